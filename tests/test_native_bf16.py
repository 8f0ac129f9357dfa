"""bfloat16 products with the processor's own instruction (ISA avx512_bf16) beside those widened to float32 (avx512)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import LAYOUTS, check_attention, problem, run_attention
from torch import Tensor

import attnfast

pytestmark = pytest.mark.skipif(
    "avx512_bf16" not in attnfast.available_isas(), reason="needs a processor with AVX512_BF16"
)


@pytest.fixture(autouse=True)
def native() -> Iterator[None]:
    before = attnfast.set_isa("avx512_bf16")
    yield
    attnfast.set_isa(before)


def results(tensors: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    """Output, lse, weights and the gradients of a fixed probe."""
    B, H, T_q, _ = tensors["query"].shape
    T_k, D_v = tensors["value"].shape[-2:]
    g = torch.Generator().manual_seed(1)
    shapes = {"output": (B, H, T_q, D_v), "lse": (B, H, T_q), "weights": (B, H, T_q, T_k)}
    probes = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    run = run_attention(attnfast.attention, tensors, probes=probes, return_lse=True, return_weights=True, **options)
    assert run.lse is not None and run.weights is not None
    grads = {f"grad_{name}": x for name, x in run.grads.items()}
    return {"output": run.output, "lse": run.lse, "weights": run.weights, **grads}


def on_isa(isa: str, tensors: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    before = attnfast.set_isa(isa)
    try:
        return results(tensors, **options)
    finally:
        attnfast.set_isa(before)


def test_avx512_widens_and_avx512_bf16_does_not() -> None:
    tensors = problem(2, 2, 70, 130, 64, dtype=torch.bfloat16)
    wide = attnfast.attention(*(x.float() for x in tensors.values())).bfloat16()
    attnfast.set_isa("avx512")
    assert torch.equal(attnfast.attention(*tensors.values()), wide)
    attnfast.set_isa("avx512_bf16")
    assert not torch.equal(attnfast.attention(*tensors.values()), wide)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_other_dtypes_have_the_bits_of_avx512(dtype: torch.dtype) -> None:
    tensors = problem(2, 2, 70, 130, 24, dtype=dtype)
    lower = on_isa("avx512", tensors, causal="top_left")
    for name, x in results(tensors, causal="top_left").items():
        assert torch.equal(x, lower[name]), name


@pytest.mark.parametrize(("D", "D_v"), [(2, 2), (6, 6), (64, 64), (66, 64), (128, 130), (256, 256), (1, 3), (33, 7)])
@pytest.mark.parametrize(("T_q", "T_k"), [(65, 129), (7, 63), (3, 64), (1, 33)])
def test_error_rule(D: int, D_v: int, T_q: int, T_k: int) -> None:
    tensors = problem(1, 4, T_q, T_k, D, D_v, H_kv=2, dtype=torch.bfloat16)
    check_attention(attnfast.attention, tensors)
    check_attention(attnfast.attention, tensors, causal="bottom_right", window=(40, -1))


@pytest.mark.parametrize("D", [64, 160, 200, 256])
def test_scores_are_exact(D: int) -> None:
    """Scores lose nothing to bfloat16: lse agrees with that of float32 products to float32 precision."""
    tensors = problem(1, 2, 100, 150, D, dtype=torch.bfloat16, spread=2.0)
    lower, native = on_isa("avx512", tensors)["lse"], results(tensors)["lse"]
    assert not torch.equal(native, lower) or D <= 1  # another order of additions, so the instruction was used
    torch.testing.assert_close(native, lower, rtol=1e-6, atol=1e-5)


def test_weights_are_those_of_the_forward() -> None:
    """Scores formed again have the forward's bits: huge scores would otherwise not cancel against lse."""
    tensors = problem(1, 2, 90, 150, 66, dtype=torch.bfloat16, spread=20.0)
    found = results(tensors, causal="top_left")
    truth = results({name: x.double() for name, x in tensors.items()}, causal="top_left")
    assert (found["weights"].double() - truth["weights"]).abs().max() < 2**-8
    assert (found["output"].double() - truth["output"]).abs().max() < 2**-6 * truth["output"].abs().max()


@pytest.mark.parametrize("layout", ["token_major", "last_dim_not_unit", "last_stride_3", "storage_offset"])
@pytest.mark.parametrize("D", [64, 7])
def test_strides_change_no_bit(layout: str, D: int) -> None:
    tensors = problem(2, 3, 70, 131, D, dtype=torch.bfloat16)
    plain = results(tensors, causal="bottom_right")
    for name, x in results({n: LAYOUTS[layout](t) for n, t in tensors.items()}, causal="bottom_right").items():
        assert torch.equal(x, plain[name]), name


def masked(how: str, B: int, T_q: int, T_k: int) -> tuple[dict[str, Any], int]:
    """Options that hide the keys from a number on, and that number."""
    if how == "mask":
        return {"mask": torch.arange(T_k).expand(B, 1, 1, T_k) < T_k - 37}, T_k - 37
    if how == "bias":
        bias = torch.zeros(T_q, T_k, dtype=torch.bfloat16)
        bias[:, T_k - 20 :] = -math.inf
        return {"bias": bias}, T_k - 20
    if how == "causal":
        return {"causal": "top_left"}, T_q
    return {"key_lengths": torch.full((B,), T_k - 3)}, T_k - 3


@pytest.mark.parametrize("how", ["mask", "bias", "causal", "lengths"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("T_k", [100, 131])
def test_what_is_masked_may_hold_anything(how: str, bad: float, T_k: int) -> None:
    tensors = problem(2, 2, 75, T_k, 34, dtype=torch.bfloat16)
    options, hidden = masked(how, 2, 75, T_k)
    bias = {name: options.pop(name) for name in ("mask", "bias") if name in options}
    clean = results({**tensors, **bias}, **options)
    for name in ("key", "value"):
        tensors[name] = tensors[name].clone()
        tensors[name][:, :, hidden:] = bad
    for name, x in results({**tensors, **bias}, **options).items():
        assert torch.equal(x, clean[name]), name


def test_a_masked_query_may_hold_anything() -> None:
    tensors = problem(2, 2, 75, 100, 34, dtype=torch.bfloat16)
    lengths = torch.tensor([70, 33])
    clean = results(tensors, query_lengths=lengths)
    tensors["query"] = tensors["query"].clone()
    tensors["query"][0, :, 70:] = math.nan
    tensors["query"][1, :, 33:] = math.inf
    for name, x in results(tensors, query_lengths=lengths).items():
        assert torch.equal(x, clean[name]), name


def test_what_is_visible_shows() -> None:
    tensors = problem(1, 1, 70, 131, 34, dtype=torch.bfloat16)
    tensors["value"][0, 0, 100, 3] = math.nan
    out = attnfast.attention(*tensors.values())
    assert out[..., 3].isnan().all() and out[..., :3].isfinite().all() and out[..., 4:].isfinite().all()
    causal = attnfast.attention(*tensors.values(), causal="bottom_right")  # row q sees keys to q + 61
    assert causal[0, 0, 39:, 3].isnan().all() and causal[0, 0, :39].isfinite().all()


def test_gradient_of_a_sum() -> None:
    """A gradient that arrives with strides 0, as sum() sends it."""
    tensors = problem(1, 2, 70, 131, 34, dtype=torch.bfloat16)
    grads = []
    for expand in (True, False):
        x = [t.clone().requires_grad_() for t in tensors.values()]
        out = attnfast.attention(*x)
        probe = torch.ones((), dtype=out.dtype).expand(out.shape)
        grads.append(torch.autograd.grad(out, x, probe if expand else probe.contiguous()))
    assert all(torch.equal(a, b) for a, b in itertools.zip_longest(*grads))


def test_explain_names_the_arithmetic() -> None:
    x = torch.zeros(1, 2, 16, 8, dtype=torch.bfloat16)
    assert "products of bfloat16, sums in float32" in attnfast.explain(attnfast.attention, x, x, x)
    assert "bfloat16 widened to float32" in attnfast.explain(attnfast.attention, x[:, :, :1], x, x)  # decoding
    attnfast.set_isa("avx512")
    assert "bfloat16 widened to float32" in attnfast.explain(attnfast.attention, x, x, x)
