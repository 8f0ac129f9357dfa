"""The short way of ordinary calls: who may take it, and that it computes what the long way does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_close_to_truth, oracle
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import attnfast
from attnfast import ops

D = 8


def operands(**options: Any) -> list[Tensor]:
    return [torch.randn(2, 3, 5, D, **options) for _ in range(3)]


class Subclass(Tensor):
    pass


def replaced(at: int, change: Any) -> list[Any]:
    found: list[Any] = operands()
    found[at] = change(found[at])
    return found


ODD = {
    "no tensor": lambda x: x.numpy(),
    "None": lambda x: None,
    "subclass": lambda x: x.as_subclass(Subclass),
    "3-D": lambda x: x[0],
    "5-D": lambda x: x[None],
    "integer": lambda x: x.long(),
    "bool": lambda x: x > 0,
    "complex": lambda x: x.to(torch.complex64),
    "other dtype": lambda x: x.double(),
    "batch": lambda x: x[:1],
    "heads": lambda x: x[:, :1],
    "negative bit": lambda x: torch.complex(x, x).conj().imag,
    "sparse": lambda x: x.to_sparse(),
    "meta": lambda x: x.to("meta"),
}


@pytest.mark.parametrize("at", range(3))
@pytest.mark.parametrize("name", ODD)
def test_odd_operands_go_the_long_way(name: str, at: int) -> None:
    assert ops.ordinary_call(*replaced(at, ODD[name])) == 0


def test_shapes_that_do_not_fit_go_the_long_way() -> None:
    q, k, v = operands()
    assert ops.ordinary_call(q, k[..., :4], v) == 0
    assert ops.ordinary_call(q, k[:, :, :4], v) == 0
    assert ops.ordinary_call(q[..., :0], k[..., :0], v) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_ordinary_operands(dtype: torch.dtype) -> None:
    q, k, v = operands(dtype=dtype)
    assert ops.ordinary_call(q, k, v) == D
    assert ops.ordinary_call(q[:, :, :2], k, v[..., :3]) == D
    assert ops.ordinary_call(q.mT.contiguous().mT, k, v) == D
    assert ops.ordinary_call(torch.nn.Parameter(q, requires_grad=False), k, v) == D


def test_a_wanted_gradient_is_told_by_the_sign() -> None:
    for at in range(3):
        q, k, v = replaced(at, lambda x: x.requires_grad_())
        assert ops.ordinary_call(q, k, v) == -D
        with torch.no_grad():
            assert ops.ordinary_call(q, k, v) == D


MODES = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "fake": FakeTensorMode,
    "flops": lambda: FlopCounterMode(display=False),
    "forward": forward_ad.dual_level,
}


@pytest.mark.parametrize("name", MODES)
def test_nothing_may_stand_between(name: str) -> None:
    q, k, v = operands()
    with MODES[name]():
        assert ops.ordinary_call(q, k, v) == 0
    assert ops.ordinary_call(q, k, v) == D


def test_functorch_transforms_take_the_long_way() -> None:
    q, k, v = operands()
    seen = []

    def look(x: Tensor) -> Tensor:
        seen.append(ops.ordinary_call(x, k, v))
        seen.append(ops.ordinary_call(q, k, v))  # no operand of the transform, but it is active
        return x.sum()

    torch.func.vmap(look)(q[None])
    torch.func.grad(look)(q)
    assert seen == [0, 0, 0, 0]


def test_binary_says_how_it_is_called() -> None:
    with pytest.raises(TypeError, match="ordinary_call takes 3 positional arguments, got 2"):
        ops.ordinary_call(*operands()[:2])


# Up to ops.WHOLE_ROW_KEYS keys a recorded call saves its operands only, and the backward forms whole rows.
@pytest.mark.parametrize("causal", [None, "top_left", "bottom_right"])
@pytest.mark.parametrize(("T_q", "T_k"), [(1, 1), (5, 7), (1, 64), (70, 64), (130, 63), (3, 65)])
def test_whole_rows(T_q: int, T_k: int, causal: str | None, dtype: torch.dtype, isa: str) -> None:
    shapes = ((2, 3, T_q, 16), (2, 3, T_k, 16), (2, 3, T_k, 24))
    given = [torch.randn(shape, dtype=dtype) for shape in shapes]
    grad_out = torch.randn(2, 3, T_q, 24, dtype=dtype)

    def run(function: Any, precision: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.to(precision).requires_grad_() for x in given]
        out = function(*leaves, causal=causal)
        return (out, *torch.autograd.grad(out, leaves, grad_out.to(precision)))

    found = run(attnfast.attention, dtype)
    truth, plain = (run(lambda *x, **o: oracle(*x, **o).output, precision) for precision in (torch.float64, dtype))
    for name, x, want, theirs in zip(("out", "query", "key", "value"), found, truth, plain, strict=True):
        assert_close_to_truth(x, want, theirs, name)


@pytest.mark.parametrize(("T_k", "saved"), [(ops.WHOLE_ROW_KEYS, 3), (ops.WHOLE_ROW_KEYS + 1, 5)])
def test_whole_rows_save_the_operands_only(T_k: int, saved: int) -> None:
    q = torch.randn(1, 1, 4, D, requires_grad=True)
    k = torch.randn(1, 1, T_k, D)
    assert len(attnfast.attention(q, k, k).grad_fn.saved_tensors) == saved


@pytest.mark.parametrize("at", [1, 4])
def test_whole_rows_with_hidden_nan(at: int) -> None:
    """A key that causality hides from a row may hold anything; the rows that see it are lost, and no other."""
    q, k, v = (x.requires_grad_() for x in operands())
    with torch.no_grad():
        k[:, :, at] = v[:, :, at] = float("nan")
    out = attnfast.attention(q, k, v, causal="top_left")
    (grad_query,) = torch.autograd.grad(out.sum(), q)
    for x in (out, grad_query):
        assert x[:, :, :at].isfinite().all() and x[:, :, at:].isnan().all()


def test_remembered_options_know_their_scale() -> None:
    q, k, v = operands()
    ours, theirs = attnfast.scaled_dot_product_attention, torch.nn.functional.scaled_dot_product_attention
    for scale in (None, 0.1, None, 2.0, 0.1):
        for causal in (False, True):
            torch.testing.assert_close(
                ours(q, k, v, is_causal=causal, scale=scale), theirs(q, k, v, is_causal=causal, scale=scale)
            )


def test_whole_rows_second_derivative() -> None:
    q, k, v = (x.requires_grad_() for x in operands(dtype=torch.float64))
    assert torch.autograd.gradgradcheck(lambda *x: attnfast.attention(*x, causal="top_left"), (q, k, v))
