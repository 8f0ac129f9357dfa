"""Differentiation of the memory operators, and the choice between the routes. One section a function.

The routes are those of :mod:`attnfast.autograd`. Kernels take long enough here for one autograd.Function, in the
setup_context form that functorch needs, to serve every route with a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from attnfast import _memory_ops, _vmap, autograd, ops, reference
from attnfast._operator_autograd import autograd_kernel
from attnfast._reference_memory import picked_scores

# --- topk_scores ----------------------------------------------------------------------------------------------------

TOPK_FORWARD: Any = torch.ops.attnfast.topk_scores_fwd.default
TOPK_BACKWARD: Any = torch.ops.attnfast.topk_scores_bwd.default


def topk_scores(
    query: Tensor, keys: Tensor, mask: Tensor | None, k: int, scale: float, sparse_grad: bool = False,
    key_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scores and indices ``[B, k]`` for ``query [B, D]``, ``keys [N, D]``, their scales ``[N]`` in int8 and a mask
    ``[B or 1, N]``, validated.
    """
    route = autograd.plan(query, keys)
    sparse_grad = sparse_grad and keys.requires_grad and torch.is_grad_enabled()
    if sparse_grad:
        autograd.require_eager_for_sparse(route)
    if route == "reference":
        return reference.topk_scores(query, keys, k, scale=scale, mask=mask, key_scales=key_scales)
    arguments = (query, keys, key_scales, mask, k, scale)
    if route == "kernel":
        try:
            return _memory_ops.topk_scores_fwd(*arguments)
        except TypeError:
            if autograd.all_have_storage(query, keys, key_scales, mask):
                raise
    if sparse_grad:
        return TopkScoresSparse.apply(*arguments)
    if route == "function" or autograd.functorch_differentiates():
        return TopkScoresForward.apply(*arguments)
    return TOPK_FORWARD(*arguments)


class TopkScoresForward(Function):
    """``apply(query, keys, key_scales, mask, k, scale)`` with the operator's two results."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return TOPK_FORWARD(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        query, keys, key_scales, _, _, ctx.scale = inputs
        ctx.save_for_backward(query, keys, key_scales, output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if grads[0] is None:
            return (None,) * 6
        query, keys, key_scales, indices = ctx.saved_tensors
        found = _topk_backward(grads[0], query, keys, key_scales, indices, ctx.scale, ctx.needs_input_grad[:2])
        return (*found, None, None, None, None)


class TopkScoresSparse(TopkScoresForward):
    """The eager route with a sparse gradient of the keys."""

    generate_vmap_rule = False

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if grads[0] is None:
            return (None,) * 6
        autograd.require_unrecorded_sparse(grads[0])
        query, keys, _, indices = ctx.saved_tensors
        needs_query = ctx.needs_input_grad[0]
        found = _memory_ops.topk_scores_sparse_bwd(grads[0], query, keys, indices, ctx.scale, needs_query)
        return (*found, None, None, None, None)


def _topk_backward(
    grad_scores: Tensor, query: Tensor, keys: Tensor, key_scales: Tensor | None, indices: Tensor, scale: float,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """The backward operator with None for what ``needs`` does not ask for."""
    # Inside a functorch transform the operator's own Autograd kernel cannot be differentiated, the Function can.
    functorch = torch._C._are_functorch_transforms_active()
    backward: Callable[..., Any] = TopkScoresBackward.apply if functorch else TOPK_BACKWARD
    found = backward(grad_scores, query, keys, key_scales, indices, scale, needs)
    return found[0] if needs[0] else None, found[1] if needs[1] else None


class TopkScoresBackward(Function):
    """``apply(grad_scores, query, keys, key_scales, indices, scale, needs)``: see the operator's schema.

    Its results are linear in the gradient and in keys or query. So its own derivatives by these two are the same
    operator with the incoming gradients in their place, and that by ``grad_scores`` are products of picked rows.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return TOPK_BACKWARD(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:5])
        ctx.scale, ctx.needs = inputs[5:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_scores, query, keys, key_scales, indices = ctx.saved_tensors
        by_query, by_keys = (grad if need else None for grad, need in zip(grads, ctx.needs, strict=True))
        wanted, real = ctx.needs_input_grad, grad_scores.dtype
        found: list[Tensor | None] = [None, None, None]
        if wanted[0]:
            parts = []
            if by_query is not None:
                parts.append(picked_scores(by_query.to(real) * ctx.scale, keys, indices, key_scales))
            if by_keys is not None:
                parts.append(picked_scores(query.to(real) * ctx.scale, by_keys, indices))
            found[0] = sum(parts[1:], parts[0]).masked_fill(indices < 0, 0.0) if parts else None
        if wanted[1] and by_keys is not None:
            found[1] = _topk_backward(grad_scores, query, by_keys, None, indices, ctx.scale, (True, False))[0]
        if wanted[2] and by_query is not None:
            found[2] = _topk_backward(grad_scores, by_query, keys, None, indices, ctx.scale, (False, True))[1]
        return (*found, None, None, None, None)


def _topk_fwd_vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    """Samples that share the keys are further queries of one call; with keys of their own they run one by one."""
    query, keys, key_scales, mask, k, scale = operands = _in_front(in_dims, args)
    size, mapped = info.batch_size, [isinstance(dim, int) for dim in in_dims]
    if mapped[1] or mapped[2] or size == 0:
        return _vmap._one_by_one(TOPK_FORWARD, operands, mapped, size)
    rows = query.shape[1 if mapped[0] else 0]
    if mask is not None and (mapped[3] or mask.shape[0] != 1):
        mask = _stacked(mask, mapped[3], size).expand(size, rows, keys.shape[0]).flatten(0, 1)
    results = TOPK_FORWARD(_stacked(query, mapped[0], size).flatten(0, 1), keys, key_scales, mask, k, scale)
    return tuple(x.reshape(size, rows, k) for x in results), (0, 0)


def _topk_bwd_vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    grad_scores, query, keys, key_scales, indices, scale, needs = operands = _in_front(in_dims, args)
    size, mapped = info.batch_size, [isinstance(dim, int) for dim in in_dims]
    if mapped[2] or mapped[3] or needs[1] or size == 0:  # each sample has its own gradient of the keys
        return _vmap._one_by_one(TOPK_BACKWARD, operands, mapped, size)
    rows = query.shape[1 if mapped[1] else 0]
    grad_scores, query, indices = (
        _stacked(operands[at], mapped[at], size).flatten(0, 1) for at in (0, 1, 4)
    )  # fmt: skip
    grad_query, nothing = TOPK_BACKWARD(grad_scores, query, keys, key_scales, indices, scale, needs)
    if not needs[0]:
        return (grad_query, nothing), (None, None)
    return (grad_query.reshape(size, rows, -1), nothing), (0, None)


def _in_front(in_dims: Any, args: Sequence[Any]) -> list[Any]:
    return [arg.movedim(dim, 0) if isinstance(dim, int) else arg for arg, dim in zip(args, in_dims, strict=True)]


def _stacked(x: Tensor, mapped: bool, size: int) -> Tensor:
    return x if mapped else x.expand(size, *x.shape)


for _name, _call, _function, _rule in (
    ("topk_scores_fwd", TOPK_FORWARD, TopkScoresForward, _topk_fwd_vmap),
    ("topk_scores_bwd", TOPK_BACKWARD, TopkScoresBackward, _topk_bwd_vmap),
):
    ops.LIBRARY.impl(_name, autograd_kernel(_name, _call, _function), "Autograd")
    torch.library.register_vmap(f"attnfast::{_name}", _rule, lib=ops.LIBRARY)
