"""Which slot is written next: free slots first, then the one that the policy gives up.

The facts are per-slot counters that the store owns (`Marks`). What is here is an order over them that never looks at
the whole capacity for one write: logs of (slot, stamp) pairs, in which a pair whose stamp is no longer that of the slot
is out of date and skipped, and a heap of lower bounds. Every pair skipped was paid for by the call that made it out of
date, and a log is packed only after as many new pairs as it holds, so the cost of a write, update, delete or read is
O(1) for each slot it names, amortised; slots that leave the heap (``lfu`` and ``least_used``, of slots that were read)
cost O(log N). All of it can be made again from the counters, which is how a loaded store goes on exactly where the
saved one stopped.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

POLICIES = ("ring", "lru", "lfu", "least_used")


class Marks(NamedTuple):
    """The counters of a store, each ``[N]``. Stamps are values of the store's clock; no two rows are written at one.

    Attributes
    ----------
    valid : Tensor
        bool; False = free.
    usage : Tensor
        int64; how often reads have picked the slot since it was written.
    read_weight : Tensor
        float64; the sum of the weights that reads have given it since then.
    written : Tensor
        int64; stamp of the write.
    last_used : Tensor
        int64; stamp of the last write, update or read; of the deletion for a free slot, 0 if it was never written.
    """

    valid: Tensor
    usage: Tensor
    read_weight: Tensor
    written: Tensor
    last_used: Tensor

    def at(self, column: str, slots: Tensor) -> Tensor:
        """The entries of one counter, on the host."""
        values: Tensor = getattr(self, column)
        return values.index_select(0, slots.to(values.device)).cpu()


Current = Callable[[Tensor, Tensor], Tensor]  # (slots, stamps) -> which pairs still hold


class SlotLog:
    """First in, first out over (slot, stamp) pairs, in one array that is packed when it is full."""

    def __init__(self) -> None:
        self._pairs = torch.empty(2, 64, dtype=torch.int64)
        self._first = self._end = 0

    def append(self, slots: Tensor, stamps: Tensor, current: Current) -> None:
        count = slots.shape[0]
        if self._end + count > self._pairs.shape[1]:
            self._pack(count, current)
        self._pairs[0, self._end : self._end + count] = slots
        self._pairs[1, self._end : self._end + count] = stamps
        self._end += count

    def take(self, count: int, current: Current) -> Tensor:
        """The first `count` slots whose pairs still hold, removed; fewer where the log runs out."""
        taken: list[Tensor] = []
        # What is looked at in vain beyond the last slot taken is bounded by a constant, or by what was skipped before.
        length = max(32, count)
        while count and self._first < self._end:
            length *= 2
            window = self._pairs[:, self._first : min(self._end, self._first + length)]
            held = current(window[0], window[1]).nonzero().flatten()[:count]
            self._first += int(held[-1]) + 1 if held.shape[0] == count else window.shape[1]
            taken.append(window[0].index_select(0, held))
            count -= held.shape[0]
        return torch.cat(taken) if taken else torch.empty(0, dtype=torch.int64)

    def held(self, current: Current) -> Tensor:
        """All slots whose pairs hold, in order; where few do, the others are dropped for good."""
        pairs = self._pairs[:, self._first : self._end]
        held = pairs[0, current(pairs[0], pairs[1])]
        if 2 * held.shape[0] < pairs.shape[1]:
            self._pack(0, current)
        return held

    def _pack(self, more: int, current: Current) -> None:
        """Drop what is out of date and leave at least half of the array empty, so that the next pack is far away."""
        pairs = self._pairs[:, self._first : self._end]
        pairs = pairs[:, current(pairs[0], pairs[1])]
        kept = pairs.shape[1]
        self._pairs = torch.empty(2, max(64, 2 * (kept + more)), dtype=torch.int64)
        self._pairs[:, :kept] = pairs
        self._first, self._end = 0, kept


class RecencyOrder:
    """``ring`` (by `written`) and ``lru`` (by `last_used`): the smallest stamp goes first.

    Stamps only grow, so a log in the order of their making is sorted.
    """

    def __init__(self, column: str, marks: Marks) -> None:
        self._column = column
        self._log = SlotLog()
        slots = marks.valid.nonzero().flatten().cpu()
        stamps = marks.at(column, slots)
        order = stamps.argsort(stable=True)
        self._log.append(slots[order], stamps[order], self._current(marks))

    def _current(self, marks: Marks) -> Current:
        return lambda slots, stamps: marks.at("valid", slots) & (marks.at(self._column, slots) == stamps)

    def wrote(self, slots: Tensor, marks: Marks) -> None:
        self._log.append(slots, marks.at(self._column, slots), self._current(marks))

    def used(self, slots: Tensor, marks: Marks) -> None:
        """`slots` without duplicates, in the order in which they go if nothing else tells them apart."""
        if self._column == "last_used":
            self.wrote(slots, marks)

    def take(self, count: int, marks: Marks) -> Tensor:
        return self._log.take(count, self._current(marks))


class UsageOrder:
    """``lfu`` (by `usage`) and ``least_used`` (by `read_weight`): the smallest goes first, the oldest of equal ones.

    Both counters only grow while a slot stays written. So reads need not touch this order: what it remembers of a slot
    is a lower bound, and a slot that comes up with a bound out of date goes back with its count of today. Slots never
    read wait in a log, the others in a heap.
    """

    def __init__(self, column: str, marks: Marks) -> None:
        self._column = column
        self._unread = RecencyOrder("written", marks)
        self._heap: list[tuple[float, int, int]] = []  # (lower bound, stamp of the write, slot)

    def wrote(self, slots: Tensor, marks: Marks) -> None:
        self._unread.wrote(slots, marks)

    def used(self, slots: Tensor, marks: Marks) -> None:
        """Nothing to do: see above."""

    def take(self, count: int, marks: Marks) -> Tensor:
        taken: list[Tensor] = []
        while count:
            slots = self._unread.take(count, marks)
            if not slots.shape[0]:
                break
            read = marks.at(self._column, slots) > 0
            self._push(slots[read], marks)
            taken.append(slots[~read])
            count -= taken[-1].shape[0]
        while count and self._heap:
            # Take the `count` smallest bounds and look at their counts of today: those not above the smallest bound
            # that is left in the heap are the smallest of all.
            popped = [heapq.heappop(self._heap) for _ in range(min(count, len(self._heap)))]
            slots = torch.tensor([slot for _, _, slot in popped])
            same = marks.at("valid", slots) & (marks.at("written", slots) == torch.tensor([at for _, at, _ in popped]))
            slots = slots[same]
            entries = sorted(self._entries(slots, marks))
            rest = self._heap[0] if self._heap else None
            chosen = [entry for entry in entries if rest is None or entry < rest]
            for entry in entries[len(chosen) :]:
                heapq.heappush(self._heap, entry)
            taken.append(torch.tensor([slot for _, _, slot in chosen], dtype=torch.int64))
            count -= len(chosen)
        return torch.cat(taken) if taken else torch.empty(0, dtype=torch.int64)

    def _entries(self, slots: Tensor, marks: Marks) -> list[tuple[float, int, int]]:
        return list(zip(marks.at(self._column, slots).tolist(), marks.at("written", slots).tolist(), slots.tolist()))

    def _push(self, slots: Tensor, marks: Marks) -> None:
        if len(self._heap) + slots.shape[0] > 2 * marks.valid.shape[0]:  # entries of slots deleted since
            found = torch.tensor([slot for _, _, slot in self._heap], dtype=torch.int64)
            stamps = torch.tensor([at for _, at, _ in self._heap], dtype=torch.int64)
            held = marks.at("valid", found) & (marks.at("written", found) == stamps)
            self._heap = self._entries(found[held], marks)
            heapq.heapify(self._heap)
        for entry in self._entries(slots, marks):
            heapq.heappush(self._heap, entry)


class SlotBook:
    """Which slots are free, how many are written, and the policy's order over those; made from the counters."""

    def __init__(self, policy: str, marks: Marks) -> None:
        self.capacity = marks.valid.shape[0]
        written = marks.valid.nonzero().flatten()
        self.count = written.shape[0]
        self.end = int(written[-1]) + 1 if self.count else 0  # every slot from here on is free
        # Free slots in the order of their deletion, those never written first.
        self._free = SlotLog()
        slots = (~marks.valid).nonzero().flatten().cpu()
        stamps = marks.at("last_used", slots)
        order = stamps.argsort(stable=True)
        self._free.append(slots[order], stamps[order], self._is_free(marks))
        if policy in ("ring", "lru"):
            self.order: RecencyOrder | UsageOrder = RecencyOrder("written" if policy == "ring" else "last_used", marks)
        else:
            self.order = UsageOrder("usage" if policy == "lfu" else "read_weight", marks)

    @staticmethod
    def _is_free(marks: Marks) -> Current:
        return lambda slots, stamps: ~marks.at("valid", slots) & (marks.at("last_used", slots) == stamps)

    def claim(self, count: int, marks: Marks) -> Tensor:
        """Slots for `count` <= capacity new rows: free ones, then those that the policy gives up."""
        free = self._free.take(min(count, self.capacity - self.count), self._is_free(marks))
        given_up = self.order.take(count - free.shape[0], marks)
        slots = torch.cat([free, given_up])
        assert slots.shape[0] == count, "the order has lost a slot"
        return slots

    def wrote(self, slots: Tensor, newly: int, marks: Marks) -> None:
        """`slots` have been written, `newly` of them had been free."""
        if slots.shape[0]:
            self.count += newly
            self.end = max(self.end, int(slots.max()) + 1)
            self.order.wrote(slots, marks)

    def freed(self, slots: Tensor, marks: Marks) -> None:
        self.count -= slots.shape[0]
        self._free.append(slots, marks.at("last_used", slots), self._is_free(marks))
