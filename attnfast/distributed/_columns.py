"""A memory whose columns are sharded: every rank has some columns of all keys and of all values.

A score is a sum over columns, so every rank has a part of every score. In blocks of slots each rank multiplies its
columns with those of all ranks' queries and sends the parts to the ranks that asked, which add them in the order of
ranks and keep the k best. The slots and weights that were chosen go to all ranks, each of which sums its columns of
those rows, and the columns meet where they were asked for. The parts of scores are as many as slots: this traffic grows
with N.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnfast._gather import weighted_gather
from attnfast._reference_normalizers import normalize
from attnfast.distributed._group import Group
from attnfast.distributed._picks import Picked, best_of, best_of_block
from attnfast.distributed._routing import Routing, gather, swap
from attnfast.reference import real_dtype

BLOCK_BYTES = 1 << 26  # parts of scores that are on their way at a time


def columns_of(size: int, rank: int, ranks: int) -> range:
    """The columns of a rank: as evenly as it goes, the first ranks have one more."""
    each, more = divmod(size, ranks)
    begin = rank * each + min(rank, more)
    return range(begin, begin + each + (rank < more))


def slices(x: Tensor, ranks: int) -> Tensor:
    """``[M, size]`` to ``[P, M, ceil(size / P)]``, each rank's columns and perhaps a zero."""
    size = x.shape[1]
    parts = [columns_of(size, rank, ranks) for rank in range(ranks)]
    return torch.stack([nn.functional.pad(x[:, p.start : p.stop], (0, len(parts[0]) - len(p))) for p in parts])


class Columns:
    """Reads and routes for one call; `keys` and `values` are this rank's columns ``[N, .]``, `valid` is ``[N]``."""

    def __init__(self, group: Group, rank: int, ranks: int, sizes: tuple[int, int], doing: str) -> None:
        self.group, self.rank, self.ranks, self.doing = group, rank, ranks, doing
        self.key_size, self.value_size = sizes

    def deal(self, query: Tensor) -> Tensor:
        """This rank's columns of all ranks' queries, ``[P B, .]``."""
        mine = columns_of(self.key_size, self.rank, self.ranks)
        return swap(slices(query, self.ranks), self.group, self.doing).flatten(0, 1)[:, : len(mine)]

    def join(self, x: Tensor) -> Tensor:
        """This rank's columns of all ranks' results ``[P B, .]`` to all columns of its own, ``[B, D_v]``."""
        parts = [columns_of(self.value_size, rank, self.ranks) for rank in range(self.ranks)]
        x = nn.functional.pad(x, (0, len(parts[0]) - x.shape[1])).unflatten(0, (self.ranks, -1))
        found = swap(x, self.group, self.doing)
        return torch.cat([each[:, : len(part)] for each, part in zip(found, parts)], -1)

    def add_up(self, parts: Tensor) -> Tensor:
        """Parts ``[P B, n]`` of scores to the scores of this rank's queries ``[B, n]``, in the order of ranks."""
        total, *others = swap(parts.unflatten(0, (self.ranks, -1)), self.group, self.doing)
        for part in others:
            total = total + part
        return total

    def best(
        self, query: Tensor, keys: Tensor, values: Tensor, valid: Tensor, k: int, scale: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """out ``[B, D_v]``, slots and weights ``[B, k]``, and how often each slot was picked, ``[N]``."""
        every = self.deal(query)
        scores, slots = self._search(every.detach(), keys.detach(), valid, k, scale)
        with torch.no_grad():
            picked = gather(slots, self.group, self.doing).flatten(0, 1)
        if torch.is_grad_enabled() and (query.requires_grad or keys.requires_grad):
            ones = torch.ones(picked.numel(), 1, dtype=keys.dtype, device=keys.device)
            rows = weighted_gather(picked.view(-1, 1), ones, keys, sparse_grad=keys.requires_grad)
            nothing = scores.new_zeros(picked.shape)  # the scores are known; what they depend on adds 0
            scores = scores + self.add_up(Picked.apply(nothing, every, rows.view(*picked.shape, -1), scale))
        weights = normalize("softmax", scores, slots >= 0, None, None, False).weights
        everyone = gather(weights, self.group, self.doing).flatten(0, 1)
        sparse = torch.is_grad_enabled() and values.requires_grad
        out = weighted_gather(picked, everyone, values, sparse_grad=sparse).to(query.dtype)
        usage = torch.bincount(picked[picked >= 0], minlength=len(valid))
        return self.join(out), slots, weights, usage

    @torch.no_grad()
    def _search(self, every: Tensor, keys: Tensor, valid: Tensor, k: int, scale: float) -> tuple[Tensor, Tensor]:
        real = real_dtype(keys.dtype)
        asked = every.shape[0] // self.ranks
        scores = torch.full((asked, k), -torch.inf, dtype=real, device=keys.device)
        slots = torch.full((asked, k), -1, device=keys.device)
        some = valid.nonzero().flatten()
        block = max(1, BLOCK_BYTES // (max(every.shape[0], 1) * scores.element_size()))
        for at in some.split(block) if len(some) else ():
            rows = keys[at] if len(some) < len(valid) else keys[at[0] : at[-1] + 1]
            found = self.add_up(every.to(real) @ rows.to(real).mT) * scale
            best = best_of_block(found, min(k, len(at)))
            lists = torch.cat([scores, found.gather(-1, best)], -1), torch.cat([slots, at[best]], -1)
            scores, slots = best_of(*lists, k)
        return scores, slots

    def soft(self, query: Tensor, keys: Tensor, values: Tensor, valid: Tensor, scale: float) -> Tensor:
        """``[B, D_v]`` over all valid slots, whose weights are held."""
        real = real_dtype(keys.dtype)
        every = self.deal(query)
        if not bool(valid.all()):
            keys, values = keys[valid], values[valid]
        scores = self.add_up(every.to(real) @ keys.to(real).mT) * scale
        weights = gather(scores.softmax(-1), self.group, self.doing).flatten(0, 1)
        return self.join((weights @ values.to(real)).to(query.dtype))

    def routes(self, slots: Tensor, tables: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The slots that all ranks write, and this rank's columns of their rows."""
        count = len(slots)
        owner = torch.arange(self.ranks, device=slots.device).repeat_interleave(count)
        routing = Routing(owner, self.group, self.doing)
        sizes = [len(columns_of(x.shape[1], self.rank, self.ranks)) for x in tables]
        rows = [routing.there(slices(x, self.ranks).flatten(0, 1))[:, :n] for x, n in zip(tables, sizes)]
        return routing.there(slots.repeat(self.ranks)), rows
