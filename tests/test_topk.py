"""topk_scores and its specification against a stable sort of the definition, written here a second time.

Operands of small integers have exact scores in every dtype, with many ties, so results are compared bit for bit.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FLOATS, dtype_id, error, real
from torch import Tensor

import attnfast
from attnfast import _C, reference

NAN, INF = math.nan, math.inf
ROOT = Path(__file__).resolve().parent.parent

# (queries, slots, D, k): one for each way through the kernel.
PATHS: dict[str, tuple[int, int, int, int]] = {
    "one query": (1, 5000, 33, 32),
    "a few queries": (3, 700, 20, 100),
    "one query, large k": (1, 9000, 8, 2048),
    "one query over ranges": (1, 70_000, 8, 5),
    "half a panel": (17, 3000, 40, 7),
    "a narrow panel": (7, 2500, 17, 64),
    "panels": (70, 1024, 64, 32),
    "a slot more than the first look": (33, 1153, 16, 32),
    "many slots": (70, 6000, 24, 20),
    "large k": (9, 9000, 5, 2048),
    "deep": (66, 1300, 300, 32),
    "panels over ranges": (9, 70_000, 6, 40),
    "conflicting rows": (6, 1500, 1024, 12),
    "few slots": (70, 5, 9, 5),
    "one of one": (5, 1, 1, 1),
    "all": (6, 64, 3, 64),
    "no elements": (6, 40, 0, 4),
}


def oracle(scores: Tensor, k: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Row by row, in Python: NaN first, then by score, then by slot; hidden slots left out."""
    values, slots = [], []
    for row, visible in zip(scores.double(), (torch.ones_like(scores) if mask is None else mask).bool(), strict=True):
        place = [(not math.isnan(x), 0.0 if math.isnan(x) else -x, n) for n, x in enumerate(row.tolist())]
        chosen = sorted((n for n in range(len(row)) if visible[n]), key=place.__getitem__)
        chosen = chosen[:k]
        values.append([row[n].item() for n in chosen] + [-INF] * (k - len(chosen)))
        slots.append(chosen + [-1] * (k - len(chosen)))
    shape = (len(scores), k)
    return torch.tensor(values, dtype=torch.float64).reshape(shape), torch.tensor(slots).long().reshape(shape)


def sorted_stably(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The same where nothing is hidden, by torch."""
    values, slots = scores.double().sort(dim=-1, descending=True, stable=True)
    return values[:, :k], slots[:, :k]


def integers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, bound: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-bound, bound + 1, shape, generator=generator).to(dtype)


def assert_same(got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(got[0].double(), wanted[0], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(got[1], wanted[1])


@pytest.fixture(params=["reference", "kernel"])
def topk(request: pytest.FixtureRequest) -> Callable[..., tuple[Tensor, Tensor]]:
    return reference.topk_scores if request.param == "reference" else attnfast.topk_scores


# --------------------------------------------------------------------------------------------------------------- result


@pytest.mark.bf16
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
def test_equals_a_stable_sort(isa: str, dtype: torch.dtype, path: tuple[int, int, int, int]) -> None:
    B, N, D, k = path
    query, keys = integers(B, D, dtype=dtype), integers(N, D, dtype=dtype, seed=1)
    wanted = sorted_stably(query.double() @ keys.double().T, k)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        scores, indices = attnfast.topk_scores(query, keys, k)
        assert scores.dtype == real(dtype) and indices.dtype == torch.int64
        assert_same((scores, indices), wanted)


@pytest.mark.parametrize("path", [p for p in PATHS.values() if p[0] * p[1] <= 25_000])
def test_reference_equals_the_definition(dtype: torch.dtype, path: tuple[int, int, int, int]) -> None:
    B, N, D, k = path
    query, keys = integers(B, D, dtype=dtype), integers(N, D, dtype=dtype, seed=1)
    mask = integers(B, N, seed=2) > 0
    scores = query.double() @ keys.double().T
    assert_same(reference.topk_scores(query, keys, k), oracle(scores, k))
    assert_same(reference.topk_scores(query, keys, k, mask=mask), oracle(scores, k, mask))


@pytest.mark.bf16
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
def test_ordinary_numbers(isa: str, dtype: torch.dtype, path: tuple[int, int, int, int]) -> None:
    """Scores are as near to float64's as plain torch's in the accumulation type, and no better slot was left out."""
    B, N, D, k = path
    query, keys = torch.randn(B, D).to(dtype), torch.randn(N, D).to(dtype)
    scores, indices = attnfast.topk_scores(query, keys, k, scale=0.37)
    exact = 0.37 * query.double() @ keys.double().T
    plain = 0.37 * query.to(real(dtype)) @ keys.to(real(dtype)).T
    limit = 2 * error(plain, exact) + 8 * torch.finfo(real(dtype)).eps * max(1.0, exact.abs().max().item())
    assert error(scores, exact.gather(1, indices)) <= limit
    assert error(scores, exact.sort(descending=True).values[:, :k]) <= limit
    assert (scores[:, 1:] <= scores[:, :-1]).all()
    assert all(len(set(row)) == k for row in indices.tolist())


@pytest.mark.bf16
@pytest.mark.parametrize("order", ["rising", "falling", "equal", "zeros of both signs"])
@pytest.mark.parametrize("path", ["one query over ranges", "panels", "many slots", "large k"])
def test_orders_of_the_slots(isa: str, path: str, order: str) -> None:
    """Every score a new best one, or none after the first k; equal scores stay in order, 0 and -0 among them."""
    B, N, D, k = PATHS[path]
    column = torch.arange(N, dtype=torch.float32)
    column = {"rising": column, "falling": -column, "equal": column * 0 + 3}.get(order, column % 2 * -0.0)
    query, keys = torch.ones(B, D), torch.zeros(N, D)
    keys[:, -1] = column
    if order.startswith("zeros"):  # -0 as a sum of products needs every product to be -0
        keys, query = -0.0 * torch.ones(N, D) * (torch.arange(N) % 2)[:, None], torch.ones(B, D)
    assert_same(attnfast.topk_scores(query, keys, k), sorted_stably(query.double() @ keys.double().T, k))


@pytest.mark.parametrize("B", [1, 3, 20, 70])
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
def test_not_finite(isa: str, dtype: torch.dtype, B: int) -> None:
    """NaN comes first, +inf after it; -inf of a visible slot before the places that stay empty."""
    N, D, k = 1500, 8, 40
    query, keys = integers(B, D, dtype=dtype).abs() + 1, integers(N, D, dtype=dtype, seed=1)
    keys[90, 0] = INF
    keys[700, 3], keys[1400, 2] = torch.full((2,), NAN, dtype=dtype).copysign(torch.tensor([-1, 1], dtype=dtype))
    assert keys[[700, 1400], [3, 2]].signbit().tolist() == [True, False]
    keys[3], keys[1300] = INF, -INF
    mask = torch.ones(B, N, dtype=torch.bool)
    scores = query.double() @ keys.double().T
    assert_same(attnfast.topk_scores(query, keys, k), oracle(scores, k))
    mask[0] = False
    mask[0, [5, 90, 700, 1300, 1401]] = True
    got = attnfast.topk_scores(query, keys, k, mask=mask)
    assert_same(got, oracle(scores, k, mask))
    assert got[1][0].tolist() == [700, 90, *sorted([5, 1401], key=lambda n: -scores[0, n]), 1300] + [-1] * 35
    mask[0, 700] = False  # what is hidden may hold anything
    assert not attnfast.topk_scores(query, keys, k, mask=mask)[0][0].isnan().any()


def test_a_full_house_of_nan(isa: str) -> None:
    for B in (1, 20):
        keys = torch.full((2000, 4), NAN)
        scores, indices = attnfast.topk_scores(torch.ones(B, 4), keys, 6)
        assert scores.isnan().all() and torch.equal(indices, torch.arange(6).expand(B, 6))
        keys = torch.full((2000, 4), -INF)
        keys[1990] = INF
        scores, indices = attnfast.topk_scores(torch.ones(B, 4), keys, 6)
        assert scores.tolist() == [[INF] + [-INF] * 5] * B
        assert indices.tolist() == [[1990, 0, 1, 2, 3, 4]] * B


@pytest.mark.bf16
@pytest.mark.parametrize("path", [*PATHS.values()], ids=PATHS.keys())
def test_masks(isa: str, path: tuple[int, int, int, int]) -> None:
    B, N, D, k = path
    query, keys = integers(B, D), integers(N, D, seed=1)
    scores = query.double() @ keys.double().T
    generator = torch.Generator().manual_seed(3)

    def check(mask: Tensor) -> None:
        shown = mask.expand(B, N)
        values = scores.masked_fill(~shown, -INF)
        wanted = sorted_stably(values, k)  # finite scores: what is hidden sorts last
        wanted[1][wanted[0] == -INF] = -1
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert_same(attnfast.topk_scores(query, keys, k, mask=mask), wanted)

    for share in (0.5, 0.999, 0.01):
        check(torch.rand(B, N, generator=generator) < share)
    check(torch.rand(N, generator=generator) < 0.3)
    check(torch.rand(1, N, generator=generator) < 0.3)
    check((torch.rand(N, B, generator=generator) < 0.3).T)
    check((torch.rand(B, 3 * N, generator=generator) < 0.3)[:, ::3])
    check(torch.rand(B, 1, generator=generator) < 0.5)
    check(torch.zeros(N, dtype=torch.bool))
    check(torch.arange(N) >= N - 1)


def test_mask_of_other_bytes(isa: str) -> None:
    """Any byte but zero is true."""
    mask = torch.zeros(200, dtype=torch.uint8)
    mask[[3, 77, 150]] = torch.tensor([2, 128, 255], dtype=torch.uint8)
    for B in (1, 20):
        assert (attnfast.topk_scores(torch.zeros(B, 4), torch.zeros(200, 4), 4, mask=mask.view(torch.bool))[1]
                == torch.tensor([3, 77, 150, -1])).all()  # fmt: skip


@pytest.mark.parametrize("B", [2, 30])
def test_strides(isa: str, dtype: torch.dtype, B: int) -> None:
    N, D, k = 1300, 20, 9
    query, keys = integers(B, D, dtype=dtype), integers(N, D, dtype=dtype, seed=1)
    wanted = sorted_stably(query.double() @ keys.double().T, k)
    wide = torch.full((N + 2, 2 * D), NAN, dtype=dtype)
    wide[1:-1, 3 : D + 3] = keys
    tables = [keys, wide[1:-1, 3 : D + 3], keys.T.contiguous().T, keys.repeat_interleave(2, 1)[:, ::2]]
    tables.append(torch._neg_view(-keys))
    for x in (query, query.T.contiguous().T, query.repeat_interleave(3, 1)[:, ::3], torch._neg_view(-query)):
        for table in tables:
            assert_same(attnfast.topk_scores(x, table, k), wanted)
    same = attnfast.topk_scores(query[:1].expand(B, D), keys[:1].expand(N, D), k)
    assert torch.equal(same[1], torch.arange(k).expand(B, k))


@pytest.mark.parametrize("query_dtype", FLOATS[1:], ids=dtype_id)
@pytest.mark.parametrize("keys_dtype", FLOATS[1:], ids=dtype_id)
def test_dtypes_may_differ(topk: Any, query_dtype: torch.dtype, keys_dtype: torch.dtype) -> None:
    query, keys = integers(5, 12, dtype=query_dtype), integers(300, 12, dtype=keys_dtype, seed=1)
    scores, indices = topk(query, keys, 8)
    assert scores.dtype == torch.float32
    assert_same((scores, indices), sorted_stably(query.double() @ keys.double().T, 8))
    leaves = query.requires_grad_(), keys.requires_grad_()
    grads = torch.autograd.grad(topk(*leaves, 8)[0].sum(), leaves)
    assert [g.dtype for g in grads] == [query_dtype, keys_dtype]


def codes(N: int, D: int) -> tuple[Tensor, Tensor]:
    """Keys in int8, and scales whose products are exact."""
    generator = torch.Generator().manual_seed(5)
    return integers(N, D, dtype=torch.int8, seed=1, bound=5), 2.0 ** torch.randint(-3, 3, (N,), generator=generator)


@pytest.mark.bf16
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
def test_keys_in_int8(isa: str, path: tuple[int, int, int, int]) -> None:
    B, N, D, k = path
    keys, scales = codes(N, D)
    for dtype in (torch.float32, torch.bfloat16):
        query = integers(B, D, dtype=dtype)
        scores = query.double() @ (keys.double() * scales.double()[:, None]).T
        mask = integers(N, seed=2) >= 0
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found = attnfast.topk_scores(query, keys, k, key_scales=scales)
            assert found[0].dtype == torch.float32
            assert_same(found, sorted_stably(scores, k))
            wanted = sorted_stably(scores.masked_fill(~mask, -INF), k)
            wanted[1][wanted[0] == -INF] = -1
            assert_same(attnfast.topk_scores(query, keys, k, key_scales=scales, mask=mask), wanted)


@pytest.mark.parametrize("B", [2, 30])
def test_strides_of_int8(isa: str, B: int) -> None:
    keys, scales = codes(1300, 20)
    query = integers(B, 20)
    wanted = attnfast.topk_scores(query, keys, 9, key_scales=scales)
    wide = torch.full((1302, 50), 100, dtype=torch.int8)
    wide[1:-1, 3:23] = keys
    for table in (wide[1:-1, 3:23], keys.T.contiguous().T):
        for apart in (scales, scales.repeat_interleave(2)[::2]):
            found = attnfast.topk_scores(query, table, 9, key_scales=apart)
            assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


def test_derivatives_with_keys_in_int8() -> None:
    """The query's first and second are those with the numbers that the codes stand for."""
    keys, scales = codes(60, 7)
    query, found = torch.randn(5, 7), []
    for table, given in ((keys, {"key_scales": scales}), (keys * scales[:, None], {})):
        leaf = query.clone().requires_grad_()
        scores, indices = attnfast.topk_scores(leaf, table, 6, scale=0.7, **given)
        (grad,) = torch.autograd.grad(scores.pow(3).sum(), leaf, create_graph=True)
        found.append((scores.detach(), indices, grad.detach(), *torch.autograd.grad(grad.square().sum(), leaf)))
    assert found[0][2].any() and found[0][3].any()
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted)


def test_shapes(topk: Any) -> None:
    keys = integers(50, 6, seed=1)
    for leading in ((), (3,), (2, 3), (2, 0, 3), (1, 1, 4)):
        query = integers(*leading, 6)
        scores, indices = topk(query, keys, 7)
        assert scores.shape == indices.shape == (*leading, 7)
        flat = query.reshape(math.prod(leading), 6)
        assert_same((scores.reshape(-1, 7), indices.reshape(-1, 7)), sorted_stably(flat @ keys.T, 7))
        for k in (0, 50):
            assert topk(query, keys, k)[1].shape == (*leading, k)
        scores, indices = topk(query, keys[:0], 0)
        assert scores.shape == indices.shape == (*leading, 0)
    query = integers(2, 3, 6)
    for mask_shape in ((50,), (3, 50), (2, 1, 50), (2, 3, 50), (1, 1, 1), (2, 3, 1)):
        mask = integers(*mask_shape, seed=4) > 0
        got = topk(query, keys, 7, mask=mask)
        wanted = oracle((query @ keys.T).flatten(0, 1), 7, mask.expand(2, 3, 50).flatten(0, 1))
        assert_same((got[0].flatten(0, 1), got[1].flatten(0, 1)), wanted)


@pytest.mark.parametrize("scale", [0.0, -0.5, 2.0])
def test_scale(topk: Any, scale: float) -> None:
    query, keys = integers(20, 6), integers(300, 6, seed=1)
    assert_same(topk(query, keys, 9, scale=scale), sorted_stably(scale * query.double() @ keys.double().T, 9))


# ------------------------------------------------------------------------------------------------------------- sifting
# avx512_bf16 leaves out scores that a product of bfloat16 shows to be too small; what it returns is avx512's.

SIFTING = "avx512_bf16"
sifting = pytest.mark.skipif(SIFTING not in _C.available_isas(), reason="this machine lacks AVX512_BF16")


def both(*args: Any, **kwargs: Any) -> list[tuple[Tensor, Tensor]]:
    before, results = _C.get_isa(), []
    for isa in ("avx512", SIFTING):
        _C.set_isa(isa)
        results.append(attnfast.topk_scores(*args, **kwargs))
    _C.set_isa(before)
    return results


def wild(keys: Tensor) -> Tensor:
    keys[2000], keys[3000], keys[4000] = INF, NAN, 3e38
    keys[3500], keys[4100:4200] = -3e38, 1e-40
    return keys


DATA: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "ordinary": lambda q, n: (q, n),
    "close together": lambda q, n: (q, n + 20),
    "small integers": lambda q, n: (q.round(), n.round()),
    "equal": lambda q, n: (q, n[:1].expand(n.shape)),
    "queries of zeros": lambda q, n: (q * (torch.arange(len(q)) % 3 == 0)[:, None], n),
    "long and short keys": lambda q, n: (q, n * torch.logspace(-6, 6, len(n))[torch.randperm(len(n)), None]),
    "huge": lambda q, n: (q * 1e19, n * 1e16),
    "tiny": lambda q, n: (q * 1e-25, n * 1e-18),
    "subnormal": lambda q, n: (q * 1e-40, n * 1e30),
    "not finite": lambda q, n: (q, wild(n)),
    "infinite query": lambda q, n: (q * torch.tensor([INF] + [1.0] * (len(q) - 1))[:, None], n),
    "rising": lambda q, n: (q.abs(), torch.arange(len(n))[:, None] * n[:1].abs()),
    "bfloat16": lambda q, n: (q, n.bfloat16()),
    "float16": lambda q, n: (q.half(), n.half()),
}


@sifting
@pytest.mark.parametrize("shape", [(9, 24, 8), (33, 33, 32), (70, 130, 5), (130, 1, 3)], ids=str)
@pytest.mark.parametrize("data", DATA)
def test_sifting_changes_no_bit(data: str, shape: tuple[int, int, int]) -> None:
    B, D, k = shape
    query, keys = DATA[data](torch.randn(B, D), torch.randn(9000, D))
    masks = None, torch.rand(B, 9000) < 0.3, torch.arange(9000) % 5 == 2
    for threads, mask in itertools.product((1, 2), masks):
        torch.set_num_threads(threads)
        plain, sifted = both(query, keys, k, mask=mask)
        assert torch.equal(plain[0].nan_to_num(nan=7.0), sifted[0].nan_to_num(nan=7.0))
        assert torch.equal(plain[1], sifted[1])


@sifting
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("B", [9, 70])
def test_sifting_allows_for_the_largest_error(B: int, sign: int) -> None:
    """Elements just below the middle between two numbers of bfloat16, all rounded the same way: the products say that
    the best slot scores 1 / 128 less than it does."""
    element = 1 + 2.0**-8 - 2.0**-16
    query, keys = torch.full((B, 64), sign * element), torch.zeros(6000, 64)
    keys[:4] = sign * element * (1 - 2.0**-12)
    keys[5000] = sign * element
    for scores, indices in both(query, keys, 4):
        assert indices.tolist() == [[5000, 0, 1, 2]] * B
        assert (scores[:, 0] > scores[:, 1]).all()


# ------------------------------------------------------------------------------------------------------------- threads


@pytest.mark.bf16
@pytest.mark.parametrize("path", ["one query over ranges", "panels over ranges", "panels", "deep", "large k"])
def test_no_bit_depends_on_the_number_of_threads(isa: str, dtype: torch.dtype, path: str) -> None:
    B, N, D, k = PATHS[path]
    query, keys = torch.randn(B, D).to(dtype).requires_grad_(), torch.randn(N, D).to(dtype).requires_grad_()
    probe = torch.randn(B, k).to(real(dtype))
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        scores, indices = attnfast.topk_scores(query, keys, k)
        results.append((scores, indices, *torch.autograd.grad(scores, (query, keys), probe)))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_no_buffer_of_scores() -> None:
    """A million slots for 512 queries would be 2 GiB of scores; forward and backward take less than a thirtieth."""
    script = """
import resource, torch, attnfast
torch.set_num_threads(2)
keys = torch.randn(1_000_000, 8)
query = torch.randn(512, 8, requires_grad=True)
attnfast.topk_scores(query[:8], keys[:2000], 16)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
attnfast.topk_scores(query, keys, 16)[0].sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert int(run.stdout) < 64 << 10  # KiB


# ----------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("B", [2, 6])
def test_gradcheck(topk: Any, B: int, masked: bool) -> None:
    query, keys = (torch.randn(n, 5, dtype=torch.float64, requires_grad=True) for n in (B, 30))
    mask = integers(B, 30, seed=2) > 0 if masked else None
    if mask is not None:
        mask[0] = torch.arange(30) < 2  # fewer than k

    def scores(query: Tensor, keys: Tensor) -> Tensor:
        found, indices = topk(query, keys, 4, scale=0.7, mask=mask)
        return found.where(indices >= 0, 0.0)

    assert torch.autograd.gradcheck(scores, (query, keys))
    assert torch.autograd.gradgradcheck(scores, (query, keys))


@pytest.mark.parametrize("B", [1, 3, 40])
def test_gradients_are_the_reference_s(isa: str, dtype: torch.dtype, B: int) -> None:
    """With slots that many queries choose, and slots that none does."""
    N, D, k = 700, 37, 24
    query, keys = torch.randn(B, D).to(dtype), torch.randn(N, D).to(dtype)
    mask = torch.arange(N) % 16 == 3
    probe = torch.randn(B, k)
    grads = []
    for function, kind in ((attnfast.topk_scores, dtype), (reference.topk_scores, torch.float64)):
        leaves = query.to(kind).requires_grad_(), keys.to(kind).requires_grad_()
        scores, indices = function(*leaves, k, scale=1.3, mask=mask)
        grads.append((indices, *torch.autograd.grad((scores * probe.to(scores.dtype)).sum(), leaves)))
    assert torch.equal(grads[0][0], grads[1][0])
    for got, wanted in zip(grads[0][1:], grads[1][1:], strict=True):
        assert got.dtype == dtype
        limit = (torch.finfo(dtype).eps + 64 * torch.finfo(real(dtype)).eps) * wanted.abs().max().item()
        assert error(got, wanted) <= limit
    chosen = torch.zeros(N, dtype=torch.bool)
    chosen[grads[0][0].flatten()] = True
    assert (grads[0][2][~chosen] == 0).all() and grads[0][2][chosen].any(1).all()


def test_only_what_wants_a_gradient_gets_one() -> None:
    query, keys = torch.randn(6, 5, requires_grad=True), torch.randn(40, 5, requires_grad=True)
    both = torch.autograd.grad(attnfast.topk_scores(query, keys, 3)[0].sum(), (query, keys))
    alone = torch.autograd.grad(attnfast.topk_scores(query, keys.detach(), 3)[0].sum(), query)[0]
    assert torch.equal(alone, both[0])
    alone = torch.autograd.grad(attnfast.topk_scores(query.detach(), keys, 3)[0].sum(), keys)[0]
    assert torch.equal(alone, both[1])
    scores, indices = attnfast.topk_scores(query, keys, 3)
    assert scores.requires_grad and not indices.requires_grad
    with torch.no_grad():
        assert not attnfast.topk_scores(query, keys, 3)[0].requires_grad


@pytest.mark.parametrize("B", [2, 20])
def test_what_is_hidden_reaches_no_gradient(topk: Any, B: int) -> None:
    query, keys = torch.randn(B, 5, requires_grad=True), torch.randn(300, 5)
    keys[::3] = NAN
    keys.requires_grad_()
    mask = (torch.arange(300) % 3 != 0).repeat(B, 1)
    mask[0, 4:] = False  # fewer than k
    scores, indices = topk(query, keys, 4, mask=mask)
    finite = scores.where(indices >= 0, 0.0)
    for grad in torch.autograd.grad(finite.square().sum(), (query, keys), create_graph=True):
        assert grad.isfinite().all()
        if grad.shape == keys.shape:
            assert (grad[::3] == 0).all() and grad.any()
        assert torch.autograd.grad(grad.sum(), query, retain_graph=True)[0].isfinite().all()


# ------------------------------------------------------------------------------------ the sparse gradient of the keys


@pytest.mark.parametrize("path", ["one query", "panels", "few slots", "no elements", "many slots"])
def test_the_sparse_gradient_is_the_dense_one(isa: str, dtype: torch.dtype, path: str) -> None:
    """Bit for bit, with one row for each slot that was chosen; the query's gradient does not change."""
    B, N, D, k = PATHS[path]
    query, keys = torch.randn(B, D).to(dtype), torch.randn(N, D).to(dtype)
    mask = torch.rand(B, N) < 0.5
    probe, found = torch.randn(B, k).to(real(dtype)), []
    for sparse in (True, False):
        leaves = query.clone().requires_grad_(), keys.clone().requires_grad_()
        scores, indices = attnfast.topk_scores(*leaves, k, scale=0.3, mask=mask, sparse_grad=sparse)
        found.append(torch.autograd.grad(scores, leaves, probe))
    (by_query, sparse), (same, dense) = found
    assert torch.equal(by_query, same)
    assert sparse.layout == torch.sparse_coo and sparse.is_coalesced() and sparse.dtype == dtype
    assert torch.equal(sparse.to_dense(), dense) and dense.any() == (D > 0)
    assert torch.equal(sparse.indices()[0], indices[indices >= 0].unique())


def test_sparse_gradients_of_one_side() -> None:
    query, keys = torch.randn(6, 5, requires_grad=True), torch.randn(40, 5, requires_grad=True)
    wanted = torch.autograd.grad(attnfast.topk_scores(query, keys, 3)[0].sum(), (query, keys))
    alone = torch.autograd.grad(attnfast.topk_scores(query.detach(), keys, 3, sparse_grad=True)[0].sum(), keys)[0]
    assert alone.is_sparse and torch.equal(alone.to_dense(), wanted[1])
    scores = attnfast.topk_scores(query, keys.detach(), 3, sparse_grad=True)[0]
    assert torch.equal(torch.autograd.grad(scores.sum(), query, create_graph=True)[0], wanted[0])
    with torch.no_grad():
        assert not attnfast.topk_scores(query, keys, 3, sparse_grad=True)[0].requires_grad
    scores, indices = attnfast.topk_scores(query, keys, 3, sparse_grad=True)
    assert not indices.requires_grad
    second = attnfast.topk_scores(query, keys, 4, sparse_grad=True)[0]
    (scores.sum() + second.sum()).backward()
    assert keys.grad is not None and keys.grad.is_sparse
    dense = torch.autograd.grad(attnfast.topk_scores(query, keys, 4)[0].sum(), keys)[0]
    torch.testing.assert_close(keys.grad.to_dense(), wanted[1] + dense)


@pytest.mark.parametrize("optimizer", ["SparseAdam", "SGD"])
def test_optimizers_take_the_sparse_gradient(optimizer: str) -> None:
    """The steps are those with the rows of a dense gradient."""
    query, start = torch.randn(9, 6), torch.randn(50, 6)
    tables = []
    for sparse in (True, False):
        keys = torch.nn.Parameter(start.clone())
        steps = getattr(torch.optim, optimizer)([keys], lr=0.1)
        for _ in range(3):
            steps.zero_grad()
            attnfast.topk_scores(query, keys, 4, sparse_grad=sparse)[0].square().sum().backward()
            assert keys.grad is not None and keys.grad.is_sparse is sparse
            if not sparse:
                keys.grad = keys.grad.to_sparse(1)
            steps.step()
        tables.append(keys.detach())
    assert not torch.equal(tables[0], start)
    torch.testing.assert_close(tables[0], tables[1])


def test_a_sparse_step_takes_no_memory_of_the_keys_size() -> None:
    """A dense gradient would be another 256 MB."""
    script = """
import resource, torch, attnfast
torch.set_num_threads(2)
keys = torch.randn(1_000_000, 64).requires_grad_()
query = torch.randn(64, 64, requires_grad=True)
attnfast.topk_scores(query, torch.randn(2000, 64, requires_grad=True), 16, sparse_grad=True)[0].sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
attnfast.topk_scores(query, keys, 16, sparse_grad=True)[0].sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert int(run.stdout) < 24 << 10  # KiB


def test_where_a_sparse_gradient_does_not_exist() -> None:
    query, keys = torch.randn(3, 4), torch.randn(20, 4, requires_grad=True)

    def total(keys: Tensor) -> Tensor:
        return attnfast.topk_scores(query, keys, 2, sparse_grad=True)[0].square().sum()

    with pytest.raises(NotImplementedError, match="sparse_grad=True: the sparse gradient has no derivative"):
        torch.autograd.grad(total(keys), keys, create_graph=True)
    scores = attnfast.topk_scores(query, keys, 2, sparse_grad=True)[0]
    with pytest.raises(NotImplementedError, match="sparse_grad=True: the sparse gradient has no derivative"):
        torch.autograd.grad(scores, keys, torch.ones(2, 3, 2), is_grads_batched=True)
    for call in (
        lambda: torch.func.grad(total)(keys),
        lambda: torch.vmap(torch.func.grad(total))(keys.expand(2, 20, 4)),
        lambda: torch.compile(total, backend="aot_eager", fullgraph=True)(keys),
    ):
        with pytest.raises(Exception, match="sparse_grad=True works in eager mode only"):
            call()


# ------------------------------------------------------------------------------------- operators, transforms, compile


def operator_samples() -> list[tuple[Any, ...]]:
    query, keys = torch.randn(5, 6), torch.randn(40, 6)
    mask = torch.rand(5, 40) < 0.5
    half = torch.randn(40, 6).bfloat16()
    return [
        (query, keys, None, None, 3, 1.0),
        (query.requires_grad_(), keys.clone().requires_grad_(), None, mask, 4, 0.5),
        (query.detach().T.contiguous().T, keys.T.contiguous().T, None, mask[:1], 4, 0.5),
        (query.detach(), half, None, None, 4, 1.0),
        (query.detach().requires_grad_(), *codes(40, 6), mask, 4, 0.5),
    ]


@pytest.mark.parametrize("at", range(5))
def test_opcheck(at: int) -> None:
    sample = operator_samples()[at]
    torch.library.opcheck(torch.ops.attnfast.topk_scores_fwd.default, sample)
    query, keys, key_scales, _, _, scale = sample
    scores, indices = torch.ops.attnfast.topk_scores_fwd(*sample)
    grad = torch.randn_like(scores).requires_grad_(keys.dtype == torch.float32)
    for needs in ((True, True), (True, False), (False, True)):
        arguments = (grad, query, keys, key_scales, indices, scale, needs)
        if key_scales is None or not needs[1]:
            torch.library.opcheck(torch.ops.attnfast.topk_scores_bwd.default, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic: bool) -> None:
    def loss(query: Tensor, keys: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        scores, indices = attnfast.topk_scores(query, keys, 5, mask=mask)
        return (scores.softmax(-1) * scores).sum(), indices

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for B, N in ((3, 60), (21, 90)):
        leaves = [torch.randn(B, 8, requires_grad=True), torch.randn(N, 8, requires_grad=True)]
        mask = torch.rand(N) < 0.5
        results = []
        for function in (loss, compiled):
            value, indices = function(*leaves, mask)
            results.append((value.detach(), indices, *torch.autograd.grad(value, leaves)))
        for got, wanted in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("mapped", [d for d in itertools.product((None, 0, 1), repeat=3) if d != (None,) * 3])
def test_vmap(mapped: tuple[int | None, ...]) -> None:
    """Query, keys and mask mapped or shared, in either dimension: each sample's own result and gradients."""
    X, B, N, D, k = 3, 2, 30, 6, 4
    shapes = ((B, D), (N, D), (B, N))
    operands = [
        torch.randn((*shape[:dim], X, *shape[dim:])) if dim is not None else torch.randn(shape)
        for shape, dim in zip(shapes, mapped, strict=True)
    ]

    def call(query: Tensor, keys: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return attnfast.topk_scores(query, keys, k, mask=mask > 0)

    def gradients(*operands: Tensor) -> Any:
        return torch.func.grad(lambda q, n: call(q, n, operands[2])[0].square().sum(), argnums=(0, 1))(*operands[:2])

    for function in (call, gradients):
        results = torch.vmap(function, in_dims=mapped)(*operands)
        for x in range(X):
            sample = [o if dim is None else o.select(dim, x) for o, dim in zip(operands, mapped, strict=True)]
            for got, wanted in zip(results, function(*sample), strict=True):
                torch.testing.assert_close(got[x], wanted)


@pytest.mark.parametrize("mapped", [(0, None, None), (None, 0, None), (None, None, 0), (0, None, 1)])
def test_vmap_of_int8(mapped: tuple[int | None, ...]) -> None:
    keys, scales = codes(30, 6)
    operands = [torch.randn(2, 6), keys, scales]
    for at, dim in enumerate(mapped):
        if dim is not None:
            operands[at] = torch.stack([operands[at].roll(shift, 0) for shift in range(3)], dim)

    def call(query: Tensor, keys: Tensor, scales: Tensor) -> tuple[Tensor, ...]:
        return attnfast.topk_scores(query, keys, 4, key_scales=scales)

    def gradient(*given: Tensor) -> tuple[Tensor, ...]:
        return (torch.func.grad(lambda q: call(q, *given[1:])[0].square().sum())(given[0]),)

    for function in (call, gradient):
        results = torch.vmap(function, in_dims=mapped)(*operands)
        for x in range(3):
            sample = [o if dim is None else o.select(dim, x) for o, dim in zip(operands, mapped, strict=True)]
            for got, wanted in zip(results, function(*sample), strict=True):
                torch.testing.assert_close(got[x], wanted)


def test_vmap_of_nothing_and_of_a_shared_mask() -> None:
    keys = torch.randn(20, 4)
    scores, indices = torch.vmap(lambda q: attnfast.topk_scores(q, keys, 3))(torch.randn(0, 2, 4))
    assert scores.shape == indices.shape == (0, 2, 3)
    query, mask = torch.randn(3, 2, 4), torch.arange(20) % 2 == 0
    _, indices = torch.vmap(lambda q: attnfast.topk_scores(q, keys, 3, mask=mask))(query)
    assert torch.equal(indices, attnfast.topk_scores(query, keys, 3, mask=mask)[1])


def test_functorch_derivatives() -> None:
    query, keys = torch.randn(2, 4, dtype=torch.float64), torch.randn(15, 4, dtype=torch.float64)

    def loss(function: Any) -> Callable[..., Tensor]:
        return lambda q, n: function(q, n, 3)[0].square().sum()

    ours, spec = loss(attnfast.topk_scores), loss(reference.topk_scores)
    for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
        for at in (0, 1):
            torch.testing.assert_close(
                transform(ours, argnums=at)(query, keys), transform(spec, argnums=at)(query, keys)
            )
    tangents = torch.randn_like(query), torch.randn_like(keys)
    for got, wanted in zip(
        torch.func.jvp(ours, (query, keys), tangents), torch.func.jvp(spec, (query, keys), tangents), strict=True
    ):
        torch.testing.assert_close(got, wanted)


def test_batched_gradients() -> None:
    """A vmap inside of the autograd engine."""
    query, keys = torch.randn(3, 4, requires_grad=True), torch.randn(15, 4, requires_grad=True)
    scores, _ = attnfast.topk_scores(query, keys, 3)
    probes = torch.randn(5, 3, 3)
    batched = torch.autograd.grad(scores, (query, keys), probes, is_grads_batched=True, retain_graph=True)
    for i, probe in enumerate(probes):
        for got, wanted in zip(batched, torch.autograd.grad(scores, (query, keys), probe, retain_graph=True)):
            torch.testing.assert_close(got[i], wanted)


def test_autocast_changes_nothing() -> None:
    query, keys = torch.randn(5, 8), torch.randn(60, 8)
    with torch.autocast("cpu", torch.bfloat16):
        scores, indices = attnfast.topk_scores(query, keys, 4)
    assert_same((scores, indices), tuple(x.double() if at == 0 else x
                                         for at, x in enumerate(attnfast.topk_scores(query, keys, 4))))  # fmt: skip
    assert scores.dtype == torch.float32


def test_export() -> None:
    class Lookup(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.keys = torch.nn.Parameter(torch.randn(40, 6))

        def forward(self, query: Tensor) -> tuple[Tensor, Tensor]:
            return attnfast.topk_scores(query, self.keys, 3)

    module, query = Lookup(), torch.randn(5, 6)
    program = torch.export.export(module, (query,))
    for got, wanted in zip(program.module()(query), module(query), strict=True):
        assert torch.equal(got, wanted)


# --------------------------------------------------------------------------------------------------------- wrong calls

Q, KEYS = torch.zeros(3, 8), torch.zeros(20, 8)
CODES, SCALES = KEYS.to(torch.int8), torch.ones(20)
WRONG: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "query of lists": (([1.0], KEYS, 3), {}, TypeError, "query: expected a torch.Tensor, got list"),
    "keys of lists": ((Q, [1.0], 3), {}, TypeError, "keys: expected a torch.Tensor, got list"),
    "integer query": ((Q.long(), KEYS, 3), {}, TypeError, "query: expected dtype .*, got int64"),
    "integer keys": ((Q, KEYS.long(), 3), {}, TypeError, "keys: expected dtype .*, got int64"),
    "float64 keys": ((Q, KEYS.double(), 3), {}, TypeError, "keys: expected float64 if query is and only then"),
    "float64 query": ((Q.double(), KEYS, 3), {}, TypeError, "keys: expected float64 .* got float32 with .* float64"),
    "three dimensions of keys": ((Q, KEYS[None], 3), {}, ValueError, r"keys: expected 2 dimensions \[N, D\]"),
    "no dimensions": ((Q[0, 0], KEYS, 3), {}, ValueError, r"query: expected \[..., D\] with D = 8"),
    "D": ((Q[:, :5], KEYS, 3), {}, ValueError, r"query: expected \[..., D\] with D = 8 \(keys'\), got \[3, 5\]"),
    "k of many": ((Q, KEYS, 21), {}, ValueError, "k: expected .* number of slots .*, got 21 with N = 20"),
    "k of an empty memory": ((Q, KEYS[:0], 1), {}, ValueError, "k: expected .*, got 1 with N = 0"),
    "k negative": ((Q, KEYS, -1), {}, ValueError, "k: expected .*, got -1"),
    "k beyond 2048": ((Q, torch.zeros(3000, 8), 2049), {}, ValueError, "k: expected .* at most 2048, got 2049"),
    "k float": ((Q, KEYS, 3.0), {}, TypeError, "k: expected an integer .*, got float"),
    "k bool": ((Q, KEYS, True), {}, TypeError, "k: expected an integer .*, got bool"),
    "k tensor": ((Q, KEYS, torch.tensor(3)), {}, TypeError, "k: expected an integer .*, got Tensor"),
    "scale NaN": ((Q, KEYS, 3), {"scale": NAN}, ValueError, "scale: expected a finite number"),
    "scale tensor": ((Q, KEYS, 3), {"scale": torch.tensor(1.0)}, TypeError, "scale: expected a finite number"),
    "float mask": ((Q, KEYS, 3), {"mask": torch.zeros(20)}, TypeError, "mask: expected dtype bool"),
    "mask of lists": ((Q, KEYS, 3), {"mask": [True]}, TypeError, "mask: expected a torch.Tensor"),
    "mask shape": (
        (Q, KEYS, 3),
        {"mask": torch.ones(19, dtype=torch.bool)},
        ValueError,
        r"mask: expected a sha",
    ),
    "mask queries": ((Q, KEYS, 3), {"mask": torch.ones(2, 20, dtype=torch.bool)}, ValueError, r"mask: .*\[3, 20\]"),
    "sparse keys": ((Q, KEYS.to_sparse(), 3), {}, TypeError, "keys: expected a dense"),
    "sparse_grad": ((Q, KEYS, 3), {"sparse_grad": 1}, TypeError, "sparse_grad: expected True or False, got 1"),
    "no scales": ((Q, CODES, 3), {}, ValueError, r"key_scales: expected a float32 tensor \[N\] with keys in int8"),
    "scales of floats": ((Q, KEYS, 3), {"key_scales": SCALES}, ValueError, "key_scales: not supported with keys in f"),
    "scales shape": ((Q, CODES, 3), {"key_scales": SCALES[1:]}, ValueError, r"key_scales: expected \[N\] = \[20\]"),
    "scales dtype": ((Q, CODES, 3), {"key_scales": SCALES.half()}, TypeError, "key_scales: expected dtype float32"),
    "scales gradient": (
        (Q, CODES, 3),
        {"key_scales": torch.ones(20, requires_grad=True)},
        ValueError,
        "key_scales: has no gradient",
    ),
    "int8 and double": ((Q.double(), CODES, 3), {"key_scales": SCALES}, TypeError, "keys: expected float64 if query"),
    "meta query": ((Q.to("meta"), KEYS, 3), {}, ValueError, "query: this build has kernels for cpu"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls(name: str) -> None:
    args, kwargs, kind, pattern = WRONG[name]
    with pytest.raises(kind, match=pattern):
        attnfast.topk_scores(*args, **kwargs)


def raw_forward(**changes: Any) -> Callable[[], None]:
    arguments = {"query": Q, "keys": KEYS, "key_scales": None, "mask": None, "scores": torch.empty(3, 4),
                 "indices": torch.empty(3, 4, dtype=torch.int64), "scale": 1.0, "threads": 1}  # fmt: skip
    return lambda: _C.topk_scores_fwd(*{**arguments, **changes}.values())


LONG = torch.int64
RAW: dict[str, tuple[Callable[[], None], type[Exception], str]] = {
    "forward: D": (raw_forward(query=Q[:, :5]), ValueError, "keys: expected shape"),
    "forward: k": (raw_forward(keys=KEYS[:3]), ValueError, "k: expected an integer >= 0 and <= 3, got 4"),
    "forward: keys apart": (raw_forward(keys=torch.zeros(20, 16)[:, ::2]), ValueError, "keys: expected rows of neigh"),
    "forward: dtypes": (raw_forward(query=Q.double()), TypeError, "keys: expected float64"),
    "forward: integer keys": (raw_forward(keys=KEYS.long()), TypeError, "keys: expected a floating dtype"),
    "forward: no scales": (raw_forward(keys=CODES), ValueError, "key_scales: expected a tensor"),
    "forward: scales": (raw_forward(key_scales=SCALES), ValueError, "key_scales: expected None"),
    "forward: scales short": (raw_forward(keys=CODES, key_scales=SCALES[:5]), ValueError, "key_scales: expected shap"),
    "forward: scales half": (raw_forward(keys=CODES, key_scales=SCALES.half()), TypeError, "key_scales: expected dty"),
    "forward: int8, double": (raw_forward(query=Q.double(), keys=CODES, key_scales=SCALES), TypeError, "keys: exp"),
    "forward: scores": (raw_forward(scores=torch.empty(3, 4).double()), TypeError, "scores: expected dtype float32"),
    "forward: rows": (raw_forward(scores=torch.empty(2, 4)), ValueError, "scores: expected shape"),
    "forward: indices": (raw_forward(indices=torch.empty(3, 3, dtype=LONG)), ValueError, "indices: expected shape"),
    "forward: holes": (raw_forward(scores=torch.empty(3, 8)[:, ::2]), ValueError, "scores: expected a contiguous"),
    "forward: mask": (raw_forward(mask=torch.ones(3, 19, dtype=torch.bool)), ValueError, "mask: expected shape"),
    "forward: mask dtype": (raw_forward(mask=torch.ones(3, 20)), TypeError, "mask: expected dtype bool"),
    "forward: threads": (raw_forward(threads=0), ValueError, "threads: expected"),
}


@pytest.mark.parametrize("name", RAW)
def test_the_binary_checks_what_it_relies_on(name: str) -> None:
    raw_forward()()
    call, kind, pattern = RAW[name]
    with pytest.raises(kind, match=pattern):
        call()


def test_stub_signature_is_the_binary_s() -> None:
    name = "topk_scores_fwd"
    tree = ast.parse((ROOT / "attnfast" / "_C.pyi").read_text())
    (stub,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    names = [argument.arg for argument in stub.args.posonlyargs]
    with pytest.raises(TypeError, match=f"{name} takes {len(names)} positional arguments, got 0"):
        getattr(_C, name)()
    arguments = inspect.getclosurevars(raw_forward()).nonlocals["arguments"]
    assert list(arguments) == names
    for at, wanted in enumerate(names):
        values = list(arguments.values())
        values[at] = "wrong"
        with pytest.raises(TypeError, match=f"^{wanted}: expected "):
            getattr(_C, name)(*values)


def test_reference_has_the_same_signature() -> None:
    assert inspect.signature(reference.topk_scores) == inspect.signature(attnfast.topk_scores)
