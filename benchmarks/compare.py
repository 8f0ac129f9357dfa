"""Sets a run beside an earlier one, row by row."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .history import Judgement, compared
from .registry import OURS
from .report import format_ratio, format_time, geometric_mean, grouped, ratio_text
from .results import Row


@dataclass(frozen=True)
class Comparison:
    """attnfast's row in both runs. `speedup` is the old time over the new one; `relative` divides out the machine."""

    new: Row
    old: Row
    new_ratio: float | None  # the time of torch, or of the formula in torch, over attnfast's in the same run
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
        peers = compared(group), compared(before)
        same = peers[0] is not None and peers[1] is not None and peers[0].peer == peers[1].peer
        ratios = [peer.ratio if peer is not None and same else None for peer in peers]
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


def print_judgements(judgements: list[Judgement], lost: list[str], console: Console) -> None:
    """The rows that changed by more than their rounds scatter, and the sum of all."""
    changed = sorted((row for row in judgements if row.verdict != "same"), key=lambda row: row.change)
    if changed:
        table = Table(title="Changed by more than the noise", title_justify="left", header_style="bold")
        table.add_column("row", no_wrap=True)
        for name in ("over", "before", "now", "change", "noise", ""):
            table.add_column(name, justify="right", no_wrap=True)
        for row in changed:
            style = "bold red" if row.verdict == "slower" else "green"
            ratios = (format_ratio(side.ratio or 0.0) for side in (row.old, row.new))
            change, noise = f"{100 * (row.change - 1):+.0f} %", f"{100 * row.bound:.0f} %"
            table.add_row(row.name, row.new.peer, *ratios, change, noise, Text(row.verdict, style=style))
        console.print(table)
    for name in lost:
        console.print(f"No longer computed: {name}", style="bold red", markup=False)
    counts = {verdict: sum(row.verdict == verdict for row in judgements) for verdict in ("slower", "same", "faster")}
    text = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    console.print(f"Against the peers of the same run, beyond the noise: {text}, {len(lost)} lost.")
