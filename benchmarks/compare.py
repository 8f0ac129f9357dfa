"""Sets a run beside an earlier one, row by row."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from .registry import OURS, TORCH
from .report import format_ratio, format_time, geometric_mean, grouped, ratio_text
from .results import OK, Row


@dataclass(frozen=True)
class Comparison:
    """attnfast's row in both runs. `speedup` is the old time over the new one; `relative` divides out the machine."""

    new: Row
    old: Row
    new_ratio: float | None  # torch's time over attnfast's in the same run
    old_ratio: float | None

    @property
    def speedup(self) -> float:
        return (self.old.time_ms or 0.0) / (self.new.time_ms or 1.0)

    @property
    def relative(self) -> float | None:
        """Change of the ratio to torch: does not see a machine that is faster or busier as a whole."""
        if not self.new_ratio or not self.old_ratio:
            return None
        return self.new_ratio / self.old_ratio


def compare(new: list[Row], old: list[Row]) -> list[Comparison]:
    """The rows that both runs have."""
    old_groups = grouped(old)
    found = []
    for key, group in grouped(new).items():
        before = old_groups.get(key, {})
        if OURS not in group or OURS not in before or group[OURS].time_ms is None or before[OURS].time_ms is None:
            continue
        ratios = [side[TORCH].ratio if TORCH in side and side[TORCH].status == OK else None for side in (group, before)]
        found.append(Comparison(group[OURS], before[OURS], ratios[0], ratios[1]))
    return found


def print_comparison(new: list[Row], old: list[Row], console: Console) -> None:
    pairs = compare(new, old)
    if not pairs:
        console.print("The two results have no row in common.", style="red")
        return
    a, b = pairs[0].old, pairs[0].new
    for name in ("cpu", "isa", "torch", "quick"):
        if getattr(a, name) != getattr(b, name):
            console.print(f"Note: {name} differs: {getattr(a, name)} before, {getattr(b, name)} now.", style="yellow")
    table = Table(
        title=f"attnfast before ({a.commit or '?'}, {a.date}) and now ({b.commit or '?'}, {b.date})",
        title_justify="left",
        header_style="bold",
    )
    for name in ("case", "pass"):
        table.add_column(name, no_wrap=True)
    for name in ("thr", "before", "now", "faster by", "x torch before", "x torch now", "change against torch"):
        table.add_column(name, justify="right", no_wrap=True)
    for pair in pairs:
        row = pair.new
        table.add_row(
            f"{row.suite}: {row.case}",
            row.pass_,
            str(row.threads),
            format_time(pair.old.time_ms or 0),
            format_time(row.time_ms or 0),
            ratio_text(pair.speedup),
            "-" if pair.old_ratio is None else format_ratio(pair.old_ratio),
            "-" if pair.new_ratio is None else format_ratio(pair.new_ratio),
            ratio_text(pair.relative),
        )
    console.print(table)
    mean = geometric_mean(pair.speedup for pair in pairs)
    relative = [pair.relative for pair in pairs if pair.relative is not None]
    console.print(
        f"{len(pairs)} rows; geometric mean: {format_ratio(mean)} faster than before, "
        f"{format_ratio(geometric_mean(relative)) if relative else '-'} against torch."
    )
