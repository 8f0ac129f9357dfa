"""Who is measured beside MemoryStore: a plain table with a mask in torch, and a FAISS index with numbers of its own.

Each peer keeps the slots of its rows in the order in which they were written, and deletes the oldest.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .cases_store import StoreCase
from .peers_topk import Faiss, faiss_library
from .registry import EAGER, OURS, Inputs, Peer, Workload, register_peer

Write = Callable[[Tensor, Tensor], Tensor]  # keys, values -> slots
Delete = Callable[[Tensor], None]
Read = Callable[[Tensor], Tensor]


def _stream(case: StoreCase, inputs: Inputs, write: Write, delete: Delete, read: Read) -> Workload:
    """Fills the memory; each call is one step from there on."""
    keys, values, query = (inputs[name] for name in ("keys", "values", "query"))
    held: deque[Tensor] = deque()
    filled = case.slots // case.rows * case.rows
    for some in torch.arange(filled).split(case.rows):
        held.append(write(keys[some], values[some]))
    steps = itertools.count()

    def step() -> Tensor:
        rows = case.step_rows(inputs, next(steps))
        held.append(write(keys[rows], values[rows]))
        delete(held.popleft())
        return read(query)

    return Workload(step, (), inputs.grad_out)


class AttnfastStore(Peer):
    """MemoryStore with its counters of reads, as it comes."""

    name = OURS
    suites = ("store",)

    def build(self, case: StoreCase, inputs: Inputs) -> Workload:
        from attnfast.memory import MemoryStore

        store = MemoryStore(case.capacity, case.size, case.value_size)

        def read(query: Tensor) -> Tensor:
            out = store.read(query, case.picks)
            assert isinstance(out, Tensor)
            return out

        return _stream(case, inputs, store.write, store.delete, read)


class Table(Peer):
    """Tables with a mask of the slots in use and a list of free ones; ``torch.topk`` of the masked product."""

    name = EAGER
    suites = ("store",)

    def build(self, case: StoreCase, inputs: Inputs) -> Workload:
        keys, values = torch.zeros(case.capacity, case.size), torch.zeros(case.capacity, case.value_size)
        valid = torch.zeros(case.capacity, dtype=torch.bool)
        free = deque(range(case.capacity))

        def write(new_keys: Tensor, new_values: Tensor) -> Tensor:
            slots = torch.tensor([free.popleft() for _ in range(len(new_keys))])
            keys[slots], values[slots], valid[slots] = new_keys, new_values, torch.tensor(True)
            return slots

        def delete(slots: Tensor) -> None:
            valid[slots] = False
            free.extend(slots.tolist())

        def read(query: Tensor) -> Tensor:
            best = (query @ keys.T).masked_fill(~valid, -torch.inf).topk(case.picks)
            return torch.einsum("bk,bkd->bd", best.values.softmax(-1), values[best.indices])

        return _stream(case, inputs, write, delete, read)


class FaissStore(Peer):
    """``IndexIDMap`` over ``IndexFlatIP``, whose deletion moves the rows behind it; values in a table by number."""

    name = "faiss"
    suites = ("store",)

    def __init__(self) -> None:
        self._tuned = Faiss("faiss", 0)

    def build(self, case: StoreCase, inputs: Inputs) -> Workload:
        faiss = faiss_library()
        index = faiss.IndexIDMap(faiss.IndexFlatIP(case.size))
        values = torch.zeros(case.capacity, case.value_size)
        free = deque(range(case.capacity))

        def write(new_keys: Tensor, new_values: Tensor) -> Tensor:
            slots = torch.tensor([free.popleft() for _ in range(len(new_keys))])
            index.add_with_ids(new_keys.numpy(), slots.numpy())
            values[slots] = new_values
            return slots

        def delete(slots: Tensor) -> None:
            index.remove_ids(slots.numpy().astype(np.int64))
            free.extend(slots.tolist())

        def read(query: Tensor) -> Tensor:
            scores, slots = (torch.from_numpy(x) for x in index.search(query.numpy(), case.picks))
            return torch.einsum("bk,bkd->bd", scores.softmax(-1), values[slots])

        return _stream(case, inputs, write, delete, read)

    def context(self) -> contextlib.AbstractContextManager[Any]:
        return self._tuned.context()


for _peer in (AttnfastStore(), Table(), FaissStore()):
    register_peer(_peer)
