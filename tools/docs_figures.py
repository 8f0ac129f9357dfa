"""Draws the pictures of docs/numerics.md into docs/figures, each from numbers that it computes first.

    python tools/docs_figures.py            say whether the pictures are what this script draws
    python tools/docs_figures.py --write    draw them

Three pictures follow from formulas and from constants in csrc; these are compared. Two show errors of kernels, which
differ from machine to machine; tests/test_docs_figures.py holds what the page says of them.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

import attnfast

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "docs" / "figures"
TILE = 64
BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#777777"
STYLE = {
    "font.size": 9, "font.family": "sans-serif", "axes.titlesize": 9.5, "legend.frameon": False, "lines.linewidth": 1.4,
    "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none", "svg.hashsalt": "attnfast",
}  # fmt: skip


def constant(path: str, name: str) -> float:
    """A number that a source file defines, so that a picture cannot show another one."""
    match = re.search(rf"\b{name}(?:<R>)?\s*=\s*(?:R\()?([-+.\w]+?)f?\)?;", (ROOT / path).read_text(encoding="utf-8"))
    assert match is not None, f"{path} defines no {name}"
    return float.fromhex(match[1]) if "0x" in match[1] else float(match[1])


# --------------------------------------------------------------------------------------------------- the online softmax


class Online(NamedTuple):
    shift: list[float]  # after each tile, base 2
    log2_sum: list[float]  # of the row's sum, after each tile
    log2_seen: list[float]  # of the sum that a tile of the lazy way found, kept or not
    redone: list[bool]
    weights: np.ndarray


def online_softmax(scores: np.ndarray, limit: float | None) -> Online:
    """Softmax of one row of base-2 scores, tile by tile. `limit` None: the maximum follows every tile. Else the shift
    of the first tile stays until a sum passes the limit; that tile is done again with the maximum so far, as the next
    few are at once."""
    exact_tiles, exact_left = constant("csrc/cpu/dot_attention_fwd.cpp", "kExactTiles"), 0.0
    shift, total, parts = -np.inf, 0.0, np.empty(0)
    found = Online([], [], [], [], np.empty(0))
    for start in range(0, len(scores), TILE):
        tile = scores[start : start + TILE]
        lazy = limit is not None and np.isfinite(shift) and exact_left == 0
        exact_left = max(exact_left - 1, 0)
        trial = total + np.exp2(tile - shift).sum() if lazy else np.nan
        redo = bool(lazy and trial > limit)
        if redo:
            exact_left = exact_tiles
        if redo or not lazy:
            new = max(shift, tile.max())
            factor = np.exp2(shift - new) if np.isfinite(shift) else 0.0
            shift, total, parts = new, total * factor, parts * factor
        exponentials = np.exp2(tile - shift)
        total += exponentials.sum()
        parts = np.concatenate([parts, exponentials])
        found.shift.append(shift)
        found.log2_sum.append(np.log2(total))
        found.log2_seen.append(np.log2(trial))
        found.redone.append(redo)
    return found._replace(weights=parts / total)


def rows_of_scores() -> dict[str, np.ndarray]:
    """An ordinary row, and one whose scores leave the range in the fourth tile; base 2."""
    draws = np.random.default_rng(1).standard_normal(8 * TILE)
    jump = np.where(np.arange(8 * TILE) >= 3 * TILE, 50.0, 0.0)
    return {"ordinary scores": 1.5 * draws, "scores that jump by 50": 1.5 * draws + jump}


def draw_online(figure: Figure) -> None:
    limit = constant("csrc/cpu/dot_attention_fwd.cpp", "kSumLimit")
    axes = figure.subplots(2, 2, sharex=True, height_ratios=[3, 2])
    ends = np.arange(1, 9) * TILE
    for column, (title, scores) in enumerate(rows_of_scores().items()):
        every, lazy = online_softmax(scores, None), online_softmax(scores, limit)
        top, bottom = axes[:, column]
        top.plot(scores, ".", color=GREY, markersize=2, label="scores, base 2")
        edges = [*(ends - TILE), ends[-1]]
        for found, colour, label in ((every, ORANGE, "maximum so far"), (lazy, BLUE, "taken off: the lazy maximum")):
            top.step(edges, [*found.shift, found.shift[-1]], where="post", color=colour, label=label)
        top.set_title(title)
        bottom.axhline(np.log2(limit), color=GREY, linestyle=":", label="limit of a sum")
        bottom.plot(ends, lazy.log2_seen, "x", color=GREY, markersize=5, label="sum found by a lazy tile")
        bottom.plot(ends, lazy.log2_sum, "o-", color=BLUE, markersize=3, label="sum kept")
        for end, redone in zip(ends, lazy.redone):
            if redone:
                bottom.annotate(
                    "  beyond it: this tile is done again",
                    (end, lazy.log2_seen[end // TILE - 1]),
                    va="center",
                    fontsize=8,
                )
        bottom.set_xticks(np.arange(0, 9) * TILE)
        bottom.set_xlabel("key (a tick for each tile)")
    axes[0, 0].set_ylabel("score")
    axes[1, 0].set_ylabel("log2 of the row's sum")
    handles = [*axes[0, 0].get_legend_handles_labels()[0], *axes[1, 0].get_legend_handles_labels()[0]]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8)


# ---------------------------------------------------------------------------------------------------------------- tiles


def visible_pairs() -> dict[str, np.ndarray]:
    """What attnfast lets 512 queries see of 512 keys: the weights of equal scores that are not zero."""
    tokens = 512
    zeros = torch.zeros(1, 1, tokens, 8)
    document = torch.repeat_interleave(torch.arange(4), torch.tensor([200, 90, 150, 72]))
    calls: dict[str, dict[str, Any]] = {
        "causal": {"causal": "top_left"},
        "causal, window of 100": {"causal": "top_left", "window": (100, 0)},
        "key_lengths=300": {"key_lengths": torch.tensor([300])},
        "mask of four documents": {"mask": document[:, None] == document},
    }
    return {
        name: (attnfast.attention(zeros, zeros, zeros, return_weights=True, **options).weights[0, 0] > 0).numpy()
        for name, options in calls.items()
    }


def classify(visible: np.ndarray) -> np.ndarray:
    """For each tile of queries by keys: 0 hidden, 1 in part, 2 wholly visible."""
    tiles = visible.reshape(visible.shape[0] // TILE, TILE, visible.shape[1] // TILE, TILE)
    return tiles.any((1, 3)).astype(int) + tiles.all((1, 3))


def draw_tiles(figure: Figure) -> None:
    found = visible_pairs()
    axes = figure.subplots(1, len(found), sharey=True)
    colours = ListedColormap(["#ffffff", "#f0b27a", "#5d9cc9"])
    for axis, (name, visible) in zip(axes, found.items()):
        kinds = classify(visible)
        axis.imshow(kinds, cmap=colours, vmin=0, vmax=2, extent=(0, 512, 512, 0), interpolation="nearest")
        axis.contour(np.arange(512) + 0.5, np.arange(512) + 0.5, visible, levels=[0.5], colors="black", linewidths=0.7)
        axis.set_xticks(np.arange(0, 513, TILE), labels=["0", *[""] * 7, "512"])
        axis.set_yticks(np.arange(0, 513, TILE), labels=["0", *[""] * 7, "512"])
        axis.grid(color="#bbbbbb", linewidth=0.4)
        axis.set_axisbelow(False)
        axis.set_title(f"{name}\n{(kinds > 0).mean():.0%} of tiles, {visible.mean():.0%} of pairs", fontsize=8.5)
        axis.set_xlabel("key")
    axes[0].set_ylabel("query")
    for colour, label in (("#5d9cc9", "wholly visible"), ("#f0b27a", "in part"), ("#ffffff", "hidden: skipped")):
        axes[0].plot([], [], "s", color=colour, markeredgecolor="#999999", label=label)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)


# ------------------------------------------------------------------------------------------------------- additive score


def tanh_errors() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Relative error of tanh(x) in float32 over x: the kernel's, as the log-sum-exp over a single key of D = 1, and
    that of 1 - 2 / (1 + e^2x) as it stands. The portable variant, whose exponential of 0 is 1: with AVX-512 it is
    1 - 2^-24, which a log-sum-exp shows beside the tiny scores of this picture."""
    x = np.geomspace(1e-4, 12.0, 64 * 40).astype(np.float32)
    true = np.tanh(x.astype(np.float64))
    key = torch.zeros(1, 1, 1)
    query = torch.from_numpy(x).reshape(1, -1, 1)
    before = attnfast.set_isa("baseline")
    try:
        kernel = attnfast.additive_attention(query, key, key, torch.ones(1), return_lse=True).lse[0].numpy()
    finally:
        attnfast.set_isa(before)
    plain = np.float32(1) - np.float32(2) / (np.float32(1) + np.exp(np.float32(2) * x))
    assert plain.dtype == kernel.dtype == np.float32
    return {name: (x, np.abs(y - true) / true) for name, y in (("1 - 2 / (1 + e^2x)", plain), ("attnfast", kernel))}


def ways(largest_query: np.ndarray, largest_key: np.ndarray) -> np.ndarray:
    """The way of a tile whose elements reach these: 0 polynomial, 1 exponentials, 2 cut exponentials, 3 tanh itself."""
    source = "csrc/cpu/additive_tile.h"
    near, fast = constant("csrc/cpu/simd.h", "kTanhNearZero"), constant(source, "kFastSum")
    (finite,) = re.findall(r"clamped \|a\|, \|k\| <= (\d+)", (ROOT / source).read_text(encoding="utf-8"))
    total, largest = largest_query + largest_key, np.maximum(largest_query, largest_key)
    return np.where(total <= near, 0, np.where(total <= fast, 1, np.where(largest <= float(finite), 2, 3)))


def draw_tanh(figure: Figure) -> None:
    axis = figure.subplots()
    for (name, (x, error)), colour in zip(tanh_errors().items(), (ORANGE, BLUE)):
        groups = error.reshape(-1, 16).max(1)  # neighbours share a dot: the largest of 16
        axis.loglog(x.reshape(-1, 16)[:, 8], np.maximum(groups, 1e-9), ".", color=colour, markersize=3, label=name)
    axis.axhline(2.0**-24, color=GREY, linestyle=":", label="half a unit in the last place, 2^-24")
    axis.axvline(constant("csrc/cpu/simd.h", "kTanhNearZero"), color=GREY, linewidth=0.8)
    axis.text(0.6, 3e-4, "polynomial  ", ha="right", color=GREY)
    axis.text(0.66, 3e-4, "  exponentials", ha="left", color=GREY)
    axis.set_xlabel("query + key")
    axis.set_ylabel("relative error of tanh")
    axis.set_title("One term of the additive score, float32")
    axis.legend(fontsize=8)


def draw_ways(figure: Figure) -> None:
    axis = figure.subplots()
    size = np.geomspace(0.05, 100, 400)
    kinds = ways(*np.meshgrid(size, size))
    axis.pcolormesh(
        size, size, kinds, cmap=ListedColormap(["#9fd3b8", "#8fbfe0", "#f3c89a", "#dddddd"]), rasterized=True
    )
    axis.set_xscale("log")
    axis.set_yscale("log")
    for x, y, text in (
        (0.13, 0.12, "polynomial"),
        (1.0, 1.0, "exponentials"),
        (20, 0.4, "exponentials,\ncut at 2^30"),
        (65, 65, "tanh"),
    ):
        axis.text(x, y, text, ha="center", va="center", fontsize=8.5)
    axis.set_xlabel("largest |query + bias| of the tile")
    axis.set_ylabel("largest |key| of the tile")
    axis.set_title("The way that a tile of the additive score takes")


# --------------------------------------------------------------------------------------------------------------- errors


class Errors(NamedTuple):
    rounding: float  # of rounding query, key and value to the dtype, all else exact
    attnfast: float  # of the call on rounded tensors
    torch: float


def forward_errors(dtype: torch.dtype, tokens: int, spread: float = 1.0) -> Errors:
    """Errors of an output against float64, over its largest element. Scores have the standard deviation `spread`."""
    generator = torch.Generator().manual_seed(tokens)
    given = [torch.randn(1, 2, tokens, 64, generator=generator, dtype=torch.float64) for _ in range(3)]
    given[0] = given[0] * spread
    rounded = [x.to(dtype) for x in given]
    true = attnfast.reference.scaled_dot_product_attention(*given)
    of_rounded = attnfast.reference.scaled_dot_product_attention(*(x.double() for x in rounded))
    largest = of_rounded.abs().max()
    results = (
        attnfast.scaled_dot_product_attention(*rounded),
        torch.nn.functional.scaled_dot_product_attention(*rounded),
    )
    ours, theirs = (float((x.double() - of_rounded).square().mean().sqrt() / largest) for x in results)
    return Errors(float((of_rounded - true).square().mean().sqrt() / largest), ours, theirs)


LENGTHS = (64, 128, 256, 512, 1024)
SPREADS = (1, 4, 16, 64, 256, 1024)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def draw_errors(figure: Figure) -> None:
    left, right = figure.subplots(1, 2, sharey=True)
    for (name, dtype), colour in zip(DTYPES.items(), (BLUE, GREEN, ORANGE)):
        found = [forward_errors(dtype, tokens) for tokens in LENGTHS]
        left.loglog(LENGTHS, [e.rounding for e in found], ":", color=colour)
        left.loglog(LENGTHS, [e.attnfast for e in found], "o-", color=colour, markersize=3)
        left.loglog(LENGTHS, [e.torch for e in found], "x--", color=colour, markersize=4, linewidth=0.8)
        left.text(LENGTHS[-1] * 1.15, found[-1].attnfast, name, color=colour, va="center", fontsize=8)
        found = [forward_errors(dtype, 256, spread) for spread in SPREADS]
        right.loglog(SPREADS, [e.rounding for e in found], ":", color=colour)
        right.loglog(SPREADS, [e.attnfast for e in found], "o-", color=colour, markersize=3)
        right.loglog(SPREADS, [e.torch for e in found], "x--", color=colour, markersize=4, linewidth=0.8)
    for style, label in ((":", "rounding the inputs"), ("o-", "the call, attnfast"), ("x--", "the call, torch")):
        left.plot([], [], style, color="black", markersize=4, label=label)
    left.set_xlim(right=LENGTHS[-1] * 3)
    left.set_xlabel("tokens")
    left.set_ylabel("error (root mean square)")
    left.set_title("scores of standard deviation 1")
    right.set_xlabel("standard deviation of the scores")
    right.set_title("256 tokens")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)


# -------------------------------------------------------------------------------------------------------------- drawing

# Name: what draws it, its size in inches, and whether it is the same on every machine.
PICTURES: dict[str, tuple[Callable[[Figure], None], tuple[float, float], bool]] = {
    "online-softmax": (draw_online, (8.4, 5.0), True),
    "tiles": (draw_tiles, (8.4, 3.0), True),
    "additive-ways": (draw_ways, (4.6, 3.9), True),
    "additive-error": (draw_tanh, (6.2, 3.7), False),
    "errors": (draw_errors, (8.4, 3.9), False),
}


def svg(name: str) -> str:
    draw, size, _ = PICTURES[name]
    with rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return re.sub(r"[ \t]+$", "", text.getvalue(), flags=re.MULTILINE)


def is_same(one: str, other: str) -> bool:
    """Equal but for the last digits of coordinates, and of the names that are hashes of them."""
    number = re.compile(r"-?\d+\.\d+")
    texts = [re.sub(r"(?<=[#\"])[a-z]+[0-9a-f]{10}\b", "id", number.sub("0", x)) for x in (one, other)]
    values = [np.array(number.findall(x), dtype=float) for x in (one, other)]
    return texts[0] == texts[1] and bool(np.allclose(*values, rtol=0, atol=0.02))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="draw them")
    write = parser.parse_args().write
    torch.set_num_threads(1)
    FIGURES.mkdir(exist_ok=True)
    stale = []
    for name, (_, _, everywhere) in PICTURES.items():
        path = FIGURES / f"{name}.svg"
        if write:
            path.write_text(svg(name), encoding="utf-8")
        elif not path.is_file() or (everywhere and not is_same(path.read_text(encoding="utf-8"), svg(name))):
            stale.append(name)
    if stale:
        print(f"{', '.join(stale)}: not what is drawn now; python tools/docs_figures.py --write", file=sys.stderr)
    return bool(stale)


if __name__ == "__main__":
    sys.exit(main())
