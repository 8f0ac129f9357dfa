"""attnfast.reference against a naive loop in Python floats, against torch, and against finite differences.

The loop below is a second, independent reading of the formulas (its Philox included): one (batch, head, query) row at a
time, scalars only, no code shared with the package.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnfast import reference
from attnfast._options import DotAttentionOptions

F64 = torch.float64
NAN, INF = math.nan, math.inf


# --- the naive loop -------------------------------------------------------------------------------------------------


def philox_words(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-7 in Python integers."""
    c, k, full = list(counter), list(key), (1 << 32) - 1
    for _ in range(7):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & full, (p0 >> 32) ^ c[3] ^ k[1], p0 & full]
        k = [(k[0] + 0x9E3779B9) & full, (k[1] + 0xBB67AE85) & full]
    return c[0], c[1], c[2], c[3]


def kept(seed: tuple[int, int], p: float, row: int, k: int) -> bool:
    full = (1 << 32) - 1
    counter = (k // 4, row & full, (row >> 32) & full, seed[1] & full)
    word = philox_words(counter, (seed[0] & full, (seed[0] >> 32) & full))[k % 4]
    return word >= min(math.ceil(p * 2**32), 2**32)


def naive_score(kind: str, q: list[float], k: list[float]) -> float:
    dot = sum(x * y for x, y in zip(q, k, strict=True))
    if kind == "cosine":
        norms = [max(math.sqrt(sum(x * x for x in v)), 1e-8) for v in (q, k)]
        return dot / (norms[0] * norms[1])
    if kind == "l2":
        return -sum((x - y) ** 2 for x, y in zip(q, k, strict=True))
    return dot / math.sqrt(len(q)) if kind == "scaled_dot" and q else dot


def naive(
    query: Tensor, key: Tensor, value: Tensor, *, score: str = "scaled_dot", mask: Tensor | None = None,
    bias: Tensor | None = None, causal: str | None = None, window: tuple[int, int] = (-1, -1),
    query_lengths: list[int] | None = None, key_lengths: list[int] | None = None, alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None, softcap: float = 0.0, scale: float | None = None, dropout_p: float = 0.0,
    seed: tuple[int, int] = (0, 0),
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """out, lse and applied weights of ``[B, H, T, D]`` operands, row by row."""
    (b_n, h_n, tq_n, _), (_, hk_n, tk_n, _) = query.shape, key.shape
    out = torch.zeros(b_n, h_n, tq_n, value.shape[3], dtype=F64)
    lse = torch.full((b_n, h_n, tq_n), -INF, dtype=F64)
    weights = torch.zeros(b_n, h_n, tq_n, tk_n, dtype=F64)
    shape = (b_n, h_n, tq_n, tk_n)
    masks = None if mask is None else mask.expand(shape).tolist()
    added = None if bias is None else bias.expand(shape).tolist()
    slopes = None if alibi_slopes is None else alibi_slopes.expand(b_n, h_n).tolist()
    for b, h, i in itertools.product(range(b_n), range(h_n), range(tq_n)):
        q_len = tq_n if query_lengths is None else query_lengths[b]
        k_len = tk_n if key_lengths is None else key_lengths[b]
        if i >= q_len:
            if sink is not None:
                lse[b, h, i] = sink[h]
            continue
        at = i + (k_len - q_len if causal == "bottom_right" else 0)
        q = query[b, h, i].tolist()
        logits: dict[int, float] = {}
        for j in range(k_len):
            hidden = (causal is not None and j > at) or (window[0] >= 0 and j < at - window[0])
            hidden = hidden or (window[1] >= 0 and j > at + window[1])
            hidden = hidden or (masks is not None and not masks[b][h][i][j])
            hidden = hidden or (added is not None and added[b][h][i][j] == -INF)
            if hidden:
                continue
            kind = "dot" if scale is not None and score == "scaled_dot" else score
            s = naive_score(kind, q, key[b, h // (h_n // hk_n), j].tolist()) * (1.0 if scale is None else scale)
            if softcap:
                s = softcap * math.tanh(s / softcap)
            if slopes is not None:
                s -= slopes[b][h] * abs(at - j)
            if added is not None:
                s += added[b][h][i][j]
            logits[j] = s
        terms = list(logits.values()) + ([] if sink is None else [sink[h].item()])
        if not terms:
            continue
        top = max(terms)
        total = sum(math.exp(t - top) for t in terms)
        lse[b, h, i] = top + math.log(total)
        for j, s in logits.items():
            w = math.exp(s - top) / total
            if dropout_p:
                w = w / (1 - dropout_p) if kept(seed, dropout_p, (b * h_n + h) * tq_n + i, j) else 0.0
            weights[b, h, i, j] = w
            out[b, h, i] += w * value[b, h // (h_n // hk_n), j]
    return out, lse, weights


def operands(b: int = 2, h: int = 4, h_kv: int = 2, tq: int = 5, tk: int = 7, d: int = 3, dv: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(17)
    shapes = ((b, h, tq, d), (b, h_kv, tk, d), (b, h_kv, tk, dv))
    return [torch.randn(shape, generator=generator, dtype=F64) for shape in shapes]


def rand(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def random_mask(*shape: int) -> Tensor:
    mask = rand(*shape, seed=5) > -0.5
    mask[..., 2, :] = False  # one row that sees nothing
    return mask


HOLES = rand(4, 5, 7).masked_fill(rand(4, 5, 7, seed=8) > 0.8, -INF)

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "dot": {"score": "dot"},
    "cosine": {"score": "cosine"},
    "l2": {"score": "l2"},
    "cosine-scaled": {"score": "cosine", "scale": 7.5},
    "l2-scaled": {"score": "l2", "scale": 0.25},
    "scale-negative": {"scale": -0.7},
    "scale-zero": {"scale": 0.0},
    "mask": {"mask": random_mask(2, 4, 5, 7)},
    "mask-broadcast": {"mask": random_mask(5, 1)},
    "bias": {"bias": rand(4, 1, 7)},
    "bias-inf": {"bias": HOLES},
    "top-left": {"causal": "top_left"},
    "bottom-right": {"causal": "bottom_right"},
    "window": {"window": (1, 2)},
    "window-left": {"window": (2, -1)},
    "window-right": {"window": (-1, 0)},
    "window-zero": {"window": (0, 0)},
    "window-top-left": {"causal": "top_left", "window": (1, 3)},
    "window-bottom-right": {"causal": "bottom_right", "window": (2, 0)},
    "key-lengths": {"key_lengths": [7, 3]},
    "key-length-zero": {"key_lengths": [0, 5]},
    "query-lengths": {"query_lengths": [2, 5]},
    "lengths-bottom-right": {"query_lengths": [4, 3], "key_lengths": [6, 2], "causal": "bottom_right"},
    "lengths-window": {"query_lengths": [4, 3], "key_lengths": [6, 5], "causal": "bottom_right", "window": (1, -1)},
    "alibi": {"alibi_slopes": torch.tensor([0.1, 0.5, 1.0, 2.0], dtype=F64)},
    "alibi-batch": {"alibi_slopes": rand(2, 4).abs(), "causal": "bottom_right", "key_lengths": [7, 4]},
    "sink": {"sink": rand(4)},
    "sink-mask": {"sink": rand(4), "mask": random_mask(4, 5, 7)},
    "sink-lengths": {"sink": rand(4), "query_lengths": [2, 4], "key_lengths": [3, 7]},
    "softcap": {"softcap": 0.8},
    "softcap-bias": {"softcap": 0.8, "bias": rand(5, 7), "mask": random_mask(5, 7)},
    "dropout": {"dropout_p": 0.4, "seed": (123456789, 42)},
    "dropout-wide-seed": {"dropout_p": 0.75, "seed": (2**62 + 12345, 2**33 + 7), "causal": "top_left"},
    "everything": {
        "score": "l2", "scale": 0.3, "mask": random_mask(2, 1, 5, 7), "bias": HOLES, "causal": "bottom_right",
        "window": (3, 1), "query_lengths": [5, 4], "key_lengths": [6, 7], "alibi_slopes": rand(4).abs(),
        "sink": rand(4), "softcap": 1.5, "dropout_p": 0.3, "seed": (7, 8),
    },
}  # fmt: skip


def call_reference(case: dict[str, Any], tensors: list[Tensor], **extra: Any) -> Any:
    options = {**case, **extra}
    seed = options.pop("seed", None)
    for name in ("query_lengths", "key_lengths"):
        if name in options:
            options[name] = torch.tensor(options[name])
    if seed is not None:
        options["dropout_seed"] = torch.tensor(seed)
    return reference.attention(*tensors, **options)


@pytest.mark.parametrize("name", CASES)
def test_matches_the_naive_loop(name: str) -> None:
    tensors = operands()
    out, lse, weights = naive(*tensors, **CASES[name])
    got = call_reference(CASES[name], tensors, return_lse=True, return_weights=True)
    torch.testing.assert_close(got.output, out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.lse, lse, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.weights, weights, rtol=1e-12, atol=1e-12)
    sums = call_reference(CASES[name], tensors, return_weights="column_sum")
    torch.testing.assert_close(sums.weights, weights.sum(-2), rtol=1e-12, atol=1e-12)
    maxima = call_reference(CASES[name], tensors, return_weights="row_max")
    torch.testing.assert_close(maxima.weights, weights.amax(-1), rtol=1e-12, atol=1e-12)
    assert sums.lse is None


@pytest.mark.parametrize(("h", "h_kv"), [(1, 1), (4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize(("tq", "tk"), [(1, 6), (4, 4), (6, 3)])
@pytest.mark.parametrize("causal", [None, "top_left", "bottom_right"])
def test_heads_and_shapes(h: int, h_kv: int, tq: int, tk: int, causal: str | None) -> None:
    tensors = operands(1, h, h_kv, tq, tk, 5, 2)
    out, lse, _ = naive(*tensors, causal=causal)
    got = reference.attention(*tensors, causal=causal, return_lse=True)
    torch.testing.assert_close(got.output, out)
    torch.testing.assert_close(got.lse, lse)


@pytest.mark.parametrize("sizes", [(0, 2, 1, 3, 4, 5), (2, 2, 1, 0, 4, 5), (2, 2, 1, 3, 0, 5), (2, 2, 1, 3, 4, 0)])
@pytest.mark.parametrize("score", ["dot", "scaled_dot", "cosine", "l2"])
def test_empty_dimensions(sizes: tuple[int, ...], score: str) -> None:
    b, h, h_kv, tq, tk, d = sizes
    tensors = [t.requires_grad_() for t in operands(b, h, h_kv, tq, tk, d, 3)]
    got = reference.attention(*tensors, score=score, return_lse=True, return_weights="row_max")
    out, lse, weights = naive(*[t.detach() for t in tensors], score=score)
    torch.testing.assert_close(got.output, out)
    torch.testing.assert_close(got.lse, lse)
    torch.testing.assert_close(got.weights, weights.amax(-1) if tk else torch.zeros(b, h, tq, dtype=F64))
    grads = torch.autograd.grad(got.output.sum(), tensors)
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (2, 1, 3)])
def test_leading_dimensions(batch: tuple[int, ...]) -> None:
    q, k, v = rand(*batch, 4, 5, 3), rand(*batch[:-1], *([1] if batch else []), 2, 6, 3), rand(2, 6, 4)
    got = reference.attention(q, k, v, return_lse=True, return_weights=True)
    flat = [x.expand(*batch, *x.shape[-3:]).reshape(-1, *x.shape[-3:]) for x in (q, k, v)]
    out, lse, weights = naive(*flat)
    assert got.output.shape == (*batch, 4, 5, 4)
    torch.testing.assert_close(got.output, out.reshape(*batch, 4, 5, 4))
    torch.testing.assert_close(got.lse, lse.reshape(*batch, 4, 5))
    torch.testing.assert_close(got.weights, weights.reshape(*batch, 4, 5, 6))


def test_two_dimensions() -> None:
    q, k, v = rand(5, 3), rand(6, 3, seed=1), rand(6, 4, seed=2)
    got = reference.attention(q, k, v, mask=random_mask(5, 6), return_lse=True, return_weights="column_sum")
    out, lse, weights = naive(q[None, None], k[None, None], v[None, None], mask=random_mask(5, 6))
    torch.testing.assert_close(got.output, out[0, 0])
    torch.testing.assert_close(got.lse, lse[0, 0])
    torch.testing.assert_close(got.weights, weights[0, 0].sum(0))


# --- random numbers -------------------------------------------------------------------------------------------------


def test_philox_against_python_integers() -> None:
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(0, 2**32, (6, 200), generator=generator)
    words[:, 0], words[:, 1] = 0, 2**32 - 1
    got = torch.stack(reference_philox(tuple(words[:4]), tuple(words[4:])))
    for i in range(words.shape[1]):
        c, k = words[:4, i].tolist(), words[4:, i].tolist()
        assert got[:, i].tolist() == list(philox_words(tuple(c), tuple(k)))


def reference_philox(counter: Any, key: Any) -> Any:
    from attnfast._reference_core import philox

    return philox(counter, key)


def test_philox_known_answers_for_ten_rounds() -> None:
    """The published test vectors of the Random123 library (they are for ten rounds)."""
    from attnfast._reference_core import philox

    def run(counter: tuple[int, ...], key: tuple[int, ...]) -> list[int]:
        words = philox([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key], rounds=10)
        return [int(word) for word in words]

    ones = 0xFFFFFFFF
    assert run((0, 0, 0, 0), (0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert run((ones,) * 4, (ones,) * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    digits = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
    assert run(*digits) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_dropout_follows_manual_seed_and_keeps_the_mean() -> None:
    q, k, v = operands(1, 2, 2, 64, 64, 4, 4)
    torch.manual_seed(3)
    first = reference.attention(q, k, v, dropout_p=0.25, return_weights=True).weights
    second = reference.attention(q, k, v, dropout_p=0.25, return_weights=True).weights
    torch.manual_seed(3)
    again = reference.attention(q, k, v, dropout_p=0.25, return_weights=True).weights
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert abs((first == 0).double().mean().item() - 0.25) < 0.02
    plain = reference.attention(q, k, v, return_weights=True).weights
    torch.testing.assert_close(first, torch.where(first == 0, 0.0, plain / 0.75))
    assert reference.attention(q, k, v, dropout_p=1.0).eq(0).all()


# --- derivatives ----------------------------------------------------------------------------------------------------

GRADIENT_CASES = {
    "plain": {},
    "mask-bias-sink": {"mask": random_mask(3, 4), "bias": True, "sink": True},
    "cosine-window": {"score": "cosine", "window": (1, 1), "bias": True},
    "l2-softcap": {"score": "l2", "softcap": 2.0, "causal": "bottom_right", "sink": True},
    "dropout-lengths": {"dropout_p": 0.3, "dropout_seed": torch.tensor([5, 6]), "key_lengths": torch.tensor([2, 4])},
}


def differentiable(name: str, weights: Any) -> tuple[Callable[..., Any], list[Tensor]]:
    options: dict[str, Any] = dict(GRADIENT_CASES[name])
    tensors = operands(2, 2, 1, 3, 4, 2, 2)
    extra = {key: rand(*shape) for key, shape in (("bias", (2, 1, 4)), ("sink", (2,))) if options.pop(key, False)}
    if isinstance(options.get("mask"), Tensor):
        options["mask"] = random_mask(3, 4)

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(extra, inputs[3:], strict=True))
        result = reference.attention(*inputs[:3], **options, **named, return_lse=True, return_weights=weights)
        # -inf of a row that sees nothing has no numerical derivative; its analytic one is tested on its own below.
        lse = result.lse.masked_fill(result.lse == -INF, 0.0)
        return result.output, lse, result.weights

    return run, [t.requires_grad_() for t in (*tensors, *extra.values())]


@pytest.mark.parametrize("weights", [True, "column_sum", "row_max"])
@pytest.mark.parametrize("name", GRADIENT_CASES)
def test_gradients(name: str, weights: Any) -> None:
    function, inputs = differentiable(name, weights)
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("name", GRADIENT_CASES)
def test_functorch_agrees_with_autograd(name: str) -> None:
    function, inputs = differentiable(name, "column_sum")
    inputs = [x.detach() for x in inputs]

    def loss(*args: Tensor) -> Tensor:
        return sum((x.square().sum() for x in function(*args)), torch.zeros((), dtype=F64))

    got = torch.func.hessian(loss, argnums=(0, 1))(*inputs)
    expected = torch.autograd.functional.hessian(lambda q, k: loss(q, k, *inputs[2:]), tuple(inputs[:2]))
    for row, wanted_row in zip(got, expected, strict=True):
        for block, wanted in zip(row, wanted_row, strict=True):
            torch.testing.assert_close(block, wanted)
    stacked = [torch.stack([x, 2 * x]) for x in inputs]
    for mapped, first, second in zip(
        torch.vmap(function)(*stacked), function(*inputs), function(*[2 * x for x in inputs]), strict=True
    ):
        torch.testing.assert_close(mapped, torch.stack([first, second]))


def test_fully_masked_rows_have_zero_gradients() -> None:
    tensors = [t.requires_grad_() for t in (*operands(1, 2, 2, 3, 4, 2, 2), rand(2, 3, 4))]
    q, k, v, bias = tensors
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[1] = False
    got = reference.attention(q, k, v, bias=bias, mask=mask, return_lse=True, return_weights=True)
    assert got.output[:, :, 1].eq(0).all()
    assert got.weights[:, :, 1].eq(0).all()
    assert got.lse[:, :, 1].eq(-INF).all()
    total = got.output.sum() + got.lse.sum() + got.weights.square().sum()
    grads = torch.autograd.grad(total, tensors, create_graph=True)
    assert all(g.isfinite().all() for g in grads)
    assert grads[0][:, :, 1].eq(0).all()
    assert grads[3][:, 1].eq(0).all()
    second = torch.autograd.grad(sum(g.square().sum() for g in grads), tensors)
    assert all(g.isfinite().all() for g in second)


def test_row_maximum_gradient_goes_to_the_first_of_ties() -> None:
    q = torch.zeros(1, 1, 1, 2, dtype=F64)
    k, v = torch.zeros(1, 1, 3, 2, dtype=F64), torch.zeros(1, 1, 3, 1, dtype=F64)
    bias = torch.tensor([0.0, 1.0, 1.0], dtype=F64).requires_grad_()
    best = reference.attention(q, k, v, bias=bias, return_weights="row_max").weights
    (grad,) = torch.autograd.grad(best.sum(), bias)
    w = bias.detach().softmax(0)
    torch.testing.assert_close(grad, w[1] * (torch.tensor([0.0, 1.0, 0.0], dtype=F64) - w))


# --- selection ------------------------------------------------------------------------------------------------------

POISONS = [NAN, INF, -INF]


def poison_problem() -> tuple[list[Tensor], dict[str, Any]]:
    """Key 1 is hidden from rows 0 and 2 only, key 3 from all rows, query 3 is padded."""
    tensors = operands(2, 2, 1, 4, 5, 3, 2)
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[0, 1] = mask[2, 1] = False
    mask[:, 3] = False
    return tensors, {"mask": mask, "query_lengths": torch.tensor([3, 3])}


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("target", ["key", "value", "query"])
@pytest.mark.parametrize(
    "options", [{}, {"softcap": 1.0}, {"score": "cosine"}, {"score": "l2"}, {"scale": 0.0}], ids=str
)
@pytest.mark.parametrize("order", [1, 2, "functorch"])
def test_hidden_rows_never_leak(poison: float, target: str, options: dict[str, Any], order: int | str) -> None:
    (q, k, v), masks = poison_problem()
    clean = [q.clone(), k.clone(), v.clone()]
    {"key": k, "value": v}.get(target, q)[..., 3, 1 if target != "value" else 0] = poison

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = reference.attention(q, k, v, **masks, **options, return_lse=True)
        return result.output.square().sum() + result.lse.masked_fill(result.lse == -INF, 0.0).square().sum()

    def derivatives(*tensors: Tensor) -> list[Tensor]:
        if order == "functorch":
            jacobian = torch.func.jacfwd(loss, argnums=(0, 1, 2))(*tensors)
            return [loss(*tensors), *jacobian]
        leaves = [t.clone().requires_grad_() for t in tensors]
        grads = torch.autograd.grad(loss(*leaves), leaves, create_graph=order == 2)
        if order == 2:
            grads = (*grads, *torch.autograd.grad(sum(g.square().sum() for g in grads), leaves))
        return [loss(*tensors), *grads]

    for got, expected in zip(derivatives(q, k, v), derivatives(*clean), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("target", ["key", "value"])
def test_a_key_hidden_from_some_rows_reaches_only_the_others(poison: float, target: str) -> None:
    (q, k, v), masks = poison_problem()
    clean = reference.attention(q, k, v, **masks, return_weights=True)
    (k if target == "key" else v)[..., 1, 0] = poison
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    got = reference.attention(q, k, v, **masks, return_weights=True)
    for row in (0, 2):
        torch.testing.assert_close(got.output[..., row, :], clean.output[..., row, :])
        torch.testing.assert_close(got.weights[..., row, :], clean.weights[..., row, :])
    seen = got.output[..., 1, :] if target == "key" else got.output[..., 1, 0]
    if poison != -INF or target == "value":  # a score of -inf is an ordinary weight of 0 or, for other queries, NaN
        assert not seen.isfinite().all()
    # Row 1 does see the poisoned key, so NaN may go wherever row 1 leads; rows 0 and 2 must not notice, at any order.
    loss = got.output[..., [0, 2], :].square().sum() + got.weights[..., [0, 2], :].square().sum()
    grads = torch.autograd.grad(loss, (q, k, v), create_graph=True)
    assert grads[0][..., [0, 2], :].isfinite().all()
    assert grads[1][..., 3, :].eq(0).all()
    assert grads[2][..., 3, :].eq(0).all()
    (second,) = torch.autograd.grad(grads[0][..., [0, 2], :].square().sum(), q)
    assert second[..., [0, 2], :].isfinite().all()


@pytest.mark.parametrize("score", ["scaled_dot", "cosine", "l2"])
def test_nan_in_what_is_visible_propagates(score: str) -> None:
    for target in range(3):
        tensors = operands(1, 1, 1, 3, 4, 2, 2)
        tensors[target][0, 0, 1, 0] = NAN
        for t in tensors:
            t.requires_grad_()
        out = reference.attention(*tensors, score=score, causal="bottom_right")
        assert out.isnan().any()
        grads = torch.autograd.grad(out.sum(), tensors)
        assert grads[0].isnan().any()


def test_a_row_that_sees_nan_still_gives_hidden_keys_no_weight() -> None:
    q, k, v = operands(1, 1, 1, 2, 3, 2, 2)
    k[0, 0, 0, 0] = NAN
    weights = reference.attention(q, k, v, causal="top_left", return_weights=True).weights
    assert weights[0, 0, 0, 1:].eq(0).all()


def test_nan_behind_an_infinite_bias_is_hidden() -> None:
    q, k, v = operands(1, 2, 2, 3, 4, 2, 2)
    bias = torch.zeros(3, 4, dtype=F64)
    bias[:, 1] = -INF
    clean = reference.attention(q, k, v, bias=bias)
    k[..., 1, :], v[..., 1, :] = NAN, NAN
    tensors = [t.requires_grad_() for t in (q, k, v, bias)]
    out = reference.attention(q, k, v, bias=bias)
    torch.testing.assert_close(out, clean)
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.square().sum(), tensors))


def test_an_incoming_nan_gradient_stops_at_a_row_that_saw_nothing() -> None:
    tensors = [t.requires_grad_() for t in operands(1, 2, 2, 3, 4, 2, 2)]
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[1] = False
    out = reference.attention(*tensors, mask=mask)
    incoming = torch.ones_like(out)
    incoming[:, :, 1] = NAN
    assert all(g.isfinite().all() for g in torch.autograd.grad(out, tensors, incoming))


def test_a_hidden_score_that_overflows_does_not_leak_through_the_cap() -> None:
    q = torch.tensor([[1e300, 1e300]], dtype=F64)[None, None].requires_grad_()
    k = torch.tensor([[1e-300, 0.0], [1e300, -1e300]], dtype=F64)[None, None].requires_grad_()
    v = torch.ones(1, 1, 2, 1, dtype=F64)
    out = reference.attention(q, k, v, causal="top_left", softcap=1.0, return_lse=True).lse
    assert out.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k)))


# --- other faces ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [None, "top_left", "bottom_right"])
@pytest.mark.parametrize("slopes", [None, (4,), (3, 4)], ids=str)
@pytest.mark.parametrize("score", ["scaled_dot", "cosine", "l2"])
def test_packed_sequences_match_each_alone(causal: str | None, slopes: tuple[int, ...] | None, score: str) -> None:
    q, k, v = rand(9, 4, 3), rand(8, 2, 3, seed=1), rand(8, 2, 5, seed=2)
    cu_q, cu_k = torch.tensor([0, 4, 4, 9], dtype=torch.int32), torch.tensor([0, 2, 5, 8])
    alibi = None if slopes is None else rand(*slopes).abs()
    options: dict[str, Any] = {"causal": causal, "window": (2, 1), "score": score, "return_lse": True}
    options["return_weights"] = True
    got = reference.varlen_attention(q, k, v, cu_q, cu_k, 5, 3, alibi_slopes=alibi, sink=rand(4), **options)
    outside = torch.ones(4, 9, 8, dtype=torch.bool)
    for n in range(3):
        rows, keys = slice(int(cu_q[n]), int(cu_q[n + 1])), slice(int(cu_k[n]), int(cu_k[n + 1]))
        own = alibi[n] if alibi is not None and alibi.dim() == 2 else alibi
        alone = [q[rows].transpose(0, 1), k[keys].transpose(0, 1), v[keys].transpose(0, 1)]
        wanted = reference.attention(*alone, alibi_slopes=own, sink=rand(4), **options)
        torch.testing.assert_close(got.output[rows].transpose(0, 1), wanted.output)
        torch.testing.assert_close(got.lse[:, rows], wanted.lse)
        torch.testing.assert_close(got.weights[:, rows, keys], wanted.weights)
        outside[:, rows, keys] = False
    assert got.weights[outside].eq(0).all()


def test_packed_dropout_counts_keys_from_each_sequence() -> None:
    q, k, v = rand(6, 2, 3), rand(6, 2, 3, seed=1), rand(6, 2, 3, seed=2)
    cu = torch.tensor([0, 1, 6])
    seed = (99, 5)
    got = reference.varlen_attention(
        q, k, v, cu, cu, 5, 5, dropout_p=0.5, dropout_seed=torch.tensor(seed), return_weights=True
    )
    for h, row in itertools.product(range(2), range(1, 6)):
        keep = [kept(seed, 0.5, h * 6 + row, j) for j in range(5)]
        assert got.weights[h, row, 1:].ne(0).tolist() == keep


@pytest.mark.parametrize("rank", [2, 3, 4, 5])
@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"attn_mask": "bool"}, {"attn_mask": "float", "scale": 0.3}]
)
def test_sdpa_matches_torch(rank: int, options: dict[str, Any]) -> None:
    batch = (2, 1, 3)[: rank - 2]
    q, k, v = rand(*batch, 5, 4), rand(*batch, 7, 4, seed=1), rand(*batch, 7, 3, seed=2)
    options = dict(options)
    if "attn_mask" in options:
        options["attn_mask"] = random_mask(5, 7) if options["attn_mask"] == "bool" else rand(5, 7)
    torch.testing.assert_close(
        reference.scaled_dot_product_attention(q, k, v, **options), F.scaled_dot_product_attention(q, k, v, **options)
    )


def test_sdpa_broadcasts_and_groups_as_torch() -> None:
    q, k, v = rand(2, 1, 4, 5, 3), rand(3, 1, 6, 3), rand(1, 3, 4, 6, 3)
    torch.testing.assert_close(reference.scaled_dot_product_attention(q, k, v), F.scaled_dot_product_attention(q, k, v))
    q, k, v = rand(2, 6, 5, 3), rand(2, 2, 6, 3), rand(2, 2, 6, 3, seed=1)
    torch.testing.assert_close(
        reference.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_types_are_accumulated_in_float32(dtype: torch.dtype) -> None:
    tensors = [t.to(dtype) for t in operands(1, 2, 2, 30, 200, 16, 8)]
    truth = reference.attention(*[t.double() for t in tensors], return_lse=True, return_weights=True)
    got = reference.attention(*tensors, return_lse=True, return_weights=True)
    assert got.output.dtype == got.weights.dtype == dtype
    assert got.lse.dtype == torch.float32
    # One rounding at the end: half an ulp of the dtype, plus float32 arithmetic.
    bound = torch.finfo(dtype).eps * truth.output.abs() / 2 * 1.01 + 1e-6
    assert ((got.output.double() - truth.output).abs() <= bound).all()
    torch.testing.assert_close(got.lse.double(), truth.lse, rtol=1e-6, atol=1e-6)


def test_unit_vectors_of_extreme_rows() -> None:
    x = torch.tensor([[3e38, 3e38], [0.0, 0.0], [1e-30, 0.0], [3.0, 4.0]])
    got = reference.unit_vectors(x)
    expected = torch.tensor([[0.5**0.5, 0.5**0.5], [0.0, 0.0], [1e-22, 0.0], [0.6, 0.8]])
    torch.testing.assert_close(got, expected)


def test_blocks_of_rows_are_rows_of_the_whole() -> None:
    """What second derivatives rely on: `rows` of dot_attention."""
    q, k, v = operands(2, 2, 1, 6, 5, 3, 2)
    options = DotAttentionOptions(
        mask=random_mask(2, 1, 6, 5), query_lengths=torch.tensor([5, 6]), key_lengths=torch.tensor([4, 5]),
        alibi_slopes=rand(1, 2).abs(), seed=torch.tensor([3, 4]), scale=0.5, dropout_p=0.3, causal=2, window_left=3,
        weights_mode=1,
    )  # fmt: skip
    bias = rand(1, 2, 6, 5)
    whole = reference.dot_attention(q, k, v, bias, None, None, options, True)
    for first, last in ((0, 2), (2, 5), (5, 6)):
        rows = slice(first, last)
        block = reference.dot_attention(
            q[:, :, rows], k, v, bias[:, :, rows], None, None, options._replace(mask=options.mask[:, :, rows]), True,
            rows=(first, 6),
        )  # fmt: skip
        for part, full in zip(block, whole, strict=True):
            torch.testing.assert_close(part, full[:, :, rows])
