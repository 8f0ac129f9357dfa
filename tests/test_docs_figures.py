"""The pictures of docs/numerics.md show what the page says, and are what tools/docs_figures.py draws."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from helpers import load_tool

import attnfast

ROOT = Path(attnfast.__file__).resolve().parents[1]
FIGURES = ROOT / "docs" / "figures"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_tool("docs_figures")


def test_every_picture_is_shown_and_drawn(tool: ModuleType) -> None:
    text = (ROOT / "docs" / "numerics.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"\(figures/([\w-]+)\.svg\)", text))
    assert shown == set(tool.PICTURES) == {path.stem for path in FIGURES.iterdir()}
    for name in shown:
        root = ElementTree.parse(FIGURES / f"{name}.svg").getroot()
        assert root.tag.endswith("svg")
        assert len(list(root.iter())) > 100


@pytest.mark.parametrize("name", ["online-softmax", "tiles", "additive-ways"])
def test_pictures_are_up_to_date(tool: ModuleType, name: str) -> None:
    drawn = (FIGURES / f"{name}.svg").read_text(encoding="utf-8")
    assert tool.is_same(drawn, tool.svg(name)), "python tools/docs_figures.py --write"


def test_another_picture_is_not_the_same(tool: ModuleType) -> None:
    text = (FIGURES / "tiles.svg").read_text(encoding="utf-8")
    number = re.search(r"\d+\.\d+", text[5000:])
    assert number is not None
    assert tool.is_same(text, text)
    assert not tool.is_same(text, text.replace(number[0], f"{float(number[0]) + 1:.6f}"))
    assert not tool.is_same(text, text.replace("causal", "casual"))


def test_both_ways_of_the_online_softmax_are_softmax(tool: ModuleType) -> None:
    limit = tool.constant("csrc/cpu/dot_attention_fwd.cpp", "kSumLimit")
    assert limit == 2.0**40
    redone = {}
    for name, scores in tool.rows_of_scores().items():
        true = np.exp2(scores - scores.max())
        for way in (None, limit):
            found = tool.online_softmax(scores, way)
            np.testing.assert_allclose(found.weights, true / true.sum(), rtol=1e-12)
        redone[name] = sum(found.redone)
        assert len(set(tool.online_softmax(scores, None).shift)) > 1, "the maximum never moves: nothing to see"
    assert list(redone.values()) == [0, 1]


def test_tiles(tool: ModuleType) -> None:
    visible = tool.visible_pairs()
    assert np.array_equal(visible["causal"], np.tri(512, dtype=bool))
    kinds = {name: tool.classify(pairs) for name, pairs in visible.items()}
    assert np.array_equal(kinds["causal"], np.tri(8, k=-1) + np.tri(8))
    assert (kinds["key_lengths=300"] == [2, 2, 2, 2, 1, 0, 0, 0]).all()
    assert (kinds["causal, window of 100"] < 2).all()


def test_ways(tool: ModuleType) -> None:
    points = [(0.3, 0.3), (0.3, 0.4), (5.0, 5.0), (10.0, 1.0), (43.0, 1.0), (44.0, 0.0)]
    assert [int(tool.ways(*map(np.array, point))) for point in points] == [0, 1, 1, 2, 2, 3]


def test_near_zero_the_kernel_keeps_relative_precision(tool: ModuleType) -> None:
    found = tool.tanh_errors()
    (_, plain), (_, kernel) = found.values()
    assert kernel.max() < 2e-6
    assert plain[:64].max() > 1e-4


def test_errors_are_those_of_the_page(tool: ModuleType) -> None:
    for name, bound in (("float32", 3e-7), ("float16", 2e-4), ("bfloat16", 2e-3)):
        found = tool.forward_errors(tool.DTYPES[name], 256)
        assert 0 < found.attnfast < bound
        assert found.attnfast < 2 * found.torch
        assert (found.rounding > found.attnfast) == (name != "float32"), "rounding the inputs costs more than the call"
    near, far = (tool.forward_errors(torch.float32, 256, spread).attnfast for spread in (1, 256))
    assert far > 5 * near
    short, long = (tool.forward_errors(torch.float32, tokens).attnfast for tokens in (64, 1024))
    assert long < 2 * short
