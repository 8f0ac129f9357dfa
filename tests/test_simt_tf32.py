"""tf32 in the dot core's CUDA kernels under the SIMT emulator, behind torch's own switch for it.

As in test_simt.py and test_simt_backward.py the module ``_simt`` takes the place of the CPU's kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import must_launch
from test_simt import OPTIONS, operands, options_of
from test_simt_backward import gradients, inputs_of, use
from torch import Tensor

import attnfast
from attnfast import reference

MATMUL = torch.backends.cuda.matmul
SWITCHES: dict[str, tuple[Callable[[], None], bool]] = {
    "nothing": (lambda: None, False),
    "tf32": (lambda: setattr(MATMUL, "fp32_precision", "tf32"), True),
    "ieee": (lambda: setattr(MATMUL, "fp32_precision", "ieee"), False),
    "all backends": (lambda: setattr(torch.backends, "fp32_precision", "tf32"), True),
    "allow_tf32": (lambda: setattr(MATMUL, "allow_tf32", True), True),
    "not allow_tf32": (lambda: setattr(MATMUL, "allow_tf32", False), False),
    "high": (lambda: torch.set_float32_matmul_precision("high"), True),
    "highest": (lambda: torch.set_float32_matmul_precision("highest"), False),
}


@pytest.fixture(autouse=True)
def _switch_restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # torch's own test helpers, which other tests import, forbid what a user does with its switches.
    monkeypatch.setitem(torch.backends.flags_frozen.__globals__, "__allow_nonbracketed_mutation_flag", True)
    before = torch.backends.fp32_precision, MATMUL.fp32_precision
    legacy = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(legacy)
    torch.backends.fp32_precision, MATMUL.fp32_precision = before
    assert (torch.backends.fp32_precision, MATMUL.fp32_precision) == before


def allow() -> None:
    MATMUL.fp32_precision = "tf32"


@pytest.fixture
def backend(simt: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    use(simt, monkeypatch)
    with must_launch(simt):
        yield simt


def rounded(x: Tensor) -> Tensor:
    """float32 to 11 bits, to nearest, ties away from zero; in float64."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32).double()


def uses_tensor_cores(backend: ModuleType, call: Callable[[], Any]) -> bool:
    before = backend.mma_instructions()
    call()
    return bool(backend.mma_instructions() > before)


@pytest.mark.parametrize("name", list(SWITCHES))
def test_torch_s_switch_decides_in_both_directions(backend: ModuleType, name: str) -> None:
    turn, expected = SWITCHES[name]
    turn()
    query, key, value = (x.requires_grad_() for x in operands(torch.float32, 2, 1, 20, 30, 16, 16))
    out = []
    assert uses_tensor_cores(backend, lambda: out.append(attnfast.attention(query, key, value))) == expected
    assert uses_tensor_cores(backend, lambda: out[0].backward(torch.randn_like(out[0]))) == expected
    exact = reference.attention(*(x.detach().double() for x in (query, key, value)))
    error = (out[0].detach().double() - exact).abs().max().item()
    assert (error > 1e-5) == expected and error < 2e-3


def test_it_is_read_at_each_call(backend: ModuleType) -> None:
    operand = operands(torch.float32, 1, 1, 20, 30, 16, 16)
    before = attnfast.attention(*operand)
    allow()
    assert not torch.equal(attnfast.attention(*operand), before)
    MATMUL.fp32_precision = "ieee"
    assert torch.equal(attnfast.attention(*operand), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_do_not_mind(backend: ModuleType, dtype: torch.dtype) -> None:
    query, key, value = operands(dtype, 2, 1, 20, 30, 16, 16)
    leaves = [x.requires_grad_() for x in (query, key, value)]

    def run() -> list[Tensor]:
        out = attnfast.attention(*leaves)
        return [out.detach(), *torch.autograd.grad(out.sum(), leaves)]

    before = run()
    allow()
    assert all(torch.equal(x, y) for x, y in zip(run(), before, strict=True))
    if dtype == torch.float64:
        assert not uses_tensor_cores(backend, run)


def test_the_cpu_does_not_mind() -> None:
    operand = operands(torch.float32, 2, 1, 20, 30, 16, 16)
    before = attnfast.attention(*operand)
    allow()
    assert torch.equal(attnfast.attention(*operand), before)


@pytest.mark.parametrize("size", [16, 96, 200])
@pytest.mark.parametrize("options", [{}, {"causal": "bottom_right", "softcap": 3.0}], ids=["plain", "modified"])
def test_the_error_is_that_of_rounding(backend: ModuleType, size: int, options: dict[str, Any]) -> None:
    """With rounded operands for the reference the weights' rounding is left; log-sum-exp and weights are float32's."""
    allow()
    query, key, value = operands(torch.float32, 2, 1, 37, 70, size, size)
    got = attnfast.attention(query, key, value, return_lse=True, return_weights="full", **options)
    wanted = reference.attention(
        *(rounded(x) for x in (query, key, value)), return_lse=True, return_weights="full", **options
    )
    torch.testing.assert_close(got.lse.double(), wanted.lse, rtol=2e-6, atol=1e-5)
    torch.testing.assert_close(got.weights.double(), wanted.weights, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(got.output.double(), wanted.output, rtol=0, atol=1e-3)

    check_gradients(backend, {"query": query, "key": key, "value": value}, **options)


def test_gradients_of_biases_and_sinks_see_the_same_scores(backend: ModuleType) -> None:
    """Scores near 100, whose rounding to tf32 would show: all kernels of a call round alike."""
    allow()
    query, key, value = operands(torch.float32, 2, 1, 20, 40, 16, 16)
    inputs = {"query": query * 20, "key": key, "value": value, "bias": torch.randn(20, 40), "sink": torch.randn(2)}
    found = gradients(attnfast.attention, inputs)
    wide = {name: rounded(x) if name in ("query", "key", "value") else x.double() for name, x in inputs.items()}
    exact = gradients(reference.attention, wide)
    for name, x, y in zip(inputs, found, exact, strict=True):
        torch.testing.assert_close(
            x.double(), y, rtol=0, atol=3e-3 * y.abs().max().item(), msg=lambda m, name=name: f"{name}: {m}"
        )


def unaligned() -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    query, key, value = operands(torch.float32, 1, 1, 20, 30, 16, 16)
    late = torch.zeros(query.numel() + 1)[1:].view(query.shape).copy_(query)
    return {
        "features apart": (query, key, value.transpose(-2, -1).contiguous().transpose(-2, -1)),
        "begins late": (late, key, value),
        "rows of 18": (query, torch.zeros(2, 1, 30, 18)[..., :16].copy_(key), value),
        "D = 14": (query[..., :14].contiguous(), key[..., :14].contiguous(), value),
        "D_v = 6": (query, key, value[..., :6].contiguous()),
        "D = 260": operands(torch.float32, 1, 1, 5, 7, 260, 16),
    }


@pytest.mark.parametrize("name", list(unaligned()))
def test_what_tensor_cores_do_not_take_stays_float32(backend: ModuleType, name: str) -> None:
    allow()
    operand = unaligned()[name]
    out = []
    assert not uses_tensor_cores(backend, lambda: out.append(attnfast.attention(*operand)))
    wanted = reference.attention(*(x.double() for x in operand))
    torch.testing.assert_close(out[0].double(), wanted, rtol=0, atol=4e-6)


def test_a_gradient_that_comes_in_unaligned_meets_the_same_scores(backend: ModuleType) -> None:
    """Then the backward multiplies without tensor cores, from operands that are rounded as the forward's were."""
    allow()
    query, key, value = (x.requires_grad_() for x in operands(torch.float32, 2, 1, 20, 30, 16, 16))
    out = attnfast.attention(query, key, value)
    weigh = torch.randn_like(out).transpose(-2, -1).contiguous().transpose(-2, -1)
    assert not uses_tensor_cores(backend, lambda: out.backward(weigh))
    wide = [rounded(x.detach()).requires_grad_() for x in (query, key, value)]
    reference.attention(*wide).backward(weigh.double())
    for x, y in zip((query, key, value), wide, strict=True):
        assert x.grad is not None and y.grad is not None
        limit = 1e-3 if x is not value else 1e-5  # what the output's rounded weights left in delta
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=0, atol=limit * y.grad.abs().max().item())


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_is_on_tensor_cores(backend: ModuleType, name: str) -> None:
    allow()
    query, key, value = operands(torch.float32, 2, 1, 37, 70, 36, 36)
    options = options_of(name, query, key)
    check_gradients(backend, inputs_of(query, key, value, options), **options)


@pytest.mark.parametrize(
    "options", [{}, {"causal": "bottom_right", "return_weights": "full"}], ids=["plain", "full weights"]
)
def test_packed_sequences_are_on_tensor_cores(backend: ModuleType, options: dict[str, Any]) -> None:
    allow()
    cu_q, cu_k = torch.tensor([0, 5, 5, 45, 70]), torch.tensor([0, 40, 43, 60, 130])
    torch.manual_seed(3)
    query, key, value = (torch.randn(n, 2, 36) for n in (70, 130, 130))
    center = torch.rand(2, 70) * 50
    inputs = {"query": query, "key": key, "value": value, "center": center}
    check_gradients(backend, inputs, "varlen_attention", cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=40,
                    max_seqlen_k=70, sigma=6.0, window=(20, 20), window_center=center, **options)  # fmt: skip


def check_gradients(
    backend: ModuleType, inputs: dict[str, Tensor], function: str = "attention", **options: Any
) -> None:
    """Against the reference with rounded operands, whose rounded weights and score gradients are left."""
    before = backend.mma_instructions()
    found = gradients(getattr(attnfast, function), inputs, **options)
    assert backend.mma_instructions() > before
    wide = {name: rounded(x) if name in ("query", "key", "value") else x.double() for name, x in inputs.items()}
    wide_options = {
        name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in options.items()
    }
    exact = gradients(getattr(reference, function), wide, **wide_options)
    for name, x, y in zip(inputs, found, exact, strict=True):
        error = (x.double() - y).abs().max().item() / y.abs().max().item()
        assert error < 2e-3, f"{name}: {error}"
