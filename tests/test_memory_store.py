"""MemoryStore: contents, policies against a naive model, counters, precision, gradients, checkpoints, threads."""

from __future__ import annotations

import copy
import pickle
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from attnfast.memory import MemoryStore
from attnfast.memory.policies import POLICIES, UsageOrder

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8)
COUNTERS = ("valid", "usage", "read_weight", "written", "last_used", "clock")


def filled(count: int = 7, capacity: int = 10, **options: Any) -> MemoryStore:
    store = MemoryStore(capacity, 4, 3, **{"dtype": torch.float64, **options})
    store.write(torch.randn(count, 4), torch.randn(count, 3))
    return store


def tensors(store: MemoryStore) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in store.state_dict().items()}


def assert_same(store: MemoryStore, before: dict[str, Tensor]) -> None:
    after = store.state_dict()
    assert after.keys() == before.keys()
    for name, x in before.items():
        assert torch.equal(after[name], x), name


# --------------------------------------------------------------------------------------------------------- the policies


class Model:
    """The store in the plainest way there is: one dictionary a slot, and a search through all of them for every row."""

    def __init__(self, capacity: int, policy: str) -> None:
        self.slots: list[dict[str, Any]] = [{"valid": False, "last_used": 0} for _ in range(capacity)]
        self.policy, self.clock = policy, 0

    def order(self, slot: int) -> tuple[float, ...]:
        facts = self.slots[slot]
        if self.policy == "ring":
            return (facts["written"],)
        if self.policy == "lru":
            return facts["last_used"], slot
        return facts["usage" if self.policy == "lfu" else "read_weight"], facts["written"]

    def tick(self) -> int:
        self.clock += 1
        return self.clock

    def write(self, keys: Tensor, values: Tensor) -> list[int]:
        chosen: list[int] = []
        free = sorted((x["last_used"], slot) for slot, x in enumerate(self.slots) if not x["valid"])
        full = sorted((slot for slot, x in enumerate(self.slots) if x["valid"]), key=self.order)
        for key, value in zip(keys, values):
            slot = free.pop(0)[1] if free else full.pop(0)
            now = self.tick()
            facts = {"valid": True, "usage": 0, "read_weight": 0.0, "written": now, "last_used": now}
            self.slots[slot] = {**facts, "key": key, "value": value}
            chosen.append(slot)
        return chosen

    def update(self, slots: list[int], keys: Tensor) -> None:
        for place, (slot, key) in enumerate(zip(slots, keys)):
            if slot not in slots[place + 1 :]:
                self.slots[slot].update(key=key, last_used=self.tick())

    def delete(self, slots: list[int]) -> None:
        for slot in sorted(set(slots)):
            self.slots[slot] = {"valid": False, "last_used": self.tick()}

    def read(self, query: Tensor, topk: int) -> Tensor:
        live = [slot for slot, x in enumerate(self.slots) if x["valid"]]
        now, outputs = self.tick(), []
        for row in query:
            scores = sorted((-float(row @ self.slots[slot]["key"]), slot) for slot in live)[:topk]
            weights = torch.tensor([-s for s, _ in scores], dtype=torch.float64).softmax(0)
            nothing = torch.zeros(3, dtype=torch.float64)
            outputs.append(sum((w * self.slots[s]["value"] for w, (_, s) in zip(weights, scores)), nothing))
            for w, (_, slot) in zip(weights.tolist(), scores):
                facts = self.slots[slot]
                facts.update(usage=facts["usage"] + 1, read_weight=facts["read_weight"] + w, last_used=now)
        return torch.stack(outputs)


def compare(store: MemoryStore, model: Model) -> None:
    assert int(store.clock) == model.clock
    assert len(store) == sum(x["valid"] for x in model.slots)
    for slot, facts in enumerate(model.slots):
        assert bool(store.valid[slot]) == facts["valid"]
        assert int(store.last_used[slot]) == facts["last_used"]
        assert int(store.age[slot]) == (model.clock - facts["last_used"] if facts["valid"] else -1)
        for name in ("usage", "written"):
            assert int(getattr(store, name)[slot]) == facts.get(name, 0)
        assert float(store.read_weight[slot]) == pytest.approx(facts.get("read_weight", 0.0))
        assert torch.equal(store.keys[slot], facts.get("key", torch.zeros(4, dtype=torch.float64)))
        assert torch.equal(store.values[slot], facts.get("value", torch.zeros(3, dtype=torch.float64)))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(4))
def test_follows_a_naive_model(policy: str, seed: int) -> None:
    """Random calls; now and then the store goes through its state_dict, and must go on as if nothing had happened."""
    draw = random.Random(seed)
    capacity = draw.choice((1, 5, 13))
    store, model = MemoryStore(capacity, 4, 3, torch.float64, policy), Model(capacity, policy)
    for _ in range(150):
        live = store.valid.nonzero().flatten().tolist()
        action = draw.choice(("write", "write", "update", "delete", "read", "read", "reload"))
        if action == "write":
            count = draw.randint(0, capacity) if draw.random() < 0.3 else 1
            rows = torch.randn(count, 4, dtype=torch.float64), torch.randn(count, 3, dtype=torch.float64)
            assert store.write(*rows).tolist() == model.write(*rows)
        elif action == "update" and live:
            slots = [draw.choice(live) for _ in range(draw.randint(1, 4))]
            keys = torch.randn(len(slots), 4, dtype=torch.float64)
            store.update(torch.tensor(slots), keys)
            model.update(slots, keys)
        elif action == "delete" and live and draw.random() < 0.5:
            slots = [draw.choice(live) for _ in range(draw.randint(1, 3))]
            store.delete(torch.tensor(slots))
            model.delete(slots)
        elif action == "read":
            query, k = torch.randn(draw.randint(1, 3), 4, dtype=torch.float64), draw.randint(1, capacity)
            torch.testing.assert_close(store.read(query, k), model.read(query, k))
        elif action == "reload":
            other = MemoryStore(capacity, 4, 3, torch.float64, policy)
            other.load_state_dict(tensors(store))
            store = other
        compare(store, model)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_long_run_of_reads_and_writes_keeps_its_order(policy: str) -> None:
    """Enough calls that every log and heap is packed several times; the order is checked against a full sort."""
    store = MemoryStore(50, 2, 1, policy=policy)
    store.write(torch.randn(50, 2), torch.randn(50, 1))
    column = {"ring": "written", "lru": "last_used", "lfu": "usage", "least_used": "read_weight"}[policy]
    for step in range(600):
        store.read(torch.randn(3, 2), 4)
        if step % 7 == 0:
            gone = store.valid.nonzero().flatten()[torch.randperm(len(store))[:2]]
            store.delete(gone)
            assert store.write(torch.randn(2, 2), torch.randn(2, 1)).tolist() == gone.sort().values.tolist()
        keys = getattr(store, column).tolist()
        stamps = list(range(50)) if policy == "lru" else store.written.tolist()
        expected = sorted(range(50), key=lambda slot: (keys[slot], stamps[slot]))[: 1 + step % 3]
        count = len(expected)
        assert store.write(torch.randn(count, 2), torch.randn(count, 1)).tolist() == expected
    for _ in range(400):
        store.read(torch.randn(3, 2), 4)  # nothing is given up meanwhile, and the notes of reads must not pile up
    assert store._book is not None
    order = store._book.order
    logs = [store._book._free, order._unread._log if isinstance(order, UsageOrder) else order._log]
    assert max(log._pairs.shape[1] for log in logs) <= 512
    assert not isinstance(order, UsageOrder) or len(order._heap) <= 100


@pytest.mark.parametrize("policy", ["lfu", "least_used"])
def test_slots_that_were_read_go_in_the_order_of_today(policy: str) -> None:
    """Every slot has been read, some since the order last saw them: what it remembers of those is out of date."""
    store = MemoryStore(40, 2, 1, policy=policy)

    def read(slots: Tensor) -> None:
        """One query for each slot, whose weight is anything from 0 to 1."""
        lists = torch.arange(slots.shape[0] + 1), slots
        store.read(torch.randn(slots.shape[0], 2), 1, candidates=lists, normalizer="sigmoid")

    read(store.write(torch.randn(40, 2), torch.randn(40, 1)).repeat(2))
    for step in range(200):
        read(torch.randint(0, 40, (20,)))
        keys = getattr(store, "usage" if policy == "lfu" else "read_weight").tolist()
        written = store.written.tolist()
        expected = sorted(range(40), key=lambda slot: (keys[slot], written[slot]))[: 1 + step % 4]
        slots = store.write(torch.randn(len(expected), 2), torch.randn(len(expected), 1))
        assert slots.tolist() == expected
        read(slots.repeat(1 + step % 9))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_write_does_not_look_at_the_whole_capacity(policy: str) -> None:
    """Whole tables are only seen by operations whose work is that of the slots they name."""
    store = MemoryStore(5_000, 1, 1, policy=policy)
    store.write(torch.randn(5_000, 1), torch.randn(5_000, 1))
    row, query = torch.randn(1, 1), torch.randn(1, 1)
    lists = torch.tensor([0, 3]), torch.tensor([5, 70, 900])
    seen: set[str] = set()

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = call.overloadpacket.__name__
            if any(isinstance(x, Tensor) and x.numel() >= 5_000 for x in args):
                seen.add(name)
            if any(
                x.numel() >= 5_000 for part in args if isinstance(part, list) for x in part if isinstance(x, Tensor)
            ):
                seen.add(f"{name} of a list")
            return call(*args, **(kwargs or {}))

    for step in range(3):
        store.read(query, 2, candidates=lists)
        with Sizes():
            store.write(row, row)
            slots = torch.tensor([step, 2 * step + 1])
            store.update(slots, row.expand(2, 1))
            store.delete(slots)
            store.write(row.expand(2, 1), row.expand(2, 1))
    views = {"detach", "slice", "select", "view", "alias"}
    named = {"index", "index_select", "gather", "index_copy_", "index_fill_", "index_put_"}
    assert seen and seen <= views | named, seen


def test_rows_of_one_write_do_not_evict_each_other() -> None:
    store = filled(8, 8)
    slots = store.write(torch.randn(8, 4), torch.randn(8, 3))
    assert sorted(slots.tolist()) == list(range(8))
    assert slots.tolist() == list(range(8))


def test_ring_goes_round() -> None:
    store = MemoryStore(4, 1, 1)
    written = [store.write(torch.full((3, 1), float(i)), torch.zeros(3, 1)).tolist() for i in range(4)]
    assert written == [[0, 1, 2], [3, 0, 1], [2, 3, 0], [1, 2, 3]]


# ----------------------------------------------------------------------------------------------------------- the tables


def test_leading_dimensions() -> None:
    store = MemoryStore(20, 4, 3)
    keys, values = torch.randn(2, 3, 4), torch.randn(2, 3, 3)
    slots = store.write(keys, values)
    assert slots.shape == (2, 3) and slots.dtype is torch.int64
    got = store.rows(slots)
    assert torch.equal(got[0], keys) and torch.equal(got[1], values)
    single = store.write(torch.randn(4), torch.randn(3))
    assert single.shape == () and int(single) == 6
    assert store.read(torch.randn(4), 2).shape == (3,)
    assert store.read(torch.randn(5, 2, 4), 2).shape == (5, 2, 3)
    assert store.write(torch.randn(0, 4), torch.randn(0, 3)).shape == (0,)
    assert len(store) == 7


def test_update_takes_the_last_of_equal_slots() -> None:
    store = filled()
    before = tensors(store)
    rows = torch.randn(4, 3, dtype=torch.float64)
    store.update(torch.tensor([3, 1, 3, 1]), values=rows)
    assert torch.equal(store.values[3], rows[2]) and torch.equal(store.values[1], rows[3])
    assert torch.equal(store.keys, before["keys"])
    assert int(store.clock) == int(before["clock"]) + 2
    assert store.last_used[[3, 1]].tolist() == [8, 9]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_kept_within_the_bound(dtype: torch.dtype) -> None:
    store = MemoryStore(50, 16, 8, dtype)
    keys, values = torch.randn(50, 16) * torch.logspace(-20, 20, 50).unsqueeze(-1), torch.randn(50, 8)
    keys, values = keys.clamp(-6e4, 6e4) if dtype is torch.float16 else keys, values
    keys[7] = 0
    slots = store.write(keys, values)
    store.update(slots[3:5], keys[3:5].flip(0))
    keys[3:5] = keys[3:5].flip(0)
    for got, rows in zip(store.rows(slots), (keys, values)):
        if dtype is torch.int8:
            largest = rows.abs().amax(-1, keepdim=True).double()
            assert bool(((got.double() - rows.double()).abs() <= largest / 254 * (1 + 1e-5)).all())
            # The bound is not idle: half a step is what rounding costs somewhere.
            assert bool(((got.double() - rows.double()).abs() > largest / 254 * 0.5).any())
        else:
            assert torch.equal(got, rows.to(dtype))


def test_int8_tables_read_as_their_rows() -> None:
    """A read of codes is the read of the rows they stand for."""
    store = MemoryStore(300, 16, 8, torch.int8)
    store.write(torch.randn(300, 16), torch.randn(300, 8))
    store.delete(torch.tensor([0, 5, 299]))
    plain = MemoryStore(300, 16, 8)
    live = store.valid.nonzero().flatten()
    plain.write(*store.rows(live))
    query = torch.randn(6, 16)
    for options in ({}, {"topk": 9}, {"topk": 9, "score": "l2"}, {"topk": 9, "score": "cosine"}):
        got, expected = (x.read(query, return_aux=True, **options) for x in (store, plain))
        torch.testing.assert_close(got.output, expected.output)
        if options:
            assert torch.equal(got.indices, live[expected.indices])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_tables_of_another_dtype_than_the_query(dtype: torch.dtype) -> None:
    store = MemoryStore(64, 8, 8, dtype)
    slots = store.write(torch.randn(64, 8), torch.randn(64, 8))
    plain = MemoryStore(64, 8, 8)
    plain.write(*(x.float() for x in store.rows(slots)))
    query = torch.randn(5, 8)
    for options in ({}, {"topk": 4}):
        got = store.read(query, **options)
        assert got.dtype is torch.float32
        torch.testing.assert_close(got, plain.read(query, **options))


# ------------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("options", [{}, {"topk": 3}, {"topk": 10}, {"topk": 4, "score": "l2"}], ids=str)
@pytest.mark.parametrize("learning", [False, True])
def test_free_slots_take_no_part(options: dict[str, Any], learning: bool) -> None:
    """NaN in a free slot, which nothing writes there, shows whoever looks."""
    store = filled(9)
    store.delete(torch.tensor([0, 4, 8]))
    store.keys[~store.valid] = store.values[~store.valid] = torch.nan
    live = MemoryStore(10, 4, 3, torch.float64)
    live.write(*store.rows(store.valid.nonzero().flatten()))
    query = torch.randn(5, 4, dtype=torch.float64, requires_grad=learning)
    got, expected = store.read(query, **options), live.read(query, **options)
    torch.testing.assert_close(got, expected)
    if learning:
        (grad,) = torch.autograd.grad(got.square().sum(), query)
        torch.testing.assert_close(grad, torch.autograd.grad(expected.square().sum(), query)[0])


@pytest.mark.parametrize("after", ["nothing", "deletion"])
def test_an_empty_store_reads_as_zero(after: str) -> None:
    store = MemoryStore(5, 4, 3)
    if after == "deletion":
        store.delete(store.write(torch.randn(5, 4), torch.randn(5, 3)))
        store.values.fill_(torch.nan)
    assert len(store) == 0 and store
    query = torch.randn(2, 4, requires_grad=True)
    lists = torch.tensor([0, 2, 2]), torch.tensor([1, 3])
    for options in ({}, {"topk": 2}, {"candidates": lists}, {"topk": 2, "candidates": lists}):
        result = store.read(query, return_aux=True, **options)
        assert torch.equal(result.output, torch.zeros(2, 3)), options
        assert result.usage.sum() == 0 and result.usage.shape == (5,)
        if "topk" in options:
            assert torch.equal(result.indices, torch.full((2, 2), -1))
            assert torch.equal(result.weights, torch.zeros(2, 2))
        if result.output.requires_grad:
            (grad,) = torch.autograd.grad(result.output.sum(), query, allow_unused=True)
            assert grad is None or torch.equal(grad, torch.zeros(2, 4))
    assert store.usage.sum() == 0 and store.read_weight.sum() == 0


def test_more_picks_than_slots_are_filled_up() -> None:
    store = filled(3)
    result = store.read(torch.randn(2, 4, dtype=torch.float64), 5, return_aux=True)
    assert result.indices.shape == (2, 5)
    assert (result.indices >= 0).sum(-1).tolist() == [3, 3]
    assert torch.equal(result.indices[:, 3:], torch.full((2, 2), -1))
    assert bool((result.weights[:, 3:] == 0).all())
    torch.testing.assert_close(result.weights.sum(-1), torch.ones(2, dtype=torch.float64))


def test_reads_count() -> None:
    store = filled(6)
    query = torch.randn(4, 4, dtype=torch.float64)
    before = tensors(store)
    store.read(query, 2, count=False)
    store.read(query, count=False)
    assert_same(store, before)
    result = store.read(query, 2, return_aux=True)
    expected = torch.bincount(result.indices.flatten(), minlength=10)
    assert torch.equal(store.usage, expected) and torch.equal(result.usage, expected)
    weights = torch.zeros(10, dtype=torch.float64)
    for slot, weight in zip(result.indices.flatten().tolist(), result.weights.flatten().tolist()):
        weights[slot] += weight
    torch.testing.assert_close(store.read_weight, weights)
    assert int(store.clock) == 7
    assert store.last_used[expected > 0].unique().tolist() == [7]
    # A read over all slots favours none: it leaves usage and recency alone.
    counted = tensors(store)
    full = store.read(query, return_aux=True)
    torch.testing.assert_close(full.usage.double(), full.weights.sum(0))
    torch.testing.assert_close(store.read_weight, weights + full.weights.sum(0))
    assert all(torch.equal(getattr(store, name), counted[name]) for name in COUNTERS if name != "read_weight")
    store.read(query)
    torch.testing.assert_close(store.read_weight, weights + 2 * full.weights.sum(0))


def test_hops_count_each() -> None:
    store = MemoryStore(20, 4, 4, torch.float64)
    store.write(torch.randn(20, 4), torch.randn(20, 4))
    query = torch.randn(3, 4, dtype=torch.float64)
    result = store.read(query, 2, hops=3, return_aux=True)
    assert int(store.usage.sum()) == int(result.usage.sum()) == 3 * 3 * 2
    for _ in range(3):
        expected = store.read(query, 2)
        query = query + expected
    torch.testing.assert_close(result.output, expected)


def test_scores_that_are_nan_do_not_spoil_the_counters() -> None:
    store = filled(4, policy="least_used")
    query = torch.full((1, 4), torch.nan, dtype=torch.float64)
    assert bool(store.read(query, 2).isnan().all())
    assert bool(store.read_weight.isfinite().all())
    assert store.write(torch.randn(8, 4), torch.randn(8, 3)).unique().shape == (8,)


# ----------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("options", [{}, {"topk": 3}, {"topk": 2, "hops": 2}], ids=str)
def test_gradient_of_the_query(options: dict[str, Any]) -> None:
    store = MemoryStore(8, 4, 4, torch.float64)
    store.write(torch.randn(6, 4), torch.randn(6, 4))
    query = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q: store.read(q, count=False, **options), (query,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("listed", [False, True])
def test_a_write_does_not_disturb_the_backward_of_an_earlier_read(dtype: torch.dtype, listed: bool) -> None:
    store = MemoryStore(6, 4, 3, dtype)
    store.write(torch.randn(6, 4), torch.randn(6, 3))
    options = {"candidates": (torch.tensor([0, 3, 6]), torch.tensor([0, 1, 2, 3, 4, 5]))} if listed else {"topk": 3}
    query = torch.randn(2, 4, requires_grad=True)
    (expected,) = torch.autograd.grad(store.read(query, **options).square().sum(), query)
    output = store.read(query, **options)
    store.write(torch.randn(6, 4), torch.randn(6, 3))
    (grad,) = torch.autograd.grad(output.square().sum(), query)
    assert torch.equal(grad, expected)


def test_a_read_over_all_slots_says_that_its_tables_were_written() -> None:
    store = MemoryStore(6, 4, 3)
    store.write(torch.randn(6, 4), torch.randn(6, 3))
    output = store.read(torch.randn(2, 4, requires_grad=True))
    store.write(torch.randn(6, 4), torch.randn(6, 3))
    with pytest.raises(RuntimeError, match="inplace operation"):
        output.sum().backward()


def test_writes_keep_no_graph() -> None:
    store = MemoryStore(6, 4, 3)
    keys = torch.randn(2, 4, requires_grad=True)
    slots = store.write(keys, torch.randn(2, 3, requires_grad=True))
    store.update(slots, keys)
    assert not store.keys.requires_grad and not store.values.requires_grad


# ---------------------------------------------------------------------------------------------------------- checkpoints


class Model2(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.project = nn.Linear(4, 4)
        self.memory = MemoryStore(10, 4, 3, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("assign", [False, True])
def test_checkpoint_of_a_model_is_one_of_its_memory(dtype: torch.dtype, assign: bool) -> None:
    model, other = Model2(dtype=dtype), Model2(dtype=dtype)
    model.memory.write(torch.randn(7, 4), torch.randn(7, 3))
    model.memory.delete(torch.tensor([2]))
    other.memory.write(torch.randn(10, 4), torch.randn(10, 3))
    other.load_state_dict(copy.deepcopy(model.state_dict()), assign=assign)
    assert_same(other.memory, tensors(model.memory))
    assert len(other.memory) == 6
    rows = torch.randn(5, 4), torch.randn(5, 3)
    assert torch.equal(other.memory.write(*rows), model.memory.write(*rows))


def wrong_states() -> Iterator[tuple[str, Callable[[dict[str, Tensor]], None], str]]:
    yield "missing", lambda s: s.__delitem__("usage"), "usage"
    yield "shape", lambda s: s.update(values=torch.zeros(10, 5, dtype=torch.float64)), r"values: expected \[10, 3\]"
    yield "capacity", lambda s: s.update(valid=torch.zeros(9, dtype=torch.bool)), r"valid: expected \[10\]"
    yield "counter dtype", lambda s: s.update(usage=s["usage"].float()), "usage: expected"
    yield "negative", lambda s: s.update(usage=s["usage"] - 1), "usage: expected numbers >= 0"
    yield "nan", lambda s: s.update(read_weight=s["read_weight"] * torch.nan), "read_weight: expected numbers >= 0"
    yield "future", lambda s: s.update(last_used=s["last_used"] + 1000), "last_used: expected stamps up to"
    yield "scales", lambda s: s.update(key_scale=torch.ones(10)), "key_scale"
    yield "half codes", lambda s: s.update(values=s["values"].to(torch.int8)), "values: expected dtype"


@pytest.mark.parametrize(("name", "spoil", "pattern"), list(wrong_states()), ids=lambda x: x if x is str else None)
def test_a_state_that_does_not_fit_changes_nothing(name: str, spoil: Any, pattern: str) -> None:
    store, other = filled(), filled(3)
    state = tensors(other)
    spoil(state)
    before = tensors(store)
    with pytest.raises(RuntimeError, match=pattern):
        store.load_state_dict(state)
    assert_same(store, before)


def test_codes_do_not_load_as_numbers() -> None:
    coded, plain = filled(dtype=torch.int8), filled()
    for store, state in ((plain, tensors(coded)), (coded, tensors(plain))):
        before = tensors(store)
        with pytest.raises(RuntimeError):
            store.load_state_dict(state)
        with pytest.raises(RuntimeError, match="dtype"):
            store.load_state_dict(
                {k: v for k, v in state.items() if "scale" not in k}
                | {name: before[name] for name in before if "scale" in name}
            )
        assert_same(store, before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_copies_are_independent(copied: Any) -> None:
    store = filled(policy="lru")
    other = copied(store)
    before = tensors(store)
    assert_same(other, before)
    assert other.policy == "lru"
    rows = torch.randn(5, 4), torch.randn(5, 3)
    slots = other.write(*rows)
    assert_same(store, before)
    assert torch.equal(store.write(*rows), slots)


def test_a_change_of_dtype_is_one_of_the_tables() -> None:
    store = filled(dtype=torch.float32)
    store.read(torch.randn(2, 4), 2)
    before = tensors(store)
    store.half()
    assert store.dtype is torch.float16 and store.values.dtype is torch.float16
    for name in COUNTERS:
        assert torch.equal(getattr(store, name), before[name])
        assert getattr(store, name).dtype is before[name].dtype
    coded = filled(dtype=torch.int8)
    before = tensors(coded)
    coded.to(torch.bfloat16)
    assert_same(coded, before)
    assert coded.key_scale is not None and coded.key_scale.dtype is torch.float32
    assert coded.write(torch.randn(4, 4), torch.randn(4, 3)).tolist() == [7, 8, 9, 0]


def test_an_interrupted_write_leaves_a_store_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    store = filled(10, policy="lru")

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MemoryStore, "_put", fail)
        with pytest.raises(KeyboardInterrupt):
            store.write(torch.randn(3, 4), torch.randn(3, 3))
    assert len(store) == int(store.valid.sum()) == 7
    assert store.write(torch.randn(10, 4), torch.randn(10, 3)).unique().shape == (10,)
    assert len(store) == 10


# -------------------------------------------------------------------------------------------------------------- threads


class NoLock:
    """What the tests below must notice."""

    @contextmanager
    def reading(self) -> Iterator[None]:
        yield

    writing = reading

    def __enter__(self) -> None: ...

    def __exit__(self, *_: Any) -> None: ...


class PausingStore(MemoryStore):
    """Stops between the columns of a write, so that a reader who need not wait comes in between on any machine."""

    def _put(self, at: Tensor, columns: list[tuple[str, Tensor]]) -> None:
        for column in columns:
            super()._put(at, [column])
            time.sleep(0.001)


def full_store() -> MemoryStore:
    store = PausingStore(64, 8, 8)
    store.write(torch.ones(64, 8), torch.ones(64, 8))
    return store


def stress(store: MemoryStore, seconds: float) -> list[str]:
    """Readers beside a writer that puts one number into all rows at a time; what they saw of two numbers at once."""
    slots = torch.arange(store.capacity)
    seen: list[str] = []
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            number = number % 1000 + 1
            rows = torch.full((store.capacity, 8), float(number))
            try:
                if number % 3 == 0:
                    store.write(rows, rows)
                else:
                    store.update(slots, rows, rows)
            except Exception as error:
                seen.append(repr(error))
                stop.set()

    def check(what: str, x: Tensor) -> None:
        if x.numel() and not bool((x == x.flatten()[0]).all()):
            seen.append(f"{what}: {x.unique().tolist()[:5]}")
            stop.set()

    def read() -> None:
        query = torch.ones(4, 8)
        while not stop.is_set():
            try:
                # Equal scores: weights are powers of two, so the sum of equal rows is exact.
                result = store.read(query, store.capacity, return_aux=True)
                check("picks", torch.cat([result.indices.sort(-1).values - slots, torch.zeros(1, store.capacity)]))
                check("values", result.output)
                check("keys and values", torch.cat(store.rows(slots)))
            except Exception as error:
                seen.append(repr(error))
                stop.set()

    threads = [threading.Thread(target=f, daemon=True) for f in (write, read, read)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        stop.wait(seconds)
        stop.set()
        for thread in threads:
            thread.join(30)
        assert not any(thread.is_alive() for thread in threads), "a reader or the writer hangs"
    finally:
        sys.setswitchinterval(interval)
    return seen


def test_readers_see_whole_states() -> None:
    torch.set_num_threads(1)
    assert stress(full_store(), 2.0) == []


def test_without_the_lock_the_stress_test_fails() -> None:
    """The control of the test before it."""
    torch.set_num_threads(1)
    store = full_store()
    store._lock = NoLock()  # type: ignore[assignment]
    assert stress(store, 30.0) != []


def test_readers_beside_each_other_lose_no_count() -> None:
    torch.set_num_threads(1)
    store = MemoryStore(16, 8, 8, policy="lru")
    store.write(torch.randn(16, 8), torch.randn(16, 8))
    reads, workers = 150, 4

    def read() -> None:
        for _ in range(reads):
            store.read(torch.randn(2, 8), 4)

    threads = [threading.Thread(target=read) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert int(store.usage.sum()) == reads * workers * 2 * 4
    assert int(store.clock) == 16 + reads * workers
    assert float(store.read_weight.sum()) == pytest.approx(reads * workers * 2)


def test_a_writer_is_not_kept_waiting_by_a_stream_of_readers() -> None:
    store = filled()
    stop, inside = threading.Event(), threading.Barrier(3)

    def read() -> None:
        first = True
        while not stop.is_set():
            with store._lock.reading():
                if first:
                    inside.wait(10)
                    first = False
                time.sleep(0.002)

    readers = [threading.Thread(target=read, daemon=True) for _ in range(2)]
    for thread in readers:
        thread.start()
    inside.wait(10)
    writer = threading.Thread(target=lambda: store.write(torch.randn(4), torch.randn(3)), daemon=True)
    writer.start()
    writer.join(10)
    late = writer.is_alive()
    stop.set()
    assert not late


# ---------------------------------------------------------------------------------------------------------- wrong calls


def rows(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(shape, **options)


LISTS = torch.tensor([0, 1, 2]), torch.tensor([1, 2])
SLOTS = torch.tensor([1, 2])
WRONG: dict[str, tuple[Callable[[MemoryStore], Any], type[Exception], str]] = {
    "capacity-zero": (lambda s: MemoryStore(0, 4, 3), ValueError, r"capacity: expected an integer >= 1, got 0"),
    "capacity-float": (lambda s: MemoryStore(1.5, 4, 3), TypeError, r"capacity: expected an integer"),
    "key-size": (lambda s: MemoryStore(5, -1, 3), ValueError, r"key_size: expected an integer >= 1, got -1"),
    "value-size": (lambda s: MemoryStore(5, 4, True), TypeError, r"value_size: expected an integer >= 1, got True"),
    "dtype": (lambda s: MemoryStore(5, 4, 3, torch.int64), TypeError, r"dtype: expected one of .*got torch.int64"),
    "policy": (lambda s: MemoryStore(5, 4, 3, policy="fifo"), ValueError, r"policy: expected one of 'ring', .*'fifo'"),
    "write-list": (lambda s: s.write([1.0], rows(1, 3)), TypeError, r"keys: expected a torch\.Tensor, got list"),
    "write-integers": (lambda s: s.write(rows(1, 4, dtype=torch.int64), rows(1, 3)), TypeError, r"keys: .*int64"),
    "write-sparse": (lambda s: s.write(rows(1, 4).to_sparse(), rows(1, 3)), TypeError, r"keys: .*sparse_coo"),
    "write-key-size": (lambda s: s.write(rows(1, 5), rows(1, 3)), ValueError, r"keys: expected \[\.\.\., 4\], got"),
    "write-value-size": (
        lambda s: s.write(rows(1, 4), rows(1, 4)),
        ValueError,
        r"values: expected \[1, 3\], got \[1, 4\]",
    ),
    "write-uneven": (lambda s: s.write(rows(2, 4), rows(1, 3)), ValueError, r"values: expected \[2, 3\], got \[1, 3\]"),
    "write-device": (lambda s: s.write(rows(2, 4, device="meta"), rows(2, 3)), ValueError, r"keys: .* on meta"),
    "write-too-many": (lambda s: s.write(rows(11, 4), rows(11, 3)), ValueError, r"at most capacity = 10 .*got 11"),
    "update-nothing": (lambda s: s.update(SLOTS), ValueError, r"keys, values: expected at least one"),
    "update-shape": (lambda s: s.update(SLOTS, rows(3, 4)), ValueError, r"keys: expected \[2, 4\], got \[3, 4\]"),
    "update-free": (lambda s: s.update(SLOTS + 7, rows(2, 4)), ValueError, r"slots: slot 8 is free"),
    "update-float": (lambda s: s.update(SLOTS * 1.0, rows(2, 4)), TypeError, r"slots: expected an integer tensor"),
    "delete-range": (lambda s: s.delete(torch.tensor([1, 10])), ValueError, r"slots: expected 0 <= .*= 10, got 10"),
    "delete-negative": (lambda s: s.delete(torch.tensor([-1])), ValueError, r"slots: expected 0 <= .*got -1"),
    "delete-free": (lambda s: s.delete(torch.tensor([1, 9])), ValueError, r"slots: slot 9 is free"),
    "delete-list": (lambda s: s.delete([1]), TypeError, r"slots: expected a torch\.Tensor, got list"),
    "rows-free": (lambda s: s.rows(torch.tensor(9)), ValueError, r"slots: slot 9 is free"),
    "read-size": (lambda s: s.read(rows(2, 5)), ValueError, r"query: expected \[\.\.\., D\] of D = 4 .*\[2, 5\]"),
    "read-integers": (lambda s: s.read(rows(2, 4, dtype=torch.int64)), TypeError, r"query: expected dtype"),
    "read-meta": (lambda s: s.read(rows(2, 4, device="meta")), ValueError, r"query: .*meta"),
    "topk-zero": (lambda s: s.read(rows(2, 4), 0), ValueError, r"topk: expected an integer >= 1, got 0"),
    "topk-large": (lambda s: s.read(rows(2, 4), 11), ValueError, r"topk: expected at most N = 10, got 11"),
    "topk-float": (lambda s: s.read(rows(2, 4), 2.0), TypeError, r"topk: expected an integer"),
    "score": (lambda s: s.read(rows(2, 4), score="bm25"), ValueError, r"score: expected one of 'dot'"),
    "hops-size": (lambda s: s.read(rows(2, 4), hops=2), ValueError, r"hops: more than one needs D_v = D"),
    "count": (lambda s: s.read(rows(2, 4), count=1), TypeError, r"count: expected True or False"),
    "lists-number": (lambda s: s.read(rows(3, 4), candidates=LISTS), ValueError, r"candidates' offsets: expected \[Q"),
    "lists-range": (
        lambda s: s.read(rows(2, 4), candidates=(LISTS[0], LISTS[1] + 9)),
        ValueError,
        r"candidates' slots: expected 0 <= slot < N = 10, got 11",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls_change_nothing(name: str) -> None:
    call, kind, pattern = WRONG[name]
    store = filled(dtype=torch.float32)
    before = tensors(store)
    with pytest.raises(kind, match=pattern):
        call(store)
    assert_same(store, before)
    assert store.write(torch.randn(4, 4), torch.randn(4, 3)).tolist() == [7, 8, 9, 0]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["keys", "values"])
def test_int8_takes_finite_rows_only(bad: float, where: str) -> None:
    store = filled(dtype=torch.int8)
    before = tensors(store)
    both = {"keys": torch.randn(2, 4), "values": torch.randn(2, 3)}
    both[where][1, 2] = bad
    with pytest.raises(ValueError, match=f"{where}: a store of int8 takes finite numbers only"):
        store.write(**both)
    with pytest.raises(ValueError, match=f"{where}: a store of int8 takes finite numbers only"):
        store.update(torch.tensor([0, 1]), **{where: both[where]})
    assert_same(store, before)


@pytest.mark.parametrize("where", ["keys", "values"])
@pytest.mark.parametrize("score", ["dot", "l2", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_missing_pick_takes_nothing_from_any_slot(dtype: torch.dtype, score: str, where: str) -> None:
    """Lists shorter than topk: what is missing stands at -1, and no row is read in its place, not even one of NaN.

    Of a query in float64 and a store in float32 rows are copied by another way than of equal dtypes.
    """
    store = MemoryStore(4, 2, 3, dtype=torch.float32)
    rows = {"keys": torch.randn(4, 2), "values": torch.randn(4, 3)}
    for bad in (0, 3):
        rows[where][bad] = torch.nan
    store.write(**rows)
    query = torch.randn(2, 2, dtype=dtype, requires_grad=True)
    lists = torch.tensor([0, 1, 3]), torch.tensor([2, 1, 2])
    for normalizer in ("softmax", "sigmoid", "none"):
        given = {"candidates": lists, "score": score, "normalizer": normalizer}
        long = store.read(query, 4, return_aux=True, **given)
        assert long.indices[0].tolist() == [2, -1, -1, -1] and sorted(long.indices[1].tolist()) == [-1, -1, 1, 2]
        assert long.weights[long.indices < 0].eq(0).all() and long.usage.tolist() == [0, 1, 2, 0]
        for row, k in ((0, 1), (1, 2)):
            own = lists[1][lists[0][row] : lists[0][row + 1]]
            alone = torch.tensor([0, len(own)]), own
            exact = store.read(query[row : row + 1], k, **{**given, "candidates": alone})
            torch.testing.assert_close(long.output[row : row + 1], exact)
        (grad,) = torch.autograd.grad(long.output.square().sum(), query)
        assert grad.isfinite().all() and (normalizer == "softmax" or grad.any())
        with torch.no_grad():
            torch.testing.assert_close(store.read(query, 4, **given), long.output)
