"""The additive core's CUDA kernels under the SIMT emulator: packed sequences, weights, windows around centres, priors.

As test_simt_additive.py, whose calls have each of these among the other options.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from test_simt_additive import TOLERANCE, backend, operands
from torch import Tensor

import attnfast
from attnfast import _additive_ops, ops, reference
from attnfast._additive_autograd import additive_attention as additive_core
from attnfast._ext import _C

__all__ = ["backend"]  # the fixture


@contextlib.contextmanager
def cpu_kernels() -> Iterator[None]:
    """The CPU's kernels, which the package would take."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_additive_ops, "_forward", _C.additive_attention_fwd)
        patch.setattr(_additive_ops, "_backward", _C.additive_attention_bwd)
        yield


# --- packed sequences: by the operators, because no public function takes them ---------------------------------------
PACKED = {
    "sequences": (torch.tensor([0, 0, 1, 34, 36, 70]), torch.tensor([0, 3, 3, 40, 105, 110])),
    "short ones": (torch.tensor([0, 1, 2, 2, 5, 6]), torch.tensor([0, 40, 40, 41, 80, 110])),
}


def packed_inputs(cu_q: Tensor, cu_k: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    rows, keys = int(cu_q[-1]), int(cu_k[-1])
    shapes = {"query": (1, 2, rows, 12), "key": (1, 1, keys, 12), "value": (1, 1, keys, 5), "weight": (1, 12)}
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def packed_options(name: str, cu_q: Tensor, cu_k: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What has a gradient, and what has none."""
    generator = torch.Generator().manual_seed(8)
    rows, keys = int(cu_q[-1]), int(cu_k[-1])
    draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    center = torch.rand(1, 2, rows, generator=generator, dtype=torch.float64) * 30
    begin = torch.randint(0, 30, (1, 2, rows, 1), generator=generator)
    mask = torch.rand(1, 1, rows, keys, generator=generator) < 0.7
    cases: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {
        "plain": ({}, {}),
        "bottom_right": ({"sink": draw(2)}, {"causal": 2, "weights_mode": ops.WEIGHTS_FULL}),
        "alibi": (
            {},
            {
                "alibi_slopes": draw(5, 2).abs(),
                "window_left": 20,
                "window_right": 3,
                "weights_mode": ops.WEIGHTS_ROW_MAX,
            },
        ),
        "bias": ({"bias": draw(1, 2, rows, keys)}, {"mask": mask, "weights_mode": ops.WEIGHTS_COLUMN_SUM}),
        "bias of columns": ({"bias": draw(1, 2, 1, keys), "score_bias": draw(2, 12)}, {"causal": 1}),
        "bias of rows": ({"bias": draw(1, 1, rows, 1), "bias2": draw(1, 1, rows, keys)}, {"softcap": 1.5}),
        "bias of heads": ({"bias": draw(1, 2, 1, 1), "bias2": draw(1, 1, 1, 1)}, {}),
        "bounds": (
            {"bias": draw(1, 1, 1, keys)},
            {"window_bounds": torch.cat([begin - 5, begin + 20], -1), "weights_mode": ops.WEIGHTS_COLUMN_SUM},
        ),
        "prior": (
            {"center": center},
            {
                "prior_sigma": 9.0,
                "seed": torch.tensor([3, 4]),
                "dropout_p": 0.3,
                "weights_mode": ops.WEIGHTS_FULL,
            },
        ),
    }
    return cases[name]


def packed_results(leaves: dict[str, Tensor], options: ops.DotAttentionOptions, dtype: torch.dtype) -> list[Tensor]:
    names = ("query", "key", "value", "weight", "score_bias", "bias", "bias2", "sink")
    given = [leaves.get(name) for name in names]
    out, lse, weights = additive_core(*given, options, True, leaves.get("center"))  # type: ignore[arg-type]
    assert lse is not None
    found = [out, torch.where(lse.isfinite(), lse, 0.0), *([] if weights is None else [weights])]
    generator = torch.Generator().manual_seed(9)
    incoming = [torch.randn(x.shape, generator=generator).to(dtype).to(x.dtype) for x in found]
    return [*found, *torch.autograd.grad(found, list(leaves.values()), incoming)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("lengths", list(PACKED))
@pytest.mark.parametrize(
    "name",
    ["plain", "bottom_right", "alibi", "bias", "bias of columns", "bias of rows", "bias of heads", "bounds", "prior"],
)
def test_packed_sequences(backend: ModuleType, dtype: torch.dtype, lengths: str, name: str) -> None:
    """Tiles begin in the middle of nothing: lengths of 0, 1, one tile and more, against the CPU in float64."""
    cu_q, cu_k = PACKED[lengths]
    extra, plain = packed_options(name, cu_q, cu_k)
    tensors = {**packed_inputs(cu_q, cu_k), **extra}
    real = reference.real_dtype(dtype)
    typed = {
        key: x.to(dtype if key in ("query", "key", "value", "bias", "bias2") else real) for key, x in tensors.items()
    }
    plain = {key: x.to(real) if isinstance(x, Tensor) and x.is_floating_point() else x for key, x in plain.items()}
    options = ops.DotAttentionOptions(cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, scale=1.0, **plain)
    wide = options._replace(alibi_slopes=None if options.alibi_slopes is None else options.alibi_slopes.double())
    with cpu_kernels():
        wanted = packed_results({key: x.double().requires_grad_() for key, x in typed.items()}, wide, dtype)
    backend.set_seed(len(name))
    got = packed_results({key: x.requires_grad_() for key, x in typed.items()}, options, dtype)
    labels = ["out", "lse", "weights"] if options.weights_mode else ["out", "lse"]
    for label, x, y in zip([*labels, *typed], got, wanted, strict=True):
        size = max(1.0, y.abs().max().item())
        torch.testing.assert_close(
            x.double(), y, rtol=0, atol=TOLERANCE[dtype] * size, msg=lambda m, label=label: f"{label}: {m}"
        )


@pytest.mark.parametrize("rows", [5, 34])
def test_what_another_sequence_holds_takes_no_part(backend: ModuleType, rows: int) -> None:
    cu_q, cu_k = torch.tensor([0, rows, 2 * rows]), torch.tensor([0, 35, 70])
    options = ops.DotAttentionOptions(
        cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, scale=1.0, prior_sigma=5.0, weights_mode=ops.WEIGHTS_FULL
    )
    found = []
    for poison in (0.0, math.nan):
        tensors = {**packed_inputs(cu_q, cu_k), "center": torch.full((1, 2, 2 * rows), 7.0, dtype=torch.float64)}
        for name in ("query", "key", "value"):
            tensors[name][:, :, tensors[name].shape[2] // 2 :] += poison
        tensors["center"][..., rows:] += poison
        leaves = {name: x.float().requires_grad_() for name, x in tensors.items()}
        arguments = [leaves[name] for name in ("query", "key", "value", "weight")]
        out, _, weights = additive_core(*arguments, None, None, None, None, options, False, leaves["center"])
        assert weights is not None
        kept = out[:, :, :rows].square().sum() + weights[:, :, :rows, :35].square().sum()
        assert not weights[:, :, :rows, 35:].any() and not weights[:, :, rows:, :35].any()
        grads = dict(zip(leaves, torch.autograd.grad(kept, list(leaves.values()), allow_unused=True), strict=True))
        found.append([out[:, :, :rows], weights[:, :, :rows], grads["key"][:, :, :35], grads["query"][:, :, :rows],
                      grads["value"][:, :, :35], grads["center"][..., :rows]])  # fmt: skip
    for x, y in zip(*found, strict=True):
        assert torch.equal(x, y)


# --- weights, windows around centres, the prior ----------------------------------------------------------------------
@pytest.mark.parametrize("rows", [3, 20])
def test_what_a_window_hides_takes_no_part(backend: ModuleType, rows: int) -> None:
    """Nor does what arrives at a hidden weight, or the centre of a row that sees nothing."""
    query, key, value, weight = operands(torch.float32, rows, 70, 16, 16, heads=1)
    center, prior = torch.full((2, 1, rows), 30.0), torch.full((2, 1, rows), 28.0)
    mask = torch.ones(rows, 70, dtype=torch.bool)
    mask[1] = False
    clean = [x.clone() for x in (key, value)]
    for x, hidden in zip((key, value, *clean), (math.nan, math.inf, 0.0, 0.0), strict=True):
        x[:, :, :10] = hidden
        x[:, :, 60:] = hidden
    arrived = torch.randn(2, 1, rows, 70, generator=torch.Generator().manual_seed(3))
    found = []
    for k, v, poison in ((key, value, math.nan), (*clean, 0.0)):
        grads = arrived.clone()
        grad_out = torch.ones(2, 1, rows, 16)
        grad_out[:, :, 1] = poison
        grads[..., :10] = grads[..., 60:] = poison
        grads[:, :, 1] = poison
        given = [query.clone(), k, v, weight, prior.clone(), torch.zeros(1)]
        given[0][:, :, 1] = given[4][:, :, 1] = poison
        leaves = [x.clone().requires_grad_() for x in given]
        result = attnfast.additive_attention(
            *leaves[:4], mask=mask, window=(15, 20), window_center=center, prior=("gaussian", leaves[4], 9.0),
            sink=leaves[5], return_weights="full",
        )  # fmt: skip
        both = torch.autograd.grad([result.output, result.weights], leaves, [grad_out, grads])
        found.append([result.output, result.weights, *both])
        assert not result.weights[..., :10].any() and not result.weights[..., 60:].any()
    for poisoned, zeros in zip(*found, strict=True):
        torch.testing.assert_close(poisoned, zeros, rtol=0, atol=1e-5)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("mode", ["full", "column_sum", "row_max"])
def test_weights_in_windows_over_many_tiles(backend: ModuleType, mode: str, centred: bool) -> None:
    """Of rows and keys that a tile leaves out, all are far away."""
    tensors = operands(torch.float64, 100, 90, 4, 4)
    options: dict[str, Any] = {"window": (17, 3), "return_weights": mode}
    if centred:
        options["window_center"] = torch.linspace(80.0, 5.0, 100, dtype=torch.float64).expand(2, 2, 100)
    found = attnfast.additive_attention(*tensors, **options).weights
    wanted = reference.additive_attention(*tensors, **options).weights
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_row_maxima(backend: ModuleType) -> None:
    """Among equals the lowest key, NaN before all, -1 where nothing is seen; the gradient goes to that key."""
    query, key, value = torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 40, 8), torch.randn(1, 1, 40, 8)
    weight = torch.ones(1, 8)
    mask = torch.ones(8, 40, dtype=torch.bool)
    mask[1, :19] = mask[2] = mask[4, 3:] = False
    options = ops.DotAttentionOptions(mask=mask[None, None], weights_mode=ops.WEIGHTS_ROW_MAX)

    def run(rows: slice) -> tuple[Tensor, Tensor]:
        narrowed = options._replace(mask=mask[None, None, rows])
        inputs = (query[:, :, rows], key, value, weight, None, None, None, None, None)
        _, _, weights, index = _additive_ops.additive_attention_fwd(*inputs, narrowed, True)
        assert weights is not None and index is not None
        return weights[0, 0], index[0, 0]

    for rows in (slice(0, 3), slice(0, 8)):  # narrow and wide tiles
        weights, index = run(rows)
        torch.testing.assert_close(weights[:3], torch.tensor([1 / 40, 1 / 21, 0]))
        assert index[:3].tolist() == [0, 19, -1]
    key[0, 0, 7, 0] = math.nan
    for rows in (slice(0, 3), slice(0, 8)):
        weights, index = run(rows)
        assert weights[:3].isnan().tolist() == [True, False, False] and index[1:3].tolist() == [19, -1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [4, 7])
def test_the_most_negative_number_hides_nothing(backend: ModuleType, dtype: torch.dtype, rows: int) -> None:
    """Its log-sum-exp has no place for the logarithm of the sum: weights and gradients form both terms again."""
    query, key, value, weight = operands(dtype, rows, 40, 16, 16)
    lowest = torch.finfo(dtype).min
    bias = torch.zeros(rows, 40, dtype=dtype)
    bias[1], bias[2, 3:], bias[3, :20], bias[3, 20:] = lowest, lowest, -math.inf, lowest
    wide = [x.double() for x in (query, key, value, weight)]
    for mode in ("full", "column_sum", "row_max"):
        leaves = [x.clone().requires_grad_() for x in (value, bias)]
        got = attnfast.additive_attention(query, key, leaves[0], weight, bias=leaves[1], return_weights=mode)
        wide_leaves = [x.double().requires_grad_() for x in (value, bias)]
        wanted = reference.additive_attention(
            *wide[:2], wide_leaves[0], wide[3], bias=wide_leaves[1], return_weights=mode
        )
        limit = 4 * TOLERANCE[dtype]
        torch.testing.assert_close(got.output.double(), wanted.output, rtol=0, atol=limit)
        if mode != "row_max":  # all are equal, but the reference rounds otherwise
            torch.testing.assert_close(got.weights.double(), wanted.weights, rtol=0, atol=limit)
        grads = torch.autograd.grad(got.output.square().sum(), leaves)
        for x, y in zip(grads, torch.autograd.grad(wanted.output.square().sum(), wide_leaves), strict=True):
            torch.testing.assert_close(x.double(), y, rtol=0, atol=limit * max(1.0, y.abs().max().item()))


@pytest.mark.parametrize("rows", [2, 9])
def test_rows_of_nothing_but_huge_scores(backend: ModuleType, rows: int) -> None:
    """Weights of any size: bits that a tile gives a score must be those that its maximum has."""
    query, key, value, weight = operands(torch.float32, rows, 70, 70, 8, spread=3.0)
    weight = weight * 1e6
    key[:, :, 1::2] = key[:, :, ::2]  # every score twice
    leaves = [x.clone().requires_grad_() for x in (query, key, value, weight)]
    result = attnfast.additive_attention(*leaves, return_weights="full")
    best = result.weights.amax(-1)
    torch.testing.assert_close(best, torch.full_like(best, 0.5), rtol=0, atol=1e-6)
    probe = torch.randn(result.output.shape, generator=torch.Generator().manual_seed(1))
    (grad,) = torch.autograd.grad(result.output, leaves[2], probe)
    wanted = torch.einsum("bhqk,bhqd->bkd", result.weights, probe)
    torch.testing.assert_close(grad[:, 0], wanted, rtol=0, atol=1e-5)


def test_lengths_and_offsets_are_cut_to_the_tensors(backend: ModuleType) -> None:
    """A GPU's are not looked at before the launch, and the emulator's are treated as a GPU's."""
    tensors = operands(torch.float32, 4, 4, 8, 8, heads=1)
    lengths = {"query_lengths": torch.tensor([4, 2]), "key_lengths": torch.tensor([1, 4])}
    beyond = {"query_lengths": torch.tensor([9, 2]), "key_lengths": torch.tensor([1, 5])}
    expected = attnfast.additive_attention(*tensors, **lengths)
    assert torch.equal(attnfast.additive_attention(*tensors, **beyond), expected)
    query, key, value = (x[:1] for x in tensors[:3])
    found = []
    for end in (4, 9):
        offsets = torch.tensor([0, 1, end])
        options = ops.DotAttentionOptions(cu_seqlens_q=offsets, cu_seqlens_k=offsets, scale=1.0)
        leaves = [x.clone().requires_grad_() for x in (query, key, value, tensors[3])]
        out, _, _ = additive_core(*leaves, None, None, None, None, options, False)
        found.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def test_the_gradient_of_a_centre_alone(backend: ModuleType) -> None:
    """No other gradient by queries is wanted; where keys are split too."""
    for rows, keys in ((9, 40), (1, 300)):
        tensors = operands(torch.float64, rows, keys, 8, 8)
        center = torch.full((2, 2, rows), keys / 3, dtype=torch.float64, requires_grad=True)
        found = []
        for function in (attnfast.additive_attention, reference.additive_attention):
            out = function(*tensors, prior=("gaussian", center, 20.0))
            found.append(torch.autograd.grad(out.square().sum(), center)[0])
        torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)
