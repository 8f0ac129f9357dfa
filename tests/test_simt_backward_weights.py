"""Gradients of the emulated CUDA kernels through returned weights, the prior's centres, windows around centres and
packed sequences, each by itself, all together, and where what is hidden holds NaN. As in test_simt_backward.py.
"""

from __future__ import annotations

import functools
import math
from types import ModuleType
from typing import Any

import pytest
import test_simt_backward
import torch
from test_simt import operands, packed_calls
from test_simt_backward import DTYPES, TOLERANCE, check, gradients, inputs_of, noise, use
from torch import Tensor

import attnfast
from attnfast import reference

backend = test_simt_backward.backend  # the fixture

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_heads_that_share_keys_look_elsewhere(backend: ModuleType, dtype: torch.dtype) -> None:
    """A block of keys goes through the queries of every head that look there, one from either end."""
    query, key, value = operands(dtype, 2, 1, 200, 200, 8, 8)
    along = torch.arange(200.0)
    center = torch.stack((along, 199 - along)).expand(2, 2, 200)
    check(backend, {"query": query, "key": key, "value": value}, seeds=(3,), window=(4, 4), window_center=center)


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
