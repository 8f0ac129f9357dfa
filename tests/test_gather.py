"""weighted_gather and its gradients against the definition in float64, written here a second time.

Error rule, as everywhere: err(kernel) <= 2 * err(plain torch, same dtype) + floor, both against float64.
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
from helpers import FLOATS, HALVES, assert_close_to_truth, dtype_id, error, magnitude, real
from torch import Tensor

import attnfast
from attnfast import _C, reference
from attnfast._gather_ops import weighted_gather_sparse_bwd

ROOT = Path(__file__).resolve().parent.parent

# (B, K, N, D_v): one for each way through the kernels.
PATHS: dict[str, tuple[int, int, int, int]] = {
    "rows apart": (20, 32, 5000, 256),
    "one row": (1, 40, 300, 64),
    "one pick": (70, 1, 50, 48),
    "ragged columns": (9, 5, 60, 103),
    "wide": (5, 7, 90, 700),
    "one element": (1, 1, 1, 1),
    "narrow": (33, 6, 40, 3),
    "a hot slot over many chunks": (120, 20, 1, 33),
    "chunks cut slots": (400, 9, 23, 20),
    "a large sort": (2200, 32, 90_000, 4),
    "a large sort of few slots": (1500, 40, 3, 2),
    "picks beyond a task": (3, 1500, 700, 16),
    "no picks": (4, 0, 10, 8),
    "no rows": (0, 3, 10, 8),
    "no columns": (4, 3, 10, 0),
}
SMALL = [name for name, (B, K, _, D) in PATHS.items() if B * K * D < 100_000]


def problem(
    path: str, dtype: torch.dtype = torch.float32, *, weights_dtype: torch.dtype | None = None, missing: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Indices (some -1), weights, values and a gradient of the output."""
    B, K, N, D = PATHS[path]
    generator = torch.Generator().manual_seed(B + 7 * K + N)
    indices = torch.randint(-1 if missing else 0, N, (B, K), generator=generator)
    weights_dtype = dtype if weights_dtype is None else weights_dtype
    weights = torch.randn(B, K, generator=generator, dtype=torch.float64).to(weights_dtype)
    values = torch.randn(N, D, generator=generator, dtype=torch.float64).to(dtype)
    return indices, weights, values, torch.randn(B, D, generator=generator, dtype=torch.float64).to(weights_dtype)


def definition(indices: Tensor, weights: Tensor, values: Tensor) -> Tensor:
    """In the dtype of the weights, with plain torch."""
    used = weights.where(indices >= 0, 0.0)
    return torch.einsum("bk,bkd->bd", used, values.to(weights.dtype)[indices.clamp_min(0)])


def gradients(
    function: Callable[..., Tensor], indices: Tensor, weights: Tensor, values: Tensor, grad: Tensor, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    leaves = weights.detach().requires_grad_(), values.detach().requires_grad_()
    out = function(indices, *leaves, **options)
    return (out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype)))


def check(path: str, dtype: torch.dtype, weights_dtype: torch.dtype, sparse: bool) -> None:
    indices, weights, values, grad = problem(path, dtype, weights_dtype=weights_dtype)
    found = gradients(attnfast.weighted_gather, indices, weights, values, grad, sparse_grad=sparse)
    assert [x.dtype for x in found] == [weights_dtype, weights_dtype, dtype]
    assert found[2].is_sparse == sparse
    truth = gradients(definition, indices, weights.double(), values.double(), grad.double())
    plain = gradients(definition, indices, weights.to(real(dtype)), values.to(real(dtype)), grad.to(real(dtype)))
    for name, got, want, theirs in zip(("out", "grad_weights", "grad_values"), found, truth, plain, strict=True):
        assert_close_to_truth(got.to_dense(), want, theirs.to(got.dtype), name)


# -------------------------------------------------------------------------------------------------------------- result


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("path", PATHS)
def test_result_and_gradients(isa: str, path: str, dtype: torch.dtype, sparse: bool) -> None:
    check(path, dtype, dtype, sparse)


@pytest.mark.parametrize("dtype", HALVES, ids=dtype_id)
@pytest.mark.parametrize("path", ["rows apart", "ragged columns", "chunks cut slots"])
def test_half_tables_with_float_weights(isa: str, path: str, dtype: torch.dtype) -> None:
    check(path, dtype, torch.float32, True)


@pytest.mark.parametrize("path", SMALL)
def test_reference_is_the_definition(path: str) -> None:
    problem_ = problem(path, torch.float64)
    for got, want in zip(
        gradients(reference.weighted_gather, *problem_), gradients(definition, *problem_), strict=True
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("weights_dtype", [torch.float32, *HALVES], ids=dtype_id)
@pytest.mark.parametrize("path", ["rows apart", "ragged columns", "wide", "narrow", "no picks", "no columns"])
def test_int8_tables(isa: str, path: str, weights_dtype: torch.dtype) -> None:
    indices, weights, _, grad = problem(path, weights_dtype)
    N, D = PATHS[path][2:]
    generator = torch.Generator().manual_seed(2)
    values = torch.randint(-128, 128, (N, D), generator=generator, dtype=torch.int8)
    scales = torch.rand(N, generator=generator) / 100
    for function in (attnfast.weighted_gather, reference.weighted_gather):
        leaf = weights.clone().requires_grad_()
        out = function(indices, leaf, values, scales=scales)
        assert out.dtype == weights_dtype
        (grad_weights,) = torch.autograd.grad(out, leaf, grad)
        table = values.double() * scales.double()[:, None]
        truth = gradients(definition, indices, weights.double(), table, grad.double())
        plain = gradients(definition, indices, weights.float(), table.float(), grad.float())
        assert_close_to_truth(out, truth[0], plain[0].to(weights_dtype), "out")
        assert_close_to_truth(grad_weights, truth[1], plain[1].to(weights_dtype), "grad_weights")


def test_sparse_gradient_is_the_dense_one(isa: str) -> None:
    """Bit for bit; its rows ascend, one for each slot that occurs, and torch takes it for coalesced."""
    for path in PATHS:
        indices, weights, values, grad = problem(path)
        dense = gradients(attnfast.weighted_gather, indices, weights, values, grad)
        sparse = gradients(attnfast.weighted_gather, indices, weights, values, grad, sparse_grad=True)
        assert torch.equal(dense[1], sparse[1])
        assert torch.equal(dense[2], sparse[2].to_dense())
        assert sparse[2].is_coalesced() and sparse[2].shape == values.shape
        assert torch.equal(sparse[2].indices()[0], indices[indices >= 0].unique())
        torch.sparse_coo_tensor(sparse[2].indices(), sparse[2].values(), values.shape, check_invariants=True)


def test_no_bit_depends_on_the_number_of_threads(isa: str, dtype: torch.dtype) -> None:
    for path in PATHS:
        problem_ = problem(path, dtype)
        results = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(gradients(attnfast.weighted_gather, *problem_, sparse_grad=True))
        for other in results[1:]:
            for got, want in zip(other, results[0], strict=True):
                assert torch.equal(got.to_dense(), want.to_dense()), path


def test_uses_of_a_slot_are_added_in_order() -> None:
    """Sums of 256 positions, then these in order: what the documentation says."""
    B = 3000
    weights, grad = torch.ones(B, 1), torch.randn(B, 4)
    got = gradients(attnfast.weighted_gather, torch.zeros(B, 1).long(), weights, torch.randn(1, 4), grad)[2]
    parts = []
    for part in grad.split(256):
        total = torch.zeros(4)
        for row in part:
            total = total + row
        parts.append(total)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    assert torch.equal(got[0], total)


def test_missing_slots_take_no_part(isa: str) -> None:
    """Whatever weight they have, and though the row they might stand for holds NaN."""
    values = torch.full((5, 40), math.nan)
    values[1:4] = torch.randn(3, 40)
    indices = torch.tensor([[1, -1, 3], [-1, -1, -1], [2, 2, -1]])
    weights = torch.tensor([[0.5, math.nan, 2.0], [math.nan, math.inf, 1.0], [1.0, 1.0, math.inf]])
    for function in (attnfast.weighted_gather, reference.weighted_gather):
        out, grad_weights, grad_values = gradients(function, indices, weights, values, torch.ones(3, 40))
        torch.testing.assert_close(out, torch.stack([0.5 * values[1] + 2 * values[3], torch.zeros(40), 2 * values[2]]))
        assert (grad_weights[indices < 0] == 0).all() and grad_weights.isfinite().all()
        assert grad_values[:, 0].tolist() == [0, 0.5, 2, 2, 0]
    empty = attnfast.weighted_gather(torch.full((2, 3), -1), torch.ones(2, 3), torch.empty(0, 7))
    assert torch.equal(empty, torch.zeros(2, 7))
    alone = torch.autograd.grad(
        attnfast.weighted_gather(indices, weights.requires_grad_(), values.nan_to_num()).sum(), weights
    )[0]
    assert (alone[indices < 0] == 0).all()


def test_nan_in_a_chosen_row_shows() -> None:
    values = torch.randn(4, 20)
    values[2, 7] = math.nan
    out = attnfast.weighted_gather(torch.tensor([[2, 1], [0, 1]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]]), values)
    assert out.isnan().nonzero().tolist() == [[0, 7]]


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 0, 3), (1, 1, 4)])
def test_leading_dimensions(leading: tuple[int, ...]) -> None:
    values = torch.randn(30, 6)
    indices, weights = torch.randint(0, 30, (*leading, 5)), torch.randn(*leading, 5)
    out = attnfast.weighted_gather(indices, weights, values)
    torch.testing.assert_close(out, (weights.unsqueeze(-1) * values[indices]).sum(-2))


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_index_dtypes(index_dtype: torch.dtype) -> None:
    values, indices = torch.randn(100, 6), torch.randint(0, 100, (4, 5))
    got = attnfast.weighted_gather(indices.to(index_dtype), torch.ones(4, 5), values)
    torch.testing.assert_close(got, values[indices].sum(1))


def test_strides(isa: str, dtype: torch.dtype) -> None:
    B, K, N, D = 7, 6, 40, 37
    indices, weights = torch.randint(-1, N, (B, K)), torch.randn(B, K).to(dtype)
    values, grad = torch.randn(N, D).to(dtype), torch.randn(B, D).to(dtype)
    wide = torch.full((N + 2, 2 * D), math.nan, dtype=dtype)
    wide[1:-1, 3 : D + 3] = values
    tables = [wide[1:-1, 3 : D + 3], values.T.contiguous().T, values.repeat_interleave(2, 1)[:, ::2]]
    tables.append(torch._neg_view(-values))
    want = gradients(attnfast.weighted_gather, indices, weights, values, grad)
    for table in tables:
        for sparse in (False, True):
            got = gradients(attnfast.weighted_gather, indices, weights, table, grad, sparse_grad=sparse)
            assert all(torch.equal(x.to_dense(), y) for x, y in zip(got, want, strict=True))
    others = (indices.T.contiguous().T, torch._neg_view(-weights), values, torch._neg_view(-grad))
    got = gradients(attnfast.weighted_gather, *others)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    same = gradients(attnfast.weighted_gather, indices, weights, values[:1].expand(N, D), grad[:1, :1].expand(B, D))
    plain = values[:1].repeat(N, 1), grad[:1, :1].repeat(B, D)
    want = gradients(attnfast.weighted_gather, indices, weights, *plain)
    assert all(torch.equal(x, y) for x, y in zip(same, want, strict=True))


# ------------------------------------------------------------------------------------------------- memory and training


def test_sparse_step_takes_no_memory_of_the_table_s_size() -> None:
    """Tables of 4 MB and 1 GB (of which only what is picked is ever touched): forward and backward take the same."""
    script = """
import sys, torch, attnfast
from pathlib import Path
N = int(sys.argv[1])
torch.set_num_threads(2)
values = torch.empty(N, 64).requires_grad_()
def step(values, N):
    weights = torch.rand(512, 32, requires_grad=True)
    attnfast.weighted_gather(torch.randint(0, N, (512, 32)), weights, values, sparse_grad=True).sum().backward()
step(torch.randn(20_000, 64, requires_grad=True), 20_000)
rows = torch.randint(0, N, (20_000,))
with torch.no_grad():
    values[rows] = 1.0
def field(name):
    return next(int(x.split()[1]) for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
before = field("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
weights = torch.rand(512, 32, requires_grad=True)
indices = rows[torch.randint(0, len(rows), (512, 32))]
attnfast.weighted_gather(indices, weights, values, sparse_grad=True).sum().backward()
print(field("VmHWM") - before)
"""
    extra = []
    for slots in (16_384, 4_194_304):
        run = subprocess.run(
            [sys.executable, "-c", script, str(slots)], capture_output=True, text=True, check=True, cwd=ROOT
        )
        extra.append(int(run.stdout))
    assert extra[1] < extra[0] + (4 << 10), extra  # KiB
    assert extra[1] < 24 << 10  # 16384 picks of 64 floats are 4 MiB


@pytest.mark.parametrize("columns", [64, 60], ids=["whole vectors", "not whole"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=dtype_id)
def test_gradients_beyond_the_caches_have_the_same_bits(isa: str, dtype: torch.dtype, columns: int) -> None:
    """Rows of a result beyond 16 MiB, the table of a dense one and the rows of a sparse one, are written otherwise."""
    N = (16 << 20) // (columns * dtype.itemsize) + 100
    few = torch.randint(-1, 300, (40, 33))
    few[:, 5] = 7  # cut by edges of chunks
    small, large = torch.zeros(300, columns, dtype=dtype), torch.zeros(N, columns, dtype=dtype)
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    weights, grad = torch.randn(40, 33, dtype=kind), torch.randn(40, columns, dtype=kind)
    dense = [
        torch.ops.attnfast.weighted_gather_bwd(grad, few, weights, table, None, (False, True))[1]
        for table in (small, large)
    ]
    assert torch.equal(dense[0], dense[1][:300]) and dense[0].any() and not dense[1][300:].any()
    many = torch.cat([torch.arange(N).flip(0), few.flatten().clamp_min(0)])
    many = torch.nn.functional.pad(many, (0, -len(many) % 32), value=-1).reshape(-1, 32)
    weights, grad = torch.randn(many.shape, dtype=kind), torch.randn(len(many), columns, dtype=kind)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        sparse = weighted_gather_sparse_bwd(grad, many, weights, large, False)[1]
        assert torch.equal(sparse.indices()[0], torch.arange(N))
        used = torch.tensor([0, 7, 299, 300, N // 2, N - 1])
        uses = [(many == slot).nonzero() for slot in used]
        want = torch.stack([(weights[at[:, 0], at[:, 1], None].double() * grad[at[:, 0]]).sum(0) for at in uses])
        limit = torch.finfo(dtype).eps + 64 * torch.finfo(kind).eps
        assert error(sparse.values()[used], want) <= limit * magnitude(want)


def test_gradients_of_an_empty_table() -> None:
    values, weights, grad = torch.zeros(0, 3), torch.ones(2, 4), torch.ones(2, 3)
    indices = torch.full((2, 4), -1)
    assert weighted_gather_sparse_bwd(grad, indices, weights, values, False)[1].values().shape == (0, 3)
    indices[1, 2] = 0
    with pytest.raises(ValueError, match=r"got 0 as pick 2 of row 1$"):
        weighted_gather_sparse_bwd(grad, indices, weights, values, False)


def test_only_what_wants_a_gradient_gets_one(monkeypatch: pytest.MonkeyPatch) -> None:
    indices, weights, values, grad = problem("ragged columns")
    both = gradients(attnfast.weighted_gather, indices, weights, values, grad)
    asked = []
    backward = attnfast._gather_ops._C.weighted_gather_bwd

    class Spy:
        def __getattr__(self, name: str) -> Any:
            return getattr(_C, name)

        def weighted_gather_bwd(self, *args: Any) -> None:
            asked.append(tuple(x is not None for x in args[5:]))
            backward(*args)

    monkeypatch.setattr(attnfast._gather_ops, "_C", Spy())
    weights, values = weights.requires_grad_(), values.requires_grad_()
    alone = torch.autograd.grad(attnfast.weighted_gather(indices, weights, values.detach()), weights, grad)[0]
    assert torch.equal(alone, both[1])
    for sparse in (False, True):
        out = attnfast.weighted_gather(indices, weights.detach(), values, sparse_grad=sparse)
        assert torch.equal(torch.autograd.grad(out, values, grad)[0].to_dense(), both[2])
    assert asked == [(True, False, False), (False, True, False), (False, False, True)]
    with torch.no_grad():
        assert not attnfast.weighted_gather(indices, weights, values, sparse_grad=True).requires_grad


def test_a_table_written_to_meanwhile() -> None:
    """No error where the backward does not look at it; torch's own error where it does."""
    indices, weights, values, grad = problem("ragged columns")
    values.requires_grad_()
    out = attnfast.weighted_gather(indices, weights, values)
    with torch.no_grad():
        values.add_(1)
    out.backward(grad)
    out = attnfast.weighted_gather(indices, weights.requires_grad_(), values)
    with torch.no_grad():
        values.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(grad)


@pytest.mark.parametrize("optimizer", ["SparseAdam", "SGD", "Adagrad"])
def test_optimizers_take_the_sparse_gradient(optimizer: str) -> None:
    """The same steps as with torch's own sparse gradient."""
    indices, weights, values, grad = problem("chunks cut slots", missing=False)
    tables = []
    for ours in (True, False):
        table = torch.nn.Parameter(values.clone())
        steps = getattr(torch.optim, optimizer)([table], lr=0.1)
        for shift in range(3):
            steps.zero_grad()
            index = (indices + shift) % values.shape[0]
            if ours:
                out = attnfast.weighted_gather(index, weights, table, sparse_grad=True)
            else:
                out = torch.nn.functional.embedding_bag(
                    index, table, mode="sum", per_sample_weights=weights, sparse=True
                )
            out.backward(grad)
            steps.step()
        tables.append(table.detach())
    assert not torch.equal(tables[0], values)
    torch.testing.assert_close(tables[0], tables[1])


def test_sparse_gradients_accumulate() -> None:
    values = torch.randn(20, 5, requires_grad=True)
    for rows in ([3, 4], [4, 19]):
        attnfast.weighted_gather(torch.tensor([rows]), torch.ones(1, 2), values, sparse_grad=True).sum().backward()
    assert values.grad is not None and values.grad.is_sparse
    assert values.grad.to_dense()[:, 0].tolist() == [0, 0, 0, 1, 2, *[0] * 14, 1]


# --------------------------------------------------------------------------------------------------------- derivatives


@pytest.mark.parametrize("function", [attnfast.weighted_gather, reference.weighted_gather], ids=["kernel", "reference"])
def test_gradcheck(function: Callable[..., Tensor]) -> None:
    indices = torch.tensor([[0, 3, 3, -1], [2, 0, 1, 3]])
    point = (
        torch.randn(2, 4, dtype=torch.float64, requires_grad=True),
        torch.randn(5, 3, dtype=torch.float64, requires_grad=True),
    )

    def call(weights: Tensor, values: Tensor) -> Tensor:
        return function(indices, weights, values)

    assert torch.autograd.gradcheck(call, point)
    assert torch.autograd.gradgradcheck(call, point)
    assert torch.autograd.gradcheck(call, point, check_forward_ad=True, check_batched_grad=True)


def test_third_derivatives() -> None:
    indices, weights, values, _ = problem("narrow", torch.float64)
    results = []
    for function in (attnfast.weighted_gather, reference.weighted_gather):
        leaves = weights.clone().requires_grad_(), values.clone().requires_grad_()
        total = function(indices, *leaves).pow(4).sum()
        for _ in range(2):
            total = sum(g.pow(2).sum() for g in torch.autograd.grad(total, leaves, create_graph=True))
        results.append(torch.autograd.grad(total, leaves))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def test_second_derivative_of_a_sparse_gradient_is_an_error() -> None:
    indices, weights, values, _ = problem("narrow")
    values.requires_grad_()
    out = attnfast.weighted_gather(indices, weights, values, sparse_grad=True)
    with pytest.raises(NotImplementedError, match="sparse_grad=True: the sparse gradient has no derivative"):
        torch.autograd.grad(out.square().sum(), values, create_graph=True)
    out = attnfast.weighted_gather(indices, weights, values, sparse_grad=True)
    with pytest.raises(NotImplementedError, match=r"sparse_grad=True: .* batched \(is_grads_batched=True\)"):
        torch.autograd.grad(out, values, torch.ones(2, *out.shape), is_grads_batched=True)


def test_functorch_derivatives() -> None:
    indices, weights, values, _ = problem("narrow", torch.float64)
    weights, values, indices = weights[:3], values[:8], indices[:3] % 8

    def loss(function: Any) -> Callable[..., Tensor]:
        return lambda w, v: function(indices, w, v).pow(3).sum()

    ours, spec = loss(attnfast.weighted_gather), loss(reference.weighted_gather)
    for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
        for at in (0, 1):
            got, want = transform(ours, argnums=at)(weights, values), transform(spec, argnums=at)(weights, values)
            torch.testing.assert_close(got, want)
            assert got.any()
    tangents = torch.randn_like(weights), torch.randn_like(values)
    for got, want in zip(
        torch.func.jvp(ours, (weights, values), tangents),
        torch.func.jvp(spec, (weights, values), tangents),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("transform", ["grad", "vmap of grad"])
def test_sparse_gradients_under_functorch_are_an_error(transform: str) -> None:
    indices, weights, values, _ = problem("narrow")
    values.requires_grad_()

    def call(values: Tensor) -> Tensor:
        return attnfast.weighted_gather(indices, weights, values, sparse_grad=True).sum()

    with pytest.raises(NotImplementedError, match="sparse_grad=True works in eager mode only"):
        if transform == "grad":
            torch.func.grad(call)(values)
        else:
            torch.vmap(torch.func.grad(call))(values.expand(2, -1, -1))


@pytest.mark.parametrize("mapped", [d for d in itertools.product((None, 0, 1), repeat=3) if d != (None,) * 3])
def test_vmap(mapped: tuple[int | None, ...]) -> None:
    """Indices, weights and values mapped or shared, in either dimension: each sample's own result and gradients."""
    X, shapes = 3, ((4, 5), (4, 5), (9, 6))
    operands = []
    for at, (shape, dim) in enumerate(zip(shapes, mapped, strict=True)):
        full = shape if dim is None else (*shape[:dim], X, *shape[dim:])
        operands.append(torch.randint(-1, 9, full) if at == 0 else torch.randn(full))

    def gradient(indices: Tensor, weights: Tensor, values: Tensor) -> Any:
        return torch.func.grad(lambda w, v: attnfast.weighted_gather(indices, w, v).square().sum(), argnums=(0, 1))(
            weights, values
        )

    def call(*operands: Tensor) -> tuple[Tensor]:
        return (attnfast.weighted_gather(*operands),)

    for function in (call, gradient):
        results = torch.vmap(function, in_dims=mapped)(*operands)
        for x in range(X):
            sample = [o if dim is None else o.select(dim, x) for o, dim in zip(operands, mapped, strict=True)]
            for got, want in zip(results, function(*sample), strict=True):
                torch.testing.assert_close(got[x], want)


def test_vmap_of_nothing_and_of_int8() -> None:
    values = torch.randn(9, 6)
    out = torch.vmap(lambda i, w: attnfast.weighted_gather(i, w, values))(
        torch.zeros(0, 4, 5).long(), torch.zeros(0, 4, 5)
    )
    assert out.shape == (0, 4, 6)
    table, scales = torch.randint(-9, 9, (9, 6), dtype=torch.int8), torch.rand(3, 9)
    indices, weights = torch.randint(0, 9, (4, 5)), torch.randn(4, 5)
    out = torch.vmap(lambda s: attnfast.weighted_gather(indices, weights, table, scales=s))(scales)
    for x in range(3):
        torch.testing.assert_close(out[x], attnfast.weighted_gather(indices, weights, table, scales=scales[x]))


# ----------------------------------------------------------------------------------------------- operators and compile


def operator_samples() -> list[tuple[Any, ...]]:
    indices, weights, values = torch.randint(-1, 9, (4, 5)), torch.randn(4, 5), torch.randn(9, 6)
    return [
        (indices, weights, values, None),
        (indices, weights.clone().requires_grad_(), values.clone().requires_grad_(), None),
        (indices, weights.T.contiguous().T[:, :5].reshape(4, 5), values.T.contiguous().T, None),
        (indices, weights, values.bfloat16(), None),
        (indices, weights.half(), torch.randint(-9, 9, (9, 6), dtype=torch.int8), torch.rand(9)),
    ]


@pytest.mark.parametrize("at", range(5))
def test_opcheck(at: int) -> None:
    sample = operator_samples()[at]
    torch.library.opcheck(torch.ops.attnfast.weighted_gather_fwd.default, sample)
    grad = torch.randn(4, 6).to(sample[1].dtype).requires_grad_(at == 1)
    for needs in ((True, True), (True, False), (False, True)):
        if sample[2].dtype != torch.int8 or not needs[1]:
            torch.library.opcheck(torch.ops.attnfast.weighted_gather_bwd.default, (grad, *sample, needs))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic: bool) -> None:
    def loss(indices: Tensor, weights: Tensor, values: Tensor) -> Tensor:
        return attnfast.weighted_gather(indices, weights, values).square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for B, N in ((3, 60), (21, 90)):
        indices = torch.randint(-1, N, (B, 4))
        leaves = torch.randn(B, 4, requires_grad=True), torch.randn(N, 8, requires_grad=True)
        results = []
        for function in (loss, compiled):
            value = function(indices, *leaves)
            results.append((value.detach(), *torch.autograd.grad(value, leaves)))
        for got, want in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(got, want)


def test_compile_of_a_sparse_gradient_is_an_error() -> None:
    values = torch.randn(9, 6, requires_grad=True)
    indices, weights = torch.randint(0, 9, (4, 5)), torch.randn(4, 5)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def call(values: Tensor) -> Tensor:
        return attnfast.weighted_gather(indices, weights, values, sparse_grad=True).sum()

    with pytest.raises(Exception, match="sparse_grad=True works in eager mode only"):
        call(values)


def test_autocast_changes_nothing() -> None:
    indices, weights, values, _ = problem("ragged columns")
    with torch.autocast("cpu", torch.bfloat16):
        out = attnfast.weighted_gather(indices, weights, values)
    assert torch.equal(out, attnfast.weighted_gather(indices, weights, values))


# -------------------------------------------------------------------------------------------------------- wrong calls


def good() -> dict[str, Any]:
    return {"indices": torch.randint(0, 9, (4, 5)), "weights": torch.randn(4, 5), "values": torch.randn(9, 6)}


def byte_table(**others: Any) -> dict[str, Any]:
    return {"values": torch.zeros(9, 6, dtype=torch.int8), "scales": torch.ones(9), **others}


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "indices kind": ({"indices": [[1]]}, TypeError, "indices: expected a torch.Tensor, got list"),
    "indices dtype": ({"indices": torch.zeros(4, 5)}, TypeError, "indices: expected an integer tensor"),
    "indices boolean": ({"indices": torch.zeros(4, 5).bool()}, TypeError, "indices: expected an integer tensor"),
    "indices scalar": ({"indices": torch.tensor(1), "weights": torch.tensor(1.0)}, ValueError,
                       r"indices: expected at least 1 dimension \[..., K\], got \[\]"),
    "indices too large": ({"indices": torch.full((4, 5), 9)}, ValueError,
                          r"indices: expected slots in \[0, N\) = \[0, 9\) or -1 for none, got 9 as pick 0 of row 0"),
    "indices negative": ({"indices": torch.tensor([[0] * 5, [0] * 5, [0, 0, 0, -2, 0], [0, 0, -3, 0, 0]])}, ValueError,
                         r"indices: .* got -2 as pick 3 of row 2"),
    "indices of an empty table": ({"values": torch.empty(0, 6)}, ValueError, r"\[0, N\) = \[0, 0\)"),
    "weights shape": ({"weights": torch.randn(4, 6)}, ValueError,
                      r"weights: expected \[..., K\] = \[4, 5\] \(indices'\), got \[4, 6\]"),
    "weights dtype": ({"weights": torch.randn(4, 5).double()}, TypeError,
                      "weights: expected dtype float32, got float64 with values in float32"),
    "weights of doubles": ({"values": torch.randn(9, 6).double()}, TypeError,
                           "weights: expected dtype float64, got float32 with values in float64"),
    "weights of halves": ({"values": torch.randn(9, 6).half(), "weights": torch.randn(4, 5).bfloat16()}, TypeError,
                          "weights: expected dtype float16, float32, got bfloat16"),
    "weights integer": ({"weights": torch.ones(4, 5).long()}, TypeError, "weights: expected dtype"),
    "values shape": ({"values": torch.randn(9)}, ValueError, r"values: expected 2 dimensions \[N, D_v\], got \[9\]"),
    "values dtype": ({"values": torch.zeros(9, 6).int()}, TypeError, "values: expected dtype .*int8.*, got int32"),
    "values sparse": ({"values": torch.eye(9).to_sparse()}, TypeError, "values: expected a dense"),
    "values meta": ({"values": torch.empty(9, 6, device="meta")}, ValueError, "values: this build has kernels for cpu"),
    "no scales": (byte_table(scales=None), ValueError, r"scales: expected a float32 tensor \[N\]"),
    "scales of floats": ({"scales": torch.ones(9)}, ValueError, "scales: not supported with values in float32"),
    "scales shape": (byte_table(scales=torch.ones(8)), ValueError, r"scales: expected \[N\] = \[9\] .* got \[8\]"),
    "scales dtype": (byte_table(scales=torch.ones(9).double()), TypeError, "scales: expected dtype float32"),
    "scales gradient": (byte_table(scales=torch.ones(9, requires_grad=True)), ValueError, "scales: has no gradient"),
    "int8 and double": (byte_table(weights=torch.randn(4, 5).double()), TypeError, "weights: expected dtype bfloat16"),
    "sparse_grad": ({"sparse_grad": 1}, TypeError, "sparse_grad: expected True or False, got 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls(name: str) -> None:
    change, kind, message = WRONG[name]
    with pytest.raises(kind, match=message) as caught:
        attnfast.weighted_gather(**{**good(), **change})
    assert type(caught.value) is kind


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("bad", [300, -2, 2**62, -(2**63)])
def test_the_first_wrong_index_is_named(isa: str, threads: int, bad: int) -> None:
    torch.set_num_threads(threads)
    indices = torch.randint(0, 300, (500, 40))
    indices[123, 4] = indices[123, 5] = indices[400, 1] = bad
    weights, values = torch.randn(500, 40), torch.randn(300, 20)
    with pytest.raises(ValueError, match=f"got {bad} as pick 4 of row 123$"):
        attnfast.weighted_gather(indices, weights, values)
    grad = torch.randn(500, 20)
    backward = torch.ops.attnfast.weighted_gather_bwd
    for needs in ((True, False), (False, True)):
        with pytest.raises(ValueError, match=f"got {bad} as pick 4 of row 123$"):
            backward(grad, indices, weights, values, None, needs)
    with pytest.raises(ValueError, match=f"got {bad} as pick 4 of row 123$"):
        weighted_gather_sparse_bwd(grad, indices, weights, values, False)


def test_the_binary_checks_by_itself() -> None:
    indices, weights, values, grad = problem("narrow")
    out, made = torch.empty_like(grad), []

    def backward(**change: Any) -> None:
        given = {"grad_out": grad, "indices": indices, "weights": weights, "values": values, "scales": None,
                 "grad_weights": None, "grad_values": None, "allocate": None, **change}  # fmt: skip
        _C.weighted_gather_bwd(*given.values())

    def allocate(count: int, rows: int = 0, columns: int = 0, dtype: torch.dtype = torch.float32) -> Any:
        made.append(count)
        return torch.empty(count + rows, dtype=torch.int64), torch.empty(count, 3 + columns, dtype=dtype)

    with pytest.raises(ValueError, match="out: expected shape"):
        _C.weighted_gather_fwd(indices, weights, values, None, out[1:])
    with pytest.raises(TypeError, match="out: expected dtype float32"):
        _C.weighted_gather_fwd(indices, weights, values, None, out.double())
    with pytest.raises(ValueError, match="out: expected a contiguous tensor"):
        _C.weighted_gather_fwd(indices, weights, values, None, out[:1].expand_as(out))
    with pytest.raises(TypeError, match="weights: expected dtype float32"):
        _C.weighted_gather_fwd(indices, weights.double(), values, None, out)
    with pytest.raises(TypeError, match="values: expected a floating dtype, got bool"):
        _C.weighted_gather_fwd(indices, weights, values.bool(), None, out)
    with pytest.raises(ValueError, match="scales: expected None without values in int8"):
        _C.weighted_gather_fwd(indices, weights, values, torch.ones(40), out)
    with pytest.raises(ValueError, match="grad_out: expected shape"):
        backward(grad_out=grad[:1])
    with pytest.raises(ValueError, match="grad_weights: expected shape"):
        backward(grad_weights=weights[:1])
    with pytest.raises(ValueError, match="grad_values: expected shape"):
        backward(grad_values=values[:1])
    with pytest.raises(ValueError, match="allocate: expected None with grad_values"):
        backward(grad_values=torch.zeros_like(values), allocate=allocate)
    with pytest.raises(TypeError, match="allocate: expected to return a tuple"):
        backward(allocate=lambda count: None)
    with pytest.raises(ZeroDivisionError):
        backward(allocate=lambda count: 1 // 0)
    with pytest.raises(ValueError, match="rows: expected shape"):
        backward(allocate=lambda count: allocate(count, rows=-1))
    with pytest.raises(ValueError, match="grad_values: expected shape"):
        backward(allocate=lambda count: allocate(count, columns=-1))
    with pytest.raises(TypeError, match="grad_values: expected dtype float32"):
        backward(allocate=lambda count: allocate(count, dtype=torch.float64))
    backward()
    backward(allocate=allocate)
    assert made and set(made) == {indices[indices >= 0].unique().numel()}


# ----------------------------------------------------------------------------------------------------------- the whole


def test_signatures() -> None:
    """The reference has the same arguments, and every argument is documented."""
    assert inspect.signature(attnfast.weighted_gather) == inspect.signature(reference.weighted_gather)
    tree = ast.parse(inspect.getsource(attnfast.weighted_gather))
    function = tree.body[0]
    assert isinstance(function, ast.FunctionDef)
    text = ast.get_docstring(function) or ""
    for name in inspect.signature(attnfast.weighted_gather).parameters:
        assert f"\n{name} : " in text


@pytest.mark.parametrize("dtype", [torch.float32], ids=dtype_id)
def test_against_embedding_bag(isa: str, dtype: torch.dtype) -> None:
    indices, weights, values, grad = problem("rows apart", missing=False)

    def theirs(indices: Tensor, weights: Tensor, values: Tensor) -> Tensor:
        return torch.nn.functional.embedding_bag(indices, values, mode="sum", per_sample_weights=weights)

    for got, want in zip(
        gradients(attnfast.weighted_gather, indices, weights, values, grad),
        gradients(theirs, indices, weights, values, grad),
        strict=True,
    ):
        assert error(got, want) <= 1e-5 * magnitude(want)
