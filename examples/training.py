"""What every example shares: options, a run's folder, seeds, the training loop, checkpoints, logs, tables and results.

A script describes data, models and pictures; an `Experiment` does the rest. It owns one folder: a CSV log and a
checkpoint for each model it trains, figures, and ``results.md`` with what was printed and where it came from. Batches
are drawn from ``Experiment.generator(..., step)``, never from a stream, so a run that was stopped and resumed sees what
an unbroken one sees, and so does a run on the other backend.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from attnfast.benchmarks.machine import environment
from backends import BACKENDS, backend, compare
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
Model = TypeVar("Model", bound=nn.Module)
Loss = Callable[[int], Tensor]  # the number of a step -> its loss


def parser(description: str) -> argparse.ArgumentParser:
    """The options that all scripts have; a script adds its own."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    options.add_argument("--quick", action="store_true", help="seconds instead of minutes: shows that everything runs")
    options.add_argument("--backend", choices=BACKENDS, default="attnfast", help="reference: unfused plain PyTorch")
    options.add_argument("--seed", type=int, default=1, help="of data, weights and dropout")
    options.add_argument("--steps", type=int, help="of training, for each model; default: those of the script")
    options.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="for torch")
    options.add_argument("--out", type=Path, default=Path("example-results"), help="folder for all that is written")
    options.add_argument("--resume", action="store_true", help="continue from the checkpoints in that folder")
    options.add_argument("--publish", action="store_true", help="copy results and figures to docs/results")
    return options


def one_cycle(
    optimizer: torch.optim.Optimizer, rate: float, steps: int, warmup: float
) -> torch.optim.lr_scheduler.OneCycleLR:
    """The rate rises to `rate` in the share `warmup` of all steps, then falls to next to nothing, along cosines.

    torch divides by ``warmup * steps - 1``: a training of few steps rises for two of them, or for as many as there are.
    """
    share = min(0.9, max(warmup, 2 / steps))
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=share, cycle_momentum=False)


@dataclass
class Trained:
    """What a training came to."""

    steps: int = 0
    seconds: float = 0.0
    loss: float = math.nan  # mean over the last tenth of the steps
    best: float = math.inf  # lowest of what `validate` returned
    best_step: int = 0
    losses: list[float] = field(default_factory=list)


class Experiment:
    """One run of one script."""

    def __init__(self, name: str, options: argparse.Namespace, script: str | None = None) -> None:
        self.name, self.options, self.script = name, options, script or name
        self.folder: Path = options.out / f"{name}{'-quick' if options.quick else ''}"
        if options.backend != "attnfast":
            self.folder = self.folder.with_name(f"{self.folder.name}-{options.backend}")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.console = Console()
        if not self.console.is_terminal:
            self.console = Console(width=120)  # a log or a pipe has no width of its own
        self.started = time.perf_counter()
        self.environment = environment()
        self._sections: list[str] = []
        self._figures: list[Path] = []
        torch.set_num_threads(options.threads)
        torch.manual_seed(options.seed)

    def generator(self, *key: object) -> torch.Generator:
        """A source of random numbers that depends on the seed and on `key` alone."""
        digest = hashlib.sha256(repr((self.options.seed, *key)).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))

    def build(self, label: str, make: Callable[[], Model]) -> Model:
        """A model whose first weights depend on the seed and its label, not on what was built before it."""
        torch.manual_seed(int(self.generator(label).initial_seed()))
        return make()

    def train(
        self,
        label: str,
        model: nn.Module,
        loss_of: Loss,
        steps: int,
        optimizer: torch.optim.Optimizer,
        *,
        schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
        clip: float | None = None,
        validate: Callable[[], float] | None = None,
        validate_every: int = 0,
        save_every: int = 0,
    ) -> Trained:
        """Train on the backend of the options, and leave the model with the weights of its best validation.

        Every step is logged to ``<label>.csv``. With ``save_every`` steps between them, and at the end, checkpoints go
        to ``<label>.safetensors``; with ``--resume`` training goes on from there, and ends at once if it had ended. A
        loss that is not finite ends the run with an error that names the step; the checkpoint stays.
        """
        state = _State(self.folder / label, model, optimizer, schedule)
        torch.manual_seed(int(self.generator(label, "dropout").initial_seed()))
        if self.options.resume:
            state.load()
        done = state.done
        columns = (TextColumn(label.ljust(28)), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                   TimeRemainingColumn(), TextColumn("loss {task.fields[loss]:.4f}"))  # fmt: skip
        with (
            backend(self.options.backend),
            _Log(state.path.with_suffix(".csv"), done.steps) as log,
            Progress(*columns, console=self.console, disable=not self.console.is_terminal) as progress,
        ):
            task = progress.add_task(label, total=steps, completed=done.steps, loss=math.nan)
            model.train()
            while done.steps < steps:
                start = time.perf_counter()
                optimizer.zero_grad(set_to_none=True)
                loss = loss_of(done.steps)
                value = loss.item()
                if not math.isfinite(value):
                    raise FloatingPointError(f"{label}: the loss of step {done.steps} is {value}")
                loss.backward()
                norm = _clip(model, clip)
                optimizer.step()
                rate = optimizer.param_groups[0]["lr"]
                if schedule is not None:
                    schedule.step()
                done.losses.append(value)
                done.seconds += time.perf_counter() - start
                done.steps += 1
                measured = None
                if validate is not None and (
                    done.steps == steps or (validate_every and done.steps % validate_every == 0)
                ):
                    model.eval()
                    with torch.no_grad():
                        measured = validate()
                    model.train()
                    if measured < done.best:
                        done.best, done.best_step = measured, done.steps
                        state.keep()
                log.write(done.steps, value, norm, rate, done.seconds, measured)
                if done.steps == steps or (save_every and done.steps % save_every == 0):
                    state.save()
                progress.update(task, completed=done.steps, loss=value)
        state.restore_best()
        model.eval()
        last = done.losses[-max(1, len(done.losses) // 10) :]
        done.loss = sum(last) / len(last) if last else math.nan
        return done

    def text(self, text: str) -> None:
        """A paragraph, printed and kept."""
        self.console.print(text, markup=False, highlight=False)
        self._sections.append(text)

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """A table, printed and kept; floats are written as they stand in a table, to four digits."""
        cells = [[_cell(value) for value in row] for row in rows]
        shown = Table(title=title, title_justify="left")
        for index, column in enumerate(columns):
            shown.add_column(column, justify="left" if index == 0 else "right")
        for row in cells:
            shown.add_row(*row)
        self.console.print(shown)
        lines = [f"**{title}**", "", "| " + " | ".join(columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
        self._sections.append("\n".join(lines + ["| " + " | ".join(row) + " |" for row in cells]))

    def figure(self, name: str, figure: Any, caption: str) -> None:
        """Save a matplotlib figure as ``<name>.png`` and close it."""
        from matplotlib import pyplot

        path = self.folder / f"{name}.png"
        figure.savefig(path, dpi=90)
        pyplot.close(figure)
        self._figures.append(path)
        self._sections.append(f"![{caption}]({self.name}-{name}.png)\n\n*{caption}*")

    def speed(self, label: str, model: nn.Module, loss_of: Loss) -> None:
        """Time and memory of one training step on both backends, interleaved in this process; nothing is learnt."""

        def step() -> None:
            model.zero_grad(set_to_none=True)
            loss_of(0).backward()

        model.train()
        self.compare(f"One training step of {label}", step)
        model.zero_grad(set_to_none=True)
        model.eval()

    def compare(self, title: str, step: Callable[[], object]) -> None:
        """Time and memory of `step` on both backends, interleaved in this process."""
        measured = compare(step, budget_s=0.5 if self.options.quick else 10.0)
        ratio = measured.ratio
        rows = [(name, 1e3 * measured.seconds[name].median, _mebibytes(measured.peak[name])) for name in BACKENDS]
        self.table(f"{title}, {self.options.threads} thread(s)", ("backend", "ms", "peak memory, MiB"), rows)
        self.text(f"attnfast is {ratio.median:.2f} times as fast (quartiles {ratio.low:.2f} to {ratio.high:.2f}).")

    def finish(self) -> Path:
        """Write ``results.md`` and say where it is; with ``--publish`` also to docs/results."""
        options = {key: value for key, value in vars(self.options).items() if key not in {"out", "publish"}}
        flags = " ".join(_flag(key, value) for key, value in options.items() if value not in (None, False))
        where = self.environment
        head = [
            f"# {self.name}",
            "",
            f"`python examples/{self.script}.py {flags}`, {(time.perf_counter() - self.started) / 60:.1f} minutes on"
            f" {where['machine']}, {where['cpu']}, ISA {where['isa']}, {self.options.threads} thread(s);"
            f" torch {where['torch']}, attnfast {where['attnfast']}, commit {where['commit'] or 'unknown'},"
            f" {where['date']}, seed {self.options.seed}.",
        ]
        page = "\n".join(head) + "\n\n" + "\n\n".join(self._sections) + "\n"
        path = self.folder / "results.md"
        path.write_text(page, encoding="utf-8")
        for figure in self._figures:  # under the names that the page links to
            shutil.copyfile(figure, self.folder / f"{self.name}-{figure.name}")
        if self.options.publish:
            RESULTS.mkdir(parents=True, exist_ok=True)
            (RESULTS / f"{self.name}.md").write_text(page, encoding="utf-8")
            for figure in self._figures:
                shutil.copyfile(figure, RESULTS / f"{self.name}-{figure.name}")
        self.console.print(f"written: {path}", markup=False)
        return path


class _State:
    """A training's model, optimiser and progress, and the file they are kept in."""

    def __init__(self, stem: Path, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any) -> None:
        self.path = stem.with_name(stem.name + ".safetensors")
        self.model, self.optimizer, self.schedule = model, optimizer, schedule
        self.done = Trained()
        self.best: dict[str, Tensor] = {}

    def keep(self) -> None:
        self.best = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}

    def restore_best(self) -> None:
        if self.best:
            self.model.load_state_dict(self.best)

    def save(self) -> None:
        """Written beside the old file and then put in its place: what is there is always whole."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        kept = self.optimizer.state_dict()
        scalars: dict[str, Any] = {}
        for index, values in kept["state"].items():
            for name, value in values.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{index}.{name}"] = value
                else:
                    scalars[f"{index}.{name}"] = value
        tensors["random"] = torch.get_rng_state()
        tensors["losses"] = torch.tensor(self.done.losses, dtype=torch.float64)
        done = {name: value for name, value in vars(self.done).items() if name != "losses"}
        state = {"done": done, "scalars": scalars, "groups": kept["param_groups"],
                 "schedule": None if self.schedule is None else self.schedule.state_dict()}  # fmt: skip
        beside = self.path.with_suffix(".new")
        # Tied parameters share their memory, which the format does not have: each name gets its own copy.
        save_file(
            {name: t.detach().clone().contiguous() for name, t in tensors.items()}, beside, {"state": json.dumps(state)}
        )
        os.replace(beside, self.path)

    def load(self) -> None:
        if not self.path.exists():
            return
        with safe_open(self.path, "pt") as file:
            state = json.loads(file.metadata()["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

        self.model.load_state_dict(part("model."))
        self.best = part("best.")
        moments: dict[int, dict[str, Any]] = {}
        for key, value in (part("optimizer.") | state["scalars"]).items():
            index, _, name = key.partition(".")
            moments.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict({"state": moments, "param_groups": state["groups"]})
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(tensors["random"])
        self.done = Trained(**state["done"], losses=tensors["losses"].tolist())


class _Log:
    """A CSV file with a row for each step; what lies behind the checkpoint one resumes from is dropped."""

    COLUMNS = ("step", "loss", "gradient_norm", "learning_rate", "seconds", "validation")

    def __init__(self, path: Path, steps: int) -> None:
        kept: list[list[str]] = []
        if steps and path.exists():
            with path.open(newline="") as file:
                kept = [row for row in list(csv.reader(file))[1:] if int(row[0]) <= steps]
        self.file = path.open("w", newline="", buffering=1)  # whoever watches a run sees each step
        self.writer = csv.writer(self.file)
        self.writer.writerow(self.COLUMNS)
        self.writer.writerows(kept)

    def write(self, step: int, loss: float, norm: float, rate: float, seconds: float, measured: float | None) -> None:
        numbers = (loss, norm, rate, seconds, *(() if measured is None else (measured,)))
        self.writer.writerow([step, *(f"{number:.6g}" for number in numbers)] + [""] * (measured is None))

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def _clip(model: nn.Module, clip: float | None) -> float:
    return nn.utils.clip_grad_norm_(model.parameters(), math.inf if clip is None else clip).item()


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.4g}"
    return str(value)


def _flag(key: str, value: Any) -> str:
    name = "--" + key.replace("_", "-")
    if isinstance(value, (list, tuple)):
        return " ".join([name, *map(str, value)])
    return name if value is True else f"{name} {value}"


def _mebibytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:.1f}"
