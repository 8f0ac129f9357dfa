"""Contract lines 8 and 12 of semantics.md: scales, sizes beyond 2^31 elements."""

from __future__ import annotations

import math
import mmap
from typing import Any

import pytest
import torch
from helpers import HALVES, check_attention, leaves, oracle, problem, real
from torch import Tensor

# -------------------------------------------------------------------------------------------------------- line 8: scale


@pytest.mark.parametrize("scale", [None, 0.0, -0.7, 1.0, 1e-3, 5.0])
@pytest.mark.parametrize("score", ["dot", "scaled_dot", "cosine", "l2"])
@pytest.mark.parametrize("T_q", [1, 40])
def test_s08_scale(backend: Any, dtype: torch.dtype, T_q: int, score: str, scale: float | None) -> None:
    inputs = problem(1, 2, T_q, 70, 16, dtype=dtype)
    # cosine and l2 are prepared in Python: gradients pass through one more rounding in half precision
    slack = 2 * torch.finfo(dtype).eps if dtype in HALVES and score in ("cosine", "l2") else 0.0
    if score == "l2":  # -|q|^2 + 2 q.k - |k|^2 in the accumulation type: as torch.cdist, not as a sum of squares
        squares = sum(inputs[n].double().square().sum(-1).max().item() for n in ("query", "key"))
        slack += torch.finfo(real(dtype)).eps * squares * abs(1.0 if scale is None else scale)
    run = check_attention(backend.attention, inputs, score=score, scale=scale, slack=slack)
    if scale == 0.0:
        assert run.weights is not None
        torch.testing.assert_close(run.weights, torch.full_like(run.weights, 1 / 70))
        assert (run.grads["query"] == 0).all() or score == "l2"


def test_s08_default_scale(backend: Any, dtype: torch.dtype) -> None:
    inputs = problem(1, 2, 9, 11, 24, dtype=dtype)
    default = backend.attention(*inputs.values())
    torch.testing.assert_close(default, backend.attention(*inputs.values(), scale=1 / math.sqrt(24)))
    torch.testing.assert_close(default, backend.attention(*inputs.values(), score="dot", scale=1 / math.sqrt(24)))
    torch.testing.assert_close(default, backend.scaled_dot_product_attention(*inputs.values(), scale=1 / math.sqrt(24)))
    doubled = backend.attention(*inputs.values(), score="dot")
    torch.testing.assert_close(doubled, backend.attention(*inputs.values(), scale=1.0))


def test_s08_mirrored_scale(backend: Any, dtype: torch.dtype) -> None:
    """A negative scale is the same as negated queries."""
    inputs = problem(1, 2, 9, 70, 16, dtype=dtype)
    a = backend.attention(*inputs.values(), scale=-0.5)
    b = backend.attention(-inputs["query"], inputs["key"], inputs["value"], scale=0.5)
    torch.testing.assert_close(a, b)


# ---------------------------------------------------------------------------------------------- line 12: more than 2^31

FAR = 2**27 + 64  # elements from row to row: the 17th row starts beyond 2^31


def far_rows(x: Tensor) -> Tensor:
    """[1, 1, T, D] with FAR elements between the rows; only the pages in use are ever committed, none reserved."""
    T, D = x.shape[-2:]
    count = (T - 1) * FAR + D
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    buffer = torch.frombuffer(mmap.mmap(-1, count * x.element_size(), flags=flags), dtype=x.dtype, count=count)
    return buffer.as_strided((1, 1, T, D), (0, 0, FAR, 1)).copy_(x)


@pytest.mark.parametrize("which", ["query", "key", "value", "bias", "mask"])
@pytest.mark.parametrize("T_q", [1, 20])
def test_s12_offsets_beyond_2_31(isa: str, T_q: int, which: str) -> None:
    """Rows 2^27 elements apart: the last row lies beyond 2^31 elements (in 1- to 4-byte elements)."""
    import attnfast

    inputs = problem(1, 1, T_q, 20, 8)
    inputs["bias"] = torch.randn(1, 1, T_q, 20)
    inputs["mask"] = torch.rand(1, 1, T_q, 20) < 0.8
    if which in ("bias", "mask") or (which == "query" and T_q > 1) or which in ("key", "value"):
        inputs[which] = far_rows(inputs[which])
    if T_q > 1 or which in ("key", "value"):
        assert (inputs[which].shape[2] - 1) * inputs[which].stride(2) > 2**31
    found = leaves(inputs)
    output = attnfast.attention(found["query"], found["key"], found["value"], bias=found["bias"], mask=found["mask"])
    plain = leaves({n: x.clone(memory_format=torch.contiguous_format) for n, x in inputs.items()}, torch.float64)
    want = oracle(plain["query"], plain["key"], plain["value"], bias=plain["bias"], mask=plain["mask"]).output
    torch.testing.assert_close(output.double(), want, rtol=1e-5, atol=1e-5)
    probe = torch.randn(output.shape)
    names = [n for n in ("query", "key", "value", "bias") if n != which]  # torch would allocate a far gradient densely
    have_grads = torch.autograd.grad(output, [found[n] for n in names], probe)
    want_grads = torch.autograd.grad(want, [plain[n] for n in names], probe.double())
    for a, b in zip(have_grads, want_grads):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_s12_keys_beyond_2_31_elements() -> None:
    """One query over 2^23 + 9 keys of 256 features: two tensors of more than 2^31 elements, broadcast."""
    import attnfast

    T_k = 2**23 + 9
    key = torch.randn(1, 1, 1, 256).half().expand(1, 1, T_k, 256)
    value = torch.randn(1, 1, 1, 256).half().expand(1, 1, T_k, 256)
    assert key.numel() > 2**31
    query = torch.randn(1, 1, 1, 256).half()
    result = attnfast.attention(query, key, value, return_lse=True)
    # equal addends round the same way every time: the worst case for a sum (torch's own float32 is 12% off here)
    torch.testing.assert_close(result.output, value[:, :, :1], rtol=5e-3, atol=1e-3)
    score = (query.double() * key[:, :, :1].double()).sum(-1) / 16
    torch.testing.assert_close(result.lse.double(), score + math.log(T_k), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("T_q", [1, 20])
def test_s12_outputs_beyond_2_31(isa: str, dtype: torch.dtype, T_q: int) -> None:
    """Output, gradients and weights written to rows 2^27 elements apart, through the binding itself."""
    from attnfast import _C

    inputs = problem(1, 1, T_q, 20, 8, dtype=dtype)
    lse = torch.empty(1, 1, T_q, dtype=real(dtype))
    out, weights = far_rows(torch.zeros(1, 1, T_q, 8, dtype=dtype)), far_rows(torch.zeros(1, 1, T_q, 20, dtype=dtype))
    modifiers = (None,) * 12
    numbers = (0.3, 0.0, 0.0, 0.0, 0, -1, -1)
    _C.dot_attention_fwd(*inputs.values(), out, lse, weights, None, 1, *modifiers, *numbers)
    grads = {n: far_rows(torch.zeros_like(x)) for n, x in inputs.items()}
    grad_out = far_rows(torch.randn(1, 1, T_q, 8).to(dtype))
    _C.dot_attention_bwd(
        grad_out, *inputs.values(), out, lse, torch.empty_like(lse), None, None, 0, None, *grads.values(), None, None,
        None, None, *modifiers, *numbers, 1,
    )  # fmt: skip
    x = leaves(inputs, torch.float64)
    want = oracle(*x.values(), scale=0.3)
    wanted = torch.autograd.grad(want.output, list(x.values()), grad_out.double())
    atol = {8: 1e-12, 4: 1e-5, 2: 3e-2}[out.element_size()]
    for have, truth in zip((out, weights, *grads.values()), (want.output, want.weights, *wanted)):
        torch.testing.assert_close(have.double(), truth, rtol=atol, atol=atol)
    assert (T_q - 1) * out.stride(2) > 2**31 or T_q == 1
    assert 19 * grads["key"].stride(2) > 2**31


@pytest.mark.slow
def test_s12_mask_beyond_2_31_elements(isa: str) -> None:
    """A boolean mask of 47000 x 47000; a window keeps the work small, and the band is all that is committed."""
    import attnfast

    T = 47000
    mask = torch.zeros(T, T, dtype=torch.bool)
    assert mask.numel() > 2**31
    mask.as_strided((T,), (T + 1,)).fill_(True)  # the diagonal
    mask.as_strided((T - 2,), (T + 1,), 2 * T).fill_(True)  # two below: sees key q - 2, not q - 1
    inputs = leaves(problem(1, 1, T, T, 8))
    output = attnfast.attention(*inputs.values(), mask=mask, window=(3, 0))
    probe = torch.randn(output.shape)
    have = torch.autograd.grad(output, list(inputs.values()), probe)
    wide = leaves(problem(1, 1, T, T, 8), torch.float64)
    query, key, value = wide.values()
    near = (query * key).sum(-1) / math.sqrt(8)
    far = torch.full_like(near, -math.inf).index_copy(
        2, torch.arange(2, T), (query[:, :, 2:] * key[:, :, :-2]).sum(-1) / math.sqrt(8)
    )
    weights = torch.softmax(torch.stack([near, far]), 0)
    shifted = torch.cat([torch.zeros(1, 1, 2, 8, dtype=torch.float64), value[:, :, :-2]], 2)
    want = weights[0, ..., None] * value + weights[1, ..., None] * shifted
    torch.testing.assert_close(output.double(), want, rtol=1e-4, atol=1e-5)
    for a, b in zip(have, torch.autograd.grad(want, list(wide.values()), probe.double())):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)
