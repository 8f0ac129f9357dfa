"""``python -m attnfast bench``: attnfast beside PyTorch on this machine."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .._ext import has_cuda
from . import CommandError, described
from ._benchmarks import load_benchmarks

if TYPE_CHECKING:
    from rich.console import Console

_LINE_S = 30.0  # between two lines of progress where no bar can be shown
_INTERRUPTED = 130  # the shell's exit status of a command that Ctrl-C ended
_NEEDED = {"rich": "rich", "matplotlib": "matplotlib", "sklearn": "scikit-learn"}

_EXAMPLES = """\
examples:
  python -m attnfast bench --quick                                        a first look in less than two minutes
  python -m attnfast bench --suite dot --case causal --threads 1
  python -m attnfast bench --isa avx2 --no-memory                         both sides held to AVX2
  python -m attnfast bench --suite functions --quick --save-history       every public function; kept by commit
  python -m attnfast bench --suite functions --quick --compare release    what became slower since the last release
  python -m attnfast bench --compare earlier/bench.csv                    the change since an earlier result
  python -m attnfast bench --from bench-results/bench.csv --json          a result as JSON

JSON: {"rows": [{...}], "interrupted": bool}, a row having the columns of bench.csv (null: not measured); with --compare
also "comparison": {"against": {"commit", "date", "attnfast", "torch", "cpu", "isa"}, "rows": [{"suite", "case", "pass",
"threads", "peer", "old_ratio", "new_ratio", "change", "bound", "verdict"}], "slower": [names], "lost": [names]}; with
--list {"suites": {name: [{"case", "passes", "quick"}]}}.
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = described(
        commands,
        "bench",
        help="compare with PyTorch: time, memory, error",
        description="Time attnfast beside PyTorch's ways to compute the same thing, in turn inside one process, and "
        "print tables. Writes DIR/bench.csv and DIR/bench.png. A ratio above 1 means attnfast is faster.",
        examples=_EXAMPLES,
        failure="attnfast itself failed in a row, or with --compare became slower beyond the noise",
    )
    parser.add_argument(
        "--suite",
        action="append",
        metavar="NAME",
        help="dot, additive, topk, threads, masks, overhead, model, functions (each public function once), accuracy, "
        "gather, pkm, store, modules, distributed (2 and 4 processes; a minute or less each), sweep (T by D, ten "
        "minutes) or scaling (time and memory by T, minutes); repeatable (default: all but the last eight; on a GPU "
        "dot and gpu)",
    )
    parser.add_argument("--case", default="", metavar="TEXT", help="only cases whose name contains TEXT")
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds: less than two minutes")
    parser.add_argument("--threads", default="1,2", metavar="N,...", help="numbers of threads (default: 1,2)")
    parser.add_argument(
        "--isa",
        default="",
        metavar="NAME",
        help="hold both sides to an instruction set: baseline, avx2, avx512 or avx512_bf16 (sets ATTNFAST_ISA and "
        "ATEN_CPU_CAPABILITY)",
    )
    parser.add_argument(
        "--device",
        default="",
        choices=("cpu", "cuda"),
        help="where to run (default: cuda where torch sees a GPU and attnfast has CUDA kernels, else cpu)",
    )
    parser.add_argument("--out", type=Path, default=Path("bench-results"), metavar="DIR", help="default: bench-results")
    parser.add_argument(
        "--compare",
        metavar="REF",
        help="also report what changed since an earlier result: a bench.csv, or a run of the history: a commit, a "
        "version, or `release` for the last one",
    )
    parser.add_argument(
        "--save-history",
        nargs="?",
        const="",
        metavar="FOLDER",
        help="append the run to the history (default: benchmarks/history of the checkout)",
    )
    parser.add_argument("--from", type=Path, dest="source", metavar="CSV", help="show this result instead of measuring")
    parser.add_argument(
        "--readme", type=Path, metavar="FILE", help="write the table of ratios between the markers of a Markdown file"
    )
    parser.add_argument("--no-memory", action="store_true", help="do not measure memory")
    parser.add_argument("--list", action="store_true", help="name the suites and cases and stop")
    parser.add_argument("--json", action="store_true", help="print one JSON object; progress goes to stderr")
    parser.set_defaults(run=run)


def parse_threads(text: str) -> tuple[int, ...]:
    """``"1,2"`` -> ``(1, 2)``."""
    try:
        threads = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        threads = ()
    if not threads or min(threads) < 1:
        raise CommandError(f"--threads takes positive numbers separated by commas, got {text!r}")
    return threads


def choose_device(wanted: str) -> str:
    """``cpu`` or ``cuda``: as asked for, else a GPU where there are one and kernels for it."""
    if not wanted:
        return "cuda" if torch.cuda.is_available() and has_cuda() else "cpu"
    if wanted == "cuda":
        found = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is a CPU build"
        if not has_cuda():
            raise CommandError(f"this build of attnfast has no CUDA kernels, so there is nothing to measure ({found})")
        if not torch.cuda.is_available():
            raise CommandError(f"torch sees no GPU ({found})")
    return wanted


def run(arguments: argparse.Namespace) -> int:
    missing = [package for module, package in _NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise CommandError(
            f"needs {', '.join(missing)}, which this Python does not have; run: pip install 'attnfast[bench]'"
        )
    threads = parse_threads(arguments.threads)
    if arguments.isa:
        _hold_to(arguments.isa)
    arguments.device = choose_device(arguments.device)
    if arguments.device != "cpu":
        threads = threads[:1]
    registry = load_benchmarks("registry")
    suites = tuple(arguments.suite or registry.default_suites(arguments.device))
    for name in suites:
        if name not in registry.suites():
            raise CommandError(f"no suite {name!r}; there are {', '.join(registry.suites())}")
        if name == "gpu" and arguments.device == "cpu" and not (arguments.list or arguments.source):
            raise CommandError("suite 'gpu' takes hours on a CPU; it needs --device cuda")
    if arguments.list:
        _list(registry, suites, arguments.quick, arguments.json)
        return 0

    report = load_benchmarks("report")
    console = report.make_console(stderr=arguments.json)
    earlier = _earlier(arguments) if arguments.compare else None  # a wrong path should not cost the whole run
    history = None if arguments.save_history is None else _history_folder(arguments)
    if arguments.readme and not arguments.readme.is_file():
        raise CommandError(f"--readme: there is no file {arguments.readme}")
    interrupted = False
    if not arguments.source:
        _make_folder(arguments.out)
    if arguments.source:
        rows = _read(arguments.source)
    else:
        rows, interrupted = _measure(arguments, suites, threads, console)
    if not arguments.json:
        report.print_report(rows, console)
    results = load_benchmarks("results")
    shown: dict[str, Any] = {"rows": [results.plain(row) for row in rows], "interrupted": interrupted}
    regressed = False
    if earlier is not None:
        shown["comparison"], regressed = _compare(rows, earlier, None if arguments.json else console)
    if not arguments.source:
        _save(rows, arguments.out, console)
    if arguments.json:
        print(json.dumps(shown, indent=2))
    if interrupted:
        return _INTERRUPTED
    if arguments.readme:
        try:
            report.write_readme(arguments.readme, rows)
        except ValueError as error:
            raise CommandError(str(error)) from None
        console.print(f"Wrote the table of {arguments.readme}.")
    if history is not None:
        _append(rows, history, console)
    if earlier is not None and not shown["comparison"]["rows"] and not regressed:
        raise CommandError("--compare: the two results have no row with the same peer, so there was nothing to compare")
    failed = any(row.peer == registry.OURS and row.status != results.OK for row in rows)
    return int(failed or regressed)


def _hold_to(isa: str) -> None:
    """Start again in this process with both libraries held to an instruction set: torch chooses its own on import."""
    from .._ext import _C

    try:
        _C.set_isa(_C.set_isa(isa))
    except ValueError as error:
        raise CommandError(f"--isa: {error}") from None
    # torch has no name of its own for processors with AVX512_BF16.
    capability = {"baseline": "default", "avx512_bf16": "avx512"}.get(isa, isa)
    wanted = {"ATTNFAST_ISA": isa, "ATEN_CPU_CAPABILITY": capability}
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **wanted})


def _measure(
    arguments: argparse.Namespace, suites: tuple[str, ...], threads: tuple[int, ...], console: Console
) -> tuple[Any, bool]:
    """The rows, and whether Ctrl-C ended the run before the last of them."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    runner = load_benchmarks("runner")
    plan = runner.Plan(
        suites, threads, arguments.quick, arguments.case, memory=not arguments.no_memory, device=arguments.device
    )
    if not plan.total():
        raise CommandError(f"no case of {', '.join(suites)} has {arguments.case!r} in its name; see bench --list")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, refresh_per_second=2) as progress:
        task = progress.add_task("starting", total=plan.total())
        started, interrupted, last_line = False, False, time.monotonic()

        def advance(text: str) -> None:
            nonlocal started, last_line
            progress.update(task, description=text or "done", advance=1 if started else 0)
            started = True
            # A file or a pipe shows no bar: a line now and then instead.
            if not console.is_terminal and time.monotonic() - last_line > _LINE_S:
                last_line = time.monotonic()
                print(f"{progress.tasks[task].completed:.0f} of {plan.total()}: {text or 'done'}", file=sys.stderr)

        execution = runner.Run(plan, advance)
        try:
            execution.execute()
        except KeyboardInterrupt:
            if not execution.rows:
                raise
            interrupted = True
    if interrupted:
        console.print("Interrupted: these are the rows measured so far.", style="yellow")
    if execution.left_out:
        console.print(f"Left out for lack of time: {', '.join(execution.left_out)}.", style="yellow", markup=False)
    return execution.rows, interrupted


def _earlier(arguments: argparse.Namespace) -> Any:
    """The rows that --compare names: of a file, or of a run in the history."""
    path = Path(arguments.compare)
    if path.suffix == ".csv" or path.is_file():
        return _read(path)
    history = load_benchmarks("history")
    here = _read(arguments.source)[0] if arguments.source else None
    if here is None:
        found = load_benchmarks("machine").environment(arguments.device)
        here = load_benchmarks("results").Row("", "", "", 0, "", cpu=found["cpu"], isa=found["isa"])
    try:
        return history.find(arguments.compare, _history_folder(arguments), here)
    except LookupError as error:
        raise CommandError(f"--compare: {error.args[0]}") from None


def _history_folder(arguments: argparse.Namespace) -> Path:
    """The folder that --save-history names, by default the checkout's."""
    given: str = arguments.save_history or ""
    return Path(given or load_benchmarks("history").FOLDER)


def _compare(rows: Any, earlier: Any, console: Console | None) -> tuple[dict[str, Any], bool]:
    """The comparison as plain data, and whether anything became worse."""
    history, compare = load_benchmarks("history"), load_benchmarks("compare")
    judgements, lost = history.judge(rows, earlier), history.lost(rows, earlier)
    slower = [row.name for row in judgements if row.verdict == "slower"]
    if console is not None:
        console.print()
        compare.print_comparison(rows, earlier, console)
        compare.print_judgements(judgements, lost, console)
    before = earlier[0]
    found = {
        "against": {name: getattr(before, name) for name in ("commit", "date", "attnfast", "torch", "cpu", "isa")},
        "rows": [row.as_dict() for row in judgements],
        "slower": slower,
        "lost": lost,
    }
    return found, bool(slower or lost)


def _append(rows: Any, folder: Path, console: Console) -> None:
    try:
        path, count = load_benchmarks("history").append(rows, folder)
    except ValueError as error:
        raise CommandError(f"--save-history: {error}") from None
    except OSError as error:
        raise CommandError(f"--save-history: cannot write into {folder}: {error.strerror}") from None
    console.print(f"Added {count} rows to {path}.", soft_wrap=True)


def _make_folder(folder: Path) -> None:
    """Before measuring, for a wrong path should not cost the whole run."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"--out: cannot make the folder {folder}: {error.strerror}") from None


def _save(rows: Any, folder: Path, console: Console) -> None:
    load_benchmarks("results").write_csv(rows, folder / "bench.csv")
    written = [folder / "bench.csv"]
    sweep = load_benchmarks("sweep")
    if sweep.sweep_rows(rows):
        sweep.write_heat_map(rows, folder / "sweep.png")
        written.append(folder / "sweep.png")
    scaling = load_benchmarks("scaling")
    if scaling.measured(rows):
        scaling.write_scaling(rows, folder / "scaling.png")
        written.append(folder / "scaling.png")
    if any(load_benchmarks("report").is_comparison(row) for row in rows):
        load_benchmarks("chart").write_chart(rows, folder / "bench.png")
        written.append(folder / "bench.png")
    console.print(f"Wrote {' and '.join(str(path) for path in written)}.", soft_wrap=True)


def _read(path: Path) -> Any:
    try:
        rows = load_benchmarks("results").read_csv(path)
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise CommandError(str(error)) from None
    if not rows:
        raise CommandError(f"{path} has no rows")
    return rows


def _list(registry: Any, suites: tuple[str, ...], quick: bool, as_json: bool) -> None:
    if as_json:
        named = {
            suite: [{"case": c.name, "passes": list(c.passes), "quick": c.quick} for c in registry.cases(suite, quick)]
            for suite in suites
        }
        print(json.dumps({"suites": named}, indent=2))
        return
    for suite in suites:
        print(f"{suite}: {registry.SUITES[suite].title}")
        for case in registry.cases(suite, quick):
            print(f"  {case.name} ({', '.join(case.passes)}){'' if case.quick else ', full run only'}")
