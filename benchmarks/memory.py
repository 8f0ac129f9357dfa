"""Peak extra memory of one pass, measured in a process of its own.

A fork server that has imported torch and attnfast, and has never computed anything, forks a child for each
measurement. The child makes the inputs, runs the same call at a small size (so that code is paged in and thread pools
exist), gives freed memory back to the system, resets the kernel's high-water mark of resident memory and runs the pass
once. The result is the new high-water mark less the resident memory before: everything the pass held at its worst
moment, with its output and gradients, whoever allocated it. It is good to a few hundred KiB.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from .measure import step
from .registry import Peer, Workload, find_case, find_peer

_STATUS = Path("/proc/self/status")
_MMAP_THRESHOLD = -3  # mallopt's parameter; fixed at 64 KiB, freed tensors leave the resident set at once
_THP_DISABLE = 41  # prctl's PR_SET_THP_DISABLE


def available() -> str:
    """Why memory cannot be measured here, or an empty string."""
    if not _STATUS.exists() or not os.access("/proc/self/clear_refs", os.W_OK):
        return "needs Linux's /proc/self/clear_refs"
    return ""


def _field(name: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(name + ":"):
            return 1024 * int(line.split()[1])
    raise OSError(f"{_STATUS} has no field {name}")


def measure_here(suite: str, case_name: str, peer_name: str, which: str, threads: int) -> int:
    """Bytes; to be run in a fresh process only."""
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_THRESHOLD, 65536)
    libc.prctl(_THP_DISABLE, 1, 0, 0, 0)  # huge pages would round everything up to 2 MiB
    torch.set_num_threads(threads)
    case, peer = find_case(suite, case_name), find_peer(suite, peer_name)
    warm_case = case.small()
    with peer.context():
        warm, grad = step(peer.build(warm_case, warm_case.inputs()), which)
        with torch.set_grad_enabled(grad):
            warm()
        del warm
        workload = peer.build(case, case.inputs())
        with torch.set_grad_enabled(grad):
            run, _ = step(workload, which)
            return peak_here(run)


def peak_here(run: Callable[[], Any]) -> int:
    """Bytes that one call of `run` adds, at its worst moment, to what this process holds."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = _field("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    result = run()
    del result
    return max(0, _field("VmHWM") - before)


def measure_cuda(peer: Peer, workload: Workload, which: str) -> int:
    """The same of a GPU, where torch counts what it allocates; in this process, after the pass has run once."""
    with peer.context():
        run, grad = step(workload, which)
        with torch.set_grad_enabled(grad):
            run()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            result = run()
            torch.cuda.synchronize()
        del result
    return torch.cuda.max_memory_allocated() - before


def child_main(connection: Connection, *task: Any) -> None:
    """Entry of the forked child: sends bytes, or the error's text."""
    try:
        connection.send(measure_here(*task))
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}")
    connection.close()


class MemoryMeter:
    """Owner of the fork server. Make it before anything is computed in this process."""

    def __init__(self) -> None:
        self.reason = available()
        if self.reason:
            return
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["torch", "attnfast", "attnfast.cli._benchmarks"])

    def measure(self, *task: Any, timeout: float = 120.0) -> tuple[int | None, str]:
        """(bytes, "") or (None, reason) for a task (suite, case, peer, pass, threads)."""
        if self.reason:
            return None, self.reason
        from attnfast.cli._benchmarks import run_in_child

        receiver, sender = self._context.Pipe(duplex=False)
        process = self._context.Process(target=run_in_child, args=(sender, *task), daemon=True)
        process.start()
        sender.close()
        try:
            answer = receiver.recv() if receiver.poll(timeout) else f"no answer within {timeout:.0f} s"
        except EOFError:
            answer = "the measuring process died"
        finally:
            receiver.close()
            process.join(1)
            if process.is_alive():
                process.kill()
                process.join()
        return (answer, "") if isinstance(answer, int) else (None, str(answer))
