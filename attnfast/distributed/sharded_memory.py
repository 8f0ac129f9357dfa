"""A memory whose slots are spread over the ranks of a group: exact reads, routed writes, sparse local gradients.

Rank r has rows ``[r n, (r + 1) n)`` of both tables, n = ceil(N / P). A top-k read sends all queries to all ranks, each
of which finds its own k best; the lists of a query meet on the rank that asked, in the order of ranks and so of slots,
and a stable sort chooses among P k pairs. The rows that were chosen are fetched from their owners and summed as
`weighted_gather` sums them. No message grows with N:

    queries  P B D, pairs P B k (score, slot), rows B k D_v (and B k D where there is a gradient of the choice)

elements a rank, for B queries of each. Placement "columns" is _columns.py.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from attnfast import _validate as check
from attnfast._gather import weighted_gather
from attnfast._memory import topk_scores
from attnfast._reference_normalizers import normalize
from attnfast.distributed._columns import Columns, columns_of
from attnfast.distributed._group import DTYPES, Group, agree, bits, resolve
from attnfast.distributed._picks import Picked, best_of
from attnfast.distributed._routing import Routing, gather, swap
from attnfast.functional import attention
from attnfast.reference import MemoryReadOutput, real_dtype

NAME = "ShardedMemory"
FACTS = ("query shape", "dtype", "topk", "scale", "requires_grad")


class ShardedMemory(nn.Module):
    r"""A memory of `capacity` slots over the ranks of a group, rows or columns of both tables sharded.

    Calling it is :meth:`read`. Every rank must make the same calls in the same order, each with its own queries and
    rows.

    Parameters
    ----------
    mesh : DeviceMesh or ProcessGroup, optional
        One-dimensional. Default: all processes.
    placement : {"rows", "columns"}
        What is sharded. By rows traffic does not depend on N and a top-k read has one process's bits. By columns every
        rank has all slots, so that none of them serves more picks than another, and sends a part of every score: 4 N
        bytes (8 in float64) for each query and other rank.
    capacity : int
        N, the number of slots.
    key_size, value_size : int
        D and D_v; by columns at least P.
    trainable : bool
        Whether the tables are parameters (drawn from N(0, 1 / D) and N(0, 1 / D_v), every slot valid) or buffers that
        `write` fills. Their gradients are local, and after a top-k read sparse: a rank sees those of its own rows or
        columns only, from the queries of all ranks. Do not reduce them over ranks.
    dtype, device
        Of the tables.

    Attributes
    ----------
    keys, values : Tensor
        This rank's rows, ``[n_r, D]`` and ``[n_r, D_v]``, n_r <= n; by columns ``[N, d]`` and ``[N, d_v]``, about
        D / P and D_v / P columns.
    valid : Tensor
        ``[n_r]`` bool; by columns ``[N]``, the same on every rank.
    first : int
        The slot of this rank's first row; by columns 0.
    key_columns, value_columns : range
        This rank's columns.

    Examples
    --------
    >>> import torch, torch.distributed as dist
    >>> from attnfast.distributed import ShardedMemory
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> memory = ShardedMemory(capacity=100, key_size=8, value_size=4)
    >>> memory.write(torch.randn(3, 8), torch.randn(3, 4))
    tensor([0, 1, 2])
    >>> memory.read(torch.randn(2, 8), topk=2).shape
    torch.Size([2, 4])
    >>> dist.destroy_process_group()
    """

    valid: Tensor
    position: Tensor

    def __init__(
        self, mesh: DeviceMesh | Group | None = None, placement: str = "rows", *, capacity: int, key_size: int,
        value_size: int, trainable: bool = False, dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if placement not in ("rows", "columns"):
            raise ValueError(f"placement: expected 'rows' or 'columns', got {placement!r}")
        for name, size in (("capacity", capacity), ("key_size", key_size), ("value_size", value_size)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name}: expected an integer > 0, got {size!r}")
        if dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(map(str, DTYPES))}, got {dtype}")
        if isinstance(mesh, DeviceMesh):
            if mesh.ndim != 1:
                raise ValueError(f"mesh: expected 1 dimension, got {mesh.ndim}; choose one by its name: mesh['name']")
            mesh = mesh.get_group()
        self.group = resolve(mesh)
        self.rank, self.ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.capacity, self.key_size, self.value_size, self.trainable = capacity, key_size, value_size, trainable
        self.placement = placement
        if placement == "rows":
            self.rows_of_rank = -(-capacity // self.ranks)
            self.first = min(self.rank * self.rows_of_rank, capacity)
            self.key_columns, self.value_columns = range(key_size), range(value_size)
        else:
            for name, size in (("key_size", key_size), ("value_size", value_size)):
                if size < self.ranks:
                    raise ValueError(f"{name}: expected at least {self.ranks} columns for as many ranks, got {size}")
            self.rows_of_rank, self.first = capacity, 0
            self.key_columns, self.value_columns = (
                columns_of(size, self.rank, self.ranks) for size in (key_size, value_size)
            )
        count = min(self.first + self.rows_of_rank, capacity) - self.first
        keys = torch.zeros(count, len(self.key_columns), dtype=dtype, device=device)
        values = torch.zeros(count, len(self.value_columns), dtype=dtype, device=device)
        if trainable:
            self.keys: Tensor = nn.Parameter(keys)
            self.values: Tensor = nn.Parameter(values)
            self.reset_parameters()
        else:
            self.register_buffer("keys", keys)
            self.register_buffer("values", values)
        self.register_buffer("valid", torch.full((count,), trainable, device=device))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))  # where the ring goes on, on all ranks

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardedMemory:
        raise TypeError(
            "ShardedMemory: holds a process group, which cannot be copied; make another one and load a state"
        )

    def reset_parameters(self) -> None:
        """Draw the tables, each rank its own rows."""
        nn.init.normal_(self.keys, std=self.key_size**-0.5)
        nn.init.normal_(self.values, std=self.value_size**-0.5)

    @torch.no_grad()
    def write(self, keys: Tensor, values: Tensor, slots: Tensor | None = None) -> Tensor:
        """Write this rank's rows, wherever they belong.

        Parameters
        ----------
        keys, values : Tensor
            ``[M, D]`` and ``[M, D_v]``; M may differ between ranks and be 0.
        slots : Tensor, optional
            int64 ``[M]``, 0 to N - 1. Default: the next free ones of a ring, in the order of ranks; the oldest are
            overwritten when it is full. Of rows with the same slot the last one stays: that of the highest rank.

        Returns
        -------
        Tensor
            The slots, int64 ``[M]``.
        """
        error: Exception | None = None
        try:
            self._check_rows(keys, values, slots)
        except (ValueError, TypeError) as found:
            error = found
        facts = error or {"slots given": int(slots is not None)}
        agree(self.group, f"{NAME}.write", ("slots given",), facts, self.valid.device)
        count = keys.shape[0]
        if slots is None:
            mine = torch.tensor([count], device=self.valid.device)
            counts = gather(mine, self.group, f"{NAME}.write").flatten().tolist()
            if sum(counts) > self.capacity:
                raise ValueError(
                    f"keys: expected at most {self.capacity} rows of all ranks together, got {sum(counts)}"
                )
            begin = int(self.position) + sum(counts[: self.rank])
            slots = torch.arange(begin, begin + count, device=self.valid.device) % self.capacity
            self.position.fill_((int(self.position) + sum(counts)) % self.capacity)
        tables = [x.to(self.keys.dtype) for x in (keys, values)]
        if self.placement == "columns":
            places, new = self._columns(f"{NAME}.write").routes(slots, tables)
        else:
            routing = Routing(slots // self.rows_of_rank, self.group, f"{NAME}.write")
            places = routing.there(slots) - self.first
            new = [routing.there(x) for x in tables]
        # index_copy_ with a slot twice leaves either: only the last row of each may write.
        last = torch.full_like(self.valid, -1, dtype=torch.int64)
        last.scatter_reduce_(0, places, torch.arange(len(places), device=places.device), "amax")
        stays = last[places] == torch.arange(len(places), device=places.device)
        for table, rows in zip((self.keys, self.values), new):
            table[places[stays]] = rows[stays]
        self.valid[places] = True
        return slots

    def forward(self, query: Tensor, **options: Any) -> Any:
        """:meth:`read`."""
        return self.read(query, **options)

    def read(
        self, query: Tensor, *, topk: int | None = None, scale: float = 1.0, return_aux: bool = False
    ) -> Tensor | MemoryReadOutput:
        r"""Read with this rank's queries from all slots that are valid, as :func:`attnfast.memory_read` with score
        "dot".

        Parameters
        ----------
        query : Tensor
            ``[..., D]``; the same shape on every rank.
        topk : int, optional
            1 <= topk <= N. Default: a soft read over all slots.
        scale : float
            Multiplies the score.
        return_aux : bool
            With `topk`: return :class:`attnfast.MemoryReadOutput` with slots and weights ``[..., topk]``, and how often
            all ranks' queries picked each of this rank's rows, ``[n_r]``.

        Returns
        -------
        Tensor or MemoryReadOutput
            ``[..., D_v]``. A top-k read has the bits of one process that holds all rows and asks all ranks' queries in
            the order of ranks; a soft read is merged from P partial reads, and differs from it by rounding. By columns
            scores are sums of P parts, in the order of ranks: they differ by rounding, so that slots whose scores are
            that near to one another may change places; where all sums are exact (small integers) the bits are one
            process's again. Of equal sums the lowest slot comes first. A query for which no slot is valid gets 0.
        """
        doing = f"{NAME}.read"
        facts: dict[str, Any] | Exception
        try:
            facts = self._check_read(query, topk, scale, return_aux)
        except (ValueError, TypeError) as error:
            facts = error
        agree(self.group, doing, FACTS, facts, self.valid.device)
        leading = query.shape[:-1]
        flat = query.reshape(-1, self.key_size)
        tables = self.keys, self.values, self.valid
        if topk is None:
            by_rows = self.placement == "rows"
            soft = self._soft(flat, scale, doing) if by_rows else self._columns(doing).soft(flat, *tables, scale)
            return soft.reshape(*leading, self.value_size)
        if self.placement == "rows":
            out, slots, weights, usage = self._best(flat, topk, scale, doing)
        else:
            out, slots, weights, usage = self._columns(doing).best(flat, *tables, topk, scale)
        out = out.reshape(*leading, self.value_size)
        if not return_aux:
            return out
        return MemoryReadOutput(out, slots.reshape(*leading, topk), weights.reshape(*leading, topk), usage)

    def _columns(self, doing: str) -> Columns:
        return Columns(self.group, self.rank, self.ranks, (self.key_size, self.value_size), doing)

    def _soft(self, query: Tensor, scale: float, doing: str) -> Tensor:
        """Partial reads and their log-sum-exps, merged where they were asked for."""
        every = gather(query, self.group, doing)
        heads = every.reshape(1, 1, -1, self.key_size)
        shape = (self.ranks, -1)
        if len(self.valid) and bool(self.valid.any()):
            keys, values = self.keys.view(1, 1, -1, self.key_size), self.values.view(1, 1, -1, self.value_size)
            mask = self.valid.view(1, 1, 1, -1)
            part: Any = attention(heads, keys, values, score="dot", scale=scale, mask=mask, return_lse=True)
            out, lse = part.output.reshape(*shape, self.value_size), part.lse.reshape(shape)
        else:  # nothing to read here, but everyone takes part
            out = (heads.sum() * 0).expand(self.ranks, query.shape[0], self.value_size).to(query.dtype)
            lse = torch.full(
                (self.ranks, query.shape[0]), -torch.inf, dtype=real_dtype(query.dtype), device=query.device
            )
        out, lse = swap(out, self.group, doing), swap(lse, self.group, doing)
        top = lse.detach().amax(0)
        seen = top > -torch.inf
        shares = (lse - top.where(seen, 0)).exp()
        total = shares.sum(0)
        return ((out.to(shares.dtype) * shares.unsqueeze(-1)).sum(0) / total.where(seen, 1).unsqueeze(-1)).to(
            query.dtype
        )

    def _best(self, query: Tensor, topk: int, scale: float, doing: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with torch.no_grad():
            every = gather(query, self.group, doing).flatten(0, 1)
            found = min(topk, len(self.valid))
            scores, slots = topk_scores(every, self.keys, found, scale=scale, mask=self.valid)
            slots = torch.where(slots >= 0, slots + self.first, -1)
            scores = nn.functional.pad(scores, (0, topk - found), value=-torch.inf)
            slots = nn.functional.pad(slots, (0, topk - found), value=-1)
            lists = [swap(x.unflatten(0, (self.ranks, -1)), self.group, doing) for x in (scores, slots)]
            scores, slots = (x.transpose(0, 1).flatten(1) for x in lists)
            scores, slots = best_of(scores, slots, topk)
            owner = torch.where(slots >= 0, slots // self.rows_of_rank, -1).flatten()
        routing = Routing(owner, self.group, doing)
        places = routing.there(slots.flatten()) - self.first
        if torch.is_grad_enabled() and (query.requires_grad or self.keys.requires_grad):
            rows = routing.back(self._look_up(self.keys, places)).view(-1, topk, self.key_size)
            scores = Picked.apply(scores, query, rows, scale)
        weights = normalize("softmax", scores, slots >= 0, None, None, False).weights
        rows = routing.back(self._look_up(self.values, places))
        at = torch.arange(slots.numel(), device=slots.device).view_as(slots).where(slots >= 0, -1)
        usage = torch.bincount(places, minlength=len(self.valid))
        return weighted_gather(at, weights, rows).to(query.dtype), slots, weights, usage

    def _look_up(self, table: Tensor, places: Tensor) -> Tensor:
        """Rows of a table, with a sparse gradient that is coalesced in a fixed order."""
        if not (torch.is_grad_enabled() and table.requires_grad):
            return table[places]
        ones = torch.ones(len(places), 1, dtype=table.dtype, device=table.device)
        return weighted_gather(places.unsqueeze(1), ones, table, sparse_grad=True)

    def _check_rows(self, keys: Tensor, values: Tensor, slots: Tensor | None) -> None:
        for name, x, size in (("keys", keys, self.key_size), ("values", values, self.value_size)):
            check.floating(name, x)
            if x.dim() != 2 or x.shape[1] != size:
                raise ValueError(f"{name}: expected [M, {size}], got {list(x.shape)}")
        if values.shape[0] != keys.shape[0]:
            raise ValueError(f"values: expected M = {keys.shape[0]} (keys') rows, got {values.shape[0]}")
        if slots is not None:
            check.integers("slots", slots)
            if slots.shape != keys.shape[:1]:
                raise ValueError(f"slots: expected [M] = [{keys.shape[0]}], got {list(slots.shape)}")
            if len(slots) and not 0 <= int(slots.min()) <= int(slots.max()) < self.capacity:
                raise ValueError(f"slots: expected 0 to {self.capacity - 1}, got {slots.tolist()}")

    def _check_read(self, query: Tensor, topk: int | None, scale: float, return_aux: bool) -> dict[str, Any]:
        check.floating("query", query)
        if query.dim() == 0 or query.shape[-1] != self.key_size:
            raise ValueError(f"query: expected [..., {self.key_size}], got {list(query.shape)}")
        if query.dtype is not self.keys.dtype:
            raise TypeError(f"query: expected {self.keys.dtype} (the memory's dtype), got {query.dtype}")
        if topk is None and return_aux:
            raise ValueError("return_aux: expected False without topk, got True")
        if topk is not None and not 1 <= topk <= min(self.capacity, 2048):
            raise ValueError(f"topk: expected 1 to {min(self.capacity, 2048)}, got {topk}")
        recorded = torch.is_grad_enabled() and (query.requires_grad or self.trainable)
        values = (
            tuple(query.shape),
            DTYPES.index(query.dtype),
            topk or 0,
            bits(check.number("scale", scale)),
            int(recorded),
        )
        return dict(zip(FACTS, values, strict=True))

    def extra_repr(self) -> str:
        rows = f"[{self.first}, {self.first + len(self.valid)}) of {self.capacity} slots"
        if self.placement == "columns":
            rows = f"columns {self.key_columns} and {self.value_columns} of {self.capacity} slots"
        return f"{rows}, key_size={self.key_size}, value_size={self.value_size}, rank {self.rank} of {self.ranks}"
