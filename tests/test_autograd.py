"""Derivatives of the fused dot core: gradcheck, every operand alone and together, first to third order."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.utils.deterministic
from helpers import HALVES, assert_close_to_truth, dtype_id
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import attnfast
from attnfast import _second_order, autograd, ops, reference
from attnfast.ops import DotAttentionOptions

NAMES = ("query", "key", "value", "bias", "bias2", "sink")
B, H, H_KV, T_Q, T_K, D, D_V = 2, 2, 1, 3, 4, 3, 2

Inputs = list[Tensor | None]


def make(
    dtype: torch.dtype = torch.float64, *, packed: bool = False, extras: bool = True, grad: bool = True, seed: int = 0
) -> Inputs:
    """query, key, value, bias, bias2, sink of a tiny problem with grouped heads and D_v != D."""
    g = torch.Generator().manual_seed(seed)
    batch = 1 if packed else B

    def draw(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(kind).requires_grad_(grad)

    tensors: Inputs = [draw(batch, H, T_Q, D), draw(batch, H_KV, T_K, D), draw(batch, H_KV, T_K, D_V)]
    if not extras:
        return [*tensors, None, None, None]
    real = torch.float64 if dtype == torch.float64 else torch.float32
    return [*tensors, draw(1, H, 1, T_K), draw(batch, 1, T_Q, T_K), draw(H, kind=real)]


SEED = torch.tensor([2**40 + 12345, 77])
CASES: dict[str, DotAttentionOptions] = {
    "plain": DotAttentionOptions(scale=0.7),
    "negative_scale": DotAttentionOptions(scale=-0.7),
    "zero_scale": DotAttentionOptions(scale=0.0),
    "mask": DotAttentionOptions(mask=torch.tensor([[[[True, False, True, True]]], [[[False, True, True, False]]]])),
    "fully_masked_row": DotAttentionOptions(
        mask=torch.tensor([[[[True, True, False, True], [False] * 4, [True] * 4]]]), weights_mode=1
    ),
    "lengths": DotAttentionOptions(query_lengths=torch.tensor([3, 2]), key_lengths=torch.tensor([4, 0]), causal=2),
    "causal": DotAttentionOptions(causal=1, scale=0.5, weights_mode=2),
    "bottom_right": DotAttentionOptions(causal=2, weights_mode=1),
    "window": DotAttentionOptions(window_left=1, window_right=0, weights_mode=3),
    "softcap": DotAttentionOptions(softcap=0.8, scale=1.3, weights_mode=3),
    "alibi": DotAttentionOptions(alibi_slopes=torch.tensor([[0.5, 0.125]], dtype=torch.float64), causal=2),
    "dropout": DotAttentionOptions(dropout_p=0.4, seed=SEED, weights_mode=1),
    "dropout_sums": DotAttentionOptions(dropout_p=0.4, seed=SEED, weights_mode=2, softcap=2.0),
    "dropout_maximum": DotAttentionOptions(dropout_p=0.4, seed=SEED, weights_mode=3),
    "dropout_all": DotAttentionOptions(dropout_p=1.0, seed=SEED, weights_mode=1),
    "full": DotAttentionOptions(weights_mode=1),
    "column_sum": DotAttentionOptions(weights_mode=2),
    "row_max": DotAttentionOptions(weights_mode=3),
    "packed": DotAttentionOptions(cu_seqlens_q=torch.tensor([0, 1, 1, 3]), cu_seqlens_k=torch.tensor([0, 3, 4, 4])),
    "packed_causal": DotAttentionOptions(
        cu_seqlens_q=torch.tensor([0, 1, 3]), cu_seqlens_k=torch.tensor([0, 1, 4]), causal=2, weights_mode=1,
        dropout_p=0.3, seed=SEED,
    ),
}  # fmt: skip


def results(function: Callable[..., Any], tensors: Sequence[Tensor | None], options: DotAttentionOptions) -> Any:
    """out, lse and weights as one tuple; lse rows of -inf (constants) as zeros, which finite differences need."""
    out, lse, weights = function(*tensors, options, True)
    lse = torch.where(lse == -math.inf, 0.0, lse)
    return (out, lse) if weights is None else (out, lse, weights)


def differentiable(function: Callable[..., Any], options: DotAttentionOptions, inputs: Inputs) -> Any:
    """`function` of the present tensors only, as gradcheck wants it, and those tensors."""
    present = [at for at, x in enumerate(inputs) if x is not None]

    def call(*values: Tensor) -> Any:
        tensors: Inputs = [None] * 6
        for at, value in zip(present, values, strict=True):
            tensors[at] = value
        return results(function, tensors, options)

    return call, tuple(inputs[at] for at in present)


def gradients(
    function: Callable[..., Any], inputs: Inputs, options: DotAttentionOptions, wanted: Sequence[int] | None = None
) -> list[Tensor]:
    """Gradients of a fixed random functional of every result."""
    call, tensors = differentiable(function, options, inputs)
    found = call(*tensors)
    g = torch.Generator().manual_seed(5)
    probes = [torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype) for x in found]
    targets = tensors if wanted is None else [inputs[at] for at in wanted]
    pairs = [(x, probe) for x, probe in zip(found, probes, strict=True) if x.requires_grad]
    outputs, incoming = zip(*pairs, strict=True)
    grads = torch.autograd.grad(outputs, targets, incoming, allow_unused=True)
    return [torch.zeros_like(x) if grad is None else grad for x, grad in zip(targets, grads, strict=True)]


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name: str) -> None:
    call, tensors = differentiable(autograd.dot_attention, CASES[name], make(packed="packed" in name))
    assert torch.autograd.gradcheck(call, tensors, fast_mode=True)


@pytest.mark.parametrize("name", ["softcap", "dropout_sums", "packed_causal"])
def test_gradcheck_every_entry_and_batched_gradients(name: str) -> None:
    call, tensors = differentiable(autograd.dot_attention, CASES[name], make(packed="packed" in name))
    assert torch.autograd.gradcheck(call, tensors, check_batched_grad=True, check_undefined_grad=True)


@pytest.mark.parametrize("name", CASES)
def test_gradgradcheck(name: str) -> None:
    call, tensors = differentiable(autograd.dot_attention, CASES[name], make(packed="packed" in name))
    assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True)


def test_gradgradcheck_of_single_results() -> None:
    """lse alone and weights alone: the gradient of out is then absent, not zero."""
    inputs = make()
    for mode, result in ((0, 1), (1, 2), (2, 2), (3, 2)):
        call, tensors = differentiable(autograd.dot_attention, DotAttentionOptions(weights_mode=mode), inputs)
        assert torch.autograd.gradcheck(lambda *x, r=result, c=call: c(*x)[r], tensors, fast_mode=True)
        assert torch.autograd.gradgradcheck(lambda *x, r=result, c=call: c(*x)[r], tensors, fast_mode=True)


@pytest.mark.parametrize("name", ["plain", "softcap", "packed_causal"])
def test_third_order(name: str) -> None:
    call, tensors = differentiable(autograd.dot_attention, CASES[name], make(packed="packed" in name))

    def second(*values: Tensor) -> Any:
        first = torch.autograd.grad(sum(x.sin().sum() for x in call(*values)), values, create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in first), values, create_graph=True)

    assert torch.autograd.gradcheck(second, tensors, fast_mode=True)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=dtype_id)
def test_gradients_obey_the_error_rule(name: str, dtype: torch.dtype) -> None:
    """Against the float64 reference, not worse than twice the reference in the same dtype."""
    options = CASES[name]
    if options.alibi_slopes is not None:
        options = options._replace(alibi_slopes=options.alibi_slopes.float())
    inputs = make(dtype, packed="packed" in name)
    exact = [None if x is None else x.detach().double().requires_grad_() for x in inputs]
    found = gradients(autograd.dot_attention, inputs, options)
    plain = gradients(reference.dot_attention, inputs, options)
    truth = gradients(reference.dot_attention, exact, options)
    for label, a, t, p, x in zip(NAMES, found, truth, plain, inputs, strict=True):
        assert x is not None and a.dtype == x.dtype and a.shape == x.shape
        # The kernel reads the rounded output again, so that a float32 gradient of half inputs keeps half accuracy.
        slack = torch.finfo(dtype).eps if dtype in HALVES else 0.0
        assert_close_to_truth(a, t, p, f"grad_{label}", slack=slack)


@pytest.mark.parametrize("name", ["plain", "dropout", "column_sum"])
def test_only_the_wanted_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any subset of operands: the same bits as with all of them, and nothing else is computed."""
    seen: list[tuple[Tensor | None, ...]] = []

    def spy(*args: Any) -> tuple[Tensor | None, ...]:
        seen.append(ops.dot_attention_bwd(*args))
        return seen[-1]

    monkeypatch.setattr(autograd, "_run_backward", spy)
    every = gradients(autograd.dot_attention, make(), CASES[name])
    for size in (1, 2, 5):
        for wanted in itertools.combinations(range(6), size):
            seen.clear()
            inputs = make(grad=False)
            for at in wanted:
                x = inputs[at]
                assert x is not None
                x.requires_grad_()
            some = gradients(autograd.dot_attention, inputs, CASES[name], wanted)
            assert len(seen) == 1
            for at in range(6):
                assert (seen[0][at] is not None) == (at in wanted), (NAMES[at], wanted)
            for at, grad in zip(wanted, some, strict=True):
                assert torch.equal(grad, every[at]), (NAMES[at], wanted)


PATTERNS = list(itertools.product((1, B), (1, H), (1, T_Q), (1, T_K)))


@pytest.mark.parametrize("shape", PATTERNS, ids=lambda s: "x".join(map(str, s)))
def test_bias_gradient_has_the_shape_and_dtype_of_the_bias(shape: tuple[int, ...]) -> None:
    other = PATTERNS[len(PATTERNS) - 1 - PATTERNS.index(shape)]
    for dtype, bias_dtype in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        inputs = make(dtype)
        inputs[3] = torch.randn(shape, dtype=bias_dtype).requires_grad_()
        inputs[4] = torch.randn(other, dtype=dtype).requires_grad_()
        options = DotAttentionOptions(causal=1, softcap=2.0)
        found = gradients(autograd.dot_attention, inputs, options)
        exact = [None if x is None else x.detach().double().requires_grad_() for x in inputs]
        truth = gradients(reference.dot_attention, exact, options)
        plain = gradients(reference.dot_attention, inputs, options)
        for at in (3, 4):
            x = inputs[at]
            assert x is not None and found[at].shape == x.shape and found[at].dtype == x.dtype
            slack = torch.finfo(dtype).eps if dtype in HALVES else 0.0
            assert_close_to_truth(found[at], truth[at], plain[at], f"grad_{NAMES[at]}", slack=slack)


def test_expanded_bias_gets_a_gradient_per_entry() -> None:
    """An expanded view is an operand of full shape; autograd itself sums what its expand() repeated."""
    inputs = make()
    base = torch.randn(1, H, 1, T_K, dtype=torch.float64, requires_grad=True)
    inputs[3] = base.expand(B, H, T_Q, T_K)
    found = gradients(autograd.dot_attention, inputs, DotAttentionOptions())[3]
    assert found.shape == (B, H, T_Q, T_K)
    out = autograd.dot_attention(*inputs, DotAttentionOptions(), False)[0]
    summed = torch.autograd.grad(out.sin().sum(), base)[0]
    inputs[3] = base
    out = autograd.dot_attention(*inputs, DotAttentionOptions(), False)[0]
    torch.testing.assert_close(summed, torch.autograd.grad(out.sin().sum(), base)[0])


def test_masked_key_reaches_no_gradient() -> None:
    """NaN and Inf in a masked key and value, and in the gradient of its weight, are selected out."""
    inputs = make()
    mask = torch.ones(1, 1, 1, T_K, dtype=torch.bool)
    mask[..., 2] = False
    clean = gradients(autograd.dot_attention, inputs, DotAttentionOptions(mask=mask))
    with torch.no_grad():
        inputs[1][:, :, 2] = math.nan  # type: ignore[index]
        inputs[2][:, :, 2] = math.inf  # type: ignore[index]
    dirty = gradients(autograd.dot_attention, inputs, DotAttentionOptions(mask=mask))
    for label, a, b in zip(NAMES, clean, dirty, strict=True):
        assert torch.equal(a, b), label
    out, _, weights = autograd.dot_attention(*make(), DotAttentionOptions(mask=mask, weights_mode=1), False)
    assert weights is not None
    probe = torch.ones_like(weights)
    probe[..., 2] = math.nan
    tensors = make()
    out, _, weights = autograd.dot_attention(*tensors, DotAttentionOptions(mask=mask, weights_mode=1), False)
    for label, grad in zip(NAMES, torch.autograd.grad((out, weights), tensors, (out, probe)), strict=True):
        assert grad.isfinite().all(), label


def test_fully_masked_call_has_zero_gradients() -> None:
    for mode in range(4):
        options = DotAttentionOptions(mask=torch.zeros(1, 1, 1, T_K, dtype=torch.bool), weights_mode=mode)
        for at, grad in enumerate(gradients(autograd.dot_attention, make(), options)):
            if at == 5:
                # lse is the sink there, so the sink's gradient is the sum of lse's.
                assert grad.isfinite().all() and grad.abs().sum() > 0
            else:
                assert (grad == 0).all(), NAMES[at]


def test_row_maximum_gradient_goes_to_the_first_of_equal_keys() -> None:
    query = torch.zeros(1, 1, 1, 2, dtype=torch.float64, requires_grad=True)
    key = torch.ones(1, 1, 3, 2, dtype=torch.float64, requires_grad=True)
    value = torch.ones(1, 1, 3, 2, dtype=torch.float64)
    bias = torch.zeros(1, 1, 1, 3, dtype=torch.float64, requires_grad=True)
    weights = autograd.dot_attention(query, key, value, bias, None, None, DotAttentionOptions(weights_mode=3), False)[2]
    assert weights is not None
    (grad,) = torch.autograd.grad(weights.sum(), bias)
    expected = torch.tensor([2.0, -1.0, -1.0], dtype=torch.float64) / 9
    torch.testing.assert_close(grad.flatten(), expected)


@pytest.mark.parametrize("name", CASES)
def test_every_result_is_written_in_full(name: str) -> None:
    """torch fills fresh memory with NaN here, so that whatever a kernel leaves out shows."""
    inputs = make(packed="packed" in name)
    expected = results(reference.dot_attention, inputs, CASES[name])
    expected_grads = gradients(reference.dot_attention, inputs, CASES[name])
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(1).isnan()
    for a, b in zip(results(autograd.dot_attention, inputs, CASES[name]), expected, strict=True):
        torch.testing.assert_close(a, b)
    for label, a, b in zip(NAMES, gradients(autograd.dot_attention, inputs, CASES[name]), expected_grads, strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, label=label: f"{label}: {text}")


# --- second order in detail ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_second_order_does_not_depend_on_the_block(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> tuple[Tensor, ...]:
        inputs = make(packed="packed" in name)
        call, tensors = differentiable(autograd.dot_attention, CASES[name], inputs)
        first = torch.autograd.grad(sum(x.sin().sum() for x in call(*tensors)), tensors, create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in first), tensors)

    whole = run()
    rows = []
    block = _second_order._block
    monkeypatch.setattr(_second_order, "_BLOCK_ELEMENTS", 1)
    monkeypatch.setattr(_second_order, "_block", lambda *a: rows.append(a[-1]) or block(*a))
    blocks = run()
    assert rows == [(0, 1, T_Q), (1, 1, T_Q), (2, 1, T_Q)]
    for label, a, b in zip(NAMES, whole, blocks, strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, label=label: f"{label}: {text}")


class _Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return out


def test_second_order_memory_is_linear_in_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_second_order, "_BLOCK_ELEMENTS", 2**14)
    tokens = 256
    q, k, v = (torch.randn(1, 1, tokens, 4, requires_grad=True) for _ in range(3))
    with _Largest() as largest:
        out = attnfast.attention(q, k, v, causal="top_left")
        first = torch.autograd.grad(out.sin().sum(), (q, k, v), create_graph=True)
        torch.autograd.grad(sum(x.square().sum() for x in first), (q, k, v))
    assert 0 < largest.numel <= 2**14 < tokens * tokens


def test_double_backward_through_layers() -> None:
    """A gradient penalty on two attention layers with projections between them."""

    def penalty(attend: Callable[..., Any]) -> tuple[Tensor, ...]:
        g = torch.Generator().manual_seed(3)
        x = torch.randn(2, 5, 8, generator=g, dtype=torch.float64, requires_grad=True)
        weights = [torch.randn(8, 24, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        hidden = x
        for weight in weights:
            heads = (hidden @ weight).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            hidden = hidden + attend(*heads, causal="top_left", softcap=5.0).transpose(1, 2).flatten(2).tanh()
        (grad,) = torch.autograd.grad(hidden.square().sum(), x, create_graph=True)
        return torch.autograd.grad(hidden.sum() + (grad.norm() - 1).square(), [x, *weights])

    for a, b in zip(penalty(attnfast.attention), penalty(reference.attention), strict=True):
        torch.testing.assert_close(a, b)


# --- the contract with the engine ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["query", "key", "value", "bias", "sink", "mask", "key_lengths"])
def test_in_place_change_of_an_operand_is_detected(name: str) -> None:
    inputs = make(grad=False)
    query = inputs[0]
    assert query is not None
    query.requires_grad_()
    mask = torch.ones(1, 1, 1, T_K, dtype=torch.bool)
    lengths = torch.tensor([3, 2])
    out = autograd.dot_attention(*inputs, DotAttentionOptions(mask=mask, key_lengths=lengths), False)[0]
    victim = {**dict(zip(NAMES, inputs, strict=True)), "mask": mask, "key_lengths": lengths}[name]
    assert victim is not None
    with torch.no_grad():
        victim.copy_(victim.clone())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("extra", [False, True])
def test_in_place_change_of_a_result_is_detected(extra: bool) -> None:
    out = autograd.dot_attention(*make(extras=extra), DotAttentionOptions(), False)[0]
    out.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_backward_twice() -> None:
    inputs = make()
    out = autograd.dot_attention(*inputs, DotAttentionOptions(), False)[0]
    first = torch.autograd.grad(out.sum(), inputs[:3], retain_graph=True)
    again = torch.autograd.grad(out.sum(), inputs[:3])
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(out.sum(), inputs[:3])


def test_same_tensor_for_every_operand() -> None:
    x = torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    call = lambda x: attnfast.attention(x, x, x)  # noqa: E731
    assert torch.autograd.gradcheck(call, (x,)) and torch.autograd.gradgradcheck(call, (x,), fast_mode=True)


@pytest.mark.parametrize("grad_out", ["expanded", "permuted", "negative_bit"])
def test_strides_of_the_incoming_gradient(grad_out: str) -> None:
    inputs = make()
    out = autograd.dot_attention(*inputs, DotAttentionOptions(), False)[0]
    g = {
        "expanded": torch.full((), 0.5, dtype=torch.float64).expand(out.shape),
        "permuted": torch.randn(D_V, T_Q, H, B, dtype=torch.float64).permute(3, 2, 1, 0),
        "negative_bit": torch._neg_view(torch.randn(out.shape, dtype=torch.float64)),
    }[grad_out]
    found = torch.autograd.grad(out, inputs, g, retain_graph=True)
    for a, b in zip(found, torch.autograd.grad(out, inputs, g.resolve_neg().contiguous()), strict=True):
        torch.testing.assert_close(a, b)


def test_no_graph_without_a_need() -> None:
    inputs = make()
    with torch.no_grad():
        assert not autograd.dot_attention(*inputs, DotAttentionOptions(), False)[0].requires_grad
    out, lse, weights = autograd.dot_attention(*make(grad=False), DotAttentionOptions(weights_mode=1), True)
    assert lse is not None and weights is not None
    assert not (out.requires_grad or lse.requires_grad or weights.requires_grad)


def test_slopes_have_no_gradient() -> None:
    slopes = torch.ones(1, H, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match="alibi_slopes: has no gradient"):
        torch.ops.attnfast.dot_attention_fwd(*make(), None, *DotAttentionOptions(alibi_slopes=slopes))


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)])
def test_empty_problems(shape: tuple[int, ...]) -> None:
    q, k, v = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3))
    out = attnfast.attention(q, k, v)
    first = torch.autograd.grad(out.sum(), (q, k, v), create_graph=True)
    second = torch.autograd.grad(sum(x.sum() for x in first), (q, k, v), allow_unused=True)
    assert all(x.shape == shape for x in first) and all(x is None or x.shape == shape for x in second)


def test_no_keys() -> None:
    q = torch.randn(1, 2, 3, 4, requires_grad=True)
    k, v = torch.randn(1, 2, 0, 4, requires_grad=True), torch.randn(1, 2, 0, 5, requires_grad=True)
    grads = torch.autograd.grad(attnfast.attention(q, k, v).sum(), (q, k, v))
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape] and (grads[0] == 0).all()


def test_backward_is_bitwise_reproducible_over_threads() -> None:
    q, k, v = (torch.randn(1, 2, 200, 16, requires_grad=True) for _ in range(3))
    bias = torch.randn(1, 2, 1, 200, requires_grad=True)
    sink = torch.randn(2, requires_grad=True)
    runs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        out = attnfast.attention(q, k, v, bias=bias, sink=sink, causal="top_left")
        runs.append(torch.autograd.grad(out.square().sum(), (q, k, v, bias, sink)))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))
