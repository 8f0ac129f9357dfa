"""Shows how time and memory grow with the number of tokens: a table for each mechanism and pass, and a picture."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .cases_scaling import DENSE_ROWS, DENSE_SQUARE, local_pairs
from .registry import BACKWARD, BOTH, EAGER, FORWARD, OURS, SUITES, TORCH
from .results import OK, Row

SUITE = SUITES["scaling"]
_PEERS = (OURS, TORCH, EAGER, DENSE_ROWS, DENSE_SQUARE)
_LOCAL = (DENSE_ROWS, DENSE_SQUARE)
_BYTES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}
MEMORY_LIMIT_MB = 100.0  # beyond inputs and results, of additive attention over the tokens and size below
MEMORY_CASE = (4096, 256)
WINDOW_LIMIT = 2.0  # a window's time over that of as many pairs computed densely, at the most tokens


def scaling_rows(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row.suite == SUITE.name]


def measured(rows: Iterable[Row]) -> list[Row]:
    """The rows that the picture shows."""
    return [row for row in scaling_rows(rows) if row.status == OK and row.time_ms and row.peer not in _LOCAL]


def kind(row: Row) -> str:
    """The case without its sizes: "dot" or "additive", then nothing, ", window" or ", local-p"."""
    return row.case.rsplit(" T=")[0]


def result_bytes(row: Row) -> int:
    """What a pass returns: the output, or the gradients of query, key, value and the additive weight, or all of it."""
    per_head = (row.batch or 0) * (row.heads or 0)
    tokens, size, value = row.query_tokens or 0, row.head_size or 0, row.value_size or 0
    output = per_head * tokens * value
    gradients = per_head * (tokens * size + (row.key_tokens or 0) * (size + value))
    if kind(row).startswith("additive"):
        gradients += size
    if kind(row).endswith("local-p"):
        gradients += tokens  # those of the centres
    return _BYTES[row.dtype] * {FORWARD: output, BACKWARD: gradients, BOTH: output + gradients}[row.pass_]


def beyond_mb(row: Row) -> float | None:
    """Peak extra memory beyond inputs and results, in 10^6 bytes; for peers that compute the case itself."""
    if row.peak_extra_mib is None:
        return None
    return max(0.0, row.peak_extra_mib * 2**20 - result_bytes(row)) / 1e6


def _groups(rows: Iterable[Row]) -> dict[tuple[str, str, int], dict[int, dict[str, Row]]]:
    """By (kind, pass, threads), then tokens, then peer."""
    groups: dict[tuple[str, str, int], dict[int, dict[str, Row]]] = {}
    for row in rows:
        group = groups.setdefault((kind(row), row.pass_, row.threads), {})
        group.setdefault(row.query_tokens or 0, {})[row.peer] = row
    return groups


def _time(row: Row | None) -> str | Text:
    if row is None:
        return ""
    if row.status != OK or row.time_ms is None:
        return Text(row.status, style="bold red" if row.peer == OURS else "dim")
    return f"{row.time_ms:.4g}"


def _memory(row: Row | None) -> str:
    return "" if row is None or row.peak_extra_mib is None else f"{row.peak_extra_mib:.1f}"


def window_cost(row: Row) -> float | None:
    """Time of the window over that of a dense call, pair by pair; `row` is the dense peer's."""
    if row.status != OK or not row.ratio:
        return None
    tokens, reach = row.query_tokens or 0, int(row.options.split(":")[1])
    pairs = local_pairs(tokens, reach)
    side = round(pairs**0.5)
    dense = side * side if row.peer == DENSE_SQUARE else tokens * min(2 * reach + 1, tokens)
    return dense / pairs / row.ratio


def print_scaling(rows: Iterable[Row], console: Console) -> None:
    found = scaling_rows(rows)
    for (name, which, threads), group in _groups(found).items():
        local = name.endswith(("window", "local-p"))
        present = [peer for peer in _PEERS if any(peer in peers for peers in group.values())]
        remembered = [
            peer for peer in present if peer not in _LOCAL and any(_memory(peers.get(peer)) for peers in group.values())
        ]
        title = f"{name}, {which}, {threads} threads: ms, MiB"
        table = Table(title=title, title_justify="left", header_style="bold")
        table.add_column("T", justify="right")
        for peer in present:
            table.add_column(peer, justify="right", no_wrap=True)
        if local:
            table.add_column("us a token", justify="right")
            for peer in present[1:]:
                table.add_column(f"over {peer}", justify="right", no_wrap=True)
        for peer in remembered:
            table.add_column(f"MiB {peer}", justify="right", no_wrap=True)
        for tokens, peers in sorted(group.items()):
            cells = [str(tokens), *(_time(peers.get(peer)) for peer in present)]
            if local:
                ours = peers[OURS].time_ms if OURS in peers else None
                cells.append("-" if ours is None else f"{1e3 * ours / tokens:.3g}")
                costs = (window_cost(peers[peer]) if peer in peers else None for peer in present[1:])
                cells += [
                    "-" if cost is None else Text(f"{cost:.2f}", style="green" if cost <= WINDOW_LIMIT else "yellow")
                    for cost in costs
                ]
            table.add_row(*cells, *(_memory(peers.get(peer)) for peer in remembered))
        console.print(table)
    if found:
        console.print(
            "MiB: the peak beyond the inputs, results included. over dense: a pair's time under the window over "
            "that of the dense call."
        )
    _print_memory(found, console)
    if found:
        console.print()


def _print_memory(rows: list[Row], console: Console) -> None:
    """The figure that additive attention is about."""
    figures = {}
    for row in rows:
        beyond = beyond_mb(row)
        size = (row.query_tokens, row.head_size)
        if kind(row) == "additive" and row.peer == OURS and size == MEMORY_CASE and beyond is not None:
            figures[row.pass_] = beyond
    for which, beyond in figures.items():
        tokens, size = MEMORY_CASE
        triples = 4e-9 * tokens**2 * size
        console.print(
            Text(
                f"additive, T = {tokens}, D = {size}, {which}: {beyond:.1f} MB at the peak beyond inputs and results "
                f"(wanted: less than {MEMORY_LIMIT_MB:.0f}; one tensor of T x T x D has {triples:.1f} GB)",
                style="green" if beyond < MEMORY_LIMIT_MB else "bold red",
            ),
            soft_wrap=True,
        )


def write_scaling(rows: Iterable[Row], path: Path) -> None:
    """Write a PNG of two panels, time and memory against tokens, at the largest number of threads.

    Raises
    ------
    ValueError
        No row of the suite was measured.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter

    found = measured(rows)
    if not found:
        raise ValueError("there is nothing to draw: no row of the suite scaling was measured")
    threads = max(row.threads for row in found)
    figure, panels = plt.subplots(1, 2, figsize=(13, 6))
    lines = list(dict.fromkeys((kind(row), row.peer) for row in found))
    colors = {line: plt.get_cmap("tab10")(index % 10) for index, line in enumerate(lines)}
    styles = {FORWARD: "-", BOTH: "--"}
    for panel, column in zip(panels, ("time_ms", "peak_extra_mib")):
        for line in lines:
            for which, style in styles.items():
                points = sorted(
                    (row.query_tokens or 0, getattr(row, column))
                    for row in found
                    if (kind(row), row.peer, row.pass_, row.threads) == (*line, which, threads) and getattr(row, column)
                )
                if points:
                    panel.plot(*zip(*points), style, marker="o", markersize=3, color=colors[line])
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xlabel("tokens T")
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.grid(alpha=0.3, which="major")
    panels[0].set_title(f"milliseconds, {threads} threads", loc="left", fontsize=10)
    panels[1].set_title("MiB at the peak, beyond the inputs", loc="left", fontsize=10)
    panels[0].legend(
        [Line2D([], [], color=colors[line], marker="o", markersize=3) for line in lines]
        + [Line2D([], [], color="black", linestyle=style) for style in styles.values()],
        [f"{name}: {peer}" for name, peer in lines] + list(styles),
        fontsize=8,
    )
    first = found[0]
    figure.suptitle(
        f"attnfast {first.attnfast} ({first.isa}), torch {first.torch}; {first.cpu}; commit {first.commit or '?'}",
        fontsize=9,
        x=0.01,
        ha="left",
    )
    figure.tight_layout()
    figure.savefig(path, dpi=140)
    plt.close(figure)
