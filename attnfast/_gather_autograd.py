"""Differentiation of reads by index, and the choice between the routes of :mod:`attnfast.autograd`.

The output is linear in weights and in values, its backward linear in the gradient and either of them: all derivatives,
of every order, are the two operators again, with gradients in the place of weights and values.

A sparse gradient of the values exists in eager mode only: neither torch.compile nor ``torch.func`` know sparse
gradients of custom operators, and it has no derivative. Each is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from attnfast import _gather_ops, _vmap, autograd, ops, reference
from attnfast._operator_autograd import autograd_kernel

FORWARD: Any = torch.ops.attnfast.weighted_gather_fwd.default
BACKWARD: Any = torch.ops.attnfast.weighted_gather_bwd.default
PRODUCT_KEYS: Any = torch.ops.attnfast.product_keys.default

# --- weighted_gather ------------------------------------------------------------------------------------------------


def weighted_gather(
    indices: Tensor, weights: Tensor, values: Tensor, scales: Tensor | None, sparse_grad: bool
) -> Tensor:
    """``[B, D_v]`` for indices and weights ``[B, K]``, values ``[N, D_v]`` and scales ``[N]``, validated."""
    route = autograd.plan(weights, values)
    if sparse_grad and values.requires_grad and torch.is_grad_enabled():
        autograd.require_eager_for_sparse(route)
    if route == "reference":
        return reference.weighted_gather(indices, weights, values, scales=scales)
    arguments = (indices, weights, values, scales)
    try:
        if route == "function":
            result: Tensor = WeightedGatherFunction.apply(*arguments, sparse_grad)
            return result
        if route == "kernel":
            return _gather_ops.weighted_gather_fwd(*arguments)
    except TypeError:
        if autograd.all_have_storage(*arguments):
            raise
    operator: Callable[..., Tensor] = OperatorForward.apply if autograd.functorch_differentiates() else FORWARD
    return operator(*arguments)


class WeightedGatherFunction(Function):
    """The eager route with a gradient: ``apply(indices, weights, values, scales, sparse_grad)``.

    A table is saved only where the weights want a gradient: one that is written to between forward and backward is no
    error otherwise.
    """

    @staticmethod
    def forward(
        ctx: Any, indices: Tensor, weights: Tensor, values: Tensor, scales: Tensor | None, sparse_grad: bool
    ) -> Tensor:
        by_weights, by_values = ctx.needs_input_grad[1:3]
        ctx.save_for_backward(indices, weights if by_values else None, values if by_weights else None, scales)
        ctx.table = (values.shape, values.dtype)
        ctx.sparse_grad = sparse_grad
        ctx.set_materialize_grads(False)
        return _gather_ops.weighted_gather_fwd(indices, weights, values, scales)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_out is None:
            return (None,) * 5
        indices, weights, values, scales = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:3]
        if weights is None:  # stand-ins: only their shapes and dtypes are looked at
            weights = grad_out.new_zeros(()).expand(indices.shape)
        if values is None:
            shape, dtype = ctx.table
            values = grad_out.new_zeros((), dtype=dtype).expand(shape)
        grads: tuple[Tensor | None, ...]
        if ctx.sparse_grad and needs[1]:
            autograd.require_unrecorded_sparse(grad_out)
            grads = _gather_ops.weighted_gather_sparse_bwd(grad_out, indices, weights, values, needs[0])
        else:
            grads = _run_backward(grad_out, indices, weights, values, scales, needs)
        return (None, *grads, None, None)


def _run_backward(
    grad_out: Tensor, indices: Tensor, weights: Tensor, values: Tensor, scales: Tensor | None, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The backward operator, or its kernel where nobody looks, with None for what ``needs`` does not ask for."""
    arguments = (grad_out, indices, weights, values, scales, needs)
    if torch._C._are_functorch_transforms_active():
        found = OperatorBackward.apply(*arguments)
    elif autograd.intercepted() or type(grad_out) is not Tensor or not autograd.all_have_storage(grad_out):
        found = BACKWARD(*arguments)
    else:
        found = _gather_ops.weighted_gather_bwd(*arguments)
    return found[0] if needs[0] else None, found[1] if needs[1] else None


class OperatorForward(Function):
    """``apply(indices, weights, values, scales)``: the operator."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Tensor:
        out: Tensor = FORWARD(*args)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        indices, weights, values, scales = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:3]
        return (None, *_run_backward(grad_out, indices, weights, values, scales, needs), None)


class OperatorBackward(Function):
    """``apply(grad_out, indices, weights, values, scales, needs)``: see the operator's schema."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = BACKWARD(*args)
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:5])
        ctx.needs = inputs[5]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_out, indices, weights, values, scales = ctx.saved_tensors
        by_weights, by_values = (grad if need else None for grad, need in zip(grads, ctx.needs, strict=True))
        wanted = ctx.needs_input_grad
        forward: Callable[..., Tensor] = FORWARD
        if torch._C._are_functorch_transforms_active():
            forward = OperatorForward.apply
        found: list[Tensor | None] = [None] * 6
        if wanted[0]:
            parts = []
            if by_weights is not None:
                parts.append(forward(indices, by_weights, values, scales))
            if by_values is not None:
                parts.append(forward(indices, weights, by_values, None))
            found[0] = sum(parts[1:], parts[0]) if parts else None
        if wanted[2] and by_values is not None:
            found[2] = _run_backward(grad_out, indices, weights, by_values, None, (True, False))[0]
        if wanted[3] and by_weights is not None:
            found[3] = _run_backward(grad_out, indices, by_weights, values, scales, (False, True))[1]
        return tuple(found)


# --- product_keys ---------------------------------------------------------------------------------------------------


def product_keys(
    row_scores: Tensor, row_indices: Tensor, column_scores: Tensor, column_indices: Tensor, side: int, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The choice of pairs, which has no derivative; see :func:`attnfast._gather_ops.product_keys`."""
    arguments = (row_scores.detach(), row_indices, column_scores.detach(), column_indices, side, k)
    if autograd.plan(row_scores, column_scores) in ("kernel", "function"):
        try:
            return _gather_ops.product_keys(*arguments)
        except TypeError:
            if autograd.all_have_storage(row_scores, column_scores):
                raise
    found: tuple[Tensor, Tensor, Tensor] = PRODUCT_KEYS(*arguments)
    return found


# --- vmap -----------------------------------------------------------------------------------------------------------


def _operands(in_dims: Any, args: Sequence[Any]) -> tuple[list[Any], list[bool]]:
    """Mapped dimensions in front, and which arguments are mapped."""
    mapped = [isinstance(dim, int) for dim in in_dims]
    return [
        arg.movedim(dim, 0) if isinstance(dim, int) else arg for arg, dim in zip(args, in_dims, strict=True)
    ], mapped


def _rows(x: Tensor, mapped: bool, size: int) -> Tensor:
    return (x if mapped else x.expand(size, *x.shape)).flatten(0, 1)


def _forward_rule(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    """Samples that share the table are further rows of one call; with tables of their own they run one by one."""
    operands, mapped = _operands(in_dims, args)
    size = info.batch_size
    if mapped[2] or mapped[3] or size == 0:
        (out,), (dim,) = _vmap._one_by_one(lambda *sample: (FORWARD(*sample),), operands, mapped, size)
        return out, dim
    indices, weights = (_rows(operands[at], mapped[at], size) for at in (0, 1))
    out = FORWARD(indices, weights, *operands[2:])
    return out.reshape(size, indices.shape[0] // size, out.shape[1]), 0


def _backward_rule(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    operands, mapped = _operands(in_dims, args)
    size, needs = info.batch_size, operands[5]
    if mapped[3] or mapped[4] or needs[1] or size == 0:  # each sample has its own gradient of the table
        return _vmap._one_by_one(BACKWARD, operands, mapped, size)
    grad_out, indices, weights = (_rows(operands[at], mapped[at], size) for at in (0, 1, 2))
    grad_weights, nothing = BACKWARD(grad_out, indices, weights, *operands[3:])
    if not needs[0]:
        return (grad_weights, nothing), (None, None)
    return (grad_weights.reshape(size, indices.shape[0] // size, indices.shape[1]), nothing), (0, None)


def _product_keys_rule(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    operands, mapped = _operands(in_dims, args)
    size, k = info.batch_size, operands[5]
    if size == 0:
        return _vmap._one_by_one(PRODUCT_KEYS, operands, mapped, size)
    halves = [_rows(x, is_mapped, size) for x, is_mapped in zip(operands[:4], mapped, strict=False)]
    results = PRODUCT_KEYS(*halves, *operands[4:])
    return tuple(x.reshape(size, x.shape[0] // size, k) for x in results), (0, 0, 0)


for _name, _function in (("weighted_gather_fwd", OperatorForward), ("weighted_gather_bwd", OperatorBackward)):
    _operator = getattr(torch.ops.attnfast, _name).default
    ops.LIBRARY.impl(_name, autograd_kernel(_name, _operator, _function), "Autograd")
for _name, _rule in (
    ("weighted_gather_fwd", _forward_rule),
    ("weighted_gather_bwd", _backward_rule),
    ("product_keys", _product_keys_rule),
):
    torch.library.register_vmap(f"attnfast::{_name}", _rule, lib=ops.LIBRARY)
