"""Runs one program in several processes that belong to a gloo group, and shows what each suite of them found.

The processes are forked from a server that has imported torch and attnfast and has computed nothing, as in memory.py,
so that their peak memory can be measured. Each has one thread.
"""

from __future__ import annotations

import ctypes
import importlib
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .memory import _MMAP_THRESHOLD, _THP_DISABLE
from .results import OK, Row

SUITE = "distributed"
TIMEOUT_S = 300.0


def run_ranks(ranks: int, module: str, function: str, *args: Any) -> list[Any]:
    """What ``function(rank, ranks, *args)`` of a module of this package returns on each rank (plain Python data).

    Raises
    ------
    RuntimeError
        A rank failed; with its traceback.
    """
    from attnfast.cli._benchmarks import run_in_rank

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "attnfast.distributed", "attnfast.cli._benchmarks"])
    started = []
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(ranks):
            receiver, sender = context.Pipe(duplex=False)
            task = (sender, rank, ranks, folder, sys.path, module, function, args)
            process = context.Process(target=run_in_rank, args=task, daemon=True)
            process.start()
            sender.close()
            started.append((receiver, process))
        answers = []
        for receiver, _ in started:
            try:
                found = receiver.recv() if receiver.poll(TIMEOUT_S) else f"no answer within {TIMEOUT_S:.0f} s"
            except EOFError:
                found = "the process died"
            answers.append(found)
        for _, process in started:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
    bad = [f"rank {rank}: {found}" for rank, found in enumerate(answers) if not isinstance(found, tuple)]
    if bad:
        raise RuntimeError("\n".join(bad))
    return [found[0] for found in answers]


def child_main(
    sender: Any, rank: int, ranks: int, folder: str, path: list[str], module: str, function: str, args: Any
) -> None:
    """Entry of a forked process: sends a tuple of the result, or the error's text."""
    import torch.distributed as dist

    sys.path[:] = path
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_THRESHOLD, 65536)  # as in memory.py
    libc.prctl(_THP_DISABLE, 1, 0, 0, 0)
    torch.set_num_threads(1)
    try:
        store = dist.FileStore(str(Path(folder) / "store"), ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=120))
        found = getattr(importlib.import_module(f".{module}", __package__), function)(rank, ranks, *args)
        dist.barrier()
        sender.send((found,))
        dist.destroy_process_group()
    except Exception:
        sender.send(traceback.format_exc())
    sender.close()


def call(rank: int, ranks: int, module: str, function: str, *args: Any) -> Any:
    """A function of a module that lies elsewhere, for `run_ranks`."""
    return getattr(importlib.import_module(module), function)(rank, ranks, *args)


def _bytes(value: int | None) -> str:
    return "-" if value is None else f"{value:,}".replace(",", " ")


def _hidden(row: Row) -> str:
    """Which share of the exchange costs no time of its own."""
    if not row.alone_ms or row.waited_ms is None:
        return "-"
    return f"{100 * max(0.0, 1 - row.waited_ms / row.alone_ms):.0f} %"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def print_processes(rows: Iterable[Row], console: Console) -> None:
    found = [row for row in rows if row.suite == SUITE]
    if not found:
        return
    table = Table(
        title="Several processes (gloo, one thread each): the rank that has most",
        title_justify="left",
        header_style="bold",
    )
    table.add_column("case", no_wrap=True)
    table.add_column("pass", no_wrap=True)
    names = ("ms", "waited", "alone", "hidden", "bytes sent", "formula", "on the wire", "peak MiB", "formula")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for row in found:
        if row.status != OK:
            table.add_row(row.case, row.pass_, Text(row.status, style="bold red"))
            continue
        same = row.sent_bytes == row.sent_formula
        table.add_row(
            row.case,
            row.pass_,
            _figure(row.time_ms),
            _figure(row.waited_ms),
            _figure(row.alone_ms),
            _hidden(row),
            _bytes(row.sent_bytes),
            Text(_bytes(row.sent_formula), style="green" if same else "bold red"),
            _bytes(row.wire_bytes),
            _figure(row.peak_extra_mib),
            _figure(row.peak_formula_mib),
        )
    console.print(table)
    console.print(
        "waited: for what others send; alone: the same exchanges with nothing to compute; hidden: the rest of that. "
        "Processes that share cores wait for one another's computations too. Peak: beyond what is there before the "
        "call.\n"
    )
