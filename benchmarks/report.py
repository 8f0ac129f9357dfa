"""Shows results: terminal tables with rich, and the Markdown table of the README.

A ratio is a peer's time over attnfast's: above 1 attnfast is faster (green), below 1 it is slower (red). Nothing is
left out for being unfavourable: the summary names every row in which attnfast lost.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .masks import print_masks
from .processes import print_processes
from .registry import BACKWARD, BOTH, EAGER, FORWARD, OURS, SUITES, TORCH
from .results import OK, Row
from .scaling import print_scaling
from .sweep import print_sweep

README_BEGIN = "<!-- bench:begin -->"
README_END = "<!-- bench:end -->"
_PEER_ORDER = (OURS, "attnfast._C", TORCH, "sdpa math", "sdpa loop", EAGER, "compile", "keops", "flex")


def make_console(width: int | None = None, stderr: bool = False) -> Console:
    """A console wide enough for the tables when the output is a file or a pipe."""
    console = Console(highlight=False, stderr=stderr)
    if width is None and not console.is_terminal:
        width = 170
    return Console(highlight=False, width=width, stderr=stderr) if width else console


def grouped(rows: Iterable[Row]) -> dict[tuple[str, str, str, int], dict[str, Row]]:
    """Rows by (suite, case, pass, threads), then by peer."""
    groups: dict[tuple[str, str, str, int], dict[str, Row]] = {}
    for row in rows:
        groups.setdefault(row.key[:4], {})[row.peer] = row
    return groups


def format_time(milliseconds: float) -> str:
    if milliseconds < 0.1:
        return f"{1e3 * milliseconds:.2f} us"
    return f"{milliseconds:.3g} ms" if milliseconds < 1000 else f"{milliseconds / 1000:.2f} s"


def format_ratio(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 100 else f"{ratio:.0f}x"


def ratio_text(ratio: float | None) -> Text:
    if ratio is None:
        return Text("-", style="dim")
    return Text(format_ratio(ratio), style="green" if ratio >= 1 else "bold red")


def _number(value: float | None, pattern: str) -> str:
    return "-" if value is None else pattern.format(value)


def _peers(rows: Iterable[Row]) -> list[str]:
    present = {row.peer for row in rows}
    return [name for name in _PEER_ORDER if name in present] + sorted(present - set(_PEER_ORDER))


def _suite_table(suite: str, rows: list[Row]) -> Table:
    table = Table(title=SUITES[suite].title, title_justify="left", header_style="bold")
    others = [name for name in _peers(rows) if name != OURS]
    table.add_column("case", no_wrap=True)
    table.add_column("pass", no_wrap=True)
    table.add_column("thr", justify="right")
    table.add_column("attnfast", justify="right", no_wrap=True)
    table.add_column("spread", justify="right", no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    limited = any(row.of_fma_peak for row in rows)
    scaled = any(row.over_one_thread for row in rows)
    remembered = any(row.peak_extra_mib is not None for row in rows)
    tested = any(row.error is not None for row in rows) and suite != "model"
    for wanted, name in (
        (limited, "of limit"),
        (scaled, "1 thr"),
        (remembered, "MiB ours/sdpa"),
        (tested, "error ours/sdpa"),
    ):
        if wanted:
            table.add_column(name, justify="right", no_wrap=True)
    last = ""
    for (_, case, which, threads), group in grouped(rows).items():
        if case != last and last:
            table.add_section()
        ours = group[OURS]
        cells: list[str | Text] = [case if case != last else "", which, str(threads)]
        if ours.status == OK:
            cells += [format_time(ours.time_ms or math.nan), _spread(ours)]
        else:
            cells += [Text(ours.status, style="bold red"), ""]
        for name in others:
            other = group.get(name)
            if other is None:
                cells.append("")
            elif other.status == OK and other.ratio is not None:
                cells.append(ratio_text(other.ratio))
            else:
                cells.append(Text("-" if other.status == OK else other.status, style="dim"))
        sdpa = group.get(TORCH) or group.get(EAGER)
        if limited:
            cells.append(_of_limit(ours))
        if scaled:
            cells.append(_number(ours.over_one_thread, "{:.2f}"))
        if remembered:
            cells.append(_pair(ours.peak_extra_mib, sdpa and sdpa.peak_extra_mib, "{:.1f}"))
        if tested:
            cells.append(_pair(ours.error, sdpa and sdpa.error, "{:.1e}"))
        table.add_row(*cells)
        last = case
    return table


def _pair(ours: float | None, other: float | None, pattern: str) -> str:
    if ours is None and other is None:
        return "-"
    return f"{_number(ours, pattern)} / {_number(other, pattern)}"


def _of_limit(row: Row) -> str:
    """The share of the limit that binds: memory for one query, else multiply-adds."""
    if row.of_stream is not None:
        return f"{row.of_stream:.2f} mem"
    return _number(row.of_fma_peak, "{:.2f} fma")


def _spread(row: Row) -> str:
    """Half the distance of the quartiles as a share of the median."""
    if not row.time_ms or row.time_ms_q25 is None or row.time_ms_q75 is None:
        return "-"
    return f"±{50 * (row.time_ms_q75 - row.time_ms_q25) / row.time_ms:.0f}%"


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def losses(rows: Iterable[Row]) -> list[Row]:
    """The rows of any peer that was faster than attnfast (the bare binary is attnfast itself)."""
    return [row for row in rows if is_comparison(row) and (row.ratio or 1) < 1]


def is_comparison(row: Row) -> bool:
    """Whether the row's ratio says who is faster, in a suite that asks that."""
    return (
        SUITES[row.suite].compared
        and row.status == OK
        and row.ratio is not None
        and row.peer not in (OURS, "attnfast._C")
    )


def print_report(rows: list[Row], console: Console) -> None:
    """All tables, what could not run and why, and a summary."""
    if not rows:
        console.print("No rows.")
        return
    first = rows[0]
    if first.quick:
        console.print("Quick run: few rounds, read the ratios with care.", style="yellow")
    console.print(f"attnfast {first.attnfast} ({first.isa}), torch {first.torch}, commit {first.commit or 'unknown'}")
    console.print(f"{first.cpu}; {first.machine}; {first.date}")
    console.print(
        "A peer's column is its time over attnfast's: above 1, attnfast is faster. Median of interleaved rounds; "
        'spread is half the interquartile range. "of limit": share of the peak of multiply-adds or of the rate of '
        'memory, measured in the same rounds; "1 thr": the time with one thread over this one.\n'
    )
    print_sweep(rows, console)
    print_masks(rows, console)
    print_scaling(rows, console)
    print_processes(rows, console)
    for suite in dict.fromkeys(row.suite for row in rows if SUITES[row.suite].compared):
        chosen = [row for row in rows if row.suite == suite]
        console.print(_suite_table(suite, chosen))
        if suite == "model":
            for row in chosen:
                console.print(f"{row.peer}, {row.threads} threads: {format_time(row.time_ms or 0)} a step; {row.note}")
        console.print()
    _print_notes(rows, console)
    _print_summary(rows, console)


def _print_notes(rows: list[Row], console: Console) -> None:
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row.note and row.suite != "model":
            places = reasons.setdefault((row.peer, row.status, row.note), [])
            place = f"{row.case}, {row.pass_}"
            if place not in places:
                places.append(place)
    for (peer, status, note), places in reasons.items():
        more = f" and {len(places) - 2} more" if len(places) > 2 else ""
        label = "" if status == OK else f" {status}"
        console.print(f"{peer}{label} ({'; '.join(places[:2])}{more}): {note}", style="dim", markup=False)
    if reasons:
        console.print()


def _print_summary(rows: list[Row], console: Console) -> None:
    table = Table(title="Summary: geometric mean of ratios, and rows lost", title_justify="left", header_style="bold")
    for name in ("suite", "peer", "threads", "pass"):
        table.add_column(name)
    for name in ("mean", "least", "rows", "lost"):
        table.add_column(name, justify="right")
    compared = [row for row in rows if is_comparison(row)]
    for key in dict.fromkeys((row.suite, row.peer, row.threads, row.pass_) for row in compared):
        ratios = [row.ratio or 1 for row in compared if (row.suite, row.peer, row.threads, row.pass_) == key]
        lost = sum(ratio < 1 for ratio in ratios)
        table.add_row(
            *(str(part) for part in key),
            ratio_text(geometric_mean(ratios)),
            ratio_text(min(ratios)),
            str(len(ratios)),
            Text(str(lost), style="bold red" if lost else "green"),
        )
    if compared:
        console.print(table)
    slower = losses(rows)
    for row in slower:
        console.print(
            f"slower than {row.peer}: {row.suite}, {row.case}, {row.pass_}, {row.threads} threads: "
            f"{format_ratio(row.ratio or 0)} (quartiles {row.ratio_q25 or 0:.2f} to {row.ratio_q75 or 0:.2f}"
            f"{', within the spread' if (row.ratio_q75 or 0) >= 1 else ''})",
            style="red",
            markup=False,
        )
    failed = [row for row in rows if row.peer == OURS and row.status != OK]
    for row in failed:
        where = f"{row.suite}, {row.case}, {row.pass_}, {row.threads} threads"
        console.print(f"attnfast {row.status}: {where}: {row.note}", style="bold red", markup=False)
    if compared and not slower and not failed:
        console.print("attnfast was not slower than any peer in any row.", style="green")


# ---------------------------------------------------------------------- README


def markdown_table(rows: list[Row]) -> str:
    """Ratios over torch's SDPA by case, for the README: forward, backward and both; memory; the other suites below."""
    groups = grouped(rows)
    threads = sorted({row.threads for row in rows})
    first = rows[0]
    lines = [
        f"Time of `torch.nn.functional.scaled_dot_product_attention` over attnfast's (above 1: attnfast is faster), "
        f"torch {first.torch}, {first.cpu}, {first.isa}, commit {first.commit or 'unknown'}, {first.date}."
        + (" Quick run." if first.quick else ""),
        "",
    ]
    passes = (FORWARD, BACKWARD, BOTH)
    lines.append("| case | dtype | threads | forward | backward | both | extra MiB, forward: ours / torch |")
    lines.append("|---|---|---|---|---|---|---|")
    for case in dict.fromkeys(row.case for row in rows if row.suite == "dot"):
        for count in threads:
            cells, memory, dtype = [], "", ""
            for which in passes:
                group = groups.get(("dot", case, which, count), {})
                cells.append(_markdown_ratio(group.get(TORCH)))
                if which == FORWARD and OURS in group:
                    sdpa = group.get(TORCH)
                    memory = _pair(group[OURS].peak_extra_mib, sdpa and sdpa.peak_extra_mib, "{:.1f}")
                    dtype = group[OURS].dtype
            lines.append(f"| {case} | {dtype} | {count} | {' | '.join(cells)} | {memory} |")
    lines.append("")
    lines += _eager_lines([row for row in rows if row.suite == "additive"], _ADDITIVE, "B,T_q x T_k,D")
    lines += _eager_lines([row for row in rows if row.suite == "topk"], _TOPK, "B x N,D")
    rest = [row for row in rows if row.suite != "dot" and row.peer == TORCH and is_comparison(row)]
    if rest:
        lines.append("| case | threads | attnfast | torch | ratio |")
        lines.append("|---|---|---|---|---|")
        for row in rest:
            ours = groups[row.key[:4]][OURS]
            lines.append(
                f"| {row.suite}: {row.case}, {row.pass_} | {row.threads} | {format_time(ours.time_ms or 0)} "
                f"| {format_time(row.time_ms or 0)} | {_markdown_ratio(row)} |"
            )
        lines.append("")
    for row in rows:
        if row.suite == "model" and row.peer != TORCH:
            lines.append(f"- digits model, {row.peer}, {row.threads} threads: {row.note}")
    return "\n".join(lines).rstrip()


_ADDITIVE = (
    "Additive attention: times of others over attnfast's. `eager` is the formula in torch, `compile` the same under "
    "`torch.compile`."
)
_TOPK = (
    "The k = 32 best of N slots (`topk_scores`): times of others over attnfast's. `eager` is `torch.topk` of the "
    "matrix product, `faiss` FAISS's exhaustive index at its fastest setting, `faiss-stock` as it comes."
)


def _eager_lines(rows: list[Row], heading: str, case_column: str) -> list[str]:
    """Functions that torch does not have: ratios over every peer."""
    if not rows:
        return []
    peers = [name for name in _peers(rows) if name != OURS]
    lines = [
        f"{heading} Commit {rows[0].commit or 'unknown'}, {rows[0].date}.",
        "",
        f"| {case_column} | pass | threads | attnfast | {' | '.join(peers)} | extra MiB: ours / eager |",
        f"|---|---|---|---|{'---|' * len(peers)}---|",
    ]
    for (_, case, which, threads), group in grouped(rows).items():
        eager = group.get(EAGER)
        memory = _pair(group[OURS].peak_extra_mib, eager and eager.peak_extra_mib, "{:.1f}")
        ratios = " | ".join(_markdown_ratio(group.get(name)) for name in peers)
        time = format_time(group[OURS].time_ms or math.nan)
        lines.append(f"| {case} | {which} | {threads} | {time} | {ratios} | {memory} |")
    return [*lines, ""]


def _markdown_ratio(row: Row | None) -> str:
    if row is None or row.status != OK or row.ratio is None:
        return "-"
    text = format_ratio(row.ratio)
    return text if row.ratio >= 1 else f"**{text} (slower)**"


def write_readme(path: Path, rows: list[Row]) -> None:
    """Replace what stands between the two markers of a Markdown file by `markdown_table`.

    Raises
    ------
    ValueError
        The file has not exactly one pair of markers, or there are no rows.
    """
    if not rows:
        raise ValueError("there are no rows to write")
    text = path.read_text(encoding="utf-8")
    if text.count(README_BEGIN) != 1 or text.count(README_END) != 1 or text.find(README_END) < text.find(README_BEGIN):
        raise ValueError(f"{path} needs one line {README_BEGIN} and, below it, one line {README_END}")
    head, rest = text.split(README_BEGIN)
    _, tail = rest.split(README_END)
    path.write_text(f"{head}{README_BEGIN}\n{markdown_table(rows)}\n{README_END}{tail}", encoding="utf-8")
