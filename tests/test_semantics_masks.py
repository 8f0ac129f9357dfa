"""Contract lines 3 to 6 of semantics.md: mask polarity, composition, alignment, soft cap."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import PATHS, check_attention, dtype_id, leaves, oracle, problem, real, run_attention

INF = math.inf

# ----------------------------------------------------------------------------------------------------- line 3: polarity


def test_s03_bool_mask_true_attends(backend: Any, dtype: torch.dtype) -> None:
    inputs = problem(1, 1, 4, 4, 8, dtype=dtype)
    mask = torch.eye(4, dtype=torch.bool)
    output = backend.attention(*inputs.values(), mask=mask)
    torch.testing.assert_close(output, inputs["value"])
    output = backend.scaled_dot_product_attention(*inputs.values(), mask)
    torch.testing.assert_close(output, inputs["value"])
    torch.testing.assert_close(
        backend.scaled_dot_product_attention(*inputs.values(), ~mask),
        torch.nn.functional.scaled_dot_product_attention(*inputs.values(), ~mask),
        rtol=2e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-5,
        atol=1e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-5,
    )


def test_s03_float_mask_is_a_bias(backend: Any, dtype: torch.dtype) -> None:
    """The same numbers as `mask`, as `bias` or half in each; in the query's dtype or another."""
    inputs = problem(2, 2, 6, 70, 8, dtype=dtype)
    extra = torch.randn(2, 1, 6, 70).to(dtype)
    by_mask = check_attention(backend.attention, {**inputs, "mask": extra})
    by_bias = check_attention(backend.attention, {**inputs, "bias": extra})
    torch.testing.assert_close(by_mask.output, by_bias.output, rtol=0, atol=0)
    torch.testing.assert_close(by_mask.grads["mask"], by_bias.grads["bias"], rtol=0, atol=0)
    check_attention(backend.attention, {**inputs, "mask": extra, "bias": torch.randn(6, 70, dtype=torch.float32)})


@pytest.mark.parametrize("path", PATHS)
def test_s03_finfo_min_means_no_weight(backend: Any, dtype: torch.dtype, path: str) -> None:
    shape = PATHS[path]
    lowest = torch.finfo(dtype).min
    mask = torch.rand(shape["T_q"], shape["T_k"]) < 0.6
    mask[:, 0] = True
    inputs = problem(**shape, dtype=dtype)
    inputs["bias"] = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, lowest)
    run = check_attention(backend.attention, inputs)
    assert run.weights is not None
    assert (run.weights[..., ~mask] == 0).all() and (run.weights[..., mask] > 0).all()


@pytest.mark.parametrize("path", PATHS)
def test_s03_row_full_of_finfo_min_is_uniform(backend: Any, dtype: torch.dtype, path: str) -> None:
    """finfo.min is a finite number: alone in its row it takes nobody's weight. float16's does not drown scores."""
    shape = PATHS[path]
    lowest = torch.finfo(dtype).min
    inputs = problem(**shape, dtype=dtype)
    inputs["bias"] = torch.full((shape["T_q"], shape["T_k"]), lowest, dtype=dtype)
    if dtype != torch.float16:
        probe = torch.randn(inputs["query"].shape, dtype=torch.float64)
        x = leaves(inputs)
        result = backend.attention(**x, return_weights=True, return_lse=True)
        (grad,) = torch.autograd.grad(result.output, x["value"], probe.to(dtype))
        group = shape["H"] // grad.shape[1]
        mean = inputs["value"].float().mean(-2, keepdim=True).repeat_interleave(group, 1)
        torch.testing.assert_close(result.output.float(), mean.expand(probe.shape), rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(result.weights, torch.full_like(result.weights, 1 / shape["T_k"]))
        assert (result.lse > -INF).all()
        even = probe.to(dtype).float().sum(-2, keepdim=True).unflatten(1, (-1, group)).sum(2) / shape["T_k"]
        torch.testing.assert_close(grad.float(), even.expand(grad.shape), rtol=2e-2, atol=2e-2)
    else:
        run = run_attention(backend.attention, inputs, return_weights=True)
        assert run.weights is not None
        inputs.pop("bias")
        # the sum keeps 2^-8 of the score beside -65504 in float32
        want = oracle(*(x.double() for x in inputs.values())).weights
        torch.testing.assert_close(run.weights.double(), want, rtol=2e-2, atol=1e-4)


# -------------------------------------------------------------------------------------------------- line 4: composition

COMPOSITIONS: list[dict[str, Any]] = [
    {"causal": "top_left", "window": (3, 0)},
    {"causal": "bottom_right", "window": (5, 2), "key_lengths": True},
    {"causal": "bottom_right", "window": (-1, 0), "key_lengths": True, "query_lengths": True},
    {"window": (2, 2), "mask": True},
    {"window": (0, -1), "key_lengths": True, "bias": True},
    {"window": (0, 0)},
    {"alibi_slopes": True},
    {"alibi_slopes": "batch", "causal": "bottom_right", "query_lengths": True},
    {"alibi_slopes": "batch", "window": (7, 3)},
    {"window": (-1, 3)},
    {"causal": "top_left", "mask": True, "key_lengths": True},
    {"causal": "top_left", "mask": True, "bias": True, "key_lengths": True, "query_lengths": True, "window": (9, 4)},
    {
        "causal": "bottom_right",
        "mask": True,
        "bias": True,
        "key_lengths": True,
        "query_lengths": True,
        "window": (6, 1),
        "alibi_slopes": True,
        "sink": True,
        "softcap": 2.0,
    },
]


def composed(
    options: dict[str, Any], shape: dict[str, int], dtype: torch.dtype
) -> tuple[dict[str, Any], dict[str, Any]]:
    B, H, T_q, T_k = (shape[n] for n in ("B", "H", "T_q", "T_k"))
    g = torch.Generator().manual_seed(9)
    makers = {
        "mask": lambda: torch.rand(B, 1, T_q, T_k, generator=g) < 0.8,
        "bias": lambda: torch.randn(H, T_q, T_k, generator=g).to(dtype),
        "key_lengths": lambda: torch.randint(T_k // 2, T_k + 1, (B,), generator=g),
        "query_lengths": lambda: torch.randint((T_q + 1) // 2, T_q + 1, (B,), generator=g),
        "alibi_slopes": lambda: (0.05 + torch.rand(H, generator=g)).to(real(dtype)),
        "sink": lambda: torch.randn(H, generator=g).to(real(dtype)),
    }
    tensors = {n: makers[n]() for n, x in options.items() if x is True}
    if options.get("alibi_slopes") == "batch":
        tensors["alibi_slopes"] = (0.05 + torch.rand(B, H, generator=g)).to(real(dtype))
    return tensors, {n: x for n, x in options.items() if x is not True and x != "batch"}


@pytest.mark.parametrize("index", range(len(COMPOSITIONS)))
@pytest.mark.parametrize("path", PATHS)
def test_s04_masks_compose(backend: Any, dtype: torch.dtype, path: str, index: int) -> None:
    tensors, plain = composed(COMPOSITIONS[index], PATHS[path], dtype)
    check_attention(backend.attention, {**problem(**PATHS[path], dtype=dtype), **tensors}, **plain)


def test_s04_sdpa_mask_and_is_causal(backend: Any, dtype: torch.dtype) -> None:
    """torch refuses attn_mask together with is_causal; here they compose."""
    inputs = problem(2, 2, 20, 20, 8, dtype=dtype)
    mask = torch.rand(20, 20) < 0.7
    both = backend.scaled_dot_product_attention(*inputs.values(), mask, is_causal=True)
    merged = backend.scaled_dot_product_attention(*inputs.values(), mask & torch.ones(20, 20, dtype=torch.bool).tril())
    torch.testing.assert_close(both, merged)


# ---------------------------------------------------------------------------------------------------- line 5: alignment


@pytest.mark.parametrize("causal", ["top_left", "bottom_right"])
@pytest.mark.parametrize("T_q,T_k", [(1, 9), (9, 1), (64, 64), (65, 191), (191, 65), (100, 513), (3, 3)])
def test_s05_alignment(backend: Any, dtype: torch.dtype, causal: str, T_q: int, T_k: int) -> None:
    check_attention(backend.attention, problem(1, 2, T_q, T_k, 8, dtype=dtype), causal=causal)


@pytest.mark.parametrize("T_q,T_k", [(4, 9), (9, 4), (1, 5), (70, 100)])
def test_s05_sdpa_is_top_left(backend: Any, dtype: torch.dtype, T_q: int, T_k: int) -> None:
    inputs = problem(2, 2, T_q, T_k, 16, dtype=dtype)
    have = backend.scaled_dot_product_attention(*inputs.values(), is_causal=True)
    own = backend.attention(*inputs.values(), causal="top_left")
    torch.testing.assert_close(have, own, rtol=0, atol=0)
    theirs = torch.nn.functional.scaled_dot_product_attention(*(x.double() for x in inputs.values()), is_causal=True)
    torch.testing.assert_close(have.double(), theirs, rtol=1e-5, atol={8: 1e-12, 4: 1e-5, 2: 2e-2}[have.element_size()])


# ------------------------------------------------------------------------------------------------------ line 6: softcap


@pytest.mark.parametrize("softcap", [0.5, 2.0, 30.0])
@pytest.mark.parametrize("path", PATHS)
def test_s06_softcap_before_bias_and_masks(backend: Any, dtype: torch.dtype, path: str, softcap: float) -> None:
    """With spread scores a cap applied after the bias would squash the bias: check that this case can tell."""
    shape = PATHS[path]
    inputs = problem(**shape, dtype=dtype, spread=2.0)
    inputs["bias"] = (3 * torch.randn(shape["T_q"], shape["T_k"])).to(dtype)
    run = check_attention(backend.attention, inputs, softcap=softcap, causal="bottom_right")
    if softcap < 3:
        wide = {n: x.double() for n, x in inputs.items()}
        key = wide["key"].repeat_interleave(shape["H"] // wide["key"].shape[1], 1)
        s = wide["query"] @ key.mT / math.sqrt(shape["D"]) + wide["bias"]
        wrong = torch.softmax(softcap * torch.tanh(s / softcap), -1)[:, :, -1]
        assert run.weights is not None and (run.weights[:, :, -1].double() - wrong).abs().max() > 0.05


@pytest.mark.parametrize("shape", [(2, 2, 5, 7), (2, 2, 1, 7), (1, 2, 5, 7)])
def test_s06_softcap_and_the_gradient_of_a_bias(backend: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """A bias of its own for each sample and head: its gradient is the one after the cap, the query's the one before."""
    inputs = problem(dtype=dtype, spread=2.0)
    inputs["bias"] = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    check_attention(backend.attention, inputs, softcap=0.5)


def test_s06_softcap_zero_is_off(backend: Any, dtype: torch.dtype) -> None:
    inputs = problem(1, 2, 9, 9, 8, dtype=dtype, spread=3.0)
    torch.testing.assert_close(
        backend.attention(*inputs.values(), softcap=0.0), backend.attention(*inputs.values()), rtol=0, atol=0
    )


def test_s06_softcap_of_huge_scores(backend: Any, dtype: torch.dtype) -> None:
    """tanh saturates: every score is +-softcap, gradients of query and key vanish, nothing overflows."""
    inputs = problem(1, 1, 5, 12, 8, dtype=dtype, spread=100.0 if dtype == torch.float16 else 1e6)
    run = check_attention(backend.attention, inputs, softcap=5.0, scale=1.0)
    assert all(g.isfinite().all() for g in run.grads.values()), [dtype_id(dtype)]


@pytest.mark.parametrize("rows", [1, 70])
def test_any_byte_but_zero_is_true(backend: Any, rows: int) -> None:
    """A boolean view of other bytes, as foreign code makes them, holds more than 0 and 1."""
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(rows, 130, generator=g) > 0.4
    odd = torch.where(mask, torch.tensor([2, 128, 255, 1, 64], dtype=torch.uint8).repeat(26), 0).to(torch.uint8)
    query, key, value = (torch.randn(1, 2, tokens, 16, generator=g) for tokens in (rows, 130, 130))
    found = backend.attention(query, key, value, mask=odd.view(torch.bool))
    assert torch.equal(found, backend.attention(query, key, value, mask=mask))
