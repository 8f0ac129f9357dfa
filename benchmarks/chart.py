"""The picture of a result: a bar for each pass of each case, its length the ratio to torch's SDPA."""

from __future__ import annotations

from pathlib import Path

from .registry import TORCH
from .report import grouped, is_comparison
from .results import Row

_FASTER, _SLOWER, _INK = "#2a7f62", "#c8413b", "#333333"
_MARKS = {
    "sdpa math": ("o", "#4c72b0"),
    "sdpa loop": ("D", "#dd8452"),
    "compile": ("s", "#8172b3"),
    "keops": ("P", "#64b5cd"),
    "flex": ("^", "#937860"),
}


def write_chart(rows: list[Row], path: Path) -> None:
    """Write a PNG with one panel for each number of threads.

    Raises
    ------
    ValueError
        No row holds a ratio to a peer.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter

    measured = [row for row in rows if is_comparison(row)]
    if not measured:
        raise ValueError("there is nothing to draw: no row holds a ratio to a peer")
    labels = list(dict.fromkeys((row.suite, row.case, row.pass_) for row in measured))
    threads = sorted({row.threads for row in measured})
    figure, axes = plt.subplots(
        1, len(threads), figsize=(5.2 + 4.4 * len(threads), 1.6 + 0.23 * len(labels)), sharey=True, squeeze=False
    )
    groups = grouped(measured)
    limit = max(2.0, *(row.ratio or 1 for row in measured))
    least = min(0.5, *(row.ratio or 1 for row in measured))
    for axis, count in zip(axes[0], threads):
        for y, label in enumerate(labels):
            group = groups.get((*label, count), {})
            for name, row in group.items():
                ratio = row.ratio or 1.0
                if name == TORCH:
                    color = _FASTER if ratio >= 1 else _SLOWER
                    axis.barh(y, ratio - 1, left=1, height=0.7, color=color)
                    axis.text(
                        ratio * (1.05 if ratio >= 1 else 0.95),
                        y,
                        f"{ratio:.2f}",
                        va="center",
                        ha="left" if ratio >= 1 else "right",
                        fontsize=7,
                        color=_INK,
                        zorder=3,
                        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5},
                    )
                else:
                    mark, color = _MARKS.get(name, ("x", _INK))
                    axis.plot(ratio, y, mark, color=color, markersize=4, label=name)
        axis.set_xscale("log")
        axis.set_xlim(least * 0.8, limit * 1.6)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
        axis.axvline(1, color=_INK, linewidth=1)
        axis.set_title(f"{count} thread{'s' if count > 1 else ''}", fontsize=10, loc="left")
        axis.set_xlabel("time of the peer / time of attnfast (right of 1: attnfast is faster)", fontsize=8)
        axis.tick_params(axis="x", labelsize=8)
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
    axes[0][0].set_yticks(range(len(labels)), [_label(*label) for label in labels], fontsize=7)
    axes[0][0].set_ylim(len(labels) - 0.4, -0.6)
    handles: dict[str, object] = {}
    for axis in axes[0]:
        for handle, name in zip(*axis.get_legend_handles_labels()):
            handles.setdefault(name, handle)
    if handles:
        axes[0][-1].legend(handles.values(), handles.keys(), fontsize=7, loc="lower right", title="other peers",
                           title_fontsize=7)  # fmt: skip
    first = rows[0]
    figure.suptitle(
        f"attnfast {first.attnfast} ({first.isa}) against torch {first.torch}; bars: scaled_dot_product_attention\n"
        f"{first.cpu}; commit {first.commit or 'unknown'}; {first.date}",
        fontsize=9,
        x=0.01,
        ha="left",
    )
    figure.tight_layout()
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _label(suite: str, case: str, which: str) -> str:
    return f"{case}, {which}" if suite == "dot" else f"{suite}: {case}, {which}"
