"""Differentiation of the fused operators: eager fast path, operator autograd, and the choice between the routes.

One call of :func:`dot_attention` takes one of four routes, named by :func:`plan`:

``"kernel"``
    Eager, no gradient wanted: the kernel, called without torch's dispatcher.
``"function"``
    Eager, gradient wanted: :class:`DotAttentionFunction` (for a call with nothing but scale and causal alignment
    :class:`PlainFunction`, with few keys :class:`WholeRowFunction`) around the forward and backward kernels.
``"operator"``
    ``torch.ops.attnfast.dot_attention_fwd``: under torch.compile, torch.export, a dispatch mode (FakeTensorMode,
    FlopCounterMode, ...), for tensor subclasses, and under the functorch transforms ``vmap``, ``grad``, ``vjp``,
    ``jacrev`` and ``vmap`` over them. The same kernels run.
``"reference"``
    ``reference.dot_attention``, plain torch in ``O(T_q T_k)`` memory: forward-mode AD (dual tensors, ``jvp``,
    ``jacfwd``, ``linearize``), functorch transforms of second or higher order (``hessian``, ``grad`` of ``grad``) and
    functorch transforms inside of torch.compile.
    The kernels have no forward-mode derivative, and dropping a tangent silently is not an option.

Second derivatives in eager mode (``create_graph=True``) need no other route: the backward operator has a derivative of
its own, see ``_second_order``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import Function

from attnfast import _operator_autograd, _vmap, ops, reference
from attnfast._operator_autograd import FORWARD, OperatorForward, has_tangent, run_backward
from attnfast.ops import DotAttentionOptions, PlainOptions

_is_compiling = torch.compiler.is_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_functorch_active = torch._C._are_functorch_transforms_active
_grad_enabled = torch.is_grad_enabled
_run_forward = ops.dot_attention_fwd
_run_backward: Any = ops.dot_attention_bwd
_run_plain_forward = ops.plain_fwd
_run_plain_backward = ops.plain_bwd
_N_OPTION_TENSORS = ops.N_OPTION_TENSORS
_ordinary_gradient = ops.ordinary_gradient
_PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter))


def dot_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    bias2: Tensor | None,
    sink: Tensor | None,
    options: DotAttentionOptions,
    return_lse: bool,
    center: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Fused dot-product attention, differentiable; see the module's text for the route a call takes.

    Parameters
    ----------
    query, key, value : Tensor
        ``[B, H, T_q, D]``, ``[B, H_kv, T_k, D]``, ``[B, H_kv, T_k, D_v]``, one dtype, already validated.
    bias, bias2 : Tensor, optional
        Floating point, 4-D, broadcastable to ``[B, H, T_q, T_k]``; their gradients have their own shapes.
    sink : Tensor, optional
        Accumulation dtype, ``[H]``.
    options : DotAttentionOptions
        Everything that has no gradient.
    return_lse : bool
        Whether lse is wanted.
    center : Tensor, optional
        Accumulation dtype, contiguous ``[B, H, T_q]``; there exactly if ``options.prior_sigma`` is not 0.

    Returns
    -------
    tuple
        ``out [B, H, T_q, D_v]``; natural ``lse [B, H, T_q]`` or None; weights as ``options.weights_mode`` asks or None.
    """
    if (
        _is_compiling()
        or _dispatch_modes()
        or _functorch_active()
        or forward_ad._current_level >= 0
        or type(query) not in _PLAIN_TYPES
        or type(key) not in _PLAIN_TYPES
        or type(value) not in _PLAIN_TYPES
        or (bias is not None and type(bias) not in _PLAIN_TYPES)
        or (center is not None and type(center) not in _PLAIN_TYPES)
    ):
        return _unusual(query, key, value, bias, bias2, sink, center, options, return_lse)
    try:
        if _grad_enabled() and (
            query.requires_grad
            or key.requires_grad
            or value.requires_grad
            or (bias is not None and (bias.requires_grad or (bias2 is not None and bias2.requires_grad)))
            or (sink is not None and sink.requires_grad)
            or (center is not None and center.requires_grad)
        ):
            out, lse, weights = _apply(query, key, value, bias, bias2, sink, center, options)
        else:
            out, lse, weights, _ = _run_forward(query, key, value, bias, bias2, sink, center, options, return_lse)
    except TypeError:
        if all_have_storage(query, key, value, bias, bias2, sink, center, *options[:_N_OPTION_TENSORS]):
            raise
        return _unusual(query, key, value, bias, bias2, sink, center, options, return_lse)
    return out, (lse * ops.LN2 if return_lse else None), weights


def plan(*operands: Tensor | None) -> str:
    """Name the route that a core takes for these tensors (those that may have a gradient) under the current modes.

    Returns
    -------
    str
        ``"kernel"``, ``"function"``, ``"operator"`` or ``"reference"``, as described at the top of this module.
    """
    if _is_compiling():
        return "reference" if _functorch_active() else "operator"  # dynamo cannot say which transforms are active
    tensors = [t for t in operands if t is not None]
    if _functorch_active():
        kinds = _functorch_kinds()
        return "reference" if "Jvp" in kinds or kinds.count("Grad") > 1 else "operator"
    if has_tangent(tensors):
        return "reference"
    if _dispatch_modes() or any(type(t) not in _PLAIN_TYPES for t in tensors):
        return "operator"
    return "function" if _grad_enabled() and any(t.requires_grad for t in tensors) else "kernel"


def all_have_storage(*tensors: Any) -> bool:
    """False if a tensor is a wrapper that no check above can see cheaply, such as what a vmap inside of the autograd
    engine (``is_grads_batched``) passes; the dispatcher knows how to unwrap it.
    """
    return all(tensor is None or torch._C._has_storage(tensor) for tensor in tensors)


def intercepted() -> bool:
    """Whether a backward is recorded, traced or intercepted, so that it must be an operator."""
    return _grad_enabled() or _dispatch_modes() > 0 or _functorch_active() or _is_compiling()


def require_eager_for_sparse(route: str) -> None:
    """Sparse gradients exist on the eager route alone: of a table, by weighted_gather and topk_scores."""
    if route != "function":
        raise NotImplementedError(
            "sparse_grad=True works in eager mode only: not under torch.compile, torch.func transforms, dispatch "
            "modes or forward-mode AD; use sparse_grad=False there"
        )


def require_unrecorded_sparse(grad: Tensor) -> None:
    """In a backward of `grad` that is about to return a sparse gradient."""
    if intercepted() or not all_have_storage(grad):
        raise NotImplementedError(
            "sparse_grad=True: the sparse gradient has no derivative and cannot be traced (create_graph=True, "
            "torch.compile, dispatch modes) or batched (is_grads_batched=True); use sparse_grad=False"
        )


def require_no_dropout_of_shards(options: DotAttentionOptions, query: Tensor) -> None:
    """A draw depends on the places of heads and samples, which are others on a rank that has some of them."""
    if options.seed is not None and hasattr(query, "placements"):
        raise NotImplementedError(
            "dropout_p: expected 0 with DTensors, whose ranks would drop the same weights of different heads or "
            "samples; call attnfast with local tensors (DTensor.to_local) and a seed of each rank"
        )


def functorch_differentiates() -> bool:
    return _functorch_active() and "Grad" in _functorch_kinds()


def is_mapped(x: Tensor) -> bool:
    """Whether a ``torch.vmap`` that is active maps this tensor, so that it cannot be looked at."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


def _functorch_kinds() -> list[str]:
    """The active functorch transforms, outermost first: "Vmap", "Grad", "Jvp", "Functionalize"."""
    stack = torch._C._functorch.get_interpreter_stack() or []
    return [interpreter.key().name for interpreter in stack]


def _unusual(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    bias2: Tensor | None,
    sink: Tensor | None,
    center: Tensor | None,
    options: DotAttentionOptions,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Every route but the two eager ones."""
    if plan(query, key, value, bias, bias2, sink, center) == "reference":
        return reference.dot_attention(query, key, value, bias, bias2, sink, options, return_lse, center=center)
    require_no_dropout_of_shards(options, query)
    # Under vmap alone the operator keeps derivatives of any order; a functorch gradient needs the Function around it.
    operator = OperatorForward.apply if functorch_differentiates() else FORWARD
    out, lse, weights, _ = operator(query, key, value, bias, bias2, sink, center, *options)
    return out, (lse * ops.LN2 if return_lse else None), (weights if options.weights_mode else None)


class DotAttentionFunction(Function):
    """The eager route with a gradient: ``apply(query, key, value, bias, bias2, sink, center, options)``.

    Returns out, base-2 lse and the weights or None.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        bias2: Tensor | None,
        sink: Tensor | None,
        center: Tensor | None,
        options: DotAttentionOptions,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        out, lse, weights, index = _run_forward(query, key, value, bias, bias2, sink, center, options, True)
        ctx.set_materialize_grads(False)
        # Every tensor goes through save_for_backward, so that in-place changes are noticed and saved-tensor hooks run.
        ctx.save_for_backward(
            query, key, value, out, lse, weights, index, bias, bias2, sink, center, *options[:_N_OPTION_TENSORS]
        )
        ctx.scalars = options[_N_OPTION_TENSORS:]
        return out, lse, weights

    @staticmethod
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, grad_weights: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        # The kernel runs unless a second derivative is recorded or somebody intercepts.
        saved = ctx.saved_tensors
        if grad_out is None and grad_lse is None and grad_weights is None:
            return (None,) * 8
        options = DotAttentionOptions._make((*saved[11:], *ctx.scalars))
        arguments = (grad_out, grad_lse, grad_weights, *saved[:11])
        needs = ctx.needs_input_grad[:7]
        if not intercepted():
            try:
                return (*_run_backward(*arguments, options, needs), None)
            except TypeError:
                if all_have_storage(grad_out, grad_lse, grad_weights):
                    raise
        return (*_unusual_backward(arguments, options, needs), None)


class PlainFunction(Function):
    """:class:`DotAttentionFunction` of a plain call: ``apply(query, key, value, options)`` returns out.

    Every argument, every saved tensor and every result of an autograd.Function costs time, so that the common call has
    one of its own.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, options: PlainOptions) -> Tensor:
        out, lse = _run_plain_forward(query, key, value, options, True)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.options = options
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        needs, options = ctx.needs_input_grad, ctx.options
        if _ordinary_gradient(grad_out) and not _is_compiling():
            return (*_run_plain_backward(grad_out, query, key, value, out, lse, options, needs), None)
        return _unusual_plain_backward(grad_out, query, key, value, out, lse, options, needs)


class WholeRowFunction(Function):
    """:class:`PlainFunction` of a call with at most ``ops.WHOLE_ROW_KEYS`` keys, which saves its operands only."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, options: PlainOptions) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.options = options
        return _run_plain_forward(query, key, value, options, False)[0]

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        needs, options = ctx.needs_input_grad, ctx.options
        if _ordinary_gradient(grad_out) and not _is_compiling():
            return (*_run_plain_backward(grad_out, query, key, value, None, None, options, needs), None)
        with torch.no_grad():
            out, lse = _run_plain_forward(query, key, value, options, True)
        return _unusual_plain_backward(grad_out, query, key, value, out, lse, options, needs)


def _unusual_plain_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor | None,
    options: PlainOptions, needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """What the backward of a plain Function returns where somebody intercepts or records it."""
    arguments = (grad_out, None, None, query, key, value, out, lse, *(None,) * 6)
    return (*_unusual_backward(arguments, options, (*needs[:3], *(False,) * 4))[:3], None)


def _unusual_backward(
    arguments: tuple[Tensor | None, ...], options: DotAttentionOptions, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    grad_out, grad_lse, grad_weights, query, key, value, out, lse, weights, index, *rest = arguments
    assert query is not None
    weights, index = ops.fill_weights(query, weights, index)
    return run_backward(
        grad_out, grad_lse, grad_weights, query, key, value, out, lse, weights, index, *rest, needs, *options
    )  # fmt: skip


# Function.apply without its Python wrapper, whose cases (functorch) were sent elsewhere before.
_apply: Any = super(Function, DotAttentionFunction).apply
# (query, key, value, PlainOptions) -> out
plain_attention: Any = super(Function, PlainFunction).apply
whole_row_attention: Any = super(Function, WholeRowFunction).apply


_operator_autograd.register(ops.LIBRARY)
_vmap.register(ops.LIBRARY)
