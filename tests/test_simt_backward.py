"""The gradients of the CUDA kernels under the SIMT emulator, through ``attnfast.attention``: backend "simt".

As in test_simt.py the module ``_simt`` takes the place of the CPU's kernels, here of both directions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from test_simt import OPTIONS, SEEDS, operands, options_of, packed_calls
from torch import Tensor

import attnfast
from attnfast import _cuda_ops, functional, ops, reference

# Of the largest element of a gradient.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
DTYPES = list(TOLERANCE)


def backward_of(simt: ModuleType) -> Callable[..., None]:
    """The emulated backward, with the workspace that ``ops`` allocates on a GPU."""

    def backward(*arguments: Any) -> None:
        lse = arguments[5]
        assert arguments[6] is None
        return simt.dot_attention_bwd(*arguments[:6], lse.new_empty(3, *lse.shape), *arguments[7:])

    return backward


def use(simt: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both directions under the emulator, on the route of CUDA tensors: short cuts are the CPU's."""
    simt.set_seed(0)
    monkeypatch.setattr(ops, "_forward", functools.partial(_cuda_ops.dot_attention_fwd_of, simt))
    monkeypatch.setattr(ops, "_backward", backward_of(simt))
    monkeypatch.setattr(functional, "_ordinary_call", lambda *_: 0)


@pytest.fixture
def backend(simt: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A test that never launched a kernel fails."""
    use(simt, monkeypatch)
    before = simt.launches()
    yield simt
    assert simt.launches() > before, "no kernel was launched"


def noise(like: Tensor, seed: int) -> Tensor:
    """What arrives at a result, the same in every dtype: what a half type cannot hold is no error of the kernels."""
    exact = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
    return exact.half().to(like)


def gradients(function: Any, inputs: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """Of sums of output, log-sum-exp and weights times `noise`, over the rows that see something, by every input.

    An input ``center`` is the prior's, of which the options have ``sigma``.
    """
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    given = dict(leaves)
    if "center" in given:
        options["prior"] = ("gaussian", given.pop("center"), options.pop("sigma"))
    result = function(**given, return_lse=True, **options)
    lse = torch.where(result.lse.isfinite(), result.lse, 0.0)
    loss = (result.output * noise(result.output, 11)).sum() + (lse * noise(lse, 12)).sum()
    if result.weights is not None:
        loss = loss + (result.weights * noise(result.weights, 13)).sum()
    return list(torch.autograd.grad(loss, list(leaves.values())))


def check(
    backend: ModuleType, inputs: dict[str, Tensor], seeds: Any = SEEDS, limit: float | None = None,
    function: str = "attention", **options: Any,
) -> None:  # fmt: skip
    """Gradients against the reference in float64, and the same bits under every schedule."""
    dtype = inputs["query"].dtype
    wide_options = {
        name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in options.items()
    }
    wide = {name: x.double() for name, x in inputs.items()}
    wanted = gradients(getattr(reference, function), wide, **wide_options)
    first: list[Tensor] = []
    for seed in seeds:
        backend.set_seed(seed)
        got = gradients(getattr(attnfast, function), inputs, **options)
        first = first or got
        for name, x, y in zip(inputs, got, first, strict=True):
            assert torch.equal(x, y), f"{name}: schedule {seed} gives other bits"
    for name, x, y in zip(inputs, first, wanted, strict=True):
        assert x.dtype == inputs[name].dtype
        size = max(y.abs().max().item(), 1e-3) if y.numel() else 1.0
        scale = limit or TOLERANCE[dtype]
        torch.testing.assert_close(x.double(), y, rtol=0, atol=scale * size, msg=lambda m, name=name: f"{name}: {m}")


def inputs_of(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> dict[str, Tensor]:
    """Everything that has a gradient, taken out of the options."""
    extra = {name: options.pop(name) for name in ("bias", "sink") if name in options}
    if "prior" in options:
        _, extra["center"], options["sigma"] = options.pop("prior")
    return {"query": query, "key": key, "value": value, **extra}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_of_options_under_every_schedule(backend: ModuleType, dtype: torch.dtype, name: str) -> None:
    query, key, value = operands(dtype, 2, 1, 37, 70, 16, 16)
    options = options_of(name, query, key)
    check(backend, inputs_of(query, key, value, options), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("rows", "keys", "size", "value_size"),
    [
        (1, 1, 1, 1),
        (3, 0, 8, 8),
        (0, 4, 8, 8),
        (65, 129, 64, 64),
        (16, 40, 72, 136),
        (5, 33, 256, 256),
        (9, 9, 0, 8),
        (3, 20, 300, 8),
        (3, 20, 8, 520),
        (70, 40, 264, 264),
    ],
)
def test_shapes(
    simt: ModuleType, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rows: int, keys: int, size: int,
    value_size: int,
) -> None:  # fmt: skip
    use(simt, monkeypatch)
    query, key, value = operands(dtype, 2, 2, rows, keys, size, value_size)
    check(simt, {"query": query, "key": key, "value": value}, seeds=(2,), scale=0.3)


def test_float64_at_every_size(backend: ModuleType) -> None:
    for size in (40, 100, 200, 300):
        query, key, value = operands(torch.float64, 2, 1, 19, 35, size, size)
        check(backend, {"query": query, "key": key, "value": value}, seeds=(1, 3), causal="bottom_right")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_take_tensor_cores_where_rows_are_aligned(backend: ModuleType, dtype: torch.dtype) -> None:
    query, key, value = operands(dtype, 1, 1, 20, 20, 16, 16)
    for x, uses in ((query, True), (query.transpose(-2, -1).contiguous().transpose(-2, -1), False)):
        x = x.detach().requires_grad_()
        out = attnfast.attention(x, key, value)
        before = backend.mma_instructions()
        out.backward(torch.randn_like(out))
        assert (backend.mma_instructions() > before) == uses


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 1, 70), (1, 2, 37, 1), (1, 1, 37, 70), (2, 2, 37, 70)], ids=str)
def test_bias_of_every_broadcast(backend: ModuleType, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Summed over what it broadcasts over; with a soft cap, which comes before it."""
    query, key, value = operands(dtype, 2, 1, 37, 70, 16, 16)
    bias = torch.randn(shape, dtype=dtype)
    check(backend, {"query": query, "key": key, "value": value, "bias": bias}, seeds=(0, 3), softcap=2.0)


def test_a_float_mask_beside_a_bias(backend: ModuleType) -> None:
    query, key, value = operands(torch.float32, 2, 2, 37, 70, 16, 16)
    mask = torch.randn(2, 1, 1, 70)
    mask[..., 60:] = -math.inf
    inputs = {"query": query, "key": key, "value": value, "mask": mask, "bias": torch.randn(2, 37, 70)}
    check(backend, inputs, causal="top_left")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_masked_takes_no_part(backend: ModuleType, dtype: torch.dtype) -> None:
    query, key, value = operands(dtype, 2, 1, 40, 70, 16, 16)
    mask = torch.rand(40, 70) < 0.5
    mask[:, 5] = mask[3] = False
    weigh = torch.randn_like(query)

    def run() -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in (query, key, value)]
        (attnfast.attention(*leaves, mask=mask) * weigh).sum().backward()
        return [x.grad for x in leaves if x.grad is not None]

    expected = run()
    key[:, :, 5], value[:, :, 5] = math.nan, math.inf
    query[:, :, 3], weigh[:, :, 3] = math.inf, math.nan
    for seed in SEEDS:
        backend.set_seed(seed)
        for x, y in zip(run(), expected, strict=True):
            assert torch.equal(x, y)
    assert not expected[0][:, :, 3].any()
    assert not expected[1][:, :, 5].any() and not expected[2][:, :, 5].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_nan_in_the_gradient_of_a_row_reaches_the_keys_that_it_sees(backend: ModuleType, dtype: torch.dtype) -> None:
    query, key, value = (x.requires_grad_() for x in operands(dtype, 1, 1, 40, 70, 16, 16))
    mask = torch.rand(40, 70) < 0.5
    weigh = torch.randn(2, 1, 40, 16, dtype=dtype)
    weigh[0, 0, 7, 2] = math.nan
    (attnfast.attention(query, key, value, mask=mask) * weigh).sum().backward()
    assert query.grad is not None and key.grad is not None and value.grad is not None
    assert query.grad[0, 0].isnan().any(-1).nonzero().flatten().tolist() == [7]
    assert torch.equal(key.grad[0, 0].isnan().all(-1), mask[7])
    assert torch.equal(value.grad[0, 0, :, 2].isnan(), mask[7])
    value.grad[..., 2] = 0
    assert value.grad.isfinite().all() and key.grad[1].isfinite().all()
    # What the others give to those keys is there, once: all but one column is as if the row's gradient were 0 there.
    clean = weigh.nan_to_num(0.0)
    again = value.detach().requires_grad_()
    (attnfast.attention(query.detach(), key.detach(), again, mask=mask) * clean).sum().backward()
    assert again.grad is not None
    again.grad[..., 2] = 0
    torch.testing.assert_close(value.grad, again.grad, rtol=0, atol=TOLERANCE[dtype] * 4)


def test_dropout_is_the_cpu_s(simt: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = operands(torch.float64, 2, 1, 37, 70, 16, 16)
    weigh = torch.randn_like(query)

    def run() -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in (query, key, value)]
        torch.manual_seed(3)
        (attnfast.attention(*leaves, dropout_p=0.4, causal="top_left") * weigh).sum().backward()
        return [x.grad for x in leaves if x.grad is not None]

    expected = run()
    use(simt, monkeypatch)
    for x, y in zip(run(), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_nothing_but_huge_scores(backend: ModuleType, dtype: torch.dtype) -> None:
    """Beside 1e9 the log-sum-exp has no digits left for the logarithm of the sum: gradients form it again."""
    query, key, value = operands(dtype, 1, 1, 37, 70, 16, 16)
    bias = torch.zeros(37, 70)
    bias[::2] = -1e9
    bias[3] = 1e9
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    out = attnfast.attention(*leaves, bias=bias)
    weigh = torch.randn_like(out)
    (out * weigh).sum().backward()
    # Such a row is uniform: values get the mean of what arrives, queries and keys nothing worth a digit.
    uniform = weigh[:, :, ::2].float().sum(2, keepdim=True) / 70 + weigh[:, :, 3:4].float() / 70
    others = [i for i in range(1, 37, 2) if i != 3]
    clean = [x.detach().float().requires_grad_() for x in (query[:, :, others], key, value)]
    (reference.attention(*clean) * weigh[:, :, others].float()).sum().backward()
    assert leaves[2].grad is not None and clean[2].grad is not None
    wanted = clean[2].grad + uniform
    limit = TOLERANCE[dtype] * wanted.abs().max().item()
    torch.testing.assert_close(leaves[2].grad.float(), wanted, rtol=0, atol=limit)


def test_gradcheck(backend: ModuleType) -> None:
    torch.manual_seed(5)
    query, key, value = (torch.randn(1, n, t, 3, dtype=torch.float64) for n, t in ((2, 3), (1, 5), (1, 5)))
    bias, sink = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (query, key, value, bias, sink)]

    def call(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
        result = attnfast.attention(
            query, key, value, bias=bias, sink=sink, softcap=1.5, causal="bottom_right", return_lse=True
        )
        return result.output, result.lse

    torch.autograd.gradcheck(call, leaves)


def test_only_what_is_wanted_is_formed(backend: ModuleType) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        operand = operands(dtype, 1, 1, 20, 30, 16, 16)
        whole = [x.detach().requires_grad_() for x in operand]
        attnfast.attention(*whole, causal="top_left").sum().backward()
        for i in range(3):
            some = [x.detach().requires_grad_(j == i) for j, x in enumerate(operand)]
            before = backend.launches()
            attnfast.attention(*some, causal="top_left").sum().backward()
            assert backend.launches() == before + 3  # forward, rows, one pass
            assert torch.equal(some[i].grad, whole[i].grad)  # type: ignore[arg-type]


MODES = ("full", "column_sum", "row_max")


def everything(query: Tensor, key: Tensor) -> dict[str, Any]:
    """Options that meet in one call."""
    shape = (2, query.shape[1], query.shape[2], key.shape[2])
    generator = torch.Generator().manual_seed(8)
    real = reference.real_dtype(query.dtype)
    center = torch.rand(shape[:3], generator=generator, dtype=real) * shape[3]
    return {
        "window": (12, 20),
        "window_center": torch.rand(shape[:3], generator=generator, dtype=real) * shape[3],
        "prior": ("gaussian", center, 9.0),
        "mask": torch.rand(shape[2:], generator=generator) < 0.7,
        "bias": torch.randn(shape[1:], generator=generator).to(query.dtype),
        "sink": torch.randn(shape[1], generator=generator, dtype=real),
        "softcap": 3.0,
        "key_lengths": torch.tensor([shape[3], shape[3] // 2]),
        "causal": "bottom_right",
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [16, 17], ids=["mma", "fma"])
def test_all_options_at_once(backend: ModuleType, dtype: torch.dtype, mode: str, size: int) -> None:
    query, key, value = operands(dtype, 2, 1, 70, 70, size, size)
    options = everything(query, key)
    check(backend, inputs_of(query, key, value, options), seeds=(1, 3), return_weights=mode, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_weights_alone(backend: ModuleType, dtype: torch.dtype, mode: str) -> None:
    """No gradient arrives at the output, and no value takes part."""
    query, key, value = operands(dtype, 4, 2, 70, 100, 16, 16)

    def run(function: Any, *inputs: Tensor) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        weights = function(*leaves, value.to(leaves[0]), causal="top_left", return_weights=mode).weights
        return list(torch.autograd.grad((weights * noise(weights, 3)).sum(), leaves))

    wanted = run(reference.attention, query.double(), key.double())
    for x, y in zip(run(attnfast.attention, query, key), wanted, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=0, atol=TOLERANCE[dtype] * y.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_row_maximum_of_equals_is_the_first(backend: ModuleType, dtype: torch.dtype) -> None:
    """Its gradient goes to the lowest index, a row that sees nothing has none."""
    query, key, value = operands(dtype, 1, 1, 20, 40, 16, 16)
    key[:, :, 1:] = key[:, :, :1]
    mask = torch.ones(20, 40, dtype=torch.bool)
    mask[4, :19] = mask[5] = False
    query, value = query.requires_grad_(), value.requires_grad_()
    result = attnfast.attention(query, key.requires_grad_(), value, mask=mask, return_weights="row_max")
    result.weights[:, :, 4:6].sum().backward()
    assert key.grad is not None and query.grad is not None
    hits = key.grad[0, 0].abs().sum(-1)
    assert hits.argmax() == 19 and not key.grad[:, :, :19].any() and not query.grad[:, :, 5].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", list(packed_calls()))
def test_packed_sequences(backend: ModuleType, dtype: torch.dtype, name: str) -> None:
    """Of lengths 0, 1, one tile and more, which begin in the middle of nothing; each as if it were alone."""
    query, key, value = (
        torch.randn(n, h, 16, generator=torch.Generator().manual_seed(n + h)).to(dtype)
        for n, h in ((150, 2), (170, 1), (170, 1))
    )
    real = reference.real_dtype(dtype)
    cu_q, cu_k = torch.tensor([0, 1, 1, 66, 70, 150]), torch.tensor([0, 60, 64, 64, 65, 170])
    options = {name: x.to(real) if isinstance(x, Tensor) and x.is_floating_point() else x
               for name, x in packed_calls()[name].items()}  # fmt: skip
    if "prior" in options:
        options["prior"] = ("gaussian", options["prior"][1].to(real), options["prior"][2])
    check(backend, inputs_of(query, key, value, options), seeds=(0, 3), function="varlen_attention",
          cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=80, max_seqlen_k=105, **options)  # fmt: skip


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 1), (1, 150, 1), (1, 1, 170), (2, 150, 170)], ids=str)
@pytest.mark.parametrize("size", [16, 300])
def test_packed_bias_of_every_broadcast(backend: ModuleType, shape: tuple[int, ...], size: int) -> None:
    generator = torch.Generator().manual_seed(7)
    query, key, value = (torch.randn(n, 2, size, generator=generator) for n in (150, 170, 170))
    cu_q, cu_k = torch.tensor([0, 9, 9, 66, 70, 150]), torch.tensor([0, 60, 64, 64, 65, 170])
    inputs = {"query": query, "key": key, "value": value, "bias": torch.randn(shape, generator=generator)}
    check(backend, inputs, seeds=(3,), function="varlen_attention", cu_seqlens_q=cu_q, cu_seqlens_k=cu_k,
          max_seqlen_q=80, max_seqlen_k=105, causal="bottom_right", softcap=2.0)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_packed_sequences(backend: ModuleType, dtype: torch.dtype) -> None:
    """Many tiles of a sequence, whose first ones are another's."""
    query, key, value = (
        torch.randn(n, h, 8, generator=torch.Generator().manual_seed(n)).to(dtype)
        for n, h in ((420, 2), (400, 1), (400, 1))
    )
    cu_q, cu_k = torch.tensor([0, 37, 420]), torch.tensor([0, 50, 400])
    check(backend, {"query": query, "key": key, "value": value}, seeds=(3,), function="varlen_attention",
          cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=383, max_seqlen_k=350, causal="top_left")  # fmt: skip


def extras(dtype: torch.dtype, size: int) -> tuple[list[Tensor], dict[str, Any]]:
    query, key, value = operands(dtype, 2, 1, 70, 100, size, size)
    real = reference.real_dtype(dtype)
    generator = torch.Generator().manual_seed(4)
    center = torch.rand(2, 2, 70, generator=generator, dtype=real) * 100
    options = {"window": (15, 15), "window_center": center + 3, "prior": ("gaussian", center, 6.0)}
    return [query, key, value], options


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [16, 17, 300])
def test_what_is_masked_takes_no_part_in_any_of_them(
    backend: ModuleType, dtype: torch.dtype, mode: str, size: int
) -> None:
    """NaN in hidden keys, values, queries and centres, and in what arrives at hidden weights."""
    (query, key, value), options = extras(dtype, size)
    mask = torch.rand(70, 100, generator=torch.Generator().manual_seed(2)) < 0.5
    mask[:, 40:45] = mask[3] = False
    weigh = torch.randn(2, 2, 70, size, generator=torch.Generator().manual_seed(3)).to(dtype)
    arrives = None

    def run() -> list[Tensor]:
        nonlocal arrives
        leaves = [x.detach().requires_grad_() for x in (query, key, value, options["prior"][1])]
        prior = ("gaussian", leaves[3], 6.0)
        result = attnfast.attention(*leaves[:3], mask=mask, return_weights=mode, **{**options, "prior": prior})
        if arrives is None:
            arrives = noise(result.weights, 5)
        torch.autograd.backward([result.output, result.weights], [weigh, arrives])
        return [x.grad for x in leaves if x.grad is not None]

    expected = run()
    assert len(expected) == 4 and all(x.isfinite().all() and x.any() for x in expected)
    key[:, :, 42], value[:, :, 43] = math.nan, math.inf
    query[:, :, 3], weigh[:, :, 3], options["prior"][1][:, :, 3] = math.inf, math.nan, math.nan
    assert arrives is not None
    if mode == "full":
        arrives[:, :, :, 40:45] = arrives[:, :, 3] = math.nan
    elif mode == "column_sum":
        arrives[:, :, 40:45] = math.nan
    else:
        arrives[:, :, 3] = math.nan
    for seed in (0, 3):
        backend.set_seed(seed)
        for x, y in zip(run(), expected, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("size", [16, 300])
def test_nan_that_arrives_at_a_visible_weight_shows(backend: ModuleType, size: int) -> None:
    query, key, value = (x.requires_grad_() for x in operands(torch.float32, 1, 1, 20, 40, size, size))
    result = attnfast.attention(query, key, value, causal="top_left", return_weights="full")
    arrives = torch.zeros_like(result.weights)
    arrives[0, 0, 7, 5] = math.nan
    torch.autograd.backward([result.weights], [arrives])
    assert query.grad is not None and key.grad is not None
    assert query.grad[0, 0].isnan().any(-1).nonzero().flatten().tolist() == [7]
    assert key.grad[0, 0].isnan().any(-1).nonzero().flatten().tolist() == list(range(8))
    assert not query.grad[1].any() and not key.grad[1].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_centre_of_nan_sees_nothing_through_its_window(backend: ModuleType, dtype: torch.dtype) -> None:
    (query, key, value), options = extras(dtype, 16)
    options["window_center"][:, :, 5] = math.nan
    inputs = inputs_of(query, key, value, options)
    found = gradients(attnfast.attention, inputs, **options)
    assert all(x.isfinite().all() for x in found)
    assert not found[0][:, :, 5].any() and not found[3][:, :, 5].any()
    # In the prior it makes the weights of its own row NaN, and all that they reach.
    inputs["center"][0, 0, 9] = math.nan
    found = gradients(attnfast.attention, inputs, **options)
    assert found[3][0, 0].isnan().nonzero().flatten().tolist() == [9]
    assert found[0][0, 0].isnan().any(-1).nonzero().flatten().tolist() == [9]
    assert found[1][1].isfinite().all() and found[2][1].isfinite().all()


@pytest.mark.parametrize("kind", ["attention", "packed", "large"])
@pytest.mark.parametrize("mode", MODES)
def test_dropout_with_prior_and_weights_is_the_cpu_s(
    simt: ModuleType, monkeypatch: pytest.MonkeyPatch, kind: str, mode: str
) -> None:
    size = 300 if kind == "large" else 16
    query, key, value = operands(torch.float64, 2, 2, 37, 70, size, size)
    center = torch.rand(2, 2, 37, dtype=torch.float64) * 70
    weigh = torch.randn_like(query)

    def run() -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in (query, key, value, center)]
        torch.manual_seed(3)
        options: dict[str, Any] = {"dropout_p": 0.4, "causal": "bottom_right", "return_weights": mode}
        if kind != "packed":
            result = attnfast.attention(*leaves[:3], prior=("gaussian", leaves[3], 20.0), **options)
            output = result.output
        else:
            tokens = [x.transpose(1, 2).flatten(0, 1) for x in leaves[:3]]
            prior = ("gaussian", leaves[3].transpose(0, 1).flatten(1), 20.0)
            cu_q, cu_k = torch.tensor([0, 40, 74]), torch.tensor([0, 31, 140])
            result = attnfast.varlen_attention(*tokens, cu_q, cu_k, 40, 109, prior=prior, **options)  # type: ignore[arg-type]
            output = result.output.view(2, 37, 2, size).transpose(1, 2)
        loss = (output * weigh).sum() + (result.weights * noise(result.weights, 6)).sum()
        return list(torch.autograd.grad(loss, leaves))

    expected = run()
    use(simt, monkeypatch)
    before = simt.launches()
    for x, y in zip(run(), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12 * y.abs().max().item())
    assert simt.launches() > before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_rows_of_nothing_but_huge_scores(backend: ModuleType, dtype: torch.dtype) -> None:
    """As in test_rows_of_nothing_but_huge_scores: the row finds its own sequence, and its window."""
    query, key, value = (torch.randn(n, 1, 16, generator=torch.Generator().manual_seed(n)).to(dtype)
                         for n in (60, 90, 90))  # fmt: skip
    cu_q, cu_k = torch.tensor([0, 20, 20, 60]), torch.tensor([0, 30, 50, 90])
    center = torch.full((1, 60), 12.0)
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    out = attnfast.varlen_attention(*leaves, cu_q, cu_k, 40, 40, bias=torch.full((60, 90), -1e9), window=(3, 4),
                                    window_center=center)  # fmt: skip
    weigh = noise(out, 2)
    (out * weigh).sum().backward()
    wanted = torch.zeros(90, 16)
    for queries, keys in ((slice(0, 20), 9), (slice(20, 60), 59)):  # eight keys around the twelfth of each
        wanted[keys : keys + 8] += weigh[queries, 0].float().sum(0) / 8
    assert leaves[2].grad is not None
    limit = TOLERANCE[dtype] * wanted.abs().max().item()
    torch.testing.assert_close(leaves[2].grad[:, 0].float(), wanted, rtol=0, atol=limit)


def test_gradcheck_of_prior_windows_and_weights(backend: ModuleType) -> None:
    torch.manual_seed(5)
    query, key, value = (torch.randn(1, n, t, 3, dtype=torch.float64) for n, t in ((2, 3), (1, 5), (1, 5)))
    center = torch.rand(1, 2, 3, dtype=torch.float64) * 5
    leaves = [x.requires_grad_() for x in (query, key, value, center)]

    def call(mode: str, query: Tensor, key: Tensor, value: Tensor, center: Tensor) -> tuple[Tensor, Tensor]:
        result = attnfast.attention(
            query, key, value, prior=("gaussian", center, 1.5), window=(2, 2), window_center=center.detach().round(),
            softcap=1.5, return_weights=mode,
        )  # fmt: skip
        return result.output, result.weights

    for mode in ("full", "column_sum"):
        torch.autograd.gradcheck(functools.partial(call, mode), leaves)


def test_windows_narrow_the_pass_by_keys(simt: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries that look along the keys: a block of keys goes through those that look there, and no others."""
    use(simt, monkeypatch)
    query, key, value = operands(torch.bfloat16, 1, 1, 320, 320, 16, 16)
    along = torch.arange(320.0).expand(2, 1, 320)
    counts = []
    for window in ((4, 4), (320, 320)):
        leaves = [x.detach().requires_grad_() for x in (query, key, value)]
        out = attnfast.attention(*leaves, window=window, window_center=along)
        before = simt.mma_instructions()
        out.backward(torch.ones_like(out))
        counts.append(simt.mma_instructions() - before)
    assert counts[0] < 0.4 * counts[1]


def test_gradients_of_tensors_elsewhere_go_to_the_cuda_module(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    binary = SimpleNamespace(dot_attention_bwd=lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(ops, "cuda_binary", lambda: binary)
    query = torch.empty(2, 3, 5, 8, device="meta", dtype=torch.bfloat16)
    lse = torch.empty(2, 3, 5, device="meta")
    options = functional._new_options((8, False))
    ops.plain_bwd(query, query, query, query, query, lse, options, (True, True, True))
    assert len(calls) == 1 and len(calls[0]) == 38
    assert calls[0][6].shape == (3, 2, 3, 5) and calls[0][6].dtype == torch.float32
