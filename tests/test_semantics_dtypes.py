"""Contract lines 10, 11 and 13 of semantics.md: accuracy by dtype, clear errors, bitwise determinism."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import HALVES, assert_close_to_truth, check_attention, error, leaves, oracle, problem, real, run_attention
from torch import Tensor

from attnfast import reference

# ---------------------------------------------------------------------------------------------------- line 10: accuracy

LONG: dict[str, dict[str, Any]] = {
    "plain": {"T_q": 512, "T_k": 2048},
    "causal": {"T_q": 1100, "T_k": 1100, "causal": True},
    # Many heads: with two rows, the rule would compare the luck of two roundings of lse.
    "one_query": {"T_q": 1, "T_k": 8192, "H": 16},
    "large_scores": {"T_q": 300, "T_k": 1024, "spread": 3.0},  # scores of +-70: one key takes nearly all
    "huge_scores": {"T_q": 200, "T_k": 300, "spread": 12.0},
    "wide": {"T_q": 257, "T_k": 300, "D": 256},
}


@functools.cache
def long_problem(name: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor, bool, list[list[Tensor]]]:
    """Inputs, probe, causal; output and gradients of torch's SDPA in float64 and in `dtype`."""
    case = dict(LONG[name])
    causal, spread, heads = case.pop("causal", False), case.pop("spread", 1.0), case.pop("H", 2)
    tensors = problem(1, heads, **{"D": 64, **case}, dtype=dtype, spread=spread)
    g = torch.Generator().manual_seed(2)
    probe = torch.randn(tensors["query"].shape, generator=g, dtype=torch.float64).to(dtype)
    results = []
    for kind in (torch.float64, dtype):
        x = leaves(tensors, kind)
        output = F.scaled_dot_product_attention(*x.values(), is_causal=causal)
        results.append([output.detach(), *torch.autograd.grad(output, list(x.values()), probe.to(kind))])
    return tensors, probe, causal, results


@pytest.mark.parametrize("name", LONG)
def test_s10_error_rule_against_torch_sdpa(backend: Any, dtype: torch.dtype, name: str) -> None:
    tensors, probe, causal, (truth, plain) = long_problem(name, dtype)
    x = leaves(tensors)
    output = backend.scaled_dot_product_attention(*x.values(), is_causal=causal)
    found = [output, *torch.autograd.grad(output, list(x.values()), probe)]
    # float64 has no wider truth: allow what rounding the scores themselves does to it
    query, key = tensors["query"].double(), tensors["key"].double()
    scores = (query @ key.mT).abs().max().item() / key.shape[-1] ** 0.5
    slack = 4 * torch.finfo(dtype).eps * scores if dtype == torch.float64 else 0.0
    for label, a, t, p in zip(("output", "grad_query", "grad_key", "grad_value"), found, truth, plain):
        assert a.dtype == dtype
        assert_close_to_truth(a, t, p, label, tight=dtype != torch.float64, slack=slack)


@pytest.mark.parametrize("options", [{}, {"causal": "bottom_right"}, {"bias": True}], ids=str)
@pytest.mark.parametrize("tokens", [8, 64, 100, 300])
@pytest.mark.parametrize("spread", [1e5, 1e8, 1e12])
def test_s10_scores_beyond_any_exponent(backend: Any, spread: float, tokens: int, options: dict[str, Any]) -> None:
    """Of scores from 1e10 to 1e24 one takes all the weight; rounding must neither lose it nor make it infinite."""
    g = torch.Generator().manual_seed(tokens)
    query, key, value, probe = (torch.randn(1, 2, tokens, 16, generator=g) for _ in range(4))
    options = dict(options)
    if "bias" in options:
        options["bias"] = spread * torch.randn(tokens, tokens, generator=g)
    inputs = {"query": (query * spread).requires_grad_(), "key": (key * spread).requires_grad_(), "value": value}
    inputs["value"].requires_grad_()
    result = backend.attention(**inputs, **options, return_lse=True, return_weights=True)
    found = [result.output, result.weights, *torch.autograd.grad(result.output, list(inputs.values()), probe)]
    doubles = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    exact = {name: x.double() if isinstance(x, Tensor) else x for name, x in options.items()}
    want = reference.attention(**doubles, **exact, return_lse=True, return_weights=True)
    grads = torch.autograd.grad(want.output, list(doubles.values()), probe.double())
    for label, a, t in zip(("output", "weights", "dq", "dk", "dv"), found, [want.output, want.weights, *grads]):
        assert a.isfinite().all(), label
        if label not in ("dq", "dk"):  # where one weight is 1 these are rounding times `spread`
            assert error(a, t) <= 2e-6, label
    plain = backend.attention(query * spread, key * spread, value, **options)
    assert error(plain, want.output) <= 2e-6
    loss = backend.attention(**inputs, **options)
    assert error(torch.autograd.grad(loss, inputs["value"], probe)[0], grads[2]) <= 2e-6


@pytest.mark.parametrize("spread", [1.0, 6.0, 40.0])
@pytest.mark.parametrize("T_q", [1, 7, 64])
def test_s10_error_rule_with_everything(backend: Any, dtype: torch.dtype, T_q: int, spread: float) -> None:
    """lse, weights, bias, sink and soft cap too; scores up to several thousands."""
    # The largest error of a few rows whose scores are in the thousands is luck; of a thousand rows it is not.
    heads = 2 if spread < 40 else 1024 // T_q
    inputs = problem(1, heads, T_q, 150, 32, dtype=dtype, spread=spread)
    inputs["bias"] = torch.randn(heads, T_q, 150).to(dtype)
    inputs["sink"] = torch.randn(heads).to(real(dtype))
    # A score in the thousands is itself known to half an ulp only; that much may be seen in what comes of it.
    scores = (inputs["query"].double() @ inputs["key"].double().mT).abs().max().item() / 32**0.5
    slack = 0.5 * torch.finfo(real(dtype)).eps * scores if spread == 40 else 0.0
    check_attention(backend.attention, inputs, slack=slack, causal="bottom_right")
    check_attention(backend.attention, inputs, slack=slack, softcap=20.0)


@pytest.mark.bf16
def test_s10_scores_beyond_the_half_range(backend: Any) -> None:
    """float16 products overflow 65504 and bfloat16 inputs reach 1e18: scores live in float32."""
    inputs = problem(1, 2, 40, 70, 64, dtype=torch.float16, spread=100.0)
    assert (inputs["query"].double() @ inputs["key"].double().mT).abs().max() > 65504
    check_attention(backend.attention, inputs, score="dot")
    tiny = problem(1, 2, 40, 70, 8, dtype=torch.float16, spread=2e-7)  # subnormal in float16
    assert (tiny["query"] != 0).any()
    check_attention(backend.attention, tiny, score="dot", scale=1e12)
    wide = problem(1, 2, 40, 70, 8, dtype=torch.bfloat16, spread=1e18)
    run = run_attention(backend.attention, wide, scale=1e-36)
    want = oracle(*(x.double() for x in wide.values()), scale=1e-36)
    assert error(run.output, want.output) < 0.02


def test_s10_scores_of_a_hundred_thousand(backend: Any, dtype: torch.dtype) -> None:
    """Rows whose scores are all near +-1e5: only differences count, no overflow to inf or NaN."""
    for sign in (1.0, -1.0):
        inputs = problem(1, 1, 20, 90, 16, dtype=dtype)
        inputs["bias"] = torch.full((20, 90), sign * 60000.0).to(dtype)
        run = run_attention(backend.attention, inputs, return_lse=True, return_weights=True)
        assert run.lse is not None and run.weights is not None
        plain = run_attention(backend.attention, {n: x for n, x in inputs.items() if n != "bias"})
        atol = {8: 1e-9, 4: 3e-2, 2: 5e-2}[run.output.element_size()]  # float32 keeps 1/256 beside 60000
        torch.testing.assert_close(run.output, plain.output, rtol=0, atol=atol)
        assert (run.lse - sign * 60000).abs().max() < 300


@pytest.mark.bf16
def test_s10_results_are_rounded_once(backend: Any) -> None:
    """Half inputs give the float32 result of the same numbers, rounded: within one ulp of the output dtype.

    Where bfloat16 is multiplied as such, the weights are rounded too, by half an ulp each.
    """
    for dtype in HALVES:
        inputs = problem(2, 2, 30, 100, 32, dtype=dtype)
        have = backend.attention(*inputs.values())
        wide = backend.attention(*(x.float() for x in inputs.values()))
        limit = torch.finfo(dtype).eps * wide.abs().clamp_min(1e-3)
        if dtype == torch.bfloat16 and backend.isa == "avx512_bf16":
            query, key, value = (x.float() for x in inputs.values())
            limit += 0.5 * torch.finfo(dtype).eps * backend.attention(query, key, value.abs())
        assert ((have.float() - wide).abs() <= limit).all()


@pytest.mark.parametrize("score", ["scaled_dot", "dot", "cosine", "l2"])
@pytest.mark.parametrize("T_q", [1, 5])
def test_s10_gradcheck(backend: Any, score: str, T_q: int) -> None:
    x = leaves({**problem(1, 2, T_q, 6, 3, 2, H_kv=1, dtype=torch.float64), "bias": torch.randn(2, 1, 6).double()})
    x["sink"] = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def function(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, sink: Tensor) -> tuple[Tensor, ...]:
        result = backend.attention(
            query, key, value, score=score, bias=bias, sink=sink, causal="bottom_right", softcap=3.0, return_lse=True,
            return_weights=True,
        )  # fmt: skip
        return tuple(result)

    assert torch.autograd.gradcheck(function, tuple(x.values()))
    assert torch.autograd.gradgradcheck(function, tuple(x.values()), atol=1e-4, fast_mode=True)


# ------------------------------------------------------------------------------------------------------ line 11: errors

x4 = torch.randn(2, 4, 5, 8)
WRONG: list[tuple[str, type[Exception], str, dict[str, Any]]] = [
    ("mixed_dtype", TypeError, "key", {"key": x4.double()}),
    ("integer_query", TypeError, "query", {"query": x4.long(), "key": x4.long(), "value": x4.long()}),
    ("complex", TypeError, "query", {"query": x4 + 0j, "key": x4 + 0j, "value": x4 + 0j}),
    ("mixed_device", (ValueError, TypeError), "key", {"key": x4.to("meta")}),  # type: ignore[list-item]
    ("sparse", TypeError, "value", {"value": x4.to_sparse()}),
    ("not_a_tensor", TypeError, "value", {"value": [1.0]}),
    ("one_dimension", ValueError, "query", {"query": torch.randn(8)}),
    ("head_size", ValueError, "key", {"key": torch.randn(2, 4, 5, 9)}),
    ("tokens", ValueError, "value", {"value": torch.randn(2, 4, 6, 8)}),
    ("head_groups", ValueError, "key", {"key": torch.randn(2, 3, 5, 8), "value": torch.randn(2, 3, 5, 8)}),
    ("batch", ValueError, "key", {"key": torch.randn(3, 4, 5, 8), "value": torch.randn(3, 4, 5, 8)}),
    ("integer_mask", TypeError, "mask", {"mask": torch.ones(5, 5, dtype=torch.int64)}),
    ("mask_shape", ValueError, "mask", {"mask": torch.ones(5, 6, dtype=torch.bool)}),
    ("bias_shape", ValueError, "bias", {"bias": torch.ones(4, 5)}),
    ("bool_bias", TypeError, "bias", {"bias": torch.ones(5, 5, dtype=torch.bool)}),
    ("key_lengths_large", ValueError, "key_lengths", {"key_lengths": torch.tensor([5, 6])}),
    ("key_lengths_negative", ValueError, "key_lengths", {"key_lengths": torch.tensor([5, -1])}),
    ("query_lengths_large", ValueError, "query_lengths", {"query_lengths": torch.tensor([2**62, 1])}),
    ("float_lengths", TypeError, "key_lengths", {"key_lengths": torch.tensor([5.0, 1.0])}),
    ("lengths_shape", ValueError, "key_lengths", {"key_lengths": torch.tensor([5, 5, 5])}),
    ("negative_window", ValueError, "window", {"window": (-2, 0)}),
    ("window_kind", TypeError, "window", {"window": 3}),
    ("causal_name", ValueError, "causal", {"causal": "left"}),
    ("score_name", ValueError, "score", {"score": "additive"}),
    ("normalizer_name", ValueError, "normalizer", {"normalizer": "softmin"}),
    ("prior_kind", TypeError, "prior", {"prior": "gaussian"}),
    ("prior_center", ValueError, "prior", {"prior": ("gaussian", torch.randn(2, 4, 6), 1.0)}),
    ("prior_sigma", ValueError, "prior", {"prior": ("gaussian", torch.randn(2, 4, 5), -1.0)}),
    ("dropout_large", ValueError, "dropout_p", {"dropout_p": 1.5}),
    ("dropout_nan", ValueError, "dropout_p", {"dropout_p": math.nan}),
    ("softcap_negative", ValueError, "softcap", {"softcap": -1.0}),
    ("scale_nan", ValueError, "scale", {"scale": math.nan}),
    ("sink_shape", ValueError, "sink", {"sink": torch.ones(3)}),
    ("slopes_gradient", ValueError, "alibi_slopes", {"alibi_slopes": torch.ones(4, requires_grad=True)}),
    ("weights_name", ValueError, "return_weights", {"return_weights": "half"}),
]


@pytest.mark.parametrize("name,kind,argument,wrong", WRONG, ids=[w[0] for w in WRONG])
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_s11_one_clear_error(
    name: str, kind: type[Exception], argument: str, wrong: dict[str, Any], grad: bool
) -> None:
    """The first word of the message is the argument; something of what came is in it."""
    import attnfast

    arguments = {"query": x4, "key": x4, "value": x4, **wrong}
    if grad and arguments["query"].is_floating_point():
        arguments["query"] = arguments["query"].detach().requires_grad_()
    with pytest.raises(kind, match=rf"\b{argument}\b") as caught:
        attnfast.attention(**arguments)
    message = str(caught.value)
    # "the leading dimensions of query, key ..." may name several tensors, the first named is the one at fault
    assert message.startswith(argument) or (argument in ("query", "key") and argument in message[:40]), message
    assert len(message) > len(argument) + 15, "the error explains nothing"


@pytest.mark.parametrize(
    "cu_q,cu_k",
    [
        ([0, 3, 9], [0, 3, 8]),  # beyond the total
        ([0, 5, 3], [0, 3, 8]),  # decreasing
        ([1, 3, 8], [0, 3, 8]),  # not from 0
        ([0, 8], [0, 3, 8]),  # one sequence against two
        ([0, 3, 7], [0, 3, 8]),  # tokens that belong to nobody
        ([0, 2**62, 8], [0, 3, 8]),
        ([0, -(2**62), 8], [0, 3, 8]),
        ([], [0, 8]),
    ],
)
def test_s11_packed_offsets_are_validated(isa: str, cu_q: list[int], cu_k: list[int]) -> None:
    import attnfast

    x = torch.randn(8, 2, 4)
    for a, b in ((cu_q, cu_k), (cu_k, cu_q)):
        with pytest.raises(ValueError, match="cu_seqlens"):
            attnfast.varlen_attention(
                x, x, x, torch.tensor(a, dtype=torch.int64), torch.tensor(b, dtype=torch.int64), 8, 8
            )


# ------------------------------------------------------------------------------------------------- line 13: determinism

DETERMINISM: dict[str, dict[str, Any]] = {
    "plain": {"shape": (2, 3, 200, 300, 32)},
    "one_head": {"shape": (1, 1, 700, 700, 64), "causal": "top_left"},
    "groups": {"shape": (1, 8, 130, 257, 16), "H_kv": 2, "causal": "bottom_right"},
    "bias_of_heads": {"shape": (3, 2, 150, 200, 16), "bias": (2, 150, 200)},
    "bias_of_keys": {"shape": (3, 4, 150, 200, 16), "bias": (200,)},
    "bias_scalar": {"shape": (3, 4, 150, 200, 16), "bias": (1, 1)},
    "bias_of_rows": {"shape": (3, 4, 150, 200, 16), "bias": (3, 1, 150, 1)},
    "sink": {"shape": (2, 4, 150, 200, 16), "sink": True, "softcap": 3.0},
    "decode": {"shape": (1, 2, 1, 9000, 32)},
    "decode_groups": {"shape": (1, 8, 1, 5000, 32), "H_kv": 1, "bias": (8, 1, 5000)},
    "few_queries": {"shape": (1, 1, 5, 6000, 32), "window": (3000, -1), "causal": "bottom_right"},
    "dropout": {"shape": (2, 2, 200, 300, 16), "dropout_p": 0.3},
}


def bits(x: Tensor) -> Tensor:
    return x.detach().contiguous().view({8: torch.int64, 4: torch.int32, 2: torch.int16}[x.element_size()])


@pytest.mark.parametrize("weights", [False, "column_sum"])
@pytest.mark.parametrize("name", DETERMINISM)
def test_s13_bitwise_over_threads_and_runs(isa: str, dtype: torch.dtype, name: str, weights: bool | str) -> None:
    import attnfast

    torch.use_deterministic_algorithms(True)
    case = dict(DETERMINISM[name])
    B, H, T_q, T_k, D = case.pop("shape")
    inputs: dict[str, Any] = problem(B, H, T_q, T_k, D, H_kv=case.pop("H_kv", None), dtype=dtype)
    if "bias" in case:
        inputs["bias"] = torch.randn(case.pop("bias")).to(dtype)
    if case.pop("sink", False):
        inputs["sink"] = torch.randn(H).to(real(dtype))
    probes = {"output": torch.randn(B, H, T_q, D, dtype=torch.float64), "lse": torch.randn(B, H, T_q)}
    if weights:
        probes["weights"] = torch.randn(B, H, T_k)
    first: dict[str, Tensor] = {}
    for threads in (1, 2, 4, 3, 1):
        torch.set_num_threads(threads)
        torch.manual_seed(3)
        run = run_attention(attnfast.attention, inputs, probes=probes, return_lse=True, return_weights=weights, **case)
        results = {"output": run.output, "lse": run.lse, **{f"grad_{n}": g for n, g in run.grads.items()}}
        if weights:
            results["weights"] = run.weights
        for label, x in results.items():
            assert x is not None
            assert torch.equal(bits(x), first.setdefault(label, bits(x))), f"{label} differs with {threads} threads"


def test_s13_varlen_bitwise(isa: str, dtype: torch.dtype) -> None:
    import attnfast

    torch.use_deterministic_algorithms(True)
    n = [1, 300, 0, 70, 5, 129]
    cu = torch.tensor([0, *torch.tensor(n).cumsum(0).tolist()])
    base = [torch.randn(sum(n), h, 16).to(dtype) for h in (4, 2, 2)]
    probe = torch.randn(sum(n), 4, 16).to(dtype)
    first: list[Tensor] = []
    for threads in (1, 2, 4, 1):
        torch.set_num_threads(threads)
        x = [t.clone().requires_grad_() for t in base]
        output = attnfast.varlen_attention(*x, cu, cu, 300, 300, causal="top_left")
        found = [bits(t) for t in (output, *torch.autograd.grad(output, x, probe))]
        first = first or found
        assert all(torch.equal(a, b) for a, b in zip(found, first))
