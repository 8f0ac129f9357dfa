"""Differentiation of the additive core: :func:`additive_attention` takes the routes of ``autograd.dot_attention``.

The gradients of ``weight`` and ``score_bias`` are sums over everything, in the accumulation dtype. Derivatives of
second and higher order come from ``reference.additive_core``, in blocks of query rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from attnfast import _additive_ops, _vmap, autograd, ops, reference
from attnfast._additive_ops import N_BWD_TENSORS, N_INPUTS, operator_options, options_of
from attnfast._operator_autograd import autograd_kernel, require_no_slope_gradient
from attnfast._second_order import second_order
from attnfast.ops import N_OPTION_TENSORS, DotAttentionOptions

FORWARD = torch.ops.attnfast.additive_attention_fwd.default
BACKWARD = torch.ops.attnfast.additive_attention_bwd.default
_run_forward: Any = _additive_ops.additive_attention_fwd
_run_backward_kernel: Any = _additive_ops.additive_attention_bwd
_N_OPTIONS = len(DotAttentionOptions._fields) - 1  # without the scale


def additive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    score_bias: Tensor | None,
    bias: Tensor | None,
    bias2: Tensor | None,
    sink: Tensor | None,
    options: DotAttentionOptions,
    return_lse: bool,
    center: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Fused additive attention, differentiable; see ``autograd.dot_attention``.

    ``weight`` and ``score_bias`` are ``[H, D]`` or ``[1, D]``, contiguous, in the accumulation dtype; ``options.scale``
    must be 1.
    """
    inputs = (query, key, value, weight, score_bias, bias, bias2, sink, center)
    route = autograd.plan(*(x for x in inputs if x is not None))
    lse: Tensor | None
    if route == "reference":
        return reference.additive_core(*inputs[:-1], options, return_lse, center=center)
    try:
        if route == "function":
            out, lse, weights = AdditiveAttentionFunction.apply(*inputs, options)
        elif route == "kernel":
            out, lse, weights, _ = _run_forward(*inputs, options, return_lse)
        else:
            return _operator(inputs, options, return_lse)
    except TypeError:
        if autograd.all_have_storage(*inputs, *options[:N_OPTION_TENSORS]):
            raise
        return _operator(inputs, options, return_lse)
    return out, (lse * ops.LN2 if return_lse and lse is not None else None), weights


def _operator(
    inputs: Sequence[Any], options: DotAttentionOptions, return_lse: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    autograd.require_no_dropout_of_shards(options, inputs[0])
    # Under vmap alone the operator keeps derivatives of any order; a functorch gradient needs the Function around it.
    differentiated = autograd.functorch_differentiates()
    operator: Callable[..., Any] = AdditiveOperatorForward.apply if differentiated else FORWARD
    out, lse, weights, _ = operator(*inputs, *operator_options(options))
    return out, (lse * ops.LN2 if return_lse else None), (weights if options.weights_mode else None)


class AdditiveAttentionFunction(Function):
    """The eager route with a gradient: ``apply(query, ..., center, options)`` returns out, base-2 lse, weights."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        inputs, options = args[:N_INPUTS], args[N_INPUTS]
        out, lse, weights, index = _run_forward(*inputs, options, True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:5], out, lse, weights, index, *inputs[5:], *options[:N_OPTION_TENSORS])
        ctx.scalars = options[N_OPTION_TENSORS:]
        return out, lse, weights

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        if all(grad is None for grad in grads):
            return (None,) * (N_INPUTS + 1)
        options = DotAttentionOptions._make((*saved[13:], *ctx.scalars))
        arguments = (*grads, *saved[:13])
        needs = ctx.needs_input_grad[:N_INPUTS]
        if not autograd.intercepted():
            try:
                return (*_run_backward_kernel(*arguments, options, needs), None)
            except TypeError:
                if autograd.all_have_storage(*grads):
                    raise
        weights, index = ops.fill_weights(saved[0], saved[7], saved[8])
        arguments = (*arguments[:10], weights, index, *arguments[12:])
        return (*_run_backward(*arguments, needs, *operator_options(options)), None)


class AdditiveOperatorForward(Function):
    """``apply(query, ..., center, *options)`` with the operator's four results."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return FORWARD(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        tensors, options = inputs[:N_INPUTS], inputs[N_INPUTS:]
        require_no_slope_gradient(options)
        ctx.save_for_backward(*tensors[:5], *output, *tensors[5:], *options[:N_OPTION_TENSORS])
        ctx.scalars = options[N_OPTION_TENSORS:]
        ctx.mark_non_differentiable(output[3])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_out, grad_lse, grad_weights, _ = grads
        if ctx.scalars[-1] == ops.WEIGHTS_NONE:
            grad_weights = None
        if grad_out is None and grad_lse is None and grad_weights is None:
            return (None,) * (N_INPUTS + _N_OPTIONS)
        needs = ctx.needs_input_grad[:N_INPUTS]
        saved = ctx.saved_tensors
        found = _run_backward(grad_out, grad_lse, grad_weights, *saved[:13], needs, *saved[13:], *ctx.scalars)
        return (*found, *((None,) * _N_OPTIONS))


def _run_backward(*args: Any) -> tuple[Tensor | None, ...]:
    """The backward operator with None for the gradients that ``needs`` does not ask for."""
    # Inside a functorch transform the operator's own Autograd kernel cannot be differentiated, the Function can.
    functorch = torch._C._are_functorch_transforms_active()
    backward: Callable[..., Any] = AdditiveOperatorBackward.apply if functorch else BACKWARD
    found = backward(*args)
    return tuple(grad if need else None for grad, need in zip(found, args[N_BWD_TENSORS - 1], strict=True))


class AdditiveOperatorBackward(Function):
    """``apply(grad_out, grad_lse, grad_weights, query, ..., center, needs, *options)``: see the operator's schema."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return BACKWARD(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        options = inputs[N_BWD_TENSORS:]
        require_no_slope_gradient(options)
        # Neither out, lse nor weights: they follow from the inputs, and are differentiated there.
        ctx.save_for_backward(*inputs[:8], *inputs[12:16], *options[:N_OPTION_TENSORS])
        ctx.needs = inputs[N_BWD_TENSORS - 1]
        ctx.scalars = options[N_OPTION_TENSORS:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        options = options_of((*saved[12:], *ctx.scalars))
        wanted = (*ctx.needs_input_grad[:8], *ctx.needs_input_grad[12:16])
        asked = [grad if need else None for grad, need in zip(grads, ctx.needs, strict=True)]
        found = second_order(asked, saved[:3], saved[3:12], options, wanted, reference.additive_core)
        return (*found[:8], None, None, None, None, *found[8:], *((None,) * (1 + _N_OPTIONS)))


_ROLES = (_vmap.BATCH, _vmap.BATCH, _vmap.BATCH, _vmap.GLOBAL, _vmap.GLOBAL)  # query ... score_bias
_OPTION_ROLES = _vmap.OPTION_ROLES[:-1]  # without the scale
_FWD_ROLES = (*_ROLES, *_vmap.INPUT_ROLES[3:], *_OPTION_ROLES)
_BWD_ROLES = (
    *(_vmap.BATCH,) * 3, *_ROLES, *(_vmap.BATCH,) * 4, *_vmap.INPUT_ROLES[3:], _vmap.PLAIN, *_OPTION_ROLES
)  # fmt: skip
_BWD_INPUTS = (3, 4, 5, 6, 7, 12, 13, 14, 15)  # where query ... center sit among the backward's arguments

_library = ops.LIBRARY
for _name, _call, _function in (
    ("additive_attention_fwd", FORWARD, AdditiveOperatorForward),
    ("additive_attention_bwd", BACKWARD, AdditiveOperatorBackward),
):
    _library.impl(_name, autograd_kernel(_name, _call, _function), "Autograd")
torch.library.register_vmap(
    "attnfast::additive_attention_fwd", _vmap.forward_rule(FORWARD, _FWD_ROLES, N_INPUTS), lib=_library
)
torch.library.register_vmap(
    "attnfast::additive_attention_bwd", _vmap.backward_rule(BACKWARD, _BWD_ROLES, _BWD_INPUTS), lib=_library
)
