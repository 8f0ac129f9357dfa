"""Derivatives of the operators ``attnfast::dot_attention_fwd`` and ``attnfast::dot_attention_bwd``.

Two ways lead here: torch.compile, dispatch modes, subclasses and users who call ``torch.ops.attnfast`` reach the
kernels of the Autograd dispatch key below; ``torch.func`` transforms cannot see through those, for them
``autograd._unusual`` calls :class:`OperatorForward` itself. The classes are in the setup_context form, which functorch
needs and which costs more to call than the plain form of ``autograd.DotAttentionFunction``.

The Autograd kernels are written out, instead of ``torch.library.register_autograd``, because the latter lets a
forward-mode tangent vanish without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import Function

from attnfast import ops
from attnfast._second_order import second_order
from attnfast.ops import N_BWD_TENSORS, N_FWD_TENSORS, N_OPTION_TENSORS, DotAttentionOptions

FORWARD = torch.ops.attnfast.dot_attention_fwd.default
BACKWARD = torch.ops.attnfast.dot_attention_bwd.default
_N_OPTIONS = len(DotAttentionOptions._fields)
_SLOPES = DotAttentionOptions._fields.index("alibi_slopes")


def has_tangent(values: Sequence[Any]) -> bool:
    """Whether one of the tensors is a dual tensor of the current forward-mode level."""
    if forward_ad._current_level < 0:
        return False
    floats = (x for x in values if isinstance(x, Tensor) and x.is_floating_point())
    return any(forward_ad.unpack_dual(x).tangent is not None for x in floats)


def require_no_slope_gradient(options: Sequence[Any]) -> None:
    slopes = options[_SLOPES]
    if slopes is not None and slopes.requires_grad:
        raise ValueError("alibi_slopes: has no gradient, got a tensor with requires_grad=True; use .detach() or a bias")


class OperatorForward(Function):
    """``apply(query, key, value, bias, bias2, sink, center, *options)`` with the operator's four results."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return FORWARD(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        tensors, options = inputs[:N_FWD_TENSORS], inputs[N_FWD_TENSORS:]
        require_no_slope_gradient(options)
        ctx.save_for_backward(*tensors, *options[:N_OPTION_TENSORS], *output)
        ctx.scalars = options[N_OPTION_TENSORS:]
        ctx.mark_non_differentiable(output[3])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_out, grad_lse, grad_weights, _ = grads
        nothing = (None,) * (N_FWD_TENSORS + _N_OPTIONS)
        if ctx.scalars[-1] == ops.WEIGHTS_NONE:
            grad_weights = None
        if grad_out is None and grad_lse is None and grad_weights is None:
            return nothing
        saved = ctx.saved_tensors
        tensors, options, output = saved[:N_FWD_TENSORS], saved[N_FWD_TENSORS:-4], saved[-4:]
        needs = ctx.needs_input_grad[:N_FWD_TENSORS]
        found = run_backward(
            grad_out, grad_lse, grad_weights, *tensors[:3], *output, *tensors[3:], needs, *options, *ctx.scalars
        )
        return (*found, *nothing[N_FWD_TENSORS:])


def run_backward(*args: Any) -> tuple[Tensor | None, ...]:
    """The backward operator with None for the gradients that ``needs`` does not ask for."""
    # Inside a functorch transform the operator's own Autograd kernel cannot be differentiated, the Function can.
    backward: Callable[..., Any] = OperatorBackward.apply if torch._C._are_functorch_transforms_active() else BACKWARD
    found = backward(*args)
    return tuple(grad if need else None for grad, need in zip(found, args[N_BWD_TENSORS - 1], strict=True))


class OperatorBackward(Function):
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
        ctx.save_for_backward(*inputs[:6], *inputs[10:14], *options[:N_OPTION_TENSORS])
        ctx.needs = inputs[N_BWD_TENSORS - 1]
        ctx.scalars = options[N_OPTION_TENSORS:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        options = DotAttentionOptions._make((*saved[10:], *ctx.scalars))
        wanted = (*ctx.needs_input_grad[:6], *ctx.needs_input_grad[10:14])
        asked = [grad if need else None for grad, need in zip(grads, ctx.needs, strict=True)]
        found = second_order(asked, saved[:3], saved[3:10], options, wanted)
        return (*found[:6], None, None, None, None, *found[6:], *((None,) * (1 + _N_OPTIONS)))


def autograd_kernel(name: str, operator: Callable[..., Any], function: type[Function]) -> Callable[..., Any]:
    def kernel(*args: Any) -> Any:
        if has_tangent(args):
            raise NotImplementedError(
                f"torch.ops.attnfast.{name} has no forward-mode derivative; call the functions of attnfast, which fall "
                "back to attnfast.reference under forward-mode AD"
            )
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
            if torch._C._are_functorch_transforms_active():
                raise NotImplementedError(
                    f"torch.ops.attnfast.{name} cannot be differentiated by torch.func; call the functions of attnfast"
                )
            return function.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    return kernel


def register(library: torch.library.Library) -> None:
    """Register the Autograd kernels of both operators."""
    library.impl("dot_attention_fwd", autograd_kernel("dot_attention_fwd", FORWARD, OperatorForward), "Autograd")
    library.impl("dot_attention_bwd", autograd_kernel("dot_attention_bwd", BACKWARD, OperatorBackward), "Autograd")
