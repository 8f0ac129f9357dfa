"""Processes that talk over gloo, for the tests of attnfast.distributed: ``run(4, function, *args)``.

`function` lies at the top of a module and gets ``(rank, ranks, *args)`` in a process that belongs to a group of that
size. What it returns comes back, by rank; what it raises is raised here with its rank (`outcomes` returns either).

A server that has imported torch and attnfast, and has computed nothing, forks the processes: importing both anew would
cost each of them seconds.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

TIMEOUT = 120.0


def outcomes(ranks: int, function: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[tuple[str, Any]]:
    """("result", value), ("error", text) or ("died", exit status) of each rank; `timeout` is that of the group."""
    import attnfast

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "attnfast.distributed"])
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(ranks):
            receiver, sender = context.Pipe(duplex=False)
            arguments = (sender, function, rank, ranks, folder, timeout, args, sys.path, attnfast.__file__)
            process = context.Process(target=_main, args=arguments, daemon=True)
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        found: list[tuple[str, Any]] = []
        for receiver, process in zip(pipes, processes):
            try:
                found.append(receiver.recv() if receiver.poll(TIMEOUT) else ("error", "no answer: it hangs"))
            except EOFError:
                process.join(10)
                found.append(("died", process.exitcode))
        for process in processes:
            process.join(10)
            if process.is_alive():
                process.kill()
        import torch

        loaded = lambda kind, value: torch.load(io.BytesIO(value)) if kind == "result" else value  # noqa: E731
        return [(kind, loaded(kind, value)) for kind, value in found]


def run(ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What each rank returned."""
    found = outcomes(ranks, function, *args)
    bad = [f"rank {rank}: {kind}\n{value}" for rank, (kind, value) in enumerate(found) if kind != "result"]
    assert not bad, "\n".join(bad)
    return [value for _, value in found]


def whole(x: Any) -> Any:
    """A copy of a tensor, of a DTensor with all ranks' parts."""
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).detach().clone()


def _main(sender: Any, function: Callable[..., Any], rank: int, ranks: int, folder: str, timeout: float, args: Any,
          path: list[str], package: str) -> None:  # fmt: skip
    sys.path[:] = path
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torch
    import torch.distributed as dist

    import attnfast

    torch.set_num_threads(1)
    try:
        assert attnfast.__file__ == package, f"the server imported {attnfast.__file__}, the test {package}"
        store = dist.FileStore(str(Path(folder) / "store"), ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=timeout))
        # As bytes: tensors would travel as handles, which end with their process.
        buffer = io.BytesIO()
        torch.save(function(rank, ranks, *args), buffer)
        sender.send(("result", buffer.getvalue()))
        dist.destroy_process_group()
    except BaseException:
        sender.send(("error", traceback.format_exc()))
    sender.close()
