"""attnfast.reference.additive_attention against scores from a loop of Python floats, and its derivatives.

The scores are formed one number at a time and handed to the tests' oracle as a bias on zero queries: nothing of the
package takes part in what is expected.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from helpers import oracle, philox_keep
from torch import Tensor

from attnfast import reference
from attnfast._options import DotAttentionOptions

F64 = torch.float64
NAN, INF = math.nan, math.inf


def rand(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def operands(b: int = 2, h: int = 4, h_kv: int = 2, tq: int = 5, tk: int = 7, d: int = 3, dv: int = 4) -> list[Tensor]:
    """query, key, value, weight and score_bias with a head axis."""
    shapes = ((b, h, tq, d), (b, h_kv, tk, d), (b, h_kv, tk, dv), (h, d), (h, d))
    return [rand(*shape, seed=seed) for seed, shape in enumerate(shapes, start=11)]


def loop_scores(query: Tensor, key: Tensor, weight: Tensor, score_bias: Tensor | None, softcap: float = 0.0) -> Tensor:
    (b_n, h_n, tq_n, d_n), (_, hk_n, tk_n, _) = query.shape, key.shape
    scores = torch.zeros(b_n, h_n, tq_n, tk_n, dtype=F64)
    w, c = weight.tolist(), None if score_bias is None else score_bias.tolist()
    for b, h, i, j in itertools.product(range(b_n), range(h_n), range(tq_n), range(tk_n)):
        q, k = query[b, h, i].tolist(), key[b, h // (h_n // hk_n), j].tolist()
        s = sum(w[h][d] * math.tanh(q[d] + k[d] + (0.0 if c is None else c[h][d])) for d in range(d_n))
        scores[b, h, i, j] = softcap * math.tanh(s / softcap) if softcap else s
    return scores


def expected(tensors: list[Tensor], softcap: float = 0.0, **options: Any) -> Any:
    """The oracle's (output, lse, weights) for these scores."""
    query, key, value, weight, *score_bias = tensors
    scores = loop_scores(query, key, weight, score_bias[0] if score_bias else None, softcap)
    bias = options.pop("bias", None)
    zero_q, zero_k = torch.zeros_like(query), torch.zeros_like(key)
    return oracle(zero_q, zero_k, value, bias=scores if bias is None else scores + bias, **options)


def random_mask(*shape: int) -> Tensor:
    mask = rand(*shape, seed=5) > -0.5
    mask[..., 2, :] = False  # one row that sees nothing
    return mask


HOLES = rand(4, 5, 7).masked_fill(rand(4, 5, 7, seed=8) > 0.8, -INF)
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "mask": {"mask": random_mask(2, 4, 5, 7)},
    "float-mask": {"mask": HOLES[:1]},
    "bias": {"bias": HOLES},
    "top-left": {"causal": "top_left"},
    "lengths-bottom-right": {
        "causal": "bottom_right",
        "query_lengths": torch.tensor([4, 3]),
        "key_lengths": torch.tensor([6, 0]),
    },
    "window": {"window": (1, 2)},
    "alibi": {"alibi_slopes": torch.tensor([0.1, 0.5, 1.0, 2.0], dtype=F64)},
    "sink": {"sink": rand(4), "mask": random_mask(4, 5, 7)},
    "softcap": {"softcap": 0.8, "bias": rand(5, 7)},
}


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_matches_the_loop(name: str, with_bias: bool) -> None:
    tensors = operands()
    *four, score_bias = tensors
    options = CASES[name]
    wanted = expected(tensors if with_bias else four, **options)
    call = {**options, "score_bias": score_bias if with_bias else None}
    got = reference.additive_attention(*four, **call, return_lse=True, return_weights=True)
    for part, truth in zip(got, wanted, strict=True):
        torch.testing.assert_close(part, truth, rtol=1e-12, atol=1e-12)
    sums = reference.additive_attention(*four, **call, return_weights="column_sum").weights
    torch.testing.assert_close(sums, wanted.weights.sum(-2), rtol=1e-12, atol=1e-12)
    maxima = reference.additive_attention(*four, **call, return_weights="row_max").weights
    torch.testing.assert_close(maxima, wanted.weights.amax(-1), rtol=1e-12, atol=1e-12)


def test_dropout_is_that_of_every_score() -> None:
    tensors = operands()
    keep = philox_keep((7, 9), 2, 4, 5, 7, 0.4)
    wanted = expected(tensors, keep=keep, dropout_p=0.4)
    got = reference.additive_attention(
        *tensors[:4], score_bias=tensors[4], dropout_p=0.4, dropout_seed=torch.tensor([7, 9]), return_weights=True
    )
    torch.testing.assert_close(got.output, wanted.output)
    torch.testing.assert_close(got.weights, wanted.weights)


@pytest.mark.parametrize("batch", [(), (3,), (3, 2)])
def test_without_a_head_axis(batch: tuple[int, ...]) -> None:
    """A weight [D]: every leading dimension is a batch dimension, of lengths and masks too."""
    query, key, value = rand(*batch, 5, 3), rand(*batch, 7, 3, seed=4), rand(*batch, 7, 2, seed=5)
    weight, score_bias = rand(3, seed=6), rand(3, seed=7)
    samples = math.prod(batch)
    lengths = torch.arange(samples).remainder(6).add(2)
    flat = [x.reshape(samples, 1, *x.shape[-2:]) for x in (query, key, value)]
    bias = rand(*batch, 5, 7, seed=8)
    wanted = expected(
        [*flat, weight[None], score_bias[None]], key_lengths=lengths, bias=bias.reshape(samples, 1, 5, 7),
        mask=random_mask(5, 7),
    )  # fmt: skip
    for mode, truth in ((True, wanted.weights), ("column_sum", wanted.weights.sum(-2)),
                        ("row_max", wanted.weights.amax(-1))):  # fmt: skip
        got = reference.additive_attention(
            query, key, value, weight, score_bias=score_bias, bias=bias, mask=random_mask(5, 7),
            key_lengths=lengths.reshape(batch), return_lse=True, return_weights=mode,
        )  # fmt: skip
        torch.testing.assert_close(got.output, wanted.output.reshape(*batch, 5, 2))
        torch.testing.assert_close(got.lse, wanted.lse.reshape(*batch, 5))
        torch.testing.assert_close(got.weights, truth.squeeze(1).reshape(*batch, *truth.shape[2:]))
    alone = reference.additive_attention(query, key, value, weight)
    torch.testing.assert_close(
        alone, expected([*flat, weight[None]]).output.reshape(*batch, 5, 2), rtol=1e-12, atol=1e-12
    )


def test_heads_without_a_batch_and_one_score_bias_for_all() -> None:
    query, key, value, weight, score_bias = operands(b=1)
    got = reference.additive_attention(query[0], key[0], value[0], weight, score_bias=score_bias[0])
    wanted = expected([query, key, value, weight, score_bias[:1].expand(4, 3)])
    torch.testing.assert_close(got, wanted.output[0])


@pytest.mark.parametrize("sizes", [(0, 2, 1, 3, 4, 5), (2, 2, 1, 0, 4, 5), (2, 2, 1, 3, 0, 5), (2, 2, 1, 3, 4, 0)])
def test_empty_dimensions(sizes: tuple[int, ...]) -> None:
    tensors = [t.requires_grad_() for t in operands(*sizes, 3)]
    got = reference.additive_attention(*tensors[:4], score_bias=tensors[4], return_lse=True, return_weights=True)
    for part, truth in zip(got, expected([t.detach() for t in tensors]), strict=True):
        torch.testing.assert_close(part, truth)
    assert all(g.isfinite().all() for g in torch.autograd.grad(got.output.sum(), tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_types_are_accumulated_in_float32(dtype: torch.dtype) -> None:
    tensors = [t.to(dtype) for t in operands(1, 2, 2, 9, 40, 16, 8)]
    got = reference.additive_attention(*tensors[:4], score_bias=tensors[4], return_lse=True, return_weights=True)
    truth = reference.additive_attention(
        *[t.double() for t in tensors[:4]], score_bias=tensors[4].double(), return_lse=True, return_weights=True
    )
    assert got.output.dtype == got.weights.dtype == dtype
    assert got.lse.dtype == torch.float32
    bound = torch.finfo(dtype).eps * truth.output.abs() / 2 * 1.01 + 2e-6
    assert ((got.output.double() - truth.output).abs() <= bound).all()


GRADIENTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "mask-softcap": {"mask": random_mask(3, 4), "softcap": 2.0},
    "dropout-lengths": {"dropout_p": 0.3, "dropout_seed": torch.tensor([5, 6]), "key_lengths": torch.tensor([2, 4])},
}


@pytest.mark.parametrize("weights", [True, "column_sum", "row_max"])
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients(name: str, weights: Any) -> None:
    def run(query: Tensor, key: Tensor, value: Tensor, weight: Tensor, score_bias: Tensor) -> tuple[Tensor, ...]:
        result = reference.additive_attention(
            query, key, value, weight, score_bias=score_bias, return_lse=True, return_weights=weights, **GRADIENTS[name]
        )
        return result.output, result.lse.masked_fill(result.lse == -INF, 0.0), result.weights

    inputs = [t.requires_grad_() for t in operands(2, 2, 1, 3, 4, 2, 2)]
    assert torch.autograd.gradcheck(run, inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(run, inputs)


def poison_options() -> dict[str, Any]:
    """Key 1 is hidden from rows 0 and 2 only, key 3 from all rows, query 3 is padded."""
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[0, 1] = mask[2, 1] = False
    mask[:, 3] = False
    return {"mask": mask, "query_lengths": torch.tensor([3, 3])}


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("target", [0, 1, 2])
def test_hidden_rows_never_leak(poison: float, target: int) -> None:
    def derivatives(tensors: list[Tensor]) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in tensors]
        result = reference.additive_attention(
            *leaves[:4], score_bias=leaves[4], return_weights=True, **poison_options()
        )
        loss = result.output.square().sum() + result.weights.square().sum()
        grads = torch.autograd.grad(loss, leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)
        return [loss, *grads, *second]

    clean, dirty = operands(2, 2, 1, 4, 5, 3, 2), operands(2, 2, 1, 4, 5, 3, 2)
    dirty[target][..., 3, 0] = poison
    for part, truth in zip(derivatives(dirty), derivatives(clean), strict=True):
        torch.testing.assert_close(part, truth)


@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize("target", [1, 2])
def test_a_key_hidden_from_some_rows_reaches_only_the_others(poison: float, target: int) -> None:
    def rows_0_and_2(tensors: list[Tensor]) -> list[Tensor]:
        tensors[0].requires_grad_()
        result = reference.additive_attention(*tensors[:4], return_weights=True, **poison_options())
        output, weights = result.output[..., [0, 2], :], result.weights[..., [0, 2], :]
        (grad,) = torch.autograd.grad(output.square().sum() + weights.square().sum(), tensors[0], create_graph=True)
        (second,) = torch.autograd.grad(grad[..., [0, 2], :].square().sum(), tensors[0])
        return [output, weights, grad[..., [0, 2], :], second[..., [0, 2], :]]

    wanted = rows_0_and_2(operands(2, 2, 1, 4, 5, 3, 2))
    poisoned = operands(2, 2, 1, 4, 5, 3, 2)
    poisoned[target][..., 1, 0] = poison
    for part, truth in zip(rows_0_and_2(poisoned), wanted, strict=True):
        torch.testing.assert_close(part, truth)


@pytest.mark.parametrize("target", range(5))
def test_nan_in_what_is_visible_propagates(target: int) -> None:
    tensors = operands(1, 2, 2, 3, 4, 2, 2)
    tensors[target][..., 1, 0] = NAN
    out = reference.additive_attention(*tensors[:4], score_bias=tensors[4])
    assert out[0, 1, 1, 0].isnan()


def test_blocks_of_rows_are_rows_of_the_whole() -> None:
    query, key, value, weight, score_bias = operands(2, 2, 1, 6, 5, 3, 2)
    options = DotAttentionOptions(
        mask=random_mask(2, 1, 6, 5), key_lengths=torch.tensor([4, 5]), seed=torch.tensor([3, 4]), dropout_p=0.3,
        causal=2, weights_mode=1,
    )  # fmt: skip
    fixed = (key, value, weight, score_bias, None, None, None)
    whole = reference.additive_core(query, *fixed, options, True)
    for first, last in ((0, 2), (2, 6)):
        rows = slice(first, last)
        cut = options._replace(mask=options.mask[:, :, rows])
        block = reference.additive_core(query[:, :, rows], *fixed, cut, True, rows=(first, 6))
        for part, full in zip(block, whole, strict=True):
            torch.testing.assert_close(part, full[:, :, rows])
