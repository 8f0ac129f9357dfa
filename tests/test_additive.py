"""The additive core: ``attnfast.additive_attention`` and its operators against plain torch in float64.

Error rule, as everywhere: err(kernel) <= 2 * err(plain torch, same dtype) + floor, both against float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from helpers import FLOATS, HALVES, assert_close_to_truth, dtype_id, error, magnitude, patch_seed, real
from torch import Tensor

import attnfast
from attnfast import reference

Tensors = dict[str, Tensor]

SHAPES: dict[str, dict[str, int]] = {
    "tiles": {"B": 2, "H": 2, "T_q": 70, "T_k": 130, "D": 40, "D_v": 24},
    "panels": {"B": 1, "H": 1, "T_q": 300, "T_k": 70, "D": 20, "D_v": 8},
    "grouped": {"B": 2, "H": 4, "H_kv": 2, "T_q": 9, "T_k": 33, "D": 17, "D_v": 5},
    "few_queries": {"B": 1, "H": 2, "T_q": 3, "T_k": 90, "D": 70, "D_v": 16},
    "decode": {"B": 3, "H": 2, "H_kv": 1, "T_q": 1, "T_k": 77, "D": 130, "D_v": 16},
    "split_decode": {"B": 1, "H": 1, "T_q": 1, "T_k": 2100, "D": 12, "D_v": 8},
    "one": {"B": 1, "H": 1, "T_q": 1, "T_k": 1, "D": 1, "D_v": 1},
    "one_feature": {"B": 1, "H": 2, "T_q": 40, "T_k": 50, "D": 1, "D_v": 3},
    "three_features": {"B": 1, "H": 1, "T_q": 6, "T_k": 66, "D": 3, "D_v": 70},
    "wide": {"B": 1, "H": 1, "T_q": 66, "T_k": 65, "D": 515, "D_v": 4},
    "long": {"B": 1, "H": 1, "T_q": 5, "T_k": 600, "D": 8, "D_v": 8},
}


def make(
    B: int, H: int, T_q: int, T_k: int, D: int, D_v: int, H_kv: int | None = None, *,
    dtype: torch.dtype = torch.float32, spread: float = 1.0, weight_scale: float = 1.0, by_head: bool = True,
    seed: int = 0,
) -> Tensors:  # fmt: skip
    """Inputs ``[B, H, T, D]``; weight and score_bias float32 at least, as parameters are."""
    g = torch.Generator().manual_seed(seed)
    H_kv = H if H_kv is None else H_kv

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    return {
        "query": (spread * normal(B, H, T_q, D)).to(dtype),
        "key": (spread * normal(B, H_kv, T_k, D)).to(dtype),
        "value": normal(B, H_kv, T_k, D_v).to(dtype),
        "weight": (weight_scale * normal(H if by_head else 1, D)).to(real(dtype)),
        "score_bias": (spread * normal(H if by_head else 1, D)).to(real(dtype)),
    }


def oracle(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, score_bias: Tensor | None = None, *,
    visible: Tensor | None = None, bias: Tensor | None = None, sink: Tensor | None = None, softcap: float = 0.0,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Output, lse and weights by a few lines of torch, in the inputs' dtype."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if score_bias is not None:  # in the order of the reference: with large terms it matters
        query = query + score_bias[None, :, None, :].to(query.dtype)
    total = query.unsqueeze(3) + key.unsqueeze(2)
    scores = (total.tanh() * weight[None, :, None, None, :].to(query.dtype)).sum(-1)
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    logits = scores
    if sink is not None:
        logits = torch.cat([scores, sink.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    lse = logits.logsumexp(-1)
    weights = (scores - lse.unsqueeze(-1)).exp().where(lse.isfinite().unsqueeze(-1), 0.0)
    if keep is not None:
        weights = weights * keep.to(weights.dtype)
    return weights @ value, lse, weights


def leaves(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> Tensors:
    return {n: x.detach().to(x.dtype if dtype is None else dtype).requires_grad_() for n, x in tensors.items()}


Gradients = dict[str, Tensor]


def run(function: Callable[..., Any], inputs: Tensors, probes: Mapping[str, Tensor], **options: Any) -> tuple[Any, Any]:
    """The results of a call, and the gradients of sum(probe * result) by every input."""
    result = function(**inputs, **options)
    result = result if isinstance(result, tuple) else (result, None, None)
    named = dict(zip(("output", "lse", "weights"), result))
    total: Any = sum((torch.where(named[n].detach().isfinite(), named[n] * p.to(named[n].dtype), 0)).sum()
                     for n, p in probes.items())  # fmt: skip
    found = torch.autograd.grad(total, list(inputs.values()), allow_unused=True)
    return named, {n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(inputs.items(), found)}


def check(
    tensors: Tensors, options: Mapping[str, Any] | None = None, expected: Mapping[str, Any] | None = None, *,
    slack: float = 0.0, weights: bool = True,
) -> None:  # fmt: skip
    """Hold one call against the oracle by the error rule: output, lse, weights, and every gradient through all three.

    `options` go to the function, `expected` (what they mean) to the oracle. Without `weights` they are not asked for.
    """
    options, expected = options or {}, expected or {}
    dtype = tensors["query"].dtype
    B, H, T_q, _ = tensors["query"].shape
    T_k, D_v = tensors["value"].shape[2:]
    g = torch.Generator().manual_seed(5)
    shapes = {"output": (B, H, T_q, D_v), "lse": (B, H, T_q)}
    if weights:
        shapes["weights"] = (B, H, T_q, T_k)
    probes = {n: torch.randn(s, generator=g, dtype=torch.float64).to(dtype).double() for n, s in shapes.items()}
    found, grads = run(
        attnfast.additive_attention, leaves(tensors), probes, return_lse=True, return_weights=weights, **options
    )
    truth, true_grads = run(oracle, leaves(tensors, torch.float64), probes, **expected)
    # A flash attention forms rowsum(grad_out * out) from the output as rounded: that is a gradient of lse, not noise.
    rounding = (probes["output"] * (found["output"].detach().double() - truth["output"].detach())).sum(-1)
    plain, plain_grads = run(oracle, leaves(tensors, dtype), probes, **expected)
    _, flash_grads = run(
        oracle, leaves(tensors, torch.float64), {**probes, "lse": probes["lse"] - rounding}, **expected
    )
    # Weights and gradients are formed again from the saved base-2 lse, whose rounding is a relative error of a row.
    saved = 2.0 * torch.finfo(real(dtype)).eps * magnitude(truth["lse"])
    if dtype == torch.float64:
        slack, saved = slack + 4 * saved, 4 * saved
    for name in shapes:
        extra = slack + (saved if name == "weights" else 0.0)
        assert_close_to_truth(found[name], truth[name], plain[name], name, slack=extra)
    for name, grad in grads.items():
        assert grad.dtype == tensors[name].dtype and grad.shape == tensors[name].shape
        want = true_grads[name]
        theirs = max((plain_grads[name], flash_grads[name].to(dtype)), key=lambda x, w=want: error(x, w))
        rows = B * T_q if name in ("weight", "score_bias") else 1  # whose errors add up, independent of each other
        assert_close_to_truth(grad, want, theirs, f"grad_{name}", slack=slack + saved * math.sqrt(rows))


# ------------------------------------------------------------------------------------------------------- correctness


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_and_dtypes(isa: str, shape: str, dtype: torch.dtype) -> None:
    check(make(**SHAPES[shape], dtype=dtype))


@pytest.mark.parametrize("shape", ["tiles", "grouped", "decode"])
def test_one_weight_for_all_heads(isa: str, shape: str) -> None:
    check(make(**SHAPES[shape], by_head=False))


def test_without_score_bias(isa: str) -> None:
    tensors = make(**SHAPES["tiles"])
    del tensors["score_bias"]
    check(tensors)


@pytest.mark.parametrize("shape", ["tiles", "grouped", "decode", "split_decode", "panels"])
@pytest.mark.parametrize(
    "name", ["causal", "bottom_right", "window", "mask", "lengths", "bias", "float_mask", "row_bias", "column_bias",
             "softcap", "sink", "alibi", "dropout", "everything"]
)  # fmt: skip
def test_options(isa: str, shape: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = make(**SHAPES[shape])
    B, H, T_q, T_k = *tensors["query"].shape[:3], tensors["key"].shape[2]
    g = torch.Generator().manual_seed(3)
    q, k = torch.arange(T_q).view(-1, 1), torch.arange(T_k)
    options: dict[str, Any] = {}
    expected: dict[str, Any] = {}
    visible = torch.ones(B, H, T_q, T_k, dtype=torch.bool)
    everything = name == "everything"
    if name == "causal" or everything:
        options["causal"], visible = "top_left", visible & (k <= q)
    if name == "bottom_right":
        options["causal"], visible = "bottom_right", visible & (k <= q + T_k - T_q)
    if name == "window":
        options["window"], visible = (9, 40), visible & (k >= q - 9) & (k <= q + 40)
    if name == "mask" or everything:
        options["mask"] = torch.rand(B, 1, T_q, T_k, generator=g) < 0.6
        options["mask"][:, :, 0] = False  # a row that sees nothing
        visible = visible & options["mask"]
    if name == "lengths" or everything:
        options["key_lengths"] = torch.arange(B) + T_k // 2
        options["query_lengths"] = T_q - torch.arange(B) // 2
        visible = visible & (k < options["key_lengths"].view(-1, 1, 1, 1))
        visible = visible & (q < options["query_lengths"].view(-1, 1, 1, 1))
    if name == "softcap" or everything:
        options["softcap"] = expected["softcap"] = 1.5
    if name == "alibi":
        options["alibi_slopes"] = torch.rand(H, generator=g)
        expected["bias"] = -options["alibi_slopes"].double().view(1, H, 1, 1) * (q - k).abs()
    if name == "dropout" or everything:
        seed = (12345, 678)
        patch_seed(monkeypatch, seed)
        from helpers import philox_keep

        options["dropout_p"] = 0.4
        expected["keep"] = philox_keep(seed, B, H, T_q, T_k, 0.4).double() / 0.6
    expected["visible"] = visible
    shapes = {"bias": (B, H, T_q, T_k), "float_mask": (T_q, T_k), "row_bias": (H, T_q, 1), "column_bias": (1, 1, T_k),
              "everything": (1, T_q, T_k)}  # fmt: skip
    if name in shapes:
        tensors["bias"] = torch.randn(shapes[name], generator=g)
    if name == "sink" or everything:
        tensors["sink"] = torch.randn(H, generator=g)
    if name == "float_mask":
        options_bias = tensors.pop("bias")
        check_float_mask(tensors, options_bias)
        return
    check(tensors, options, expected)


def check_float_mask(tensors: Tensors, mask: Tensor) -> None:
    mask[:, 0] = -math.inf
    check(tensors, {"mask": mask}, {"bias": mask.double()})


def test_bias_shared_by_samples_and_heads(isa: str) -> None:
    tensors = make(**SHAPES["grouped"])
    tensors["bias"] = torch.randn(1, 1, 9, 33)
    check(tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=dtype_id)
def test_a_row_of_the_most_negative_number_is_uniform(isa: str, dtype: torch.dtype) -> None:
    """Its lse, near -1e38, has no digits left for the logarithm of the sum; the backward and the weights need it."""
    tensors = make(B=1, H=1, T_q=5, T_k=70, D=9, D_v=4, dtype=dtype)
    inputs = leaves(tensors)
    bias = torch.zeros(5, 70, dtype=dtype)
    bias[2] = torch.finfo(dtype).min
    result = attnfast.additive_attention(**inputs, bias=bias, return_weights=True)
    assert_near = torch.testing.assert_close
    assert_near(result.weights[0, 0, 2], torch.full((70,), 1 / 70, dtype=dtype))
    result.output[0, 0, 2].sum().backward()
    assert_near(inputs["value"].grad[0, 0], torch.full((70, 4), 1 / 70, dtype=dtype))


# ------------------------------------------------------------------------------------------------- range and precision


@pytest.mark.parametrize("shape", ["tiles", "few_queries", "one_feature", "wide"])
@pytest.mark.parametrize("spread", [0.01, 0.1, 0.3, 1.0, 2.0, 3.5, 5.0, 10.0, 20.0, 50.0])
def test_every_spread_of_inputs(isa: str, spread: float, shape: str) -> None:
    tensors = make(**SHAPES[shape], spread=spread)
    # Between the range of the polynomial and that of ordinary inputs a term keeps an absolute precision of float32,
    # where tanh itself has a relative one: half an ulp of 1 for each term, independent of each other.
    check(tensors, slack=6e-8 * tensors["weight"].norm().item() if 0.05 < spread < 0.5 else 0.0)


@pytest.mark.parametrize("dtype", HALVES, ids=dtype_id)
@pytest.mark.parametrize("spread", [0.01, 5.0, 50.0])
def test_every_spread_in_half_precision(isa: str, spread: float, dtype: torch.dtype) -> None:
    check(make(**SHAPES["tiles"], spread=spread, dtype=dtype))


@pytest.mark.parametrize("offset", [3.0, 5.0, 12.0, 21.0, 30.0, 42.9, 43.1, 88.0, 200.0])
@pytest.mark.parametrize("T_q", [1, 40])
def test_opposite_signs_that_cancel(isa: str, offset: float, T_q: int) -> None:
    """Large queries meet large keys of the other sign: the sum is ordinary, the exponentials are not."""
    tensors = make(B=1, H=1, T_q=T_q, T_k=70, D=24, D_v=8)
    tensors["query"] += offset
    tensors["key"] -= offset
    tensors["key"][:, :, ::3] += 2 * offset  # and some that saturate
    check(tensors)


@pytest.mark.parametrize("offset", [9.0, 20.0, 42.0, 60.0])
def test_saturated_scores_are_exact(isa: str, offset: float) -> None:
    """tanh is +-1 to the last bit there, so the score is a sum of weights."""
    weight = torch.tensor([[0.3, -1.7, 2.1, 0.9, 0.11]])
    sign = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0])
    query, key = (sign * offset).view(1, 1, 1, 5).expand(1, 1, 20, 5), (sign * offset).view(1, 1, 1, 5)
    lse = attnfast.additive_attention(query, key, torch.ones(1, 1, 1, 1), weight, return_lse=True).lse
    want = (weight.double() * sign).sum()
    assert (lse.double() - want).abs().max() <= 4e-7 * 2


@pytest.mark.parametrize("factor", [1000.0, 1e6, 1e12, 1e30, 1e-3, 1e-30])
def test_every_scale_of_the_weights(isa: str, factor: float) -> None:
    tensors = make(**SHAPES["tiles"], weight_scale=factor)
    if factor <= 1:
        check(tensors)
        return
    found = attnfast.additive_attention(**tensors, return_lse=True)
    want = oracle(**{n: x.double() for n, x in tensors.items()})
    plain = oracle(**tensors)
    for name, a, b, c in zip(("output", "lse"), found, want, plain):
        assert_close_to_truth(a, b, c, name)


def test_large_weights_leave_every_gradient_finite(isa: str) -> None:
    """The lanes past the last query hold scores too, of 20000 and more, whose exponentials overflow."""
    inputs = leaves(make(**SHAPES["tiles"], weight_scale=1000.0))
    attnfast.additive_attention(**inputs).sum().backward()
    for name, x in inputs.items():
        assert x.grad is not None and x.grad.isfinite().all(), name


def test_weights_of_very_different_size(isa: str) -> None:
    tensors = make(**SHAPES["tiles"])
    tensors["weight"] *= 10.0 ** torch.linspace(-12, 1, 40)
    check(tensors)


def test_zero_weights(isa: str) -> None:
    tensors = make(**SHAPES["grouped"])
    tensors["weight"].zero_()
    check(tensors)


# ------------------------------------------------------------------------------------------- infinities, NaN, selection


def results(tensors: Tensors, **options: Any) -> Tensors:
    inputs = leaves(tensors)
    output = attnfast.additive_attention(**inputs, **options)
    output.sum().backward()
    return {"output": output.detach(), **{f"grad_{n}": x.grad for n, x in inputs.items() if x.grad is not None}}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("T_q", [1, 3, 70])
def test_a_masked_key_or_query_that_is_not_finite_does_nothing(isa: str, bad: float, T_q: int) -> None:
    tensors = make(B=2, H=2, T_q=T_q, T_k=70, D=20, D_v=8)
    mask = torch.rand(2, 2, T_q, 70) < 0.7
    mask[..., 5] = mask[..., 68] = False
    mask[0, 1, T_q // 2] = False
    clean = results(tensors, mask=mask)
    for name, at in (("key", 5), ("value", 68), ("key", 68)):
        tensors[name][:, :, at] = bad
    tensors["query"][0, 1, T_q // 2] = bad
    found = results(tensors, mask=mask)
    for name, x in found.items():
        # The tile takes another way to tanh, so the last bits differ.
        torch.testing.assert_close(x, clean[name], rtol=2e-5, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}")
    assert not found["grad_key"][:, :, 5].any() and not found["grad_query"][0, 1, T_q // 2].any()


@pytest.mark.parametrize("T_q", [1, 70])
def test_a_nan_query_stays_in_its_row(isa: str, T_q: int) -> None:
    tensors = make(B=1, H=1, T_q=T_q + 1, T_k=70, D=20, D_v=8)
    clean = attnfast.additive_attention(**tensors)
    tensors["query"][0, 0, T_q // 2, 3] = math.nan
    found = attnfast.additive_attention(**tensors)
    assert found[0, 0, T_q // 2].isnan().all()
    others = [q for q in range(T_q + 1) if q != T_q // 2]
    torch.testing.assert_close(found[0, 0, others], clean[0, 0, others], rtol=2e-5, atol=2e-5)


def test_a_visible_nan_key_shows(isa: str) -> None:
    tensors = make(B=1, H=1, T_q=70, T_k=70, D=20, D_v=8)
    tensors["key"][0, 0, 9, 0] = math.nan
    assert attnfast.additive_attention(**tensors)[..., 9:, :].isnan().all()
    causal = attnfast.additive_attention(**tensors, causal="top_left")
    assert causal[..., 9:, :].isnan().all() and causal[..., :9, :].isfinite().all()


@pytest.mark.parametrize("T_q", [1, 70])
def test_infinite_elements_saturate(isa: str, T_q: int) -> None:
    tensors = make(B=1, H=1, T_q=T_q, T_k=70, D=20, D_v=8)
    tensors["query"][0, 0, 0, 0], tensors["key"][0, 0, 3, 5], tensors["key"][0, 0, 4, 0] = math.inf, -math.inf, math.inf
    check(tensors)


def test_rows_that_see_nothing(isa: str) -> None:
    tensors = make(B=1, H=2, T_q=9, T_k=20, D=6, D_v=4)
    mask = torch.ones(9, 20, dtype=torch.bool)
    mask[4] = False
    inputs = leaves(tensors)
    result = attnfast.additive_attention(**inputs, mask=mask, return_lse=True, return_weights=True)
    assert not result.output[:, :, 4].any() and not result.weights[:, :, 4].any()
    assert (result.lse[:, :, 4] == -math.inf).all()
    result.output.backward(torch.ones_like(result.output))
    assert not inputs["query"].grad[:, :, 4].any()
    assert all(x.grad.isfinite().all() for x in inputs.values())


@pytest.mark.parametrize("zero", ["B", "H", "T_q", "T_k", "D", "D_v"])
def test_sizes_of_zero(isa: str, zero: str) -> None:
    sizes = {"B": 2, "H": 2, "T_q": 5, "T_k": 7, "D": 4, "D_v": 3, zero: 0}
    inputs = leaves(make(**sizes))
    output = attnfast.additive_attention(**inputs)
    assert output.shape == (sizes["B"], sizes["H"], sizes["T_q"], sizes["D_v"])
    if zero == "T_k":
        assert not output.any()
    if zero == "D":
        torch.testing.assert_close(output, inputs["value"].mean(2, keepdim=True).expand_as(output))
    output.sum().backward()
    for name, x in inputs.items():
        assert x.grad is not None and x.grad.isfinite().all()
        if name not in ("value",):
            assert not x.grad[..., :0].any() and (zero not in ("T_q", "T_k", "B") or not x.grad.any())


# ------------------------------------------------------------------------------------------------------- determinism


@pytest.mark.parametrize("shape", ["tiles", "split_decode", "grouped", "long", "panels"])
@pytest.mark.parametrize("bias", ["by_key", "by_query"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_threads_do_not_change_a_bit(isa: str, shape: str, dtype: torch.dtype, bias: str) -> None:
    sizes = {**SHAPES[shape], "T_k": max(SHAPES[shape]["T_k"], 700)}  # enough for threads and for split keys
    tensors = make(**sizes, dtype=dtype)
    size = (1, 1, 1, sizes["T_k"]) if bias == "by_key" else (sizes["B"], sizes["H"], sizes["T_q"], 1)
    tensors["bias"] = torch.randn(size)

    def all_results() -> list[Tensor]:
        inputs = leaves(tensors)
        result = attnfast.additive_attention(**inputs, causal="bottom_right", return_lse=True, return_weights=True)
        (result.output.sin().sum() + result.lse.sum() + result.weights.square().sum()).backward()
        return [*result, *(x.grad for x in inputs.values())]

    torch.set_num_threads(1)
    one = all_results()
    for threads in (2, 5, 5, 5):
        torch.set_num_threads(threads)
        for a, b in zip(one, all_results(), strict=True):
            assert torch.equal(a, b)


def test_nothing_of_size_T_q_T_k_D_is_allocated() -> None:
    """Peak memory of a forward and backward, by the operating system's account, in a process of its own."""
    import subprocess
    import sys

    code = """
import resource, torch, attnfast
torch.set_num_threads(2)
T, D = 1024, 128
small = [torch.randn(1, 1, 70, D, requires_grad=True) for _ in range(3)]
weight = torch.randn(D, requires_grad=True)
attnfast.additive_attention(*(x[0] for x in small), weight).sum().backward()
q, k, v = (torch.randn(1, T, D, requires_grad=True) for _ in range(3))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
attnfast.additive_attention(q, k, v, weight).sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(out.stdout) < 40 * 1024  # KiB; T x T x D floats are 512 MiB, T x T floats 4 MiB


# ------------------------------------------------------------------------------------------- derivatives and transforms

CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": "bottom_right"},
    "softcap": {"softcap": 1.3},
    "window": {"window": (2, 1)},
    "lengths": {"key_lengths": torch.tensor([3, 7])},
}


def small(**kwargs: Any) -> tuple[Tensor, ...]:
    tensors = make(B=2, H=2, T_q=4, T_k=7, D=3, D_v=2, dtype=torch.float64, **kwargs)
    return tuple(x.requires_grad_() for x in tensors.values())


def call(*inputs: Tensor, **options: Any) -> Any:
    return attnfast.additive_attention(*inputs[:4], score_bias=inputs[4], **options)


@pytest.mark.parametrize("name", CALLS)
def test_gradcheck(isa: str, name: str) -> None:
    assert torch.autograd.gradcheck(lambda *t: call(*t, **CALLS[name]), small())
    assert torch.autograd.gradcheck(
        lambda *t: call(*t, return_lse=True, return_weights=True, **CALLS[name])[1:], small(H_kv=1)
    )


@pytest.mark.parametrize("mode", ["full", "column_sum", "row_max"])
def test_gradcheck_of_weights(mode: str) -> None:
    assert torch.autograd.gradcheck(lambda *t: call(*t, return_weights=mode)[2], small())


@pytest.mark.parametrize("name", CALLS)
def test_gradgradcheck(name: str) -> None:
    assert torch.autograd.gradgradcheck(lambda *t: call(*t, **CALLS[name]), small())


def test_gradgradcheck_of_everything() -> None:
    sink, bias = torch.randn(2, dtype=torch.float64), torch.randn(2, 1, 7, dtype=torch.float64)
    extra = (sink.requires_grad_(), bias.requires_grad_())

    def function(*t: Tensor) -> Any:
        result = call(*t[:5], sink=t[5], bias=t[6], return_lse=True, return_weights="column_sum")
        return tuple(result)

    assert torch.autograd.gradcheck(function, (*small(), *extra))
    assert torch.autograd.gradgradcheck(function, (*small(), *extra))


@pytest.mark.parametrize("name", CALLS)
def test_second_order_does_not_depend_on_the_block(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of one query row give what one block gives; a wrong row range would show in the masks."""
    from attnfast import _second_order

    found = []
    for elements in (1, 2**30):
        monkeypatch.setattr(_second_order, "_BLOCK_ELEMENTS", elements)
        inputs = small()
        bias = torch.linspace(-1, 1, 4 * 7, dtype=torch.float64).view(4, 7).requires_grad_()
        loss = call(*inputs, bias=bias, **CALLS[name]).sin().sum()
        grads = torch.autograd.grad(loss, (*inputs, bias), create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in grads), (*inputs, bias)))
    torch.testing.assert_close(*found)


def test_forward_mode() -> None:
    assert torch.autograd.gradcheck(call, small(), check_forward_ad=True)


@pytest.mark.parametrize("mapped", ["query", "weight", "all"])
def test_vmap(mapped: str) -> None:
    inputs = small()
    at = {"query": (0,), "weight": (3,), "all": (0, 1, 2, 3, 4)}[mapped]
    many = [torch.stack([x + 0.1 * i for i in range(3)]) if n in at else x for n, x in enumerate(inputs)]
    dims = tuple(0 if n in at else None for n in range(5))

    def gradient(*t: Tensor) -> Any:
        return torch.func.grad(lambda *t: call(*t).sin().sum(), argnums=(0, 3, 4))(*t)

    for function in (call, gradient):
        found = torch.vmap(function, dims)(*many)
        want = [function(*(x[i] if n in at else x for n, x in enumerate(many))) for i in range(3)]
        want = torch.stack(want) if isinstance(found, Tensor) else tuple(map(torch.stack, zip(*want)))
        torch.testing.assert_close(found, want)


def test_functorch_transforms() -> None:
    inputs = small()

    def loss(weight: Tensor) -> Tensor:
        return call(*inputs[:3], weight, inputs[4]).sin().sum()

    want = torch.autograd.grad(loss(inputs[3]), inputs[3])[0]
    torch.testing.assert_close(torch.func.grad(loss)(inputs[3]), want)
    direction = torch.randn_like(inputs[3])
    _, tangent = torch.func.jvp(loss, (inputs[3],), (direction,))
    torch.testing.assert_close(tangent, (want * direction).sum())
    hessian = torch.func.hessian(loss)(inputs[3])
    torch.testing.assert_close(hessian, torch.autograd.functional.hessian(loss, inputs[3]))


def test_compile_needs_no_graph_break() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: call(*t, causal="top_left").sin().sum(), fullgraph=True, backend="aot_eager")
    inputs = small()
    want = torch.autograd.grad(call(*inputs, causal="top_left").sin().sum(), inputs)
    torch.testing.assert_close(torch.autograd.grad(compiled(*inputs), inputs), want)


def test_operators_pass_opcheck() -> None:
    q, k, v, w, b = small()
    bounds = torch.tensor([[[[0, k.shape[2] - 1]]]])
    options = (*(None,) * 7, bounds, 0.0, 0.0, 1.5, 0, -1, -1, 1)
    center = torch.zeros(q.shape[:3], dtype=w.dtype, requires_grad=True)
    inputs = (q, k, v, w, b, None, None, None, center)
    torch.library.opcheck(torch.ops.attnfast.additive_attention_fwd.default, (*inputs, *options))
    out, lse, weights, index = (x.detach() for x in torch.ops.attnfast.additive_attention_fwd(*inputs, *options))
    tensors = [x.detach().requires_grad_() for x in (torch.ones_like(out), lse, weights, q, k, v, w, b)]
    rest = (out, lse, weights, index, None, None, None, center, (*(True,) * 5, *(False,) * 3, True))
    torch.library.opcheck(torch.ops.attnfast.additive_attention_bwd.default, (*tensors, *rest, *options))


# -------------------------------------------------------------------------------------------------- the public function


@pytest.mark.parametrize("weights", [False, "full", "column_sum", "row_max"])
def test_agrees_with_the_reference_without_a_head_axis(weights: Any) -> None:
    query, key, value = torch.randn(3, 2, 5, 4), torch.randn(2, 7, 4), torch.randn(3, 1, 7, 6)
    weight, score_bias, mask = torch.randn(4), torch.randn(4), torch.rand(2, 5, 7) < 0.8
    options: dict[str, Any] = {"mask": mask, "return_lse": True, "return_weights": weights, "sink": torch.randn(1)}
    found = attnfast.additive_attention(query, key, value, weight, score_bias=score_bias, **options)
    want = reference.additive_attention(query, key, value, weight, score_bias=score_bias, **options)
    for a, b in zip(found, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("normalizer", ["sparsemax", "entmax15", "sigmoid", "hard"])
def test_other_normalisers(normalizer: str) -> None:
    inputs = small()
    found = call(*inputs, normalizer=normalizer, return_weights=True)
    want = reference.additive_attention(*inputs[:4], score_bias=inputs[4], normalizer=normalizer, return_weights=True)
    torch.testing.assert_close(found.weights, want.weights)
    torch.testing.assert_close(found.output, want.output)


def test_two_dimensions() -> None:
    q, k, v, w = torch.randn(5, 4), torch.randn(7, 4), torch.randn(7, 3), torch.randn(4)
    want = torch.softmax((torch.tanh(q[:, None] + k) * w).sum(-1), -1) @ v
    torch.testing.assert_close(attnfast.additive_attention(q, k, v, w), want)


def test_autocast() -> None:
    q, k, v, w = torch.randn(2, 5, 4), torch.randn(2, 7, 4), torch.randn(2, 7, 3), torch.randn(4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = attnfast.additive_attention(q, k, v, w)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert w.grad is not None and w.grad.dtype == torch.float32


GOOD = {"query": (2, 5, 4), "key": (2, 7, 4), "value": (2, 7, 3), "weight": (4,), "score_bias": (4,)}


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("query", (4,), r"query: expected \[\.\.\., T_q, D\]"),
        ("key", (2, 7, 5), r"key: .*D = 4 \(query's\)"),
        ("value", (2, 8, 3), r"value: .*T_k = 7 \(key's\)"),
        ("weight", (5,), r"weight: expected \[D\] = \[4\]"),
        ("weight", (3, 4), r"weight: expected \[H, D\] = \[2, 4\]"),
        ("weight", (1, 1, 4), r"weight: expected \[D\] or \[H, D\]"),
        ("score_bias", (1, 4), r"score_bias: expected \[D\] = \[4\]"),
    ],
)
def test_wrong_shapes(name: str, shape: tuple[int, ...], words: str) -> None:
    tensors = {n: torch.randn(shape if n == name else s) for n, s in GOOD.items()}
    with pytest.raises(ValueError, match=words):
        attnfast.additive_attention(**tensors)


def test_wrong_kinds() -> None:
    tensors: dict[str, Any] = {n: torch.randn(s) for n, s in GOOD.items()}
    for name, bad, words in (
        ("weight", tensors["weight"].long(), "weight: expected dtype"),
        ("weight", [1.0] * 4, "weight: expected a torch.Tensor"),
        ("key", tensors["key"].double(), "key: expected dtype float32"),
    ):
        with pytest.raises(TypeError, match=words):
            attnfast.additive_attention(**{**tensors, name: bad})
    with pytest.raises(ValueError, match="query: expected"):
        attnfast.additive_attention(torch.randn(5, 4), torch.randn(7, 4), torch.randn(7, 3), torch.randn(1, 4))
    with pytest.raises(ValueError, match="key_lengths: expected values from 0 to T_k = 7, got 8"):
        attnfast.additive_attention(**tensors, key_lengths=torch.tensor([8, 1]))


def test_packed_sequences_by_the_operator(isa: str) -> None:
    """The kernel takes cu_seqlens, as the dot kernel does: each sequence is a call of its own."""
    tensors = make(B=1, H=2, T_q=150, T_k=170, D=12, D_v=5)
    q, k, v, w, b = tensors.values()
    cu_q, cu_k = torch.tensor([0, 0, 70, 150]), torch.tensor([0, 30, 100, 170])
    inputs = [x.clone().requires_grad_() for x in (q, k, v, w, b)]
    options = (None, None, None, cu_q, cu_k, None, None, None, 0.0, 0.0, 0.0, 1, -1, -1, 0)
    out = torch.ops.attnfast.additive_attention_fwd(*inputs, None, None, None, None, *options)[0]
    probe = torch.randn_like(out)
    grads = torch.autograd.grad(out, inputs, probe)
    single = [x.clone().requires_grad_() for x in (q, k, v, w, b)]
    parts = [
        attnfast.additive_attention(
            single[0][:, :, cu_q[i] : cu_q[i + 1]],
            single[1][:, :, cu_k[i] : cu_k[i + 1]],
            single[2][:, :, cu_k[i] : cu_k[i + 1]],
            single[3],
            score_bias=single[4],
            causal="top_left",
        )
        for i in range(3)
    ]
    want = torch.cat(parts, 2)
    torch.testing.assert_close(out, want)
    for a, c in zip(grads, torch.autograd.grad(want, single, probe), strict=True):
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-4)
