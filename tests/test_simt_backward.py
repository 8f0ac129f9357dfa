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
from helpers import must_launch
from test_simt import OPTIONS, SEEDS, operands, options_of
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
        return _cuda_ops.dot_attention_bwd_of(simt, *arguments[:6], lse.new_empty(3, *lse.shape), *arguments[7:])

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
    with must_launch(simt):
        yield simt


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


def test_gradients_of_tensors_elsewhere_go_to_the_cuda_module(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    binary = SimpleNamespace(dot_attention_bwd=lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(_cuda_ops, "cuda_binary", lambda: binary)
    query = torch.empty(2, 3, 5, 8, device="meta", dtype=torch.bfloat16)
    lse = torch.empty(2, 3, 5, device="meta")
    options = functional._new_options((8, False))
    ops.plain_bwd(query, query, query, query, query, lse, options, (True, True, True))
    assert len(calls) == 1 and len(calls[0]) == 39 and calls[0][-1] is False
    assert calls[0][6].shape == (3, 2, 3, 5) and calls[0][6].dtype == torch.float32
