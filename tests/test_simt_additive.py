"""The additive core's CUDA kernels under the SIMT emulator, behind ``attnfast.additive_attention``; see test_simt."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import must_launch, patch_seed
from torch import Tensor

import attnfast
from attnfast import _additive_ops, ops, reference

SEEDS = range(4)  # one of each kind of schedule
TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
OPTIONS = (
    "plain", "causal", "bottom_right", "window", "lengths", "mask", "bias", "columns_bias", "alibi", "sink", "softcap",
    "by_head", "dropout", "window_center", "prior", "weights", "together",
)  # fmt: skip


@pytest.fixture
def backend(simt: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The additive core runs under the emulator, and did: a test that never launched a kernel fails."""
    simt.set_seed(0)
    monkeypatch.setattr(_additive_ops, "_forward", functools.partial(_additive_ops.cuda_forward, simt))
    monkeypatch.setattr(_additive_ops, "_backward", functools.partial(_additive_ops.cuda_backward, simt))
    with must_launch(simt):
        yield simt


def operands(
    dtype: torch.dtype, rows: int, keys: int, size: int, value_size: int, spread: float = 1.0, heads: int = 2
) -> list[Tensor]:
    """Query, key, value and weight of two samples; ``heads`` query heads share one key head."""
    generator = torch.Generator().manual_seed(rows * 1000 + keys + size)
    shapes = ((2, heads, rows, size), (2, 1, keys, size), (2, 1, keys, value_size), (1, size))
    query, key, value, weight = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    weight *= 2 / math.sqrt(max(size, 1))
    return [x.to(dtype) for x in (query * spread, key * spread, value)] + [weight.to(reference.real_dtype(dtype))]


def options_of(name: str, query: Tensor, key: Tensor) -> dict[str, Any]:
    shape, real = (*query.shape[:3], key.shape[2]), reference.real_dtype(query.dtype)
    generator = torch.Generator().manual_seed(5)
    draw = functools.partial(torch.randn, generator=generator)
    center = (torch.rand(shape[:3], generator=generator, dtype=torch.float64) * shape[3]).to(real)
    return {
        "plain": {},
        "causal": {"causal": "top_left"},
        "bottom_right": {"causal": "bottom_right"},
        "window": {"window": (7, 3)},
        "lengths": {
            "query_lengths": torch.tensor([0, shape[2]]),
            "key_lengths": torch.tensor([shape[3], shape[3] // 2]),
            "causal": "bottom_right",
        },
        "mask": {"mask": torch.rand(shape, generator=generator) < 0.6},
        "bias": {"bias": draw(shape[2:]).to(query.dtype)},
        "columns_bias": {"bias": draw(shape[0], 1, 1, shape[3]).to(query.dtype)},
        "alibi": {"alibi_slopes": torch.rand(shape[1], generator=generator).to(real)},
        "sink": {"sink": draw(shape[1]).to(real)},
        "softcap": {"softcap": 1.5},
        "by_head": {"score_bias": draw(shape[1], query.shape[3]).to(real)},
        "dropout": {"dropout_p": 0.4},
        "window_center": {"window": (20, 30), "window_center": center, "return_weights": "row_max"},
        "prior": {"prior": ("gaussian", center, 15.0), "return_weights": "column_sum"},
        "weights": {"causal": "top_left", "sink": draw(shape[1]).to(real), "return_weights": "full"},
        "together": {
            "window": (25, 30),
            "window_center": center.mean(1, keepdim=True),
            "prior": ("gaussian", center, 12.0),
            "dropout_p": 0.3,
            "softcap": 1.5,
            "bias": draw(1, shape[1], shape[2], shape[3]).to(query.dtype),
            "mask": torch.rand(shape, generator=generator) < 0.8,
            "return_weights": ("full", "column_sum", "row_max")[shape[2] % 3],
        },
    }[name]


def widened(x: Any) -> Any:
    if isinstance(x, tuple):
        return tuple(widened(y) for y in x)
    return x.detach().double() if isinstance(x, Tensor) and x.is_floating_point() else x


def results(function: Any, tensors: list[Tensor], options: dict[str, Any], incoming: list[Tensor]) -> dict[str, Tensor]:
    """Output, lse, weights if asked for, and the gradients of all that can have one."""
    named = dict(zip(("query", "key", "value", "weight"), tensors, strict=True))
    leaves = {name: x.detach().clone().requires_grad_() for name, x in named.items()}
    options = dict(options)
    for name in ("score_bias", "bias", "sink"):
        if name in options:
            options[name] = leaves[name] = options[name].detach().clone().requires_grad_()
    if "prior" in options:
        kind, center, sigma = options["prior"]
        leaves["center"] = center.detach().clone().requires_grad_()
        options["prior"] = (kind, leaves["center"], sigma)
    arguments = [leaves[name] for name in named]
    result = function(*arguments, return_lse=True, **options)
    found = {"output": result.output, "lse": result.lse}
    if result.weights is not None:
        found["weights"] = result.weights
    seen = {**found, "lse": torch.where(result.lse.isfinite(), result.lse, 0)}
    grads = torch.autograd.grad(
        list(seen.values()),
        list(leaves.values()),
        [x[: y.numel()].view(y.shape).to(y.dtype) for x, y in zip(incoming, found.values(), strict=False)],
    )
    return {**found, **dict(zip(leaves, grads, strict=True))}


def check(dtype: torch.dtype, tensors: list[Tensor], options: dict[str, Any], limit: float | None = None) -> None:
    query, key, value, _ = tensors
    generator = torch.Generator().manual_seed(9)
    rows = query.shape[:3].numel()
    # Of output, lse and weights, as many as there may be.
    incoming = [
        torch.randn(rows * value.shape[3], generator=generator).to(dtype),
        torch.randn(rows, generator=generator),
        torch.randn(query.shape[:2].numel() * (query.shape[2] + 1) * key.shape[2] + rows, generator=generator).to(
            dtype
        ),
    ]
    seed = [3, 4]
    with pytest.MonkeyPatch.context() as patch:
        patch_seed(patch, seed)
        got = results(attnfast.additive_attention, tensors, options, incoming)
    wide = {name: widened(x) for name, x in options.items()}
    if "dropout_p" in options:
        wide["dropout_seed"] = torch.tensor(seed)
    wanted = results(reference.additive_attention, [widened(x) for x in tensors], wide, [widened(x) for x in incoming])
    limit = TOLERANCE[dtype] if limit is None else limit
    assert got["output"].dtype == dtype
    for name, x in wanted.items():
        # Sums over many terms, in proportion to the largest.
        scale = max(1.0, x[x.isfinite()].abs().max().item()) if x.isfinite().any() else 1.0
        assert not got[name].isnan().any(), name
        torch.testing.assert_close(
            got[name].double(), x, rtol=0, atol=limit * scale, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_options_under_every_schedule(backend: ModuleType, dtype: torch.dtype, name: str) -> None:
    for rows, seeds in ((19, SEEDS), (1, SEEDS[:2])):
        tensors = operands(dtype, rows, 70, 16, 16)
        for seed in seeds:
            backend.set_seed(seed)
            check(dtype, tensors, options_of(name, tensors[0], tensors[1]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("rows", "keys", "size", "value_size"),
    [(1, 1, 1, 1), (3, 0, 8, 8), (33, 65, 64, 64), (6, 40, 72, 136), (5, 33, 200, 260), (4, 9, 0, 8), (4, 300, 5, 3)],
)
def test_shapes(backend: ModuleType, dtype: torch.dtype, rows: int, keys: int, size: int, value_size: int) -> None:
    check(dtype, operands(dtype, rows, keys, size, value_size), {})


def test_no_rows_give_zeros(backend: ModuleType) -> None:
    query, key, value, weight = (x.requires_grad_() for x in operands(torch.float32, 0, 5, 8, 8))
    out = attnfast.additive_attention(query, key, value, weight)
    assert out.shape == (2, 2, 0, 8)
    grads = torch.autograd.grad(out.sum(), (query, key, value, weight))
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("spread", [0.01, 0.2, 2.0, 4.0, 12.0, 40.0, 3000.0])
def test_sizes_of_arguments(backend: ModuleType, dtype: torch.dtype, spread: float) -> None:
    """Each way of a tile: the polynomial, the exponentials, cut ones, and the hyperbolic tangent."""
    for rows in (2, 9):
        check(dtype, operands(dtype, rows, 40, 24, 8, spread), {})


# The last argument of one way, and the first of the next (device/additive.cuh); and some that a way must not have.
@pytest.mark.parametrize("edge", [0.3125, 0.5, 0.8, 5.195, 6.0, 9.0, 11.0, 43.0, 44.5, 60.0])
def test_both_sides_of_a_change_of_ways(backend: ModuleType, edge: float) -> None:
    results = []
    for size in (edge * (1 - 1e-6), edge * (1 + 1e-6)):
        sign = torch.tensor([1.0, -1.0]).repeat_interleave(4).repeat(2)  # all four of a reciprocal, too
        query, key = size * sign.expand(2, 1, 6, 16), size * torch.stack([sign, -sign]).expand(2, 1, 2, 16)
        value, weight = torch.tensor([[1.0], [-1.0]]).expand(2, 1, 2, 1), torch.linspace(-1, 1, 16).view(1, 16)
        query = query + torch.linspace(-1e-3, 0, 6).view(6, 1) * sign
        check(torch.float32, [query.contiguous(), key.contiguous(), value.contiguous(), weight], {})
        results.append(attnfast.additive_attention(query, key, value, weight))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-5)


def test_small_arguments_keep_their_relative_precision(backend: ModuleType) -> None:
    """Where 1 - 2 / (1 + e^2x) would keep only what is left of 1e-7."""
    query, key, value, weight = operands(torch.float32, 5, 40, 32, 8, 1e-4)
    weight = 3000 * weight
    check(torch.float32, [query, key, value, weight], {}, 4e-6)


@pytest.mark.parametrize("large", [slice(0, 64), slice(64, 80)], ids=str)
def test_chunks_of_dimensions_take_their_own_way(backend: ModuleType, large: slice) -> None:
    query, key, value, weight = operands(torch.float32, 6, 40, 80, 8, 0.1)
    query[..., large] *= 300
    key[..., large] *= 300
    check(torch.float32, [query, key, value, weight], {})


def test_a_sink_of_nothing_has_no_gradient(backend: ModuleType) -> None:
    tensors = operands(torch.float32, 6, 40, 8, 8)
    mask = torch.ones(6, 40, dtype=torch.bool)
    mask[2] = False
    sink = torch.full((2,), -math.inf, requires_grad=True)
    out = attnfast.additive_attention(*tensors, mask=mask, sink=sink)
    assert torch.equal(torch.autograd.grad(out.square().sum(), sink)[0], torch.zeros(2))


@pytest.mark.parametrize("large", [1.0, 1e10, 1e20, 1e36])
def test_large_arguments_that_cancel(backend: ModuleType, large: float) -> None:
    """e^2x keeps its digits up to the last argument that has one, and weights up to theirs."""
    sizes = torch.linspace(5.0, 42.0, 38, dtype=torch.float64).view(1, 1, 38, 1)
    generator = torch.Generator().manual_seed(4)
    query = (sizes + torch.randn(1, 1, 38, 16, generator=generator, dtype=torch.float64) / 4).float()
    weight = torch.randn(1, 16, generator=generator)
    errors = []
    for q in range(38):
        key = (-query[:, :, q : q + 1] + 0.3).contiguous()
        values = torch.ones(1, 1, 1, 1)
        _, lse = attnfast.additive_attention(query[:, :, q : q + 1], key, values, weight * large, return_lse=True)[:2]
        wanted = (weight.double() * torch.tanh(query[:, :, q].double() + key[:, :, 0].double())).sum()
        errors.append(lse.double().item() / large - wanted.item())
    assert torch.tensor(errors).square().mean().sqrt() < 6e-7


@pytest.mark.parametrize("scale", [1.0, 1e9, 1e12, 1e20, 1e36])
def test_large_weights_of_saturated_terms(backend: ModuleType, scale: float) -> None:
    """Where 1 / x no longer counts, x is large, and its products with a weight must be finite."""
    tokens, values = torch.full((1, 1, 1, 16), 10.0), torch.ones(1, 1, 1, 1)
    weight = scale * torch.randn(1, 16, generator=torch.Generator().manual_seed(3))
    lse = attnfast.additive_attention(tokens, tokens, values, weight, return_lse=True)[1]
    torch.testing.assert_close(lse.double().item() / scale, weight.double().sum().item() / scale, rtol=0, atol=2e-6)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_sizes_of_weights(backend: ModuleType, scale: float) -> None:
    """A weight beyond 2^36 leaves the exponentials; what is left of the softmax is a choice."""
    query, key, value, weight = operands(torch.float32, 5, 40, 8, 8)
    query[:], key[:] = query.round(), key.round()
    weight = scale * torch.ones_like(weight)
    out = attnfast.additive_attention(query, key, value, weight)
    wanted = reference.additive_attention(query.double(), key.double(), value.double(), weight.double())
    if scale < 1:
        torch.testing.assert_close(out.double(), wanted, rtol=0, atol=1e-6)
    else:
        assert out.isfinite().all()


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("rows", [1, 20])
def test_what_is_masked_takes_no_part(backend: ModuleType, dtype: torch.dtype, rows: int) -> None:
    tensors = operands(dtype, rows, 70, 16, 16, heads=1)
    mask = torch.rand(rows, 70, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[:, 5] = mask[:, 6] = False
    mask[rows // 3] = rows == 1
    mask[:, 5:7] = False
    check(dtype, tensors, {"mask": mask})
    zeros = [x.clone() for x in tensors]
    for x in zeros[1:3]:
        x[:, :, 5:7] = 0
    tensors[1][:, :, 5], tensors[2][:, :, 5] = math.nan, math.inf
    tensors[1][:, :, 6], tensors[2][:, :, 6] = -math.inf, math.nan
    if rows > 1:
        zeros[0][:, :, rows // 3], tensors[0][:, :, rows // 3] = 0, math.nan
    grad = torch.randn(2, 1, rows, 16, generator=torch.Generator().manual_seed(2)).to(dtype)
    if rows > 1:
        grad[:, :, rows // 3] = math.nan  # of a row that sees nothing
    for seed in SEEDS:
        backend.set_seed(seed)
        found = []
        for given in (tensors, zeros):
            leaves = [x.clone().requires_grad_() for x in given]
            out = attnfast.additive_attention(*leaves, mask=mask)
            found.append([out, *torch.autograd.grad(out, leaves, grad)])
        for poisoned, clean in zip(*found, strict=True):
            # NaN in a tile sends it another way, so bits may differ.
            torch.testing.assert_close(poisoned, clean, rtol=0, atol=TOLERANCE[dtype] * 4)
        if rows > 1:
            assert torch.equal(found[0][0][:, :, rows // 3], torch.zeros(2, 1, 16, dtype=dtype))
    # A NaN that some rows see is theirs alone.
    tensors[2][:, :, 7, 2] = math.nan
    seen = attnfast.additive_attention(*tensors, mask=mask).isnan()
    assert torch.equal(seen[0, 0, :, 2], mask[:, 7])
    assert not seen[..., 3:].any() and not seen[..., :2].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("rows", [2, 40])
def test_schedules_change_no_bit(backend: ModuleType, dtype: torch.dtype, rows: int) -> None:
    found = []
    for seed in range(6):
        backend.set_seed(seed)
        leaves = [x.requires_grad_() for x in operands(dtype, rows, 130, 24, 24)]
        bias = torch.linspace(-1, 1, 130).to(dtype).requires_grad_()
        center = torch.full((2, 2, rows), 60.0, dtype=reference.real_dtype(dtype), requires_grad=True)
        out, _, weights = attnfast.additive_attention(
            *leaves, causal="bottom_right", bias=bias, prior=("gaussian", center, 40.0), return_weights="column_sum"
        )
        loss = out.square().sum() + weights.square().sum()
        found.append([out, weights, *torch.autograd.grad(loss, [*leaves, bias, center])])
    assert all(torch.equal(x, y) for other in found for x, y in zip(other, found[0], strict=True))


def test_dropout_is_the_cpu_s(simt: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = operands(torch.float64, 9, 70, 16, 16)
    torch.manual_seed(3)
    prior = ("gaussian", torch.full((2, 2, 9), 30.0, dtype=torch.float64), 20.0)
    options: dict[str, Any] = {"dropout_p": 0.4, "prior": prior, "return_weights": "full"}
    expected = attnfast.additive_attention(*tensors, **options)
    monkeypatch.setattr(_additive_ops, "_forward", functools.partial(_additive_ops.cuda_forward, simt))
    torch.manual_seed(3)
    got = attnfast.additive_attention(*tensors, **options)
    torch.testing.assert_close(got.output, expected.output, rtol=0, atol=1e-12)
    torch.testing.assert_close(got.weights, expected.weights, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 6])
def test_gradcheck(backend: ModuleType, rows: int) -> None:
    tensors = [x.requires_grad_() for x in operands(torch.float64, rows, 7, 5, 3)]
    shift = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(rows, 7, dtype=torch.float64, requires_grad=True)
    sink = torch.randn(2, dtype=torch.float64, requires_grad=True)
    center = (torch.rand(2, 2, rows, dtype=torch.float64) * 7).requires_grad_()

    def call(*args: Tensor) -> Any:
        *four, score_bias, added, logit, middle = args
        return attnfast.additive_attention(
            *four, score_bias=score_bias, bias=added, sink=logit, softcap=2.0, causal="bottom_right",
            prior=("gaussian", middle, 3.0), return_lse=True, return_weights="full",
        )  # fmt: skip

    assert torch.autograd.gradcheck(call, (*tensors, shift, bias, sink, center), fast_mode=True)


def test_gradients_that_nobody_wants_are_not_formed(backend: ModuleType) -> None:
    tensors = operands(torch.float32, 9, 40, 8, 8)
    wanted = [x.clone().requires_grad_() for x in tensors]
    whole = torch.autograd.grad(attnfast.additive_attention(*wanted).square().sum(), wanted)
    for i in range(4):
        leaves = [x.clone().requires_grad_(i == j) for j, x in enumerate(tensors)]
        (grad,) = torch.autograd.grad(attnfast.additive_attention(*leaves).square().sum(), [leaves[i]])
        assert torch.equal(grad, whole[i])


def test_strides_and_shared_heads(backend: ModuleType) -> None:
    query, key, value, weight = operands(torch.float32, 9, 40, 8, 8, heads=4)
    turned = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (query, key, value)]
    check(torch.float32, [*turned, weight], {})
    check(torch.float32, [query, key.expand(2, 2, 40, 8), value.expand(2, 2, 40, 8), weight], {})


def test_without_a_head_axis(backend: ModuleType) -> None:
    query, key, value, weight = operands(torch.float32, 5, 9, 8, 8, heads=1)
    out = attnfast.additive_attention(query[:, 0], key[:, 0], value[:, 0], weight[0])
    torch.testing.assert_close(out, attnfast.additive_attention(query, key, value, weight)[:, 0])


def test_a_workspace_that_is_too_small_is_refused(simt: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value, weight = operands(torch.float32, 2, 130, 8, 8, heads=1)
    wanted, _ = simt.additive_attention_workspace(query, key, value, None, ops.WEIGHTS_NONE)
    assert wanted == 2 * 2 * 2 * (8 + 2)  # splits, samples, rows, columns with maximum and sum
    monkeypatch.setattr(_additive_ops, "_workspace", lambda query, elements: query.new_empty(elements - 1))
    monkeypatch.setattr(_additive_ops, "_forward", functools.partial(_additive_ops.cuda_forward, simt))
    with pytest.raises(ValueError, match="workspace: expected at least 80 elements, got 79"):
        attnfast.additive_attention(query, key, value, weight)
    # Three planes of rows for weights, where the parts of the splits are fewer.
    with pytest.raises(ValueError, match="workspace: expected at least 12 elements, got 11"):
        attnfast.additive_attention(query, key[:, :, :9], value[:, :, :9], weight, return_weights=True)
    offsets = torch.tensor([0, 1, 2])
    assert simt.additive_attention_workspace(query[:1], key[:1], value[:1], offsets, ops.WEIGHTS_NONE)[0] == 0
