"""Shows what masks cost: the time with a mask over the time without, beside the share of tiles that it leaves."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .registry import OURS, SUITES
from .results import OK, Row

SUITE = SUITES["masks"]
# What a computed tile may cost over an unmasked one before it is shown in yellow.
_TOLERANCE = {"dropout": 1.6}
_USUAL_TOLERANCE = 1.15


def mask_rows(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row.suite == SUITE.name and row.peer != OURS and row.status == OK and row.ratio]


def cost(row: Row) -> float:
    """Time of a computed tile over that of a tile without a mask."""
    return (row.ratio or 0.0) / (row.tiles or 1.0)


def print_masks(rows: Iterable[Row], console: Console) -> None:
    found = mask_rows(rows)
    if not found:
        return
    table = Table(title=SUITE.title, title_justify="left", header_style="bold")
    for name in ("case", "pass", "mask"):
        table.add_column(name, no_wrap=True)
    for name in ("thr", "tiles left", "time over unmasked", "quartiles", "of a tile"):
        table.add_column(name, justify="right", no_wrap=True)
    last = None
    for row in found:
        group = (row.case, row.pass_, row.threads)
        if last not in (None, group):
            table.add_section()
        last = group
        style = "green" if cost(row) <= _TOLERANCE.get(row.peer, _USUAL_TOLERANCE) else "yellow"
        table.add_row(
            row.case,
            row.pass_,
            row.peer,
            str(row.threads),
            f"{row.tiles or 1.0:.2f}",
            f"{row.ratio or 0.0:.2f}",
            f"{row.ratio_q25 or 0.0:.2f} to {row.ratio_q75 or 0.0:.2f}",
            Text(f"{cost(row):.2f}", style=style),
        )
    console.print(table)
    console.print("of a tile: the time of a tile that the mask leaves over that of a tile without a mask.\n")
