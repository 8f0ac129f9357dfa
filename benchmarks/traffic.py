"""Counts what this process sends: what is handed to torch.distributed, and what the kernel says left its sockets."""

from __future__ import annotations

import os
import socket
import struct
import sys
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

_BYTES_SENT = 200  # where struct tcp_info has tcpi_bytes_sent, since Linux 4.19


class Traffic:
    """``with Traffic() as traffic: ...``: bytes of payload that calls within sent to other ranks.

    An all_gather sends its tensor to each of the others, an exchange every part but this rank's own.
    """

    def __init__(self) -> None:
        self.sent = 0
        self.calls: list[str] = []

    def __enter__(self) -> Traffic:
        self._kept: dict[str, Callable[..., Any]] = {}
        for name in ("batch_isend_irecv", "all_gather", "all_to_all_single"):
            self._kept[name] = getattr(dist, name)
            setattr(dist, name, getattr(self, f"_{name}"))
        return self

    def __exit__(self, *error: object) -> None:
        for name, function in self._kept.items():
            setattr(dist, name, function)

    def _count(self, name: str, elements: int, tensor: Any) -> None:
        self.sent += elements * tensor.element_size()
        self.calls.append(name)

    def _batch_isend_irecv(self, operations: Any) -> Any:
        for operation in operations:
            if operation.op is dist.isend:
                self._count("isend", operation.tensor.numel(), operation.tensor)
        return self._kept["batch_isend_irecv"](operations)

    def _all_gather(self, parts: Any, x: Any, group: Any = None) -> Any:
        self._count("all_gather", (dist.get_world_size(group) - 1) * x.numel(), x)
        return self._kept["all_gather"](parts, x, group=group)

    def _all_to_all_single(self, out: Any, x: Any, received: Any = None, sent: Any = None, group: Any = None) -> Any:
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        own = x.shape[0] // ranks if sent is None else sent[rank]
        self._count("all_to_all", x.numel() - own * (x.numel() // max(x.shape[0], 1)), x)
        return self._kept["all_to_all_single"](out, x, received, sent, group=group)


def wire() -> int | None:
    """Bytes that left this process's TCP sockets since they were opened; None where the system does not say."""
    if sys.platform != "linux":
        return None
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as copy:
                found = copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except OSError:  # a descriptor that is gone by now, or a socket of another kind
            continue
        if len(found) < _BYTES_SENT + 8:
            return None
        total += struct.unpack_from("<Q", found, _BYTES_SENT)[0]
    return total
