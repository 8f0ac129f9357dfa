"""ShardedMemory by columns on 2 and 4 processes against memory_read of one process that has everything.

Scores are sums of P parts. Where all sums are exact (small integers) the bits must be one process's, ties included;
elsewhere scores differ by rounding, and picks by what is that near.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import ranks as processes
import torch
from torch import Tensor

import attnfast
from attnfast.distributed import ShardedMemory, _columns
from attnfast.distributed._picks import best_of_block

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
N, D, D_V, B = 61, 6, 5, 4
EXACT = list(itertools.product((F64, F32, BF16), (1, 7, 40), (False, True)))  # dtype, topk, holes


def tables(dtype: torch.dtype, whole_numbers: bool) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    keys = torch.randn(N, D, generator=generator, dtype=F64)
    keys = (2 * keys).round().clamp(-3, 3) if whole_numbers else keys
    return keys.to(dtype), torch.randn(N, D_V, generator=generator, dtype=F64).to(dtype)


def queries(rank: int, dtype: torch.dtype, whole_numbers: bool) -> Tensor:
    drawn = torch.randn(B, D, generator=torch.Generator().manual_seed(50 + rank), dtype=F64)
    return (drawn.round().clamp(-2, 2) if whole_numbers else drawn).to(dtype)


def memory_of(dtype: torch.dtype, whole_numbers: bool, holes: bool = False, trainable: bool = False) -> ShardedMemory:
    memory = ShardedMemory(None, "columns", capacity=N, key_size=D, value_size=D_V, dtype=dtype, trainable=trainable)
    keys, values = tables(dtype, whole_numbers)
    if trainable:
        with torch.no_grad():
            memory.keys.copy_(keys[:, memory.key_columns])
            memory.values.copy_(values[:, memory.value_columns])
        return memory
    slots = torch.arange(N).flip(0)
    slots = slots[slots % memory.ranks == memory.rank]  # written by whoever has them
    slots = slots[slots % 3 != 1] if holes else slots
    assert torch.equal(memory.write(keys[slots], values[slots], slots), slots)
    want = torch.arange(N) % 3 != 1 if holes else torch.ones(N, dtype=torch.bool)
    assert torch.equal(memory.valid, want)
    assert torch.equal(memory.keys[want], keys[want][:, memory.key_columns])
    assert torch.equal(memory.values[want], values[want][:, memory.value_columns])
    return memory


def everything(rank: int, ranks: int) -> dict[str, Any]:
    _columns.BLOCK_BYTES = 8 * 4 * B * ranks  # several blocks of slots
    found: dict[str, Any] = {"exact": [], "rounded": [], "gradients": {}}
    for dtype, topk, holes in EXACT:
        memory = memory_of(dtype, True, holes)
        found["exact"].append(list(memory(queries(rank, dtype, True), topk=topk, scale=0.5, return_aux=True)))
    for dtype in (F64, F32):
        memory = memory_of(dtype, False, True)
        query = queries(rank, dtype, False)
        first, again = (memory(query, topk=5, return_aux=True) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, again))
        found["rounded"].append([*first[:3], memory(query, scale=0.5)])
    for topk in (3, None):
        memory = memory_of(F64, False, trainable=True)
        query = queries(rank, F64, False).requires_grad_()
        out = memory(query, topk=topk, scale=0.7)
        (out * torch.arange(1.0, D_V + 1, dtype=F64) * (rank + 1)).sum().backward()
        grads = [memory.keys.grad, memory.values.grad]
        if topk is not None:
            assert all(grad.is_sparse for grad in grads)
            found["rows with a gradient"] = [grad.coalesce().indices()[0] for grad in grads]
            assert grads[0]._nnz() == len(found["rows with a gradient"][0])  # one row a slot
        found["gradients"][topk] = [query.grad, *(grad.to_dense() for grad in grads)]
    found["empty"] = empty(rank)
    found["ring"] = ring(rank)
    return found


def empty(rank: int) -> list[Any]:
    memory = ShardedMemory(None, "columns", capacity=9, key_size=4, value_size=4)
    nothing = [memory(torch.ones(2, 4)), memory(torch.ones(2, 4), topk=2)]
    memory.write(torch.ones(1 if rank == 0 else 0, 4), torch.full((1 if rank == 0 else 0, 4), 4.0))
    one = memory(torch.ones(1, 4), topk=3, return_aux=True)
    assert memory(torch.ones(0, 4), topk=3).shape == (0, 4)
    return [*(x.tolist() for x in nothing), *(x.tolist() for x in one[:3])]


def ring(rank: int) -> list[Any]:
    memory = ShardedMemory(None, "columns", capacity=7, key_size=4, value_size=4)
    seen = memory.write(torch.full((1, 4), 10.0 + rank), torch.ones(1, 4)).tolist()
    # The same slot from all ranks, and twice from each: the last row of the highest rank stays.
    rows = torch.tensor([[8.0], [20.0]]).expand(2, 4) + rank
    memory.write(rows, rows, torch.tensor([6, 6]))
    return [seen, memory.values[6].tolist()]


@pytest.fixture(scope="module", params=[2, 4])
def parts(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What all ranks found, by one start of them."""
    return processes.run(request.param, everything)


def test_exact_sums_have_one_process_s_bits(parts: list[dict[str, Any]]) -> None:
    for at, (dtype, topk, holes) in enumerate(EXACT):
        keys, values = tables(dtype, True)
        query = torch.cat([queries(rank, dtype, True) for rank in range(len(parts))])
        mask = torch.arange(N) % 3 != 1 if holes else torch.ones(N, dtype=torch.bool)
        want = attnfast.memory_read(query, keys, values, topk=topk, scale=0.5, mask=mask, return_aux=True)
        out, slots, weights = (torch.cat([part["exact"][at][place] for part in parts]) for place in range(3))
        where = f"{dtype}, topk {topk}, holes {holes}"
        assert torch.equal(slots, want.indices), where
        assert torch.equal(weights, want.weights), where
        assert torch.equal(out, want.output), where
        assert all(torch.equal(part["exact"][at][3], want.usage) for part in parts), where


def test_other_sums_are_rounded(parts: list[dict[str, Any]]) -> None:
    mask = torch.arange(N) % 3 != 1
    for at, dtype in enumerate((F64, F32)):
        keys, values = tables(dtype, False)
        query = torch.cat([queries(rank, dtype, False) for rank in range(len(parts))])
        out, slots, weights, soft = (torch.cat([part["rounded"][at][place] for part in parts]) for place in range(4))
        scores = (query.double() @ keys.double().mT).masked_fill(~mask, -torch.inf)
        bound = 2 * D * torch.finfo(dtype).eps * (query.double().abs() @ keys.double().abs().mT).max()
        chosen = scores.gather(1, slots)
        assert (chosen >= scores.topk(5).values[:, -1:] - bound).all()
        assert (chosen.diff(dim=1) <= bound).all()
        tolerance = 1e-12 if dtype is F64 else 1e-5
        torch.testing.assert_close(weights.double(), chosen.softmax(-1), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(
            out.double(), torch.einsum("bk,bkd->bd", chosen.softmax(-1), values.double()[slots]),
            rtol=tolerance, atol=tolerance,
        )  # fmt: skip
        torch.testing.assert_close(
            soft.double(), (0.5 * scores).softmax(-1) @ values.double(), rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("topk", [3, None])
def test_gradients_are_those_of_one_process(parts: list[dict[str, Any]], topk: int | None) -> None:
    keys, values = (x.requires_grad_() for x in tables(F64, False))
    query = torch.cat([queries(rank, F64, False) for rank in range(len(parts))]).requires_grad_()
    weight = torch.cat([torch.arange(1.0, D_V + 1, dtype=F64).expand(B, -1) * (rank + 1) for rank in range(len(parts))])
    out = attnfast.memory_read(query, keys, values, topk=topk, scale=0.7)
    want = torch.autograd.grad((out * weight).sum(), (query, keys, values))
    found = [part["gradients"][topk] for part in parts]
    for at, expected in enumerate(want):  # queries' by rows, both tables' by columns
        got = torch.cat([each[at] for each in found], 0 if at == 0 else 1)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    if topk is not None:
        picked = want[2].abs().sum(1).nonzero().flatten()
        assert all(torch.equal(rows, picked) for part in parts for rows in part["rows with a gradient"])


def test_writes_and_memories_with_little_in_them(parts: list[dict[str, Any]]) -> None:
    ranks = len(parts)
    for rank, part in enumerate(parts):
        soft, best, out, slots, weights = part["empty"]
        assert soft == best == [[0.0] * 4] * 2
        assert (out, slots, weights) == ([[4.0] * 4], [[0, -1, -1]], [[1.0, 0.0, 0.0]])
        seen, last = part["ring"]
        assert seen == [rank]
        assert last == [20.0 + ranks - 1] * len(_columns.columns_of(4, rank, ranks))


def test_columns_are_dealt_out_evenly() -> None:
    for size, ranks in ((6, 4), (5, 2), (7, 7), (64, 3)):
        dealt = [_columns.columns_of(size, rank, ranks) for rank in range(ranks)]
        assert list(itertools.chain(*dealt)) == list(range(size))
        assert max(map(len, dealt)) - min(map(len, dealt)) <= 1 and len(dealt[0]) == max(map(len, dealt))


def test_the_best_of_a_block_are_the_first_among_equals() -> None:
    inf, nan = torch.inf, torch.nan
    scores = torch.tensor([[1.0, 2.0, 1.0, 3.0, 1.0], [0.0, 0.0, 0.0, 0.0, 0.0], [-inf, -inf, 5.0, -inf, -inf]])
    assert best_of_block(scores, 3).tolist() == [[0, 1, 3], [0, 1, 2], [0, 1, 2]]
    assert best_of_block(torch.tensor([[1.0, nan, 2.0, 2.0]]), 2).tolist() == [[1, 2]]
    assert best_of_block(torch.tensor([[1.0, 2.0]]), 2).tolist() == [[0, 1]]


def refusals(rank: int, ranks: int) -> list[str]:
    messages = []
    for sizes in ((1, 4), (4, 1)):
        with pytest.raises(ValueError) as error:
            ShardedMemory(None, "columns", capacity=4, key_size=sizes[0], value_size=sizes[1])
        messages.append(str(error.value))
    return messages


def test_fewer_columns_than_ranks_are_refused() -> None:
    for found in processes.run(2, refusals):
        assert found == [
            "key_size: expected at least 2 columns for as many ranks, got 1",
            "value_size: expected at least 2 columns for as many ranks, got 1",
        ]
