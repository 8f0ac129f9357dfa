"""What all distributed functions ask of a process group: who is next, is everyone calling alike, is anyone gone.

A collective that ranks enter with different shapes hangs or breaks in ways that name no cause. `agree` therefore
compares a few integers first. Errors of the transport become one that says what was being done.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup


def resolve(group: Group | None) -> Group:
    """The group that is meant; the default one must exist."""
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "group: torch.distributed is not initialised; call torch.distributed.init_process_group first"
        )
    found = group if group is not None else dist.group.WORLD
    if not isinstance(found, Group):
        raise TypeError(f"group: expected a torch.distributed process group or None, got {type(group).__name__}")
    if dist.get_rank(found) < 0:
        raise ValueError("group: this process is not a member of it")
    return found


@contextlib.contextmanager
def contact(group: Group, doing: str) -> Iterator[None]:
    """Errors of the transport, with what was being done and where."""
    try:
        yield
    except (ValueError, TypeError):
        raise
    except RuntimeError as error:
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        raise RuntimeError(
            f"{doing}: rank {rank} of {ranks} lost contact with another rank, which may have died, raised an error or "
            f"not called this function: {error}"
        ) from error


def bits(x: float) -> int:
    """A float as an integer that is equal exactly if the float is."""
    return int(struct.unpack("<q", struct.pack("<d", x))[0])


Fact = int | tuple[int, ...]
_WIDTH = 9  # numbers of a fact: how many, and up to eight
FACT_BYTES = 8 * _WIDTH


def agree(
    group: Group, doing: str, names: Sequence[str], facts: Mapping[str, Fact] | Exception, device: torch.device
) -> None:
    """Raise on every rank unless all ranks have the same facts, by `names`, each a number or up to eight.

    `facts` may be the error that this rank found in its own arguments: it is raised here, after the others have been
    told, so that they do not wait for this rank.
    """
    refused = isinstance(facts, Exception)
    mine = torch.zeros(1 + len(names), _WIDTH, dtype=torch.int64)
    mine[0, 0] = refused
    if not isinstance(facts, Exception):
        for row, name in zip(mine[1:], names, strict=True):
            value = facts[name]
            numbers = (value,) if isinstance(value, int) else value
            row[: 1 + len(numbers)] = torch.tensor([len(numbers), *numbers])
    mine = mine.to(device)
    ranks = dist.get_world_size(group)
    gathered = [torch.empty_like(mine) for _ in range(ranks)]
    with contact(group, doing):
        dist.all_gather(gathered, mine, group=group)
    if isinstance(facts, Exception):
        raise facts
    tables = [table.tolist() for table in gathered]
    bad = [rank for rank in range(ranks) if tables[rank][0][0]]
    if bad:
        raise ValueError(f"{doing}: rank {bad[0]} refused its arguments; its own error says why")
    for index, name in enumerate(names, 1):
        seen = [tuple(table[index][1 : 1 + table[index][0]]) for table in tables]
        if len(set(seen)) > 1:
            first = next(rank for rank in range(ranks) if seen[rank] != seen[0])
            raise ValueError(
                f"{name}: expected the same on every rank, got {_text(name, seen[0])} on rank 0 and"
                f" {_text(name, seen[first])} on rank {first}"
            )


def _text(name: str, value: tuple[int, ...]) -> str:
    if name.endswith(" shape"):
        return str(list(value))
    if name == "dtype":
        return str(DTYPES[value[0]])
    if name in {"scale", "softcap"}:
        return str(struct.unpack("<d", struct.pack("<q", value[0]))[0])
    return str(value[0] if len(value) == 1 else list(value))


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Ring:
    """Sends a tensor to the next rank while one comes from the rank before, several times in a row."""

    def __init__(self, group: Group, doing: str) -> None:
        self.group, self.doing = group, doing
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.next = dist.get_global_rank(group, (self.rank + 1) % self.ranks)
        self.before = dist.get_global_rank(group, (self.rank - 1) % self.ranks)
        self.sent = 0  # bytes, for who measures traffic

    def start(self, outgoing: Tensor) -> Transfer:
        """Begin; `outgoing` must not change before the transfer has ended."""
        incoming = torch.empty_like(outgoing)
        with contact(self.group, self.doing):
            works = dist.batch_isend_irecv([
                dist.P2POp(dist.isend, outgoing, self.next, self.group),
                dist.P2POp(dist.irecv, incoming, self.before, self.group),
            ])  # fmt: skip
        self.sent += outgoing.numel() * outgoing.element_size()
        return Transfer(self, works, outgoing, incoming)


class Transfer:
    """One exchange under way; holds both buffers until it has ended."""

    def __init__(self, ring: Ring, works: list[dist.Work], outgoing: Tensor, incoming: Tensor) -> None:
        self.ring, self.works, self.buffers = ring, works, [outgoing, incoming]

    def wait(self, timeout: timedelta | None = None) -> Tensor:
        """What the rank before sent; to be called once."""
        with contact(self.ring.group, self.ring.doing):
            for work in self.works:
                if timeout is None:
                    work.wait()
                else:
                    work.wait(timeout)
        incoming = self.buffers.pop()
        self.works, self.buffers = [], []
        return incoming
