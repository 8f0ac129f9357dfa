"""hypothesis: random shapes, strides, masks, dtypes and options against the float64 oracle, forward and gradients."""

from __future__ import annotations

from typing import Any

import torch
from helpers import HALVES, LAYOUTS, check_attention, leaves, oracle, problem, real
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

# derandomize: the same examples on every machine and every run; a failure found by hand goes in as an @example.
COMMON = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "print_blob": True,
    "suppress_health_check": list(HealthCheck),
    "phases": (Phase.explicit, Phase.generate, Phase.shrink),
}

tokens = st.one_of(st.integers(0, 9), st.sampled_from([15, 16, 17, 31, 33, 63, 64, 65, 66, 100, 127, 129, 150]))
features = st.one_of(st.integers(0, 9), st.sampled_from([15, 16, 17, 32, 33, 64, 65, 80]))


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """A description of one call; tensors are made from it (and its seed) by `build`."""
    kv_heads = draw(st.integers(1, 2))
    return {
        "seed": draw(st.integers(0, 2**16)),
        "dtype": draw(st.sampled_from([torch.float64, torch.float32, torch.float32, torch.bfloat16, torch.float16])),
        "B": draw(st.integers(0, 3)),
        "H": kv_heads * draw(st.integers(1, 3)),
        "H_kv": kv_heads,
        "T_q": draw(st.one_of(tokens, st.just(1))),
        "T_k": draw(tokens),
        "D": draw(features),
        "D_v": draw(features),
        "layouts": [draw(st.sampled_from(sorted(LAYOUTS))) for _ in range(3)],
        "spread": draw(st.sampled_from([0.0, 0.3, 1.0, 1.0, 3.0])),
        "mask": draw(st.sampled_from([None, None, "bool", "float"])),
        "mask_dims": draw(st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans())),
        "bias": draw(st.booleans()),
        "bias_dims": draw(st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans())),
        "bias_layout": draw(st.sampled_from(sorted(LAYOUTS))),
        "causal": draw(st.sampled_from([None, None, "top_left", "bottom_right"])),
        "window": draw(st.one_of(st.none(), st.tuples(st.integers(-1, 40), st.integers(-1, 40)))),
        "query_lengths": draw(st.booleans()),
        "key_lengths": draw(st.booleans()),
        "alibi": draw(st.sampled_from([None, None, "heads", "batch"])),
        "sink": draw(st.booleans()),
        "softcap": draw(st.sampled_from([0.0, 0.0, 0.7, 5.0])),
        "scale": draw(st.sampled_from([None, None, 0.0, -0.8, 1.3])),
    }


def build(call: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors and plain options of a description."""
    sizes = {n: call[n] for n in ("B", "H", "H_kv", "T_q", "T_k", "D", "D_v")}
    B, H, T_q, T_k, dtype = (call[n] for n in ("B", "H", "T_q", "T_k", "dtype"))
    tensors: dict[str, Any] = problem(**sizes, dtype=dtype, seed=call["seed"], spread=call["spread"])
    for name, layout in zip(list(tensors), call["layouts"]):
        tensors[name] = LAYOUTS[layout](tensors[name])
    g = torch.Generator().manual_seed(call["seed"] + 1)

    def shape(keep: tuple[bool, ...]) -> list[int]:
        return [n if kept else 1 for n, kept in zip((B, H, T_q, T_k), keep)]

    if call["mask"] == "bool":
        tensors["mask"] = torch.rand(shape(call["mask_dims"]), generator=g) < 0.7
    elif call["mask"] == "float":
        mask = torch.randn(shape(call["mask_dims"]), generator=g)
        tensors["mask"] = mask.masked_fill(torch.rand(mask.shape, generator=g) < 0.3, -torch.inf).to(dtype)
    if call["bias"]:
        tensors["bias"] = LAYOUTS[call["bias_layout"]](torch.randn(shape(call["bias_dims"]), generator=g).to(dtype))
    if call["query_lengths"]:
        tensors["query_lengths"] = torch.randint(0, T_q + 1, (B,), generator=g)
    if call["key_lengths"]:
        tensors["key_lengths"] = torch.randint(0, T_k + 1, (B,), generator=g)
    if call["alibi"] is not None:
        slopes = torch.rand((H,) if call["alibi"] == "heads" else (B, H), generator=g)
        tensors["alibi_slopes"] = slopes.to(real(dtype))
    if call["sink"]:
        tensors["sink"] = torch.randn(H, generator=g).to(real(dtype))
    return tensors, {n: call[n] for n in ("causal", "window", "softcap", "scale")}


def check(attention: Any, call: dict[str, Any]) -> None:
    tensors, options = build(call)
    check_attention(attention, tensors, **options)


SIMPLE: dict[str, Any] = {
    "seed": 0, "dtype": torch.float32, "B": 1, "H": 2, "H_kv": 1, "T_q": 65, "T_k": 0, "D": 8, "D_v": 5,
    "layouts": ["negative_bit", "last_stride_3", "stride0_all"], "spread": 1.0, "mask": None,
    "mask_dims": (True, True, True, True), "bias": False, "bias_dims": (True, True, True, True),
    "bias_layout": "contiguous", "causal": "bottom_right", "window": (0, 0), "query_lengths": True, "key_lengths": True,
    "alibi": "batch", "sink": True, "softcap": 0.7, "scale": None,
}  # fmt: skip


def test_random_calls(backend: Any) -> None:
    @settings(max_examples=250, **COMMON)
    @given(calls())
    @example(SIMPLE)
    @example({**SIMPLE, "T_k": 65, "D": 0, "dtype": torch.float16, "scale": -0.8})
    @example({**SIMPLE, "T_k": 129, "T_q": 1, "bias": True, "bias_dims": (False, True, False, True)})
    def run(call: dict[str, Any]) -> None:
        check(backend.attention, call)

    run()


@st.composite
def packed_calls(draw: st.DrawFn) -> dict[str, Any]:
    n = draw(st.integers(0, 5))
    length = st.one_of(st.integers(0, 6), st.sampled_from([1, 16, 63, 64, 65, 90]))
    kv_heads = draw(st.integers(1, 2))
    return {
        "seed": draw(st.integers(0, 2**16)),
        "dtype": draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16])),
        "n_q": [draw(length) for _ in range(n)],
        "n_k": [draw(length) for _ in range(n)],
        "H": kv_heads * draw(st.integers(1, 3)),
        "H_kv": kv_heads,
        "D": draw(features),
        "D_v": draw(features),
        "causal": draw(st.sampled_from([None, "top_left", "bottom_right"])),
        "window": draw(st.one_of(st.none(), st.tuples(st.integers(-1, 20), st.integers(-1, 20)))),
        "softcap": draw(st.sampled_from([0.0, 2.0])),
        "sink": draw(st.booleans()),
    }


def check_packed(varlen: Any, call: dict[str, Any]) -> None:
    n_q, n_k, dtype = call["n_q"], call["n_k"], call["dtype"]
    g = torch.Generator().manual_seed(call["seed"])
    cu_q, cu_k = (torch.tensor([sum(n[:i]) for i in range(len(n) + 1)]) for n in (n_q, n_k))
    shapes = {
        "query": (sum(n_q), call["H"], call["D"]),
        "key": (sum(n_k), call["H_kv"], call["D"]),
        "value": (sum(n_k), call["H_kv"], call["D_v"]),
    }
    base: dict[str, Any] = {n: torch.randn(s, generator=g).to(dtype) for n, s in shapes.items()}
    if call["sink"]:
        base["sink"] = torch.randn(call["H"], generator=g).to(real(dtype))
    options = {n: call[n] for n in ("causal", "window", "softcap")}
    x, y = leaves(base), leaves(base, torch.float64)
    have = varlen(
        x["query"], x["key"], x["value"], cu_q, cu_k, max(n_q, default=0), max(n_k, default=0), sink=x.get("sink"),
        **options,
    )  # fmt: skip
    pieces = [y["query"].new_zeros(0, call["H"], call["D_v"])]
    for b in range(len(n_q)):
        rows, columns = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        query, key, value = (
            y[n][at].transpose(0, 1)[None] for n, at in (("query", rows), ("key", columns), ("value", columns))
        )
        pieces.append(oracle(query, key, value, sink=y.get("sink"), **options).output[0].transpose(0, 1))
    want = torch.cat(pieces)
    assert have.shape == want.shape and have.dtype == dtype
    tolerance = {torch.float64: 1e-11, torch.float32: 1e-4}.get(dtype, 4e-2)
    torch.testing.assert_close(have.double(), want, rtol=tolerance, atol=tolerance)
    probe = torch.randn(want.shape, generator=g).to(dtype)
    leaf_x, leaf_y = list(x.values()), list(y.values())
    have_grads = torch.autograd.grad(have, leaf_x, probe, allow_unused=True)
    want_grads = torch.autograd.grad(want, leaf_y, probe.double(), allow_unused=True) if want.requires_grad else []
    for leaf, a, b in zip(leaf_x, have_grads, want_grads):
        a = torch.zeros_like(leaf) if a is None else a
        b = torch.zeros(leaf.shape, dtype=torch.float64) if b is None else b
        size = max(1.0, b.abs().max().item() if b.numel() else 0.0)
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=2 * tolerance * size)


def test_random_packed_calls(backend: Any) -> None:
    @settings(max_examples=120, **COMMON)
    @given(packed_calls())
    def run(call: dict[str, Any]) -> None:
        check_packed(backend.varlen_attention, call)

    run()


def test_scores_of_random_calls(backend: Any) -> None:
    """The prepared scores, cosine and l2, with vectors of length zero among them."""

    @settings(max_examples=60, **COMMON)
    @given(calls(), st.sampled_from(["dot", "cosine", "l2"]))
    def run(call: dict[str, Any], score: str) -> None:
        call = {**call, "spread": min(call["spread"], 1.0), "layouts": ["contiguous", "token_major", "contiguous"]}
        if score == "cosine" and call["spread"] == 0.0:
            call["spread"] = 1.0  # the gradient at the zero vector is a matter of convention, tested in test_reference
        tensors, options = build(call)
        slack = 4 * torch.finfo(call["dtype"]).eps if call["dtype"] in HALVES else 0.0
        check_attention(backend.attention, tensors, score=score, slack=slack, **options)

    run()


def test_permutation_of_keys_changes_nothing(backend: Any) -> None:
    """A metamorphic property that needs no oracle: keys, values and their masks in any order."""

    @settings(max_examples=40, **COMMON)
    @given(calls())
    def run(call: dict[str, Any]) -> None:
        call = {**call, "causal": None, "window": None, "alibi": None, "key_lengths": False, "dtype": torch.float64}
        tensors, options = build(call)
        order = torch.randperm(call["T_k"], generator=torch.Generator().manual_seed(call["seed"]))
        shuffled = dict(tensors)
        for name in ("key", "value"):
            shuffled[name] = tensors[name][:, :, order]
        for name in ("mask", "bias"):
            if name in tensors and tensors[name].shape[-1] == call["T_k"]:
                shuffled[name] = tensors[name][..., order]
        torch.testing.assert_close(backend.attention(**shuffled, **options), backend.attention(**tensors, **options))

    run()
