"""How tokens are dealt out to ranks, and which parts of two shards see one another.

Contiguous: rank r of P has the r-th of P parts. Zig-zag: a sequence is cut into 2 P chunks and rank r has chunks r and
2 P - 1 - r, so that under a causal mask all ranks have the same work: of another rank's keys, every rank needs half.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from attnfast.distributed._group import Group, contact, resolve

LAYOUTS = ("zigzag", "contiguous")


def check_layout(layout: str) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {', '.join(map(repr, LAYOUTS))}, got {layout!r}")


def chunks_of(rank: int, ranks: int, layout: str) -> tuple[int, ...]:
    """Numbers of the chunks that a rank has; there are ``ranks * len(...)`` of them in a sequence."""
    return (rank,) if layout == "contiguous" else (rank, 2 * ranks - 1 - rank)


def shard_sequence(x: Tensor, group: Group | None = None, *, dim: int = -2, layout: str = "zigzag") -> Tensor:
    """Take this rank's tokens out of a whole tensor that every rank has.

    Parameters
    ----------
    x : Tensor
        Any tensor with a token axis.
    group : ProcessGroup, optional
        Default: all processes.
    dim : int
        The token axis; the default is that of ``[B, H, T, D]``.
    layout : {"zigzag", "contiguous"}
        As in :func:`context_parallel_attention`.

    Returns
    -------
    Tensor
        A copy with T / P tokens, differentiable.

    Raises
    ------
    ValueError
        T is no multiple of P (contiguous) or 2 P (zig-zag).

    Examples
    --------
    >>> import os, torch, torch.distributed as dist
    >>> from attnfast.distributed import shard_sequence
    >>> store = dist.HashStore()
    >>> dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    >>> shard_sequence(torch.arange(4.0).view(1, 4, 1)).flatten()
    tensor([0., 1., 2., 3.])
    >>> dist.destroy_process_group()
    """
    group = resolve(group)
    check_layout(layout)
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    mine = chunks_of(rank, ranks, layout)
    tokens, parts = x.shape[dim], ranks * len(mine)
    if tokens % parts:
        raise ValueError(f"x: expected a multiple of {parts} tokens ({layout}, {ranks} ranks), got {tokens}")
    pieces = x.chunk(parts, dim) if tokens else [x] * parts
    return torch.cat([pieces[chunk] for chunk in mine], dim)


def gather_sequence(x: Tensor, group: Group | None = None, *, dim: int = -2, layout: str = "zigzag") -> Tensor:
    """Put the shards of all ranks together on every rank; without a gradient.

    The inverse of :func:`shard_sequence`, with the same arguments; `x` must have the same shape on every rank.
    """
    group = resolve(group)
    check_layout(layout)
    ranks = dist.get_world_size(group)
    mine = x.detach().contiguous()
    shards = [torch.empty_like(mine) for _ in range(ranks)]
    with contact(group, "gather_sequence"):
        dist.all_gather(shards, mine, group=group)
    pieces: dict[int, Tensor] = {}
    for rank, shard in enumerate(shards):
        numbers = chunks_of(rank, ranks, layout)
        pieces.update(zip(numbers, shard.chunk(len(numbers), dim) if shard.shape[dim] else [shard] * len(numbers)))
    return torch.cat([pieces[number] for number in sorted(pieces)], dim)


class Block(NamedTuple):
    """What of this rank's queries sees what of another rank's keys: 0 the first half, 1 the second, None all of them;
    and whether the causal mask runs through the block."""

    queries: int | None
    keys: int | None
    causal: bool


def block(rank: int, source: int, layout: str, causal: bool) -> Block | None:
    """The block of `rank`'s queries and `source`'s keys, or None where nothing is seen."""
    if not causal:
        return Block(None, None, False)
    if rank == source:
        # Chunks lie in the order of their positions, so the mask of the whole is the mask of the shard.
        return Block(None, None, True)
    if layout == "contiguous":
        return Block(None, None, False) if source < rank else None
    # Of a lower rank's chunks the first precedes, and the second follows, all that this rank has; of a higher
    # one's both
    # lie between this rank's two.
    return Block(None, 0, False) if source < rank else Block(1, None, False)
