"""What attnfast.viz draws: labels, values and colours read back from the figure; and its way over the command line."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy
import pytest
import torch

matplotlib.use("Agg")
from matplotlib import pyplot

from attnfast import cli
from attnfast.viz import load_alignment, plot_alignment, save_alignment

SOURCE, TARGET = ["la", "maison", "bleue"], ["the", "blue"]
WEIGHTS = torch.tensor([[0.75, 0.25, 0.0], [0.0, 0.125, 0.875]])


@pytest.fixture(autouse=True)
def _no_figures_left() -> Iterator[None]:
    yield
    pyplot.close("all")


def texts(labels: Any) -> list[str]:
    return [label.get_text() for label in labels]


@pytest.mark.parametrize("kind", ["tensor", "graph", "bfloat16", "array", "list"])
def test_draws_weights_and_words(kind: str) -> None:
    given = {
        "tensor": WEIGHTS, "graph": WEIGHTS.clone().requires_grad_(), "bfloat16": WEIGHTS.bfloat16(),
        "array": WEIGHTS.double().numpy(), "list": WEIGHTS.tolist(),
    }[kind]  # fmt: skip
    ax = plot_alignment(given, SOURCE, TARGET, title="example")
    (image,) = ax.images
    assert image.get_array().tolist() == WEIGHTS.tolist()
    assert image.get_clim() == (0.0, 1.0)
    # row 0 is drawn at the top, column 0 at the left, each cell around its whole number
    assert tuple(image.get_extent()) == (-0.5, 2.5, 1.5, -0.5)
    assert texts(ax.get_xticklabels()) == SOURCE and list(ax.get_xticks()) == [0, 1, 2]
    assert texts(ax.get_yticklabels()) == TARGET and list(ax.get_yticks()) == [0, 1]
    assert ax.xaxis.get_ticks_position() == "top"
    assert ax.get_title() == "example"
    assert not ax.texts
    black, white = image.to_rgba(numpy.array([[0.0, 1.0]]))[0]
    assert black[:3].tolist() == [0, 0, 0] and white[:3].tolist() == [1, 1, 1]


def test_writes_values_readably() -> None:
    ax = plot_alignment(WEIGHTS, SOURCE, TARGET, values=True)
    shown = {tuple(text.get_position()): (text.get_text(), text.get_color()) for text in ax.texts}
    assert shown == {
        (0, 0): ("0.75", "black"), (1, 0): ("0.25", "white"), (2, 0): ("0.00", "white"),
        (0, 1): ("0.00", "white"), (1, 1): ("0.12", "white"), (2, 1): ("0.88", "black"),
    }  # fmt: skip


def test_weights_outside_of_0_and_1_widen_the_colours() -> None:
    assert plot_alignment([[2.0, -1.0]], ["a", "b"], ["c"]).images[0].get_clim() == (-1.0, 2.0)


def test_draws_where_it_is_told() -> None:
    figure, (left, right) = pyplot.subplots(1, 2)
    assert plot_alignment(WEIGHTS, SOURCE, TARGET, ax=right) is right
    assert not left.images and len(right.images) == 1
    assert pyplot.get_fignums() == [figure.number]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (WEIGHTS.t(), r"weights: expected \[T_q, T_k\] = \[2, 3\] .*got \[3, 2\]"),
        (WEIGHTS[None], r"weights: expected one sample and one head .*got \[1, 2, 3\]"),
        (WEIGHTS * float("nan"), "weights: expected finite numbers"),
    ],
)
def test_refuses_what_does_not_fit(weights: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        plot_alignment(weights, SOURCE, TARGET)
    with pytest.raises(ValueError, match=message):
        save_alignment(tmp_path / "x.npz", weights, SOURCE, TARGET)


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"needs matplotlib; run: pip install 'attnfast\[viz\]'"):
        plot_alignment(WEIGHTS, SOURCE, TARGET)


def test_saving_and_loading(tmp_path: Path) -> None:
    path = tmp_path / "no-suffix"
    save_alignment(path, WEIGHTS, ["grüße", "", "日本"], TARGET)
    weights, source, target = load_alignment(path)
    assert torch.equal(weights, WEIGHTS)
    assert (source, target) == (["grüße", "", "日本"], TARGET)


def test_plot_command_draws_an_alignment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_alignment(tmp_path / "a.npz", WEIGHTS, SOURCE, TARGET)
    drawn = []
    from attnfast import viz

    real = viz.plot_alignment
    monkeypatch.setattr(viz, "plot_alignment", lambda *args, **named: drawn.append(real(*args, **named)) or drawn[-1])
    assert cli.main(["plot", str(tmp_path / "a.npz"), "--title", "two words", "--values"]) == 0
    assert "a.png" in capsys.readouterr().out
    (ax,) = drawn
    assert ax.images[0].get_array().tolist() == WEIGHTS.tolist()
    assert texts(ax.get_xticklabels()) == SOURCE and texts(ax.get_yticklabels()) == TARGET
    assert ax.get_title() == "two words" and len(ax.texts) == 6
    picture = pyplot.imread(tmp_path / "a.png")
    assert picture.shape[0] > 100 and picture.shape[1] > 100
    assert picture[..., :3].min() < 0.01 and picture[..., :3].max() > 0.99
    assert not pyplot.get_fignums()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read .*No such file"),
        (b"", "a.npz is not a saved alignment: not an .npz file"),
        (b"weights", "a.npz is not a saved alignment: not an .npz file"),
        ({"weights": WEIGHTS.numpy(), "source": numpy.array([SOURCE], dtype=object), "target": TARGET}, "holds Python"),
        ({"weights": WEIGHTS.numpy()}, "has no source, target"),
        ({"weights": WEIGHTS.numpy(), "source": SOURCE, "target": SOURCE}, r"\[T_q, T_k\] = \[3, 3\]"),
    ],
)
def test_plot_command_refuses_clearly(
    content: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        numpy.savez(path, **content)
    assert cli.main(["plot", str(path)]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "a.png").exists()


def test_plot_command_keeps_alignment_options_from_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plot", str(tmp_path / "bench.csv"), "--values"]) == 2
    assert "are for alignments" in capsys.readouterr().err
