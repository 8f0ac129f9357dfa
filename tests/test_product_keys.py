"""product_key_read against all n^2 slots, scored and sorted here a second time.

Operands of small integers have exact scores with many ties, so slots are compared one by one.
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
from helpers import assert_close_to_truth, dtype_id, real
from torch import Tensor

import attnfast
from attnfast import _C, ProductKeyReadOutput, reference
from attnfast._gather_ops import product_keys

ROOT = Path(__file__).resolve().parent.parent

# (B, H, n, D/2, D_v, k)
SHAPES: dict[str, tuple[int, ...]] = {
    "ordinary": (9, 2, 40, 8, 24, 32),
    "one head": (70, 1, 20, 16, 40, 10),
    "best": (5, 3, 30, 4, 8, 1),
    "more picks than half keys": (4, 2, 6, 5, 7, 30),
    "all slots": (3, 2, 5, 4, 6, 25),
    "one slot": (2, 1, 1, 3, 4, 1),
    "many picks": (2, 1, 70, 4, 4, 500),
    "a column": (3, 1, 40, 0, 5, 9),
    "no picks": (3, 2, 4, 3, 5, 0),
    "no queries": (0, 2, 4, 3, 5, 3),
    "no heads": (3, 0, 4, 3, 5, 3),
}


def integers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, bound: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-bound, bound + 1, shape, generator=generator).to(dtype)


def operands(shape: str, dtype: torch.dtype = torch.float32, *, exact: bool = True) -> tuple[Any, ...]:
    B, H, n, half, D_v, k = SHAPES[shape]
    if exact:
        made = [integers(*s, dtype=dtype, seed=i) for i, s in enumerate([(B, H, 2, half), (H, n, half), (H, n, half)])]
    else:
        g = torch.Generator().manual_seed(3)
        made = [torch.randn(s, generator=g).to(dtype) for s in [(B, H, 2, half), (H, n, half), (H, n, half)]]
    return (*made, torch.randn(n * n, D_v, generator=torch.Generator().manual_seed(9)).to(dtype), k)


def slot_scores(query: Tensor, row_keys: Tensor, column_keys: Tensor) -> Tensor:
    """``[B, H, n^2]`` in float64."""
    rows = torch.einsum("bhd,hnd->bhn", query[:, :, 0].double(), row_keys.double())
    columns = torch.einsum("bhd,hnd->bhn", query[:, :, 1].double(), column_keys.double())
    return (rows.unsqueeze(-1) + columns.unsqueeze(-2)).flatten(-2)


@pytest.fixture(params=["reference", "kernel"])
def read(request: pytest.FixtureRequest) -> Callable[..., Any]:
    return reference.product_key_read if request.param == "reference" else attnfast.product_key_read


# -------------------------------------------------------------------------------------------------------------- result


@pytest.mark.parametrize("shape", SHAPES)
def test_slots_are_those_of_a_stable_sort(isa: str, dtype: torch.dtype, read: Any, shape: str) -> None:
    query, row_keys, column_keys, values, k = operands(shape, dtype)
    B, H, D_v = *query.shape[:2], values.shape[1]
    scores, slots = slot_scores(query, row_keys, column_keys).sort(dim=-1, descending=True, stable=True)
    weights = scores[..., :k].softmax(-1)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        got = read(query, row_keys, column_keys, values, k, return_aux=True)
        assert isinstance(got, ProductKeyReadOutput)
        assert got.output.shape == (B, D_v) and got.indices.shape == got.weights.shape == (B, H, k)
        assert torch.equal(got.indices, slots[..., :k])
        assert got.weights.dtype == real(dtype) and got.output.dtype == dtype
        torch.testing.assert_close(got.weights.double(), weights, rtol=1e-5, atol=1e-6)
        want = (weights.unsqueeze(-1) * values.double()[slots[..., :k]]).sum((1, 2))
        plain = (weights.to(real(dtype)).unsqueeze(-1) * values.to(real(dtype))[slots[..., :k]]).sum((1, 2))
        assert_close_to_truth(got.output, want, plain.to(dtype), "output")
        assert torch.equal(read(query, row_keys, column_keys, values, k), got.output)


@pytest.mark.parametrize("k", [1, 2, 3, 7, 16, 32, 100, 333])
@pytest.mark.parametrize("real_type", [torch.float32, torch.float64], ids=dtype_id)
def test_merge_takes_every_tie_in_order(isa: str, real_type: torch.dtype, k: int) -> None:
    """Scores of few values: nearly every comparison is a tie, decided by the slot."""
    n, B = 20, 300
    halves = []
    for seed in (0, 1):
        scores, order = integers(B, n, dtype=real_type, seed=seed, bound=seed + 1).sort(
            dim=-1, descending=True, stable=True
        )
        halves.append((scores[:, : min(k, n)].contiguous(), order[:, : min(k, n)].contiguous(), scores, order))
    (row_scores, row_indices, all_rows, row_order), (column_scores, column_indices, all_columns, column_order) = halves
    slots, row_ranks, column_ranks = product_keys(row_scores, row_indices, column_scores, column_indices, n, k)
    plain_rows = torch.empty_like(all_rows).scatter_(1, row_order, all_rows)
    plain_columns = torch.empty_like(all_columns).scatter_(1, column_order, all_columns)
    sums = (plain_rows.unsqueeze(-1) + plain_columns.unsqueeze(-2)).flatten(1)
    assert torch.equal(slots, sums.sort(dim=-1, descending=True, stable=True).indices[:, :k])
    assert torch.equal(slots, row_indices.gather(1, row_ranks) * n + column_indices.gather(1, column_ranks))
    assert ((row_ranks + 1) * (column_ranks + 1) <= k).all()


def test_sums_that_rounding_makes_equal(isa: str) -> None:
    """1e8 swallows what the rows differ in. The larger sum still comes first, though its slot is the higher one."""
    row_scores, column_scores = torch.tensor([[1.5, 1.0, 0.5]]), torch.tensor([[1e8, 0.0, -1.0]])
    assert (row_scores + 1e8).unique().numel() == 1
    slots, _, _ = product_keys(row_scores, torch.tensor([[2, 1, 0]]), column_scores, torch.tensor([[0, 1, 2]]), 3, 4)
    assert slots.tolist() == [[6, 3, 0, 7]]


def test_scores_that_are_not_finite(isa: str) -> None:
    """Every pick is another pair, and no index is out of range, whatever the scores."""
    inf, nan = math.inf, math.nan
    for rows in (
        [nan, inf, 1.0, -inf],
        [nan, nan, nan, nan],
        [-inf] * 4,
        [inf, inf, -inf, -inf],
        [3.4e38, 1, 0, -3.4e38],
    ):
        for columns in ([nan, 0.0, -inf, -inf], [inf, 1.0, 0.0, -inf], [-inf] * 4, [3.4e38, 3e38, -1e38, -3.4e38]):
            order = torch.arange(4)[None]
            found = product_keys(torch.tensor([rows]), order, torch.tensor([columns]), order, 4, 16)
            assert found[0][0].sort().values.tolist() == list(range(16))
    query, row_keys, column_keys, values, k = operands("ordinary")
    query[3, 1, 0, 2] = nan
    out = attnfast.product_key_read(query, row_keys, column_keys, values, k)
    assert out.isnan().all(1).nonzero().flatten().tolist() == [3]
    assert out[[0, 1, 2, *range(4, 9)]].isfinite().all()


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 0, 3)])
def test_leading_dimensions(read: Any, leading: tuple[int, ...]) -> None:
    _, row_keys, column_keys, values, k = operands("ordinary")
    query = integers(*leading, 2, 2, 8, seed=5)
    got = read(query, row_keys, column_keys, values, k, return_aux=True)
    rows = math.prod(leading)
    flat = read(query.reshape(rows, 2, 2, 8), row_keys, column_keys, values, k, return_aux=True)
    for x, y in zip(got, flat, strict=True):
        assert torch.equal(x.reshape(y.shape), y)
        assert x.shape == (*leading, *y.shape[1:])


def test_strides_and_mixed_dtypes(read: Any) -> None:
    query, row_keys, column_keys, values, k = operands("ordinary")
    want = read(query, row_keys, column_keys, values, k)
    moved = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in (query, row_keys, column_keys, values)]
    assert torch.equal(read(*moved, k), want)
    assert torch.equal(read(*(torch._neg_view(-x) for x in (query, row_keys, column_keys, values)), k), want)
    mixed = read(query.bfloat16(), row_keys.half(), column_keys, values, k)
    assert mixed.dtype == torch.float32 and torch.equal(mixed, want)  # small integers are exact in every dtype
    table = torch.randint(-9, 9, values.shape, dtype=torch.int8)
    scales = torch.rand(len(table))
    got = read(query, row_keys, column_keys, table, k, scales=scales)
    torch.testing.assert_close(got, read(query, row_keys, column_keys, table * scales[:, None], k))
    assert read(query.half(), row_keys, column_keys, table, k, scales=scales).dtype == torch.float16


# ----------------------------------------------------------------------------------------------------------- gradients


def gradients(read: Any, tensors: tuple[Tensor, ...], k: int, probe: Tensor, **options: Any) -> tuple[Tensor, ...]:
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    got = read(*leaves, k, return_aux=True, **options)
    total = (got.output * probe.to(got.output.dtype)).sum() + got.weights.square().sum()
    return (got.output.detach(), *torch.autograd.grad(total, leaves))


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("shape", [s for s in SHAPES if s != "no heads"])
def test_gradients_are_the_reference_s(isa: str, dtype: torch.dtype, shape: str, sparse: bool) -> None:
    *tensors, k = operands(shape, dtype)
    tensors = [0.5 * x for x in tensors]
    probe = torch.randn(tensors[0].shape[0], tensors[3].shape[1], generator=torch.Generator().manual_seed(1))
    found = gradients(attnfast.product_key_read, tuple(tensors), k, probe, sparse_grad=sparse)
    truth = gradients(reference.product_key_read, tuple(x.double() for x in tensors), k, probe.double())
    plain = gradients(reference.product_key_read, tuple(tensors), k, probe)
    assert found[4].is_sparse == sparse
    for name, got, want, theirs, like in zip(
        ("output", "query", "row_keys", "column_keys", "values"),
        found,
        truth,
        plain,
        [tensors[3], *tensors],
        strict=True,
    ):
        assert got.dtype == like.dtype
        assert_close_to_truth(got.to_dense(), want, theirs, name)


def test_gradcheck(read: Any) -> None:
    generator = torch.Generator().manual_seed(4)
    point = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True)
             for s in [(3, 2, 2, 3), (2, 5, 3), (2, 5, 3), (25, 2)]]  # fmt: skip

    def call(*tensors: Tensor) -> Tensor:
        return read(*tensors, 4)

    assert torch.autograd.gradcheck(call, point)
    assert torch.autograd.gradgradcheck(call, point)


def test_no_bit_depends_on_the_number_of_threads(isa: str, dtype: torch.dtype) -> None:
    for shape in ("ordinary", "one head", "many picks"):
        *tensors, k = operands(shape, dtype, exact=False)
        probe = torch.randn(tensors[0].shape[0], tensors[3].shape[1])
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(gradients(attnfast.product_key_read, tuple(tensors), k, probe, sparse_grad=True))
        for other in results[1:]:
            for name, x, y in zip(("out", "query", "rows", "columns", "values"), other, results[0], strict=True):
                assert torch.equal(x.to_dense(), y.to_dense()), (shape, name)


def test_only_what_wants_a_gradient_gets_one() -> None:
    *tensors, k = operands("ordinary", exact=False)
    leaves = [x.requires_grad_() for x in tensors]
    both = torch.autograd.grad(attnfast.product_key_read(*leaves, k).sum(), leaves)
    for at in range(4):
        alone = [x if i == at else x.detach() for i, x in enumerate(leaves)]
        got = torch.autograd.grad(attnfast.product_key_read(*alone, k).sum(), leaves[at])[0]
        assert torch.equal(got, both[at])
    with torch.no_grad():
        assert not attnfast.product_key_read(*leaves, k).requires_grad


@pytest.mark.slow
def test_a_step_over_16_million_slots_takes_no_memory_of_their_size() -> None:
    """n = 4096: what forward and backward take beside the tables is what they take at n = 512."""
    script = """
import sys, torch, attnfast
from pathlib import Path
n, B, H, half, D_v, k = int(sys.argv[1]), 256, 4, 32, 32, 32
torch.set_num_threads(2)
values = torch.zeros(n * n, D_v).requires_grad_()  # 2 GiB at n = 4096
def step(n, values):
    keys = [torch.randn(H, n, half, requires_grad=True) for _ in range(2)]
    query = torch.randn(B, H, 2, half, requires_grad=True)
    attnfast.product_key_read(query, *keys, values, k, sparse_grad=True).square().sum().backward()
    return values.grad
step(64, torch.randn(64 * 64, D_v, requires_grad=True))
def field(name):
    return next(int(x.split()[1]) for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
before = field("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
grad = step(n, values)
assert grad.is_sparse and grad.shape == (n * n, D_v)
torch.optim.SGD([values], lr=0.1).step()
print(field("VmHWM") - before)
"""
    extra = []
    for n in (512, 4096):
        run = subprocess.run(
            [sys.executable, "-c", script, str(n)], capture_output=True, text=True, check=True, cwd=ROOT
        )
        extra.append(int(run.stdout))
    keys = 2 * 2 * 4 * (4096 - 512) * 32 * 4 // 1024  # two sets of half keys and their gradients
    assert extra[1] < extra[0] + keys + (8 << 10), extra  # KiB; the table is 2 GiB


# ------------------------------------------------------------------------------------- operators, transforms, compile


def test_opcheck() -> None:
    order = torch.arange(4).expand(3, 4).contiguous()
    for dtype in (torch.float32, torch.float64):
        scores = torch.randn(2, 3, 4, dtype=dtype).sort(-1, descending=True).values
        sample = (scores[0], order, scores[1], order, 5, 6)
        torch.library.opcheck(torch.ops.attnfast.product_keys.default, sample)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic: bool) -> None:
    def loss(query: Tensor, row_keys: Tensor, column_keys: Tensor, values: Tensor) -> Tensor:
        return attnfast.product_key_read(query, row_keys, column_keys, values, 7).square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for B in (3, 11):
        leaves = [torch.randn(s, requires_grad=True) for s in [(B, 2, 2, 4), (2, 6, 4), (2, 6, 4), (36, 5)]]
        results = []
        for function in (loss, compiled):
            value = function(*leaves)
            results.append((value.detach(), *torch.autograd.grad(value, leaves)))
        for got, want in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("mapped", [(0, None, None, None), (1, None, None, 0), (0, 0, None, None), (None, 1, 1, 1)])
def test_vmap(mapped: tuple[int | None, ...]) -> None:
    X, shapes = 3, [(4, 2, 2, 4), (2, 6, 4), (2, 6, 4), (36, 5)]
    tensors = [torch.randn(s if d is None else (*s[:d], X, *s[d:])) for s, d in zip(shapes, mapped, strict=True)]

    def call(*tensors: Tensor) -> Any:
        return tuple(attnfast.product_key_read(*tensors, 7, return_aux=True))  # type: ignore[arg-type]

    def gradient(*tensors: Tensor) -> Any:
        return torch.func.grad(lambda *t: attnfast.product_key_read(*t, 7).square().sum(), argnums=(0, 1, 2, 3))(
            *tensors
        )

    for function in (call, gradient):
        results = torch.vmap(function, in_dims=mapped)(*tensors)
        for x in range(X):
            sample = [t if d is None else t.select(d, x) for t, d in zip(tensors, mapped, strict=True)]
            for got, want in zip(results, function(*sample), strict=True):
                torch.testing.assert_close(got[x], want)


def test_forward_mode() -> None:
    generator = torch.Generator().manual_seed(4)
    point = tuple(torch.randn(s, generator=generator, dtype=torch.float64)
                  for s in [(3, 2, 2, 3), (2, 5, 3), (2, 5, 3), (25, 2)])  # fmt: skip
    tangents = tuple(torch.randn_like(x) for x in point)
    ours, spec = (lambda *t, f=f: f(*t, 4) for f in (attnfast.product_key_read, reference.product_key_read))
    for got, want in zip(torch.func.jvp(ours, point, tangents), torch.func.jvp(spec, point, tangents), strict=True):
        torch.testing.assert_close(got, want)
        assert got.any()


def test_autocast_changes_nothing() -> None:
    *tensors, k = operands("ordinary", exact=False)
    with torch.autocast("cpu", torch.bfloat16):
        out = attnfast.product_key_read(*tensors, k)
    assert torch.equal(out, attnfast.product_key_read(*tensors, k))


# --------------------------------------------------------------------------------------------------------- wrong calls


def good() -> dict[str, Any]:
    return dict(zip(("query", "row_keys", "column_keys", "values", "topk"), operands("ordinary"), strict=True))


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "query kind": ({"query": 1.0}, TypeError, "query: expected a torch.Tensor, got float"),
    "query dtype": ({"query": torch.ones(9, 2, 2, 8).long()}, TypeError, "query: expected dtype"),
    "query shape": ({"query": torch.ones(9, 2, 3, 8)}, ValueError, r"query: .* H, 2, D/2\], got \[9, 2, 3, 8\]"),
    "query rank": ({"query": torch.ones(2, 8)}, ValueError, r"query: expected \[..., H, 2, D/2\], got \[2, 8\]"),
    "row_keys heads": ({"row_keys": torch.ones(3, 40, 8)}, ValueError,
                       r"row_keys: expected \[H, n, D/2\] with H = 2 and D/2 = 8 \(query's\), got \[3, 40, 8\]"),
    "row_keys size": ({"row_keys": torch.ones(2, 40, 9)}, ValueError, "row_keys: expected .* with H = 2 and D/2 = 8"),
    "column_keys shape": ({"column_keys": torch.ones(2, 41, 8)}, ValueError,
                          r"column_keys: expected \[H, n, D/2\] = \[2, 40, 8\] \(row_keys'\), got \[2, 41, 8\]"),
    "values rows": ({"values": torch.ones(1599, 24)}, ValueError,
                    r"values: expected \[n \* n, D_v\] with n \* n = 1600 \(n = 40 row keys\), got \[1599, 24\]"),
    "values rank": ({"values": torch.ones(1600)}, ValueError, r"values: expected 2 dimensions"),
    "values dtype": ({"values": torch.ones(1600, 24).double()}, TypeError,
                     "values: expected float64 if query is and only then, got float64 with a query of float32"),
    "keys dtype": ({"row_keys": torch.ones(2, 40, 8).double()}, TypeError, "row_keys: expected float64 if query is"),
    "int8 without scales": ({"values": torch.ones(1600, 24, dtype=torch.int8)}, ValueError, "scales: expected"),
    "topk kind": ({"topk": 2.0}, TypeError, "topk: expected an integer .* got float"),
    "topk boolean": ({"topk": True}, TypeError, "topk: expected an integer .* got bool"),
    "topk negative": ({"topk": -1}, ValueError, "topk: expected an integer from 0 .* got -1"),
    "topk above n^2": ({"topk": 1601}, ValueError, r"topk: .* got 1601 with n \* n = 1600"),
    "return_aux": ({"return_aux": 1}, TypeError, "return_aux: expected True or False"),
    "sparse_grad": ({"sparse_grad": None}, TypeError, "sparse_grad: expected True or False"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls(name: str) -> None:
    change, kind, message = WRONG[name]
    with pytest.raises(kind, match=message) as caught:
        attnfast.product_key_read(**{**good(), **change})
    assert type(caught.value) is kind


def test_topk_beyond_what_is_supported() -> None:
    keys = torch.ones(1, 50, 2)
    with pytest.raises(ValueError, match="at most 2048, got 2049"):
        attnfast.product_key_read(torch.ones(1, 2, 2), keys, keys, torch.ones(2500, 3), 2049)


def test_the_binary_checks_by_itself() -> None:
    scores, order = torch.zeros(3, 4), torch.arange(4).expand(3, 4).contiguous()
    places = [torch.empty(3, 6, dtype=torch.int64) for _ in range(3)]

    def call(**change: Any) -> None:
        halves = {"row_scores": scores, "row_indices": order, "column_scores": scores, "column_indices": order}
        results = dict(zip(("slots", "row_ranks", "column_ranks"), places, strict=True))
        given = {**halves, "side": 4, **results, **change}
        _C.product_keys(*given.values())

    call()
    for name, bad, kind, message in (
        ("row_scores", scores.half(), TypeError, "row_scores: expected dtype float32"),
        ("column_scores", scores.double(), TypeError, "column_scores: expected dtype float32"),
        ("column_scores", scores[:, :3].contiguous(), ValueError, "column_scores: expected shape"),
        ("row_indices", order.int(), TypeError, "row_indices: expected dtype"),
        ("row_indices", order[:2], ValueError, "row_indices: expected shape"),
        ("column_indices", order[:1].expand(3, 4), ValueError, "column_indices: expected a contiguous"),
        ("slots", torch.empty(3, 17, dtype=torch.int64), ValueError, r"slots: expected k <= candidates\^2 with 4"),
        ("row_ranks", places[1][:, :5], ValueError, "row_ranks: expected shape"),
        ("column_ranks", places[1][:2], ValueError, "column_ranks: expected shape"),
        ("side", 2**70, ValueError, "side: does not fit 64 bits"),
    ):
        with pytest.raises(kind, match=message):
            call(**{name: bad})


def test_signatures() -> None:
    """The reference has the same arguments, and every argument is documented."""
    parameters = inspect.signature(attnfast.product_key_read).parameters
    assert list(parameters.values()) == list(inspect.signature(reference.product_key_read).parameters.values())
    function = ast.parse(inspect.getsource(attnfast.product_key_read)).body[0]
    assert isinstance(function, ast.FunctionDef)
    text = ast.get_docstring(function) or ""
    for name in parameters:
        assert any(name in line.split(" : ")[0].split(", ") for line in text.splitlines()), name


def test_pruning_is_exact_for_every_k() -> None:
    """The pairs with i j <= k hold the k best of a merge, for every small k and all orders of two sets of scores."""
    generator = torch.Generator().manual_seed(0)
    for k, seed in itertools.product(range(1, 17), range(5)):
        halves = [torch.randn(1, 16, generator=generator).sort(-1, descending=True).values * (1 + seed * i)
                  for i in range(2)]  # fmt: skip
        order = torch.arange(16)[None]
        slots, _, _ = product_keys(halves[0], order, halves[1], order, 16, k)
        sums = (halves[0].double().unsqueeze(-1) + halves[1].double().unsqueeze(-2)).flatten(1)
        assert torch.equal(slots, sums.sort(dim=-1, descending=True, stable=True).indices[:, :k])
