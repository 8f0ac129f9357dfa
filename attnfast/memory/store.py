"""A memory of fixed capacity: write, update, delete and read rows of keys and values.

The buffers, their checkpoints and their file are in `state`, the choice of the next slot in `policies`, and a read is
`attnfast._memory_hops`. A store owns its tables: what is written is copied, without a graph, and gradients of a read go
to the query alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnfast import _validate as check
from attnfast._memory_hops import Picked, Tables, count_usage, read_tables
from attnfast._memory_read import check_query, make_lists, make_plan, shaped
from attnfast.memory.files import TABLES
from attnfast.memory.policies import SlotBook
from attnfast.memory.quantise import dequantise, quantise
from attnfast.memory.state import StoreState
from attnfast.reference import MemoryReadOutput


class MemoryStore(StoreState):
    r"""A memory of `capacity` slots, each a key ``[key_size]`` and a value ``[value_size]``.

    It is a module because its state is buffers: it follows ``.to(device)``, stands in the ``state_dict`` of a model
    that holds it, and a checkpoint of the model is one of the memory. Calling it is :meth:`read`.

    Parameters
    ----------
    capacity : int
        N, the number of slots.
    key_size, value_size : int
        D and D_v.
    dtype : torch.dtype
        Of the tables: float64, float32, bfloat16, float16, or int8 with a float32 scale for each row: then an element
        x of a row is kept within ``max(abs(row)) / 254`` of itself (and float32 rounding).
    policy : {"ring", "lru", "lfu", "least_used"}
        Which slot a write takes when none is free: the one written longest ago; the one written, updated or read
        longest ago; the one picked by the fewest reads; the one that got the least weight in reads. Of equal ones the
        one written first.
    device : torch.device, optional
        Of the tables. Reads need one for which attnfast has kernels.

    Attributes
    ----------
    keys, values : Tensor
        The tables, ``[N, D]`` and ``[N, D_v]`` (buffers, like all that follows; read them, do not write them). Free
        slots are zero.
    key_scale, value_scale : Tensor or None
        ``[N]`` float32 where the tables are int8: a row is ``scale * codes``.
    valid : Tensor
        ``[N]`` bool: which slots are written.
    usage : Tensor
        ``[N]`` int64: how often top-k reads and reads of candidates have picked a slot since it was written.
    read_weight : Tensor
        ``[N]`` float64: the sum of the absolute weights that reads have given it since then.
    written, last_used : Tensor
        ``[N]`` int64: values of `clock` when a slot was written, and when it was last written, updated or picked.
    clock : Tensor
        int64: one tick for each row written, updated or deleted, and one for each hop of a read that counts.

    Notes
    -----
    **Cost.** Beside copying rows, write, update and delete cost O(1) for each slot they name, amortised; a write that
    evicts under ``lfu`` and ``least_used`` costs O(log N) for slots that were read.

    **Threads.** Reads run beside each other. A write, update, delete or load waits for the reads that run and holds new
    ones back; so a read sees the memory between two writes, whole, and sees every write that returned before it began.
    The rule holds for the methods of the store; whoever takes a buffer out looks at a moving thing.

    **Gradients.** A read whose query needs a gradient copies the rows it picks, so writes between a read and its
    backward do no harm. A read over all slots does not (it would copy the tables): if its tables are written before its
    backward, torch raises.

    References
    ----------
    Weston, Chopra and Bordes, "Memory Networks", ICLR 2015, section 3.1; Santoro et al., "Meta-Learning with
    Memory-Augmented Neural Networks", ICML 2016, section 3.2 (least recently used); Rae et al., "Scaling
    Memory-Augmented Neural Networks with Sparse Reads and Writes", NIPS 2016, section 3.2 (sums of weights as usage).

    Examples
    --------
    >>> import torch
    >>> from attnfast.memory import MemoryStore
    >>> store = MemoryStore(capacity=1000, key_size=16, value_size=32, policy="lru")
    >>> slots = store.write(torch.randn(5, 16), torch.randn(5, 32))
    >>> store.read(torch.randn(2, 16), topk=3).shape, len(store)
    (torch.Size([2, 32]), 5)
    """

    # --- looking ----------------------------------------------------------------------------------------------------

    @property
    def age(self) -> Tensor:
        """``[N]`` int64: ticks of the clock since each slot was written, updated or picked; -1 where it is free."""
        return (self.clock - self.last_used).where(self.valid, -1)

    def __len__(self) -> int:
        """Number of slots that are written."""
        with self._lock.reading():
            return self._current_book().count

    def __bool__(self) -> bool:
        """True: a module is there even while its memory is empty."""
        return True

    def extra_repr(self) -> str:
        sizes = f"capacity={self.capacity}, key_size={self.key_size}, value_size={self.value_size}"
        return f"{sizes}, dtype={self.dtype}, policy={self.policy!r}, written={len(self)}"

    @torch.no_grad()
    def rows(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of the keys ``[..., D]`` and values ``[..., D_v]`` in `slots` ``[...]``; int8 as float32.

        Raises
        ------
        ValueError, TypeError
            `slots` that are not integers in [0, capacity), or free.
        """
        with self._lock.reading():
            at = self._checked_slots(slots)
            found = []
            for table, scale in ((self.keys, self.key_scale), (self.values, self.value_scale)):
                picked = table[at]
                picked = picked if scale is None else dequantise(picked, scale[at])
                found.append(picked.reshape(*slots.shape, table.shape[1]))
        return found[0], found[1]

    # --- changing ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def write(self, keys: Tensor, values: Tensor) -> Tensor:
        """Store rows in free slots and, when there are none, in those that the policy gives up.

        Parameters
        ----------
        keys : Tensor
            ``[..., D]``, any floating dtype; rounded to the dtype of the tables. At most `capacity` rows.
        values : Tensor
            ``[..., D_v]`` with the same leading dimensions.

        Returns
        -------
        Tensor
            int64 ``[...]``: the slot of each row. Free slots are taken first (those never written in order, then those
            deleted longest ago). Rows of one call never evict each other.

        Raises
        ------
        ValueError
            Shapes that do not fit, more rows than `capacity`, tensors on another device, NaN or infinity for int8.
        TypeError
            Tensors that are not floating.
        """
        leading = self._check_rows("keys", keys, self.key_size, None)
        self._check_rows("values", values, self.value_size, leading)
        count = leading.numel()
        if count > self.capacity:
            raise ValueError(f"keys: expected at most capacity = {self.capacity} rows in one write, got {count}")
        encoded = self._encode("key", keys) + self._encode("value", values)
        with self._lock.writing(), self._changing() as book:
            slots = book.claim(count, self._marks())
            at = slots.to(self.valid.device)
            fresh = count - int(self.valid.index_select(0, at).sum())
            self.valid.index_fill_(0, at, False)  # until the rows are whole, should anything interrupt this
            self._put(at, encoded)
            self.usage.index_fill_(0, at, 0)
            self.read_weight.index_fill_(0, at, 0.0)
            ticks = self._ticks(count)
            self.written.index_copy_(0, at, ticks)
            self.last_used.index_copy_(0, at, ticks)
            self.valid.index_fill_(0, at, True)
            book.wrote(slots, fresh, self._marks())
        return at.reshape(leading)

    @torch.no_grad()
    def update(self, slots: Tensor, keys: Tensor | None = None, values: Tensor | None = None) -> None:
        """Replace keys, values or both of slots that are written; counters stay, and the slots count as just used.

        Parameters
        ----------
        slots : Tensor
            Integer ``[...]``. Of a slot named twice the last row counts.
        keys, values : Tensor, optional
            ``[..., D]`` and ``[..., D_v]``, as for :meth:`write`; at least one.

        Raises
        ------
        ValueError, TypeError
            As :meth:`write`; slots out of range, or free.
        """
        if keys is None and values is None:
            raise ValueError("keys, values: expected at least one of them to update, got None for both")
        check.integers("slots", slots)
        encoded: list[tuple[str, Tensor]] = []
        for name, rows, size in (("key", keys, self.key_size), ("value", values, self.value_size)):
            if rows is not None:
                self._check_rows(f"{name}s", rows, size, slots.shape)
                encoded += self._encode(name, rows)
        with self._lock.writing():
            at = self._checked_slots(slots)
            # Of equal slots the last one in a stable order: what a loop over the rows would leave.
            named, order = at.sort(stable=True)
            last = torch.ones_like(named, dtype=torch.bool)
            last[:-1] = named[1:] != named[:-1]
            row = order[last].sort().values
            at = at[row]
            with self._changing() as book:
                self._put(at, [(name, rows[row]) for name, rows in encoded])
                self.last_used.index_copy_(0, at, self._ticks(at.shape[0]))
                book.order.used(at.cpu(), self._marks())

    @torch.no_grad()
    def delete(self, slots: Tensor) -> None:
        """Free slots; their rows and counters are set to zero.

        Parameters
        ----------
        slots : Tensor
            Integer ``[...]``; a slot named twice is deleted once.

        Raises
        ------
        ValueError, TypeError
            `slots` that are not integers in [0, capacity), or free already.
        """
        check.integers("slots", slots)
        with self._lock.writing():
            at = self._checked_slots(slots).unique()
            with self._changing() as book:
                self.valid.index_fill_(0, at, False)
                for name in (*TABLES, "usage", "read_weight", "written"):
                    column = getattr(self, name)
                    if column is not None:
                        column.index_fill_(0, at, 0)
                self.last_used.index_copy_(0, at, self._ticks(at.shape[0]))
                book.freed(at.cpu(), self._marks())

    # --- reading ----------------------------------------------------------------------------------------------------

    def read(
        self,
        query: Tensor,
        topk: int | None = None,
        *,
        score: str | tuple[Any, ...] = "dot",
        scale: float = 1.0,
        normalizer: str = "softmax",
        candidates: tuple[Tensor, Tensor] | None = None,
        hops: int = 1,
        hop: str = "add",
        eps: float = 0.0,
        count: bool = True,
        return_aux: bool = False,
    ) -> Tensor | MemoryReadOutput:
        """Read the slots that are written; arguments and results as in :func:`attnfast.memory_read`.

        Parameters
        ----------
        query : Tensor
            ``[..., D]``, any floating dtype. Scores and sums are those of the rows in the query's dtype; reads over all
            slots of a table of another dtype copy the written part of it to that dtype.
        topk : int, optional
            1 <= topk <= capacity, and at most 2048. If fewer slots are written (or left among the candidates), the rest
            has index -1 and weight 0.
        candidates : (offsets, slots), optional
            From an index. Slots that are free by now are left out.
        count : bool
            Whether this read counts: `usage`, `last_used` and `clock` by top-k reads and reads of candidates,
            `read_weight` by all.
        score, scale, normalizer, hops, hop, eps, return_aux
            See :func:`attnfast.memory_read`.

        Returns
        -------
        Tensor or MemoryReadOutput
            ``[..., D_v]`` in the query's dtype. A read of an empty store gives 0, with indices -1.

        Raises
        ------
        ValueError, TypeError
            As :func:`attnfast.memory_read`.
        """
        check_query(query, self.key_size)
        if query.device != self.keys.device:
            raise ValueError(f"query: expected a tensor on {self.keys.device} (the store's), got one on {query.device}")
        plan = make_plan(
            query,
            self.capacity,
            self.value_size,
            topk=topk,
            score=score,
            scale=scale,
            normalizer=normalizer,
            hops=hops,
            hop=hop,
            eps=eps,
        )
        check.flag("count", count)
        check.flag("return_aux", return_aux)
        leading = query.shape[:-1]
        flat = query.reshape(leading.numel(), self.key_size)
        operands = (query, plan.score_weight, plan.score_bias)
        learning = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in operands)
        usage = torch.empty(0)
        if return_aux:  # a row of all slots, which other reads have no need to fill
            usage = torch.zeros(self.capacity, dtype=torch.int64 if plan.topk else torch.float32, device=query.device)
        with self._lock.reading():
            book = self._current_book()
            # Slots from `end` on are free: no need to look at them, and often none to mask.
            tables = Tables(*(self._used(name, book) for name in TABLES))
            mask = None if book.count == book.end else self.valid[: book.end].clone()
            lists = None if candidates is None else make_lists(candidates, flat, self.capacity, self.valid)

            def observe(picked: Picked) -> None:
                with torch.no_grad():
                    if return_aux:
                        usage[: book.end] = count_usage(usage[: book.end], picked)
                    if count:
                        self._count(picked, book)

            picked, _ = read_tables(
                flat,
                tables,
                plan,
                mask,
                lists,
                copy=learning,
                soft_weights="full" if return_aux else "column_sum" if count else "",
                observe=observe,
            )
        output = picked.output.reshape(*leading, self.value_size)
        if not return_aux:
            return output
        indices, weights = shaped(picked, leading, listed=lists is not None and plan.topk is None)
        if lists is None and plan.topk is None and weights is not None:
            weights = nn.functional.pad(weights, (0, self.capacity - weights.shape[-1]))
        return MemoryReadOutput(output, indices, weights, usage)

    forward = read

    def _count(self, picked: Picked, book: SlotBook) -> None:
        """Counters of one hop; the read lock is held, so the slots still hold what was read."""
        with self._counting:
            if picked.indices is None:
                assert picked.column_sum is not None
                self.read_weight[: book.end] += picked.column_sum.double().nan_to_num(nan=0.0).abs()
                return
            assert picked.weights is not None
            seen = picked.indices >= 0
            slots = picked.indices[seen]
            weights = picked.weights.detach()[seen].double().nan_to_num(nan=0.0).abs()
            self.usage.index_add_(0, slots, torch.ones_like(slots))
            self.read_weight.index_add_(0, slots, weights)
            slots = slots.unique()
            self.last_used.index_copy_(0, slots, self._ticks(1).expand(slots.shape))
            book.order.used(slots.cpu(), self._marks())

    # --- parts ------------------------------------------------------------------------------------------------------

    def _used(self, name: str, book: SlotBook) -> Any:
        column = getattr(self, name)
        return None if column is None else column[: book.end]

    def _put(self, at: Tensor, columns: list[tuple[str, Tensor]]) -> None:
        for name, rows in columns:
            getattr(self, name).index_copy_(0, at, rows)

    def _encode(self, name: str, rows: Tensor) -> list[tuple[str, Tensor]]:
        """Rows in the form of the tables: the columns ``keys`` and ``key_scale``, or those of values."""
        flat = rows.detach().reshape(-1, rows.shape[-1])
        if self.dtype is not torch.int8:
            return [(f"{name}s", flat.to(self.dtype))]
        if not bool(flat.isfinite().all()):
            raise ValueError(f"{name}s: a store of int8 takes finite numbers only, got NaN or infinity")
        codes, scale = quantise(flat)
        return [(f"{name}s", codes), (f"{name}_scale", scale)]

    def _check_rows(self, name: str, rows: Any, size: int, leading: torch.Size | None) -> torch.Size:
        if not isinstance(rows, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(rows).__name__}")
        if not rows.is_floating_point() or rows.layout is not torch.strided:
            raise TypeError(f"{name}: expected a dense floating tensor, got dtype {rows.dtype}, layout {rows.layout}")
        if rows.device != self.keys.device:
            raise ValueError(f"{name}: expected a tensor on {self.keys.device} (the store's), got one on {rows.device}")
        before = "..." if leading is None else ", ".join(map(str, leading))
        if rows.dim() < 1 or rows.shape[-1] != size or (leading is not None and rows.shape[:-1] != leading):
            expected = f"[{before}, {size}]" if before else f"[{size}]"
            raise ValueError(f"{name}: expected {expected}, got {check.shape_text(rows.shape)}")
        return rows.shape[:-1]

    def _checked_slots(self, slots: Any) -> Tensor:
        """Flat int64 slots on the store's device, all of them written; a lock is held."""
        check.integers("slots", slots)
        at = slots.reshape(-1).long().to(self.valid.device)
        outside = at[(at < 0) | (at >= self.capacity)]
        if outside.shape[0]:
            raise ValueError(f"slots: expected 0 <= slot < capacity = {self.capacity}, got {int(outside[0])}")
        free = at[~self.valid[at]]
        if free.shape[0]:
            raise ValueError(f"slots: slot {int(free[0])} is free")
        return at
