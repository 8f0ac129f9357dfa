"""Normalisers other than softmax, and priors: the specification and the public functions, against independent formulas.

Sparsemax and entmax are checked by bisection on their threshold, which shares nothing with sorting. The mechanisms
around them (masks, dropout, weights) come from the tests' oracle.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import distances, philox_keep, raw_scores, visible_pairs
from torch import Tensor

import attnfast
from attnfast import reference
from attnfast._reference_normalizers import NORMALIZERS, entmax15, hard, sparsemax

F64 = torch.float64
NAN, INF = math.nan, math.inf
OTHERS = [name for name in NORMALIZERS if name != "softmax"]
SMOOTH = ["sparsemax", "entmax15", "sigmoid", "none"]
SEED = (2**61 + 77, 5)


def rand(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def operands(b: int = 2, h: int = 4, h_kv: int = 2, tq: int = 5, tk: int = 7, d: int = 3, dv: int = 4) -> list[Tensor]:
    shapes = ((b, h, tq, d), (b, h_kv, tk, d), (b, h_kv, tk, dv))
    return [rand(*shape, seed=seed) for seed, shape in enumerate(shapes, start=11)]


def bisect(mass: Callable[[Tensor, Tensor], Tensor], scores: Tensor, width: float) -> Tensor:
    """p(scores - tau), with the tau at which its sum is 1; between max - width and max the sum falls from >= 1 to 0."""
    high = scores.amax(-1, keepdim=True)
    low = high - width
    for _ in range(200):
        middle = (low + high) / 2
        above = mass(scores, middle).sum(-1, keepdim=True) >= 1
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return mass(scores, low)


def bisected(name: str, scores: Tensor) -> Tensor:
    """Weights of finite float64 scores ``[..., T_k]``."""
    if name == "sparsemax":
        return bisect(lambda z, tau: (z - tau).clamp_min(0), scores, 1.0)
    return bisect(lambda z, tau: (z / 2 - tau / 2).clamp_min(0) ** 2, scores, 2.0)


def gumbel(seed: tuple[int, int], row: int, column: int) -> float:
    """One number of the noise, in Python integers and floats."""
    low = 0xFFFFFFFF
    c = [(column // 4) & low, row & low, ((row >> 32) & low) | 1 << 31, seed[1] & low]
    k0, k1 = seed[0] & low, (seed[0] >> 32) & low
    for _ in range(7):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k0, b & low, (a >> 32) ^ c[3] ^ k1, a & low]
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return -math.log(-math.log((c[column % 4] + 0.5) / 2**32))


def row_weights(name: str, scores: list[float], sink: float | None, noise: list[float] | None) -> list[float]:
    """Weights of the visible keys of one row; the sink is a last key that is dropped."""
    terms = scores if sink is None else [*scores, sink]
    if name == "sigmoid":
        weights = [1 / (1 + math.exp(-s)) for s in terms]
    elif name == "none":
        weights = list(terms)
    elif name in ("hard", "hard_sample"):
        noisy = terms if noise is None else [s + g for s, g in zip(terms, noise, strict=True)]
        best = max(range(len(noisy)), key=lambda i: (noisy[i], -i))
        weights = [float(i == best) for i in range(len(noisy))]
    else:
        weights = bisected(name, torch.tensor(terms, dtype=F64)).tolist()
    return weights[: len(scores)]


class Expected:
    """Output, lse, full weights and log-probabilities of a call on ``[B, H, T, D]``, row by row."""

    def __init__(self, tensors: list[Tensor], name: str, **options: Any) -> None:
        query, key, value = (t.detach() for t in tensors)
        B, H, T_q, T_k = *query.shape[:3], key.shape[2]
        key, value = (x.repeat_interleave(H // x.shape[1], 1) for x in (key, value))
        scores = raw_scores(query, key, options.get("score", "scaled_dot"), options.get("scale"))
        if options.get("softcap"):
            scores = options["softcap"] * torch.tanh(scores / options["softcap"])
        seen = visible_pairs(
            B, T_q, T_k, *(options.get(o) for o in ("causal", "window", "query_lengths", "key_lengths"))
        )
        seen = seen.expand(B, H, T_q, T_k)
        if "alibi_slopes" in options:
            scores = scores - options["alibi_slopes"].view(1, H, 1, 1) * distances(B, T_q, T_k, [0] * B)
        for extra in (options.get("mask"), options.get("bias")):
            if extra is not None and extra.dtype == torch.bool:
                seen = seen & extra
            elif extra is not None:
                seen = seen & (extra != -INF)
                scores = scores + extra
        sink = options.get("sink")
        self.weights = torch.zeros(B, H, T_q, T_k, dtype=F64)
        self.log_prob = torch.zeros(B, H, T_q, dtype=F64)
        self.lse = torch.full((B, H, T_q), -INF, dtype=F64)
        for b, h, i in [(b, h, i) for b in range(B) for h in range(H) for i in range(T_q)]:
            keys = [j for j in range(T_k) if seen[b, h, i, j]]
            row, columns = (b * H + h) * T_q + i, keys if sink is None else [*keys, -1]
            terms = [float(scores[b, h, i, j]) for j in keys]
            logit = None if sink is None else float(sink[h])
            if not columns:
                continue
            noise = [gumbel(SEED, row, j) for j in columns] if name == "hard_sample" else None
            weights = row_weights(name, terms, logit, noise) if name != "softmax" else []
            every = terms if logit is None else [*terms, logit]
            lse = math.log(sum(math.exp(s) for s in every))
            self.lse[b, h, i] = lse
            if name == "softmax":
                weights = [math.exp(s - lse) for s in terms]
            for j, weight in zip(keys, weights, strict=True):
                self.weights[b, h, i, j] = weight
            if noise is not None:
                best = max(range(len(every)), key=lambda n: (every[n] + noise[n], -n))
                self.log_prob[b, h, i] = every[best] - lse
        prior = options.get("prior")
        if isinstance(prior, tuple):
            place = torch.arange(T_k, dtype=F64)
            prior = torch.exp(-((place - prior[1].unsqueeze(-1)) ** 2) / (2 * prior[2] ** 2))
        if prior is not None:
            self.weights = self.weights * prior
        p = options.get("dropout_p", 0.0)
        if p:
            self.weights = torch.where(philox_keep(SEED, B, H, T_q, T_k, p), self.weights / (1 - p), 0)
        self.output = self.weights @ value


def random_mask(*shape: int) -> Tensor:
    mask = rand(*shape, seed=5) > -0.5
    mask[..., 2, :] = False  # one row that sees nothing
    mask[..., 3, :] = torch.arange(shape[-1]) == 1  # and one that sees one key
    return mask


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "cosine": {"score": "cosine", "scale": 6.0},
    "l2": {"score": "l2"},
    "mask": {"mask": random_mask(2, 4, 5, 7)},
    "bias": {"bias": rand(4, 5, 7).masked_fill(rand(4, 5, 7, seed=8) > 0.8, -INF)},
    "causal-lengths": {
        "causal": "bottom_right",
        "query_lengths": torch.tensor([4, 3]),
        "key_lengths": torch.tensor([0, 6]),
    },
    "window": {"window": (1, 2), "causal": "top_left"},
    "alibi": {"alibi_slopes": torch.tensor([0.1, 0.5, 1.0, 2.0], dtype=F64)},
    "softcap": {"softcap": 0.7, "mask": rand(5, 7)},
    "sink": {"sink": rand(4) + 1, "mask": random_mask(4, 5, 7)},
    "dropout": {"dropout_p": 0.4},
    "prior": {"prior": rand(4, 5, 7), "mask": random_mask(5, 7)},
    "gaussian": {"prior": ("gaussian", rand(2, 4, 5) * 3 + 3, 1.5), "dropout_p": 0.25, "window": (3, 3)},
}


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("name", CASES)
def test_matches_the_independent_formulas(route: Any, name: str, normalizer: str) -> None:
    tensors, options = operands(), CASES[name]
    wanted = Expected(tensors, normalizer, **options)
    call = route.seeded(SEED)

    def run(**asked: Any) -> Any:
        return call(*tensors, normalizer=normalizer, **options, **asked)

    got = run(return_lse=True, return_weights=True)
    assert len(got) == (4 if normalizer == "hard_sample" else 3)
    torch.testing.assert_close(got.weights, wanted.weights, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got.output, wanted.output, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got.lse, wanted.lse)
    if normalizer == "hard_sample":
        torch.testing.assert_close(got.log_prob, wanted.log_prob)
    torch.testing.assert_close(run(), got.output)
    torch.testing.assert_close(run(return_weights="column_sum").weights, got.weights.sum(-2))
    torch.testing.assert_close(run(return_weights="row_max").weights, got.weights.amax(-1))


@pytest.mark.parametrize("normalizer", OTHERS)
def test_additive_reference(normalizer: str) -> None:
    """Normalisers do not know the score: the additive one as a bias on zero queries gives the same."""
    query, key, value = operands(h_kv=4)
    weight, score_bias = rand(4, 3, seed=21), rand(4, 3, seed=22)
    total = query[..., :, None, :] + key[..., None, :, :] + score_bias[:, None, None, :]
    scores = (weight[:, None, None, :] * total.tanh()).sum(-1)
    options: dict[str, Any] = {"mask": random_mask(5, 7), "dropout_p": 0.3, "prior": rand(5, 7)}
    wanted = Expected([torch.zeros_like(query), key, value], normalizer, bias=scores, **options)
    for mode, truth in ((True, wanted.weights), ("column_sum", wanted.weights.sum(-2)),
                        ("row_max", wanted.weights.amax(-1))):  # fmt: skip
        got = reference.additive_attention(
            query, key, value, weight, score_bias=score_bias, normalizer=normalizer, return_weights=mode,
            dropout_seed=torch.tensor(SEED), **options,
        )  # fmt: skip
        torch.testing.assert_close(got.output, wanted.output, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(got.weights, truth, rtol=1e-9, atol=1e-9)
    if normalizer == "hard_sample":
        torch.testing.assert_close(got.log_prob, wanted.log_prob)


def test_additive_reference_without_a_head_axis() -> None:
    query, key, value, weight = rand(2, 5, 3), rand(2, 7, 3, seed=1), rand(2, 7, 4, seed=2), rand(3, seed=4)
    center = rand(2, 5, seed=9) + 3
    scores = (weight * (query[:, :, None] + key[:, None]).tanh()).sum(-1).unsqueeze(1)
    flat = [torch.zeros(2, 1, 5, 3, dtype=F64), key.unsqueeze(1), value.unsqueeze(1)]
    prior = ("gaussian", center.unsqueeze(1), 2.0)
    wanted = Expected(flat, "hard_sample", bias=scores, prior=prior)
    got = reference.additive_attention(
        query, key, value, weight, normalizer="hard_sample", prior=("gaussian", center, 2.0), return_lse=True,
        return_weights=True, dropout_seed=torch.tensor(SEED),
    )  # fmt: skip
    for part, truth in zip(got, (wanted.output, wanted.lse, wanted.weights, wanted.log_prob), strict=True):
        torch.testing.assert_close(part, truth.squeeze(1))
    tensor_prior = rand(2, 5, 7, seed=6)
    got = reference.additive_attention(query, key, value, weight, prior=tensor_prior)
    wanted = Expected(flat, "softmax", bias=scores, prior=tensor_prior.unsqueeze(1))
    torch.testing.assert_close(got, wanted.output.squeeze(1))


# --- the functions themselves ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sparsemax", "entmax15"])
@pytest.mark.parametrize("spread", [1e-3, 0.3, 3.0, 100.0])
@pytest.mark.parametrize("size", [1, 2, 9, 300])
def test_thresholds_by_bisection(name: str, spread: float, size: int) -> None:
    function = {"sparsemax": sparsemax, "entmax15": entmax15}[name]
    scores = rand(40, size, seed=size) * spread + 1000 * rand(40, 1)
    scores[0] = scores[0, 0]  # all tied
    scores[1, size // 2 :] = scores[1].amax()  # some tied at the top
    weights = function(scores)
    torch.testing.assert_close(weights, bisected(name, scores), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(weights.sum(-1), torch.ones(40, dtype=F64))
    assert (weights >= 0).all()
    torch.testing.assert_close(weights[0], torch.full((size,), 1 / size, dtype=F64))


@pytest.mark.parametrize("name", ["sparsemax", "entmax15"])
def test_float32_is_accurate_on_long_rows(name: str) -> None:
    function = {"sparsemax": sparsemax, "entmax15": entmax15}[name]
    scores = (rand(4, 20000) * torch.tensor([[1e-4], [1e-2], [1.0], [30.0]], dtype=F64)).float()
    weights = function(scores)
    truth = bisected(name, scores.double())
    assert (weights.double() - truth).abs().max() < 2e-6
    torch.testing.assert_close(weights.double().sum(-1), torch.ones(4, dtype=F64), rtol=0, atol=1e-4)


@pytest.mark.parametrize("function", [sparsemax, entmax15, hard])
def test_rows_without_a_finite_score(function: Callable[[Tensor], Tensor]) -> None:
    scores = torch.tensor([[-INF, -INF, -INF], [-INF, 2.0, -INF], [0.0, NAN, 1.0], [-INF, -1e300, -1e300]], dtype=F64)
    scores.requires_grad_()
    weights = function(scores)
    tie = [0.0, 1.0, 0.0] if function is hard else [0.0, 0.5, 0.5]
    wanted = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], tie], dtype=F64)
    torch.testing.assert_close(weights[[0, 1, 3]], wanted, rtol=1e-15, atol=0)
    assert weights[2].isnan().all()
    (grad,) = torch.autograd.grad(weights[[0, 1, 3]].square().sum(), scores, create_graph=True)
    (second,) = torch.autograd.grad(grad[[0, 1, 3]].square().sum(), scores)
    assert grad[[0, 1, 3]].isfinite().all()
    assert second[[0, 1, 3]].isfinite().all()
    assert function(torch.zeros(3, 0)).shape == (3, 0)


def test_hard_takes_the_first_of_equal_scores(route: Any) -> None:
    query, key = torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 4, 3)
    bias = torch.tensor([[0.0, 2.0, 2.0, 1.0], [3.0, 3.0, 3.0, 3.0]])
    weights = route.attention(query, key, key, bias=bias, normalizer="hard", return_weights=True).weights
    assert weights[0, 0].tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]


# --- derivatives ----------------------------------------------------------------------------------------------------

GRADIENTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "mask": {"mask": random_mask(4, 4)[:, :3].t(), "sink": torch.tensor([0.3, -0.2], dtype=F64)},
    "dropout": {"dropout_p": 0.3, "key_lengths": torch.tensor([2, 4]), "softcap": 2.0},
}


def differentiable(function: Callable[..., Any], normalizer: str, name: str, mode: Any) -> Any:
    options = dict(GRADIENTS[name])
    sink = options.pop("sink", None)
    inputs = operands(2, 2, 1, 3, 4, 2, 2)
    inputs += [rand(2, 3, 4, seed=31)] + ([] if sink is None else [sink])

    def run(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, *sinks: Tensor) -> tuple[Tensor, ...]:
        extra = {"sink": sinks[0]} if sinks else {}
        result = function(
            query, key, value, bias=bias, normalizer=normalizer, return_lse=True, return_weights=mode, **options,
            **extra,
        )  # fmt: skip
        lse = result.lse.masked_fill(result.lse == -INF, 0.0)
        return (result.output, lse, result.weights, *result[3:])

    return run, [t.clone().requires_grad_() for t in inputs]


@pytest.mark.parametrize("normalizer", OTHERS)
@pytest.mark.parametrize(("name", "mode"), [("plain", True), ("mask", "row_max"), ("dropout", "column_sum")])
def test_gradients(route: Any, name: str, normalizer: str, mode: Any) -> None:
    run, inputs = differentiable(route.seeded(SEED), normalizer, name, mode)
    assert torch.autograd.gradcheck(run, inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("normalizer", ["softmax", "entmax15"])
def test_prior_gradients(route: Any, normalizer: str) -> None:
    """By a tensor prior, by the centre, and through the weights that they multiply."""
    tensors = operands(1, 2, 1, 3, 4, 2, 2)
    prior, center = rand(2, 1, 4), rand(1, 2, 3) + 1.5

    def with_tensor(*inputs: Tensor) -> Any:
        result = route.attention(*inputs[:3], prior=inputs[3], normalizer=normalizer, return_weights="column_sum")
        return result.output, result.weights

    def with_center(*inputs: Tensor) -> Any:
        return route.attention(
            *inputs[:3], prior=("gaussian", inputs[3], 0.8), normalizer=normalizer, causal="top_left"
        )

    for function, last in ((with_tensor, prior), (with_center, center)):
        inputs = [t.clone().requires_grad_() for t in (*tensors, last)]
        assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(function, inputs)


def test_hard_choices_give_scores_a_gradient_of_zero(route: Any) -> None:
    for normalizer in ("hard", "hard_sample"):
        tensors = [t.requires_grad_() for t in operands()]
        grads = torch.autograd.grad(route.attention(*tensors, normalizer=normalizer).sum(), tensors)
        assert grads[0].eq(0).all() and grads[1].eq(0).all()
        assert grads[2].ne(0).any()


# --- sampling -------------------------------------------------------------------------------------------------------


def test_samples_follow_manual_seed_and_the_distribution(route: Any) -> None:
    query, key, value = torch.zeros(1, 1, 20000, 2), torch.zeros(1, 1, 3, 2), torch.eye(3).view(1, 1, 3, 3)
    probabilities = torch.tensor([0.2, 0.5, 0.3])
    options: dict[str, Any] = {"bias": probabilities.log(), "normalizer": "hard_sample", "return_lse": True}
    torch.manual_seed(11)
    first, other = (route.attention(query, key, value, **options) for _ in range(2))
    torch.manual_seed(11)
    again = route.attention(query, key, value, **options)
    assert torch.equal(first.output, again.output)
    assert not torch.equal(first.output, other.output)
    assert (first.output.mean((0, 1, 2)) - probabilities).abs().max() < 0.02  # four standard deviations are 0.014
    torch.testing.assert_close(first.log_prob, (first.output @ probabilities).log())
    # dropout draws from a stream of its own: it hits every choice alike
    dropped = route.attention(query, key, value, **options, dropout_p=0.5, return_weights=True).weights.ne(0)
    assert (dropped.double().mean((0, 1, 2)) * 2 - probabilities).abs().max() < 0.03


def test_reinforce_gradient_is_that_of_the_expectation() -> None:
    """The mean of reward * grad(log_prob) over many draws against the gradient of the expected reward."""
    rows = 40000
    rewards = torch.tensor([1.0, -2.0, 0.5], dtype=F64)
    logits = torch.tensor([0.1, 0.9, -0.4], dtype=F64, requires_grad=True)
    zeros = torch.zeros(1, 1, rows, 1, dtype=F64), torch.zeros(1, 1, 3, 1, dtype=F64)
    torch.manual_seed(2)
    result = attnfast.attention(
        *zeros, rewards.view(1, 1, 3, 1), bias=logits, normalizer="hard_sample", return_lse=True
    )
    surrogate = (result.output.detach().squeeze(-1) * result.log_prob).mean()
    (got,) = torch.autograd.grad(surrogate, logits)
    (wanted,) = torch.autograd.grad((logits.softmax(0) * rewards).sum(), logits)
    assert (got - wanted).abs().max() < 0.03
    assert wanted.abs().max() > 0.3


# --- selection ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("target", [0, 1, 2, 3])
def test_hidden_values_never_leak(route: Any, normalizer: str, poison: float, target: int) -> None:
    """Key 1 hides from rows 0 and 2 (and is not looked at), key 3 from all rows, query 3 sees nothing."""
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[:, 1] = mask[:, 3] = mask[3] = False

    def derivatives(tensors: list[Tensor], prior: Tensor, center: Tensor) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (*tensors, prior, center)]
        result = route.seeded(SEED)(
            *leaves[:3], mask=mask, normalizer=normalizer, prior=leaves[3], return_lse=True, return_weights=True
        )
        second = route.seeded(SEED)(*leaves[:3], mask=mask, normalizer=normalizer, prior=("gaussian", leaves[4], 2.0))
        lse = result.lse.masked_fill(result.lse == -INF, 0.0)
        loss = sum(x.square().sum() for x in (result.output, lse, result.weights, *result[3:], second))
        grads = torch.autograd.grad(loss, leaves, create_graph=True)
        again = torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)
        return [loss, *grads, *again]

    clean, dirty = [operands(2, 2, 1, 4, 5, 3, 2) for _ in range(2)]
    prior, center = [rand(4, 5) for _ in range(2)], [rand(2, 2, 4) for _ in range(2)]
    if target == 0:
        dirty[0][..., 3, 0] = center[1][..., 3] = poison
    elif target == 3:
        prior[1][:, 3] = prior[1][3] = poison
    else:
        dirty[target][..., [1, 3], 0] = poison
    wanted = derivatives(clean, prior[0], center[0])
    for part, truth in zip(derivatives(dirty, prior[1], center[1]), wanted, strict=True):
        torch.testing.assert_close(part, truth)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_nan_in_what_is_visible_propagates(route: Any, normalizer: str) -> None:
    for target in range(3):
        tensors = operands(1, 1, 1, 3, 4, 2, 2)
        tensors[target][0, 0, 1, 0] = NAN
        output = route.attention(*tensors, normalizer=normalizer)
        assert output[0, 0, 1].isnan().any() or (target == 2 and normalizer in ("sparsemax", "entmax15"))


# --- the way of the public functions --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalizer", OTHERS)
def test_half_types_are_accumulated_in_float32(normalizer: str, dtype: torch.dtype) -> None:
    tensors = [t.to(dtype) for t in operands(1, 2, 2, 9, 40, 16, 8)]
    torch.manual_seed(4)
    got = attnfast.attention(*tensors, normalizer=normalizer, return_lse=True, return_weights=True)
    torch.manual_seed(4)
    truth = attnfast.attention(*[t.double() for t in tensors], normalizer=normalizer, return_lse=True)
    assert got.output.dtype == got.weights.dtype == dtype
    assert got.lse.dtype == torch.float32
    bound = torch.finfo(dtype).eps * truth.output.abs() / 2 * 1.01 + 2e-5
    assert ((got.output.double() - truth.output).abs() <= bound).all()


@pytest.mark.parametrize("normalizer", ["sparsemax", "hard_sample"])
def test_packed_jagged_and_plain_operands(normalizer: str) -> None:
    query, key, value = rand(9, 4, 3), rand(8, 2, 3, seed=1), rand(8, 2, 5, seed=2)
    offsets = torch.tensor([0, 4, 4, 9]), torch.tensor([0, 2, 5, 8])
    prior = ("gaussian", rand(4, 9), 1.0)
    torch.manual_seed(1)
    wanted = reference.varlen_attention(
        query, key, value, *offsets, 5, 3, normalizer=normalizer, prior=prior, return_lse=True
    )
    torch.manual_seed(1)
    got = attnfast.varlen_attention(
        query, key, value, *offsets, 5, 3, normalizer=normalizer, prior=prior, return_lse=True
    )
    torch.testing.assert_close(got, wanted)
    assert type(got) is type(wanted)
    if normalizer == "sparsemax":  # positions, of the prior too, count inside each sequence
        alone = reference.attention(
            query[4:].transpose(0, 1), key[5:].transpose(0, 1), value[5:].transpose(0, 1), normalizer=normalizer,
            prior=("gaussian", prior[1][:, 4:], 1.0),
        )  # fmt: skip
        torch.testing.assert_close(got.output[4:], alone.transpose(0, 1))
        jagged = [
            torch.nested.nested_tensor([x[:3], x[3:8]], layout=torch.jagged).transpose(1, 2) for x in (key, key, value)
        ]
        out = attnfast.attention(*jagged, normalizer=normalizer).transpose(1, 2).unbind()[1]
        rows = [x[3:8].transpose(0, 1) for x in (key, key, value)]
        torch.testing.assert_close(out, reference.attention(*rows, normalizer=normalizer).transpose(0, 1))
    flat = attnfast.attention(query[:, 0], key[:, 0], value[:, 0], normalizer="entmax15", prior=rand(9, 8))
    torch.testing.assert_close(
        flat, reference.attention(query[:, 0], key[:, 0], value[:, 0], normalizer="entmax15", prior=rand(9, 8))
    )


def test_batch_dimensions_of_a_prior() -> None:
    query, key, value = rand(3, 2, 4, 5, 3), rand(2, 4, 6, 3), rand(3, 1, 4, 6, 2)
    for prior in (rand(2, 4, 1, 6), rand(5, 1), ("gaussian", rand(3, 1, 1, 5), 1.0), ("gaussian", rand(5), 2)):
        got = attnfast.attention(query, key, value, prior=prior)
        torch.testing.assert_close(got, reference.attention(query, key, value, prior=prior))
        tensor = prior if isinstance(prior, Tensor) else None
        if tensor is not None:
            weights = attnfast.attention(query, key, value, return_weights=True).weights
            torch.testing.assert_close(got, (weights * tensor) @ value)


def test_compile_vmap_and_autocast() -> None:
    tensors = [t.float() for t in operands()]

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attnfast.attention(query, key, value, normalizer="entmax15", causal="top_left")

    wanted = call(*tensors)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*tensors), wanted)
    mapped = torch.vmap(call)(*[torch.stack([t, 2 * t]) for t in tensors])
    torch.testing.assert_close(mapped[0], wanted)
    torch.testing.assert_close(mapped[1], call(*[2 * t for t in tensors]))
    with torch.autocast("cpu"):
        low = call(*tensors)
    assert low.dtype == torch.bfloat16
    truth = call(*[t.bfloat16().float() for t in tensors])
    assert (low.float() - truth).abs().max() <= truth.abs().max() * 2**-8  # rounded once: scores were not in bfloat16


def test_memory_has_no_head_size_factor() -> None:
    """Scores of l2 are formed by a product, not by differences [T_q, T_k, D] as in the specification."""
    from torch.profiler import ProfilerActivity, profile

    query, key, value = torch.randn(1, 1, 200, 256), torch.randn(1, 1, 200, 256), torch.randn(1, 1, 200, 8)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        attnfast.attention(query, key, value, score="l2", normalizer="sparsemax")
    largest = max(event.cpu_memory_usage for event in trace.events())
    assert largest < 4 * 200 * 200 * 8


# --- additive scores in blocks of rows ------------------------------------------------------------------------------


def additive_inputs() -> list[Tensor]:
    shapes = ((2, 2, 5, 3), (2, 1, 4, 3), (2, 1, 4, 2), (2, 3), (2, 3))
    return [rand(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes, start=41)]


@pytest.mark.parametrize("elements", [1, 60, 130, 2**20], ids=["rows", "one", "two", "all"])
@pytest.mark.parametrize("mask", [None, random_mask(5, 4), random_mask(4, 4)[:1]], ids=["open", "rows", "keys"])
def test_blocks_of_rows_give_what_the_formula_gives(
    monkeypatch: pytest.MonkeyPatch, elements: int, mask: Tensor | None
) -> None:
    """Values, first and second derivatives, with NaN in a key that some rows do not see."""
    monkeypatch.setattr("attnfast._row_blocks._BLOCK_ELEMENTS", elements)
    inputs = additive_inputs()
    hidden = torch.ones(5, 4, dtype=torch.bool)
    hidden[1:3, 2] = False
    for poison in (None, NAN):
        mask = hidden if poison else mask
        tensors = [x.detach().clone() for x in inputs]
        if poison:
            tensors[1][..., 2, 0] = poison
        answers = []
        for function in (attnfast.additive_attention, reference.additive_attention):
            leaves = [x.clone().requires_grad_() for x in tensors]
            result = function(*leaves[:4], score_bias=leaves[4], normalizer="entmax15", mask=mask, return_weights=True)
            rows = [1, 2] if poison else list(range(5))
            loss = result.output[..., rows, :].square().sum() + result.weights[..., rows, :].pow(3).sum()
            first = torch.autograd.grad(loss, leaves, retain_graph=True)
            recorded = torch.autograd.grad(loss, leaves, create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in recorded), leaves)
            answers.append([result.output, result.weights, *first, *recorded, *second])
        for ours, wanted in zip(*answers, strict=True):
            torch.testing.assert_close(ours, wanted, equal_nan=True)


def test_blocks_of_rows_pass_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnfast._row_blocks._BLOCK_ELEMENTS", 100)

    def run(*inputs: Tensor) -> Tensor:
        return attnfast.additive_attention(
            *inputs[:4], score_bias=inputs[4], normalizer="sigmoid", mask=random_mask(5, 4)
        )

    inputs = additive_inputs()
    assert torch.autograd.gradcheck(run, inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(run, inputs)
    for at in range(5):  # one gradient alone
        leaves = [x.detach().requires_grad_(at == i) for i, x in enumerate(inputs)]
        (alone,) = torch.autograd.grad(run(*leaves).sum(), leaves[at])
        torch.testing.assert_close(alone, torch.autograd.grad(run(*inputs).sum(), inputs[at])[0])


def test_blocks_of_rows_bound_the_memory() -> None:
    from torch.profiler import ProfilerActivity, profile

    leaves = [torch.randn(1, 300, 256, requires_grad=True) for _ in range(2)]
    value, weight = torch.randn(1, 300, 8), torch.randn(256, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        attnfast.additive_attention(*leaves, value, weight, normalizer="sparsemax").sum().backward()
    largest = max(event.self_cpu_memory_usage for event in trace.events())
    assert largest < 300 * 300 * 256 * 4 / 4  # the whole [T_q, T_k, D] would be 92 MB


def test_explain_names_the_way() -> None:
    tensors = operands()
    text = attnfast.explain(attnfast.attention, *tensors, normalizer="sparsemax")
    assert "route: torch, plain PyTorch operations in O(T_q T_k) memory" in text
    assert "kernel: none; normalizer 'sparsemax' has no fused kernel" in text
    text = attnfast.explain(attnfast.attention, *tensors, normalizer="none", prior=torch.ones((), dtype=F64))
    assert "normalizer 'none' and a prior have no fused kernel" in text
    assert "a tensor as prior has no" in attnfast.explain(attnfast.attention, *tensors, prior=torch.ones((), dtype=F64))
