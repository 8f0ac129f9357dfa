"""Shows the sweep over tokens and head sizes: a table of ratios for each pass, and a heat map."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .registry import SUITES, TORCH
from .results import OK, Row

SUITE = SUITES["sweep"].name
TOLERANCE = 0.95  # a cell below this is named


def sweep_rows(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row.suite == SUITE and row.peer == TORCH and row.status == OK and row.ratio]


def _grids(rows: list[Row]) -> dict[tuple[str, int], dict[tuple[int, int], float]]:
    """Ratios by (tokens, head size), for each pass and number of threads."""
    grids: dict[tuple[str, int], dict[tuple[int, int], float]] = {}
    for row in rows:
        grids.setdefault((row.pass_, row.threads), {})[row.query_tokens, row.head_size] = row.ratio or 0.0
    return grids


def print_sweep(rows: Iterable[Row], console: Console) -> None:
    found = sweep_rows(rows)
    for (which, threads), grid in _grids(found).items():
        sizes = sorted({size for _, size in grid})
        title = f"{which}, {threads} threads: torch's time over attnfast's, by tokens (down) and head size (across)"
        table = Table(title=title, title_justify="left", header_style="bold", padding=(0, 0), collapse_padding=True)
        table.add_column("T", justify="right")
        for size in sizes:
            table.add_column(str(size), justify="right", min_width=4, no_wrap=True)
        for tokens in sorted({tokens for tokens, _ in grid}):
            cells = []
            for size in sizes:
                ratio = grid.get((tokens, size))
                style = (
                    "" if ratio is None else "green" if ratio >= 1 else "yellow" if ratio >= TOLERANCE else "bold red"
                )
                cells.append(
                    Text("" if ratio is None else f"{ratio:.1f}" if ratio >= 10 else f"{ratio:.2f}", style=style)
                )
            table.add_row(str(tokens), *cells)
        console.print(table)
        slow = sorted((ratio, cell) for cell, ratio in grid.items() if ratio < TOLERANCE)
        named = ", ".join(f"T={t} D={d} {ratio:.2f}x" for ratio, (t, d) in slow)
        console.print(
            f"{len(slow)} of {len(grid)} cells more than 5% slower than torch{': ' + named if slow else ''}; "
            f"least {min(grid.values()):.2f}x\n",
            style="red" if slow else "green",
            markup=False,
        )


def write_heat_map(rows: Iterable[Row], path: Path) -> None:
    """Write a PNG with one map for each pass and number of threads; the rows must hold a sweep."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import TwoSlopeNorm

    grids = _grids(sweep_rows(rows))
    figure, axes = plt.subplots(len(grids), 1, figsize=(12, 1 + 3.4 * len(grids)), squeeze=False)
    for axis, ((which, threads), grid) in zip(axes[:, 0], grids.items()):
        sizes, tokens = sorted({d for _, d in grid}), sorted({t for t, _ in grid})
        values = [[min(grid.get((t, d), float("nan")), 3.0) for d in sizes] for t in tokens]
        image = axis.imshow(values, aspect="auto", cmap="RdYlGn", norm=TwoSlopeNorm(1.0, 0.5, 3.0))
        for y, t in enumerate(tokens):
            for x, d in enumerate(sizes):
                if (t, d) in grid:
                    axis.text(x, y, f"{grid[t, d]:.1f}", ha="center", va="center", fontsize=6)
        axis.set_xticks(range(len(sizes)), [str(d) for d in sizes], fontsize=7)
        axis.set_yticks(range(len(tokens)), [str(t) for t in tokens], fontsize=7)
        axis.set_xlabel("head size D", fontsize=8)
        axis.set_ylabel("tokens T", fontsize=8)
        axis.set_title(f"{which}, {threads} threads: torch's time over attnfast's", fontsize=9, loc="left")
        figure.colorbar(image, ax=axis, fraction=0.02)
    figure.tight_layout()
    figure.savefig(path, dpi=140)
    plt.close(figure)
