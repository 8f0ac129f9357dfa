"""attnfast.distributed.ShardedMemory on 1, 2 and 4 processes against memory_read of one process that has all rows."""

from __future__ import annotations

from typing import Any

import pytest
import ranks as processes
import torch
from torch import Tensor

import attnfast
from attnfast.distributed import ShardedMemory
from attnfast.distributed._picks import best_of

F64 = torch.float64
N, D, D_V, B = 37, 6, 5, 8  # 37 is no multiple of 2 or 4


def tables(dtype: torch.dtype, ties: bool = False) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(11)
    keys, values = (torch.randn(N, size, generator=generator, dtype=F64).to(dtype) for size in (D, D_V))
    if ties:
        keys = keys[torch.arange(N) % 4]  # every key nine times, over all ranks
    return keys, values


def queries(rank: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(B, D, generator=torch.Generator().manual_seed(100 + rank), dtype=F64).to(dtype)


def filled(rank: int, dtype: torch.dtype, ties: bool, holes: bool, trainable: bool = False) -> ShardedMemory:
    memory = ShardedMemory(capacity=N, key_size=D, value_size=D_V, dtype=dtype, trainable=trainable)
    keys, values = tables(dtype, ties)
    mine = slice(memory.first, memory.first + len(memory.valid))
    if trainable:
        with torch.no_grad():
            memory.keys.copy_(keys[mine])
            memory.values.copy_(values[mine])
    else:
        # From whoever has them: rank r writes every row whose number is r, modulo the ranks, backwards.
        slots = torch.arange(N).flip(0)
        slots = slots[slots % memory.ranks == rank]
        if holes:
            slots = slots[slots % 3 != 1]
        assert torch.equal(memory.write(keys[slots], values[slots], slots), slots)
        want = torch.arange(N)[mine] % 3 != 1 if holes else torch.ones(len(memory.valid), dtype=torch.bool)
        assert torch.equal(memory.valid, want) and torch.equal(memory.keys[want], keys[mine][want])
    return memory


READS: list[tuple[torch.dtype, int | None, bool, bool]] = [
    (dtype, topk, ties, holes)
    for dtype in (F64, torch.float32, torch.bfloat16)
    for topk, ties, holes in (
        (1, False, False),
        (5, True, False),
        (12, False, True),
        (30, True, True),
        (None, False, True),
    )
]


def reads(rank: int, ranks: int) -> list[Any]:
    results: list[Any] = []
    for dtype, topk, ties, holes in READS:
        memory = filled(rank, dtype, ties, holes)
        query = queries(rank, dtype).reshape(2, B // 2, D)
        if topk is None:
            results.append([memory(query, scale=0.5).flatten(0, 1)])
        else:
            out, slots, weights, usage = memory(query, topk=topk, scale=0.5, return_aux=True)
            assert out.shape == (2, B // 2, D_V) and slots.shape == weights.shape == (2, B // 2, topk)
            results.append([out.flatten(0, 1), slots.flatten(0, 1), weights.flatten(0, 1), usage])
    return results


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_reads_are_those_of_one_process(ranks: int) -> None:
    parts = processes.run(ranks, reads)
    for at, (dtype, topk, ties, holes) in enumerate(READS):
        keys, values = tables(dtype, ties)
        mask = torch.arange(N) % 3 != 1 if holes else torch.ones(N, dtype=torch.bool)
        query = torch.cat([queries(rank, dtype) for rank in range(ranks)])
        want = attnfast.memory_read(query, keys, values, topk=topk, scale=0.5, mask=mask, return_aux=True)
        got = [torch.cat([part[at][place] for part in parts]) for place in range(len(parts[0][at]))]
        where = f"{dtype}, topk {topk}, ties {ties}, holes {holes}"
        if topk is None:
            tolerance = 1e-12 if dtype is F64 else 2 * torch.finfo(dtype).eps
            torch.testing.assert_close(got[0], want.output, rtol=tolerance, atol=tolerance, msg=where)
        else:  # the same bits
            assert torch.equal(got[1], want.indices), where
            assert torch.equal(got[2], want.weights), where
            assert torch.equal(got[0], want.output), where
            assert torch.equal(got[3], want.usage), where


def gradients(rank: int, ranks: int, topk: int | None) -> list[Tensor]:
    memory = filled(rank, F64, False, False, trainable=True)
    query = queries(rank, F64).requires_grad_()
    out = memory(query, topk=topk, scale=0.7)
    weight = torch.arange(1.0, D_V + 1, dtype=F64) * (rank + 1)
    (out * weight).sum().backward()
    assert query.grad is not None and memory.keys.grad is not None and memory.values.grad is not None
    if topk is not None:
        assert memory.keys.grad.is_sparse and memory.values.grad.is_sparse
        rows = [table.grad.coalesce().indices()[0] for table in (memory.keys, memory.values)]
        assert memory.values.grad._nnz() == len(rows[1]) and torch.equal(*rows)  # one row a slot
        usage = memory(query, topk=topk, scale=0.7, return_aux=True).usage
        assert torch.equal(rows[1], usage.nonzero().flatten()) and len(rows[1]) < len(
            usage
        )  # of those that were picked
    return [query.grad, memory.keys.grad.to_dense(), memory.values.grad.to_dense()]


@pytest.mark.parametrize("topk", [3, None])
def test_gradients_are_those_of_one_process(topk: int | None) -> None:
    ranks = 2
    parts = processes.run(ranks, gradients, topk)
    keys, values = (x.requires_grad_() for x in tables(F64))
    query = torch.cat([queries(rank, F64) for rank in range(ranks)]).requires_grad_()
    weight = torch.cat([torch.arange(1.0, D_V + 1, dtype=F64).expand(B, -1) * (rank + 1) for rank in range(ranks)])
    out = attnfast.memory_read(query, keys, values, topk=topk, scale=0.7)
    want = torch.autograd.grad((out * weight).sum(), (query, keys, values))
    for at, expected in enumerate(want):
        torch.testing.assert_close(torch.cat([part[at] for part in parts]), expected, rtol=1e-10, atol=1e-12)


def ring(rank: int, ranks: int) -> list[Any]:
    memory = ShardedMemory(capacity=7, key_size=2, value_size=1)
    seen = []
    for step, count in enumerate([2, 0, 3]):
        rows = count + rank  # each rank another number
        keys = torch.full((rows, 2), float(10 * step + rank))
        seen.append(memory.write(keys, keys[:, :1]).tolist())
    empty = ShardedMemory(capacity=5, key_size=2, value_size=1)
    nothing = empty(torch.ones(3, 2), topk=2), empty(torch.ones(3, 2))
    partly = ShardedMemory(capacity=5, key_size=2, value_size=1)
    partly.write(torch.ones(1 - rank, 2), torch.full((1 - rank, 1), 4.0))
    found = partly(torch.ones(1, 2), topk=3, return_aux=True)
    # The same slot from two ranks, and twice from one: the last row of the highest rank stays.
    partly.write(torch.ones(2, 2), torch.tensor([[8.0 + rank], [20.0 + rank]]), torch.tensor([3, 3]))
    twice = partly(torch.ones(1, 2), topk=2, return_aux=True)
    return [
        seen,
        memory.keys[:, 0].tolist(),
        [x.tolist() for x in nothing],
        [x.tolist() for x in found[:3]],
        twice.output.item(),
    ]


def test_writes_go_round_and_empty_slots_are_not_read() -> None:
    first, second = processes.run(2, ring)
    assert first[0] == [[0, 1], [], [6, 0, 1]]
    assert second[0] == [[2, 3, 4], [5], [2, 3, 4, 5]]
    assert first[1] + second[1] == [20.0, 20.0, 21.0, 21.0, 21.0, 21.0, 20.0]
    for rank in (first, second):
        assert rank[2] == [[[0.0]] * 3, [[0.0]] * 3]
        assert rank[3] == [[[4.0]], [[0, -1, -1]], [[1.0, 0.0, 0.0]]]
        assert rank[4] == pytest.approx((4.0 + 21.0) / 2)


def refusals(rank: int, ranks: int) -> list[str]:
    memory = ShardedMemory(capacity=4, key_size=3, value_size=2)
    query = torch.ones(2, 3)
    calls: list[Any] = [
        lambda: memory(query if rank else query[:1], topk=2),
        lambda: memory(query, topk=1 + rank),
        lambda: memory(query, topk=5),
        lambda: memory(query[:, :2]),
        lambda: memory(query.double()),
        lambda: memory(query, return_aux=True),
        lambda: memory.write(torch.ones(2, 3), torch.ones(3, 2)),
        lambda: memory.write(torch.ones(1, 3), torch.ones(1, 2), torch.tensor([4])),
        lambda: memory.write(torch.ones(5, 3), torch.ones(5, 2)),
        lambda: memory.write(torch.ones(1, 3), torch.ones(1, 2), torch.tensor([1]) if rank else None),
        lambda: ShardedMemory(capacity=4, key_size=3, value_size=2, placement="diagonal"),
        lambda: ShardedMemory(capacity=0, key_size=3, value_size=2),
    ]
    messages = []
    for call in calls:
        with pytest.raises((ValueError, TypeError)) as error:
            call()
        messages.append(str(error.value))
    with pytest.raises(ValueError) as error:
        memory(query[:, :2] if rank else query)  # one rank alone
    messages.append(str(error.value))
    assert memory(query).tolist() == [[0, 0]] * 2  # and all is well afterwards
    return messages


def test_bad_arguments_are_errors_on_all_ranks() -> None:
    first, second = processes.run(2, refusals)
    wanted = [
        "query shape: expected the same on every rank, got [1, 3] on rank 0 and [2, 3] on rank 1",
        "topk: expected the same on every rank, got 1 on rank 0 and 2 on rank 1",
        "topk: expected 1 to 4, got 5",
        "query: expected [..., 3], got [2, 2]",
        "query: expected torch.float32 (the memory's dtype), got torch.float64",
        "return_aux: expected False without topk, got True",
        "values: expected M = 2 (keys') rows, got 3",
        "slots: expected 0 to 3, got [4]",
        "keys: expected at most 4 rows of all ranks together, got 10",
        "slots given: expected the same on every rank, got 0 on rank 0 and 1 on rank 1",
        "placement: expected 'rows' or 'columns', got 'diagonal'",
        "capacity: expected an integer > 0, got 0",
    ]
    assert first[:-1] == second[:-1] == wanted
    assert first[-1] == "ShardedMemory.read: rank 1 refused its arguments; its own error says why"
    assert second[-1] == "query: expected [..., 3], got [2, 2]"


def test_the_best_of_several_lists() -> None:
    inf, nan = torch.inf, torch.nan
    scores = torch.tensor([[2.0, -inf, -inf, 3.0, 2.0, -inf], [nan, 1.0, -inf, nan, 5.0, 1.0]])
    slots = torch.tensor([[4, 1, -1, 9, 8, 7], [0, 3, -1, 6, 7, 8]])
    got, at = best_of(scores, slots, 5)
    assert at.tolist() == [[9, 4, 8, 1, 7], [0, 6, 7, 3, 8]]  # a true -inf stands before a place without a slot
    assert got[0].tolist() == [3, 2, 2, -inf, -inf]


def messages_of_a_read(rank: int, ranks: int) -> list[list[int]]:
    """Elements that collectives carried in reads of a small and of a large memory."""
    import torch.distributed as dist

    carried = []
    original = dist.all_gather, dist.all_to_all_single
    for capacity in (64, 4096):
        memory = ShardedMemory(capacity=capacity, key_size=4, value_size=3, trainable=True)
        sizes: list[int] = []

        def all_gather(parts: Any, x: Tensor, sizes: list[int] = sizes, **options: Any) -> Any:
            sizes.append(x.numel() * ranks)
            return original[0](parts, x, **options)

        def all_to_all(out: Tensor, x: Tensor, *args: Any, sizes: list[int] = sizes, **options: Any) -> Any:
            sizes.append(-1 if args else x.numel())  # split by owner: bounded by the picks, checked below
            assert x.numel() <= 5 * 8 * 4 * ranks
            return original[1](out, x, *args, **options)

        dist.all_gather, dist.all_to_all_single = all_gather, all_to_all
        try:
            for topk in (8, None):
                memory(torch.ones(5, 4, requires_grad=True), topk=topk).sum().backward()
        finally:
            dist.all_gather, dist.all_to_all_single = original
        carried.append(sizes)
    return carried


def test_traffic_does_not_grow_with_the_memory() -> None:
    for small, large in processes.run(2, messages_of_a_read):
        assert small == large and len(small) > 5
