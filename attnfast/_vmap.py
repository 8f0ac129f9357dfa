"""Batching rules of the attnfast operators under ``torch.vmap`` and the other functorch transforms.

The mapped dimension X is folded into the batch dimension, ``[X, B, ...] -> [X * B, ...]``: one kernel launch, all
threads busy. An operand that is not mapped is shared by the X samples; where strides cannot say so (that takes stride 0
for X and a free stride for B) folding copies it X times. Such copies are made only while they stay below the size of
the mapped operands and results, which are there anyway, so a large mask or a shared key cache is never multiplied.
Otherwise, and for dropout (whose mask is the one of the unmapped call), packed input and gradients of operands that are
shared over B, the samples run one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# How an argument takes part in the fold.
BATCH = "batch"  # dimension 0 is B
BROADCAST = "broadcast"  # dimension 0 is B or 1
GLOBAL = "global"  # has no batch dimension
SEQUENTIAL = "sequential"  # its presence asks for one sample after another
PLAIN = "plain"  # not a tensor

INPUT_ROLES = (BATCH, BATCH, BATCH, BROADCAST, BROADCAST, GLOBAL, BATCH)  # query ... center
OPTION_ROLES = (BROADCAST, BATCH, BATCH, SEQUENTIAL, SEQUENTIAL, BROADCAST, SEQUENTIAL, BROADCAST) + (PLAIN,) * 8
_FWD_ROLES = INPUT_ROLES + OPTION_ROLES
_BWD_ROLES = (BATCH,) * 10 + INPUT_ROLES[3:] + (PLAIN,) + OPTION_ROLES
_BWD_INPUTS = (3, 4, 5, 10, 11, 12, 13)  # where query ... center sit among the backward's arguments


class _CannotFold(Exception):
    """The samples have to run one after another."""


def _is_nothing(tensor: Tensor) -> bool:
    return tensor.ndim == 1 and tensor.numel() == 0


def _stack(tensor: Tensor, mapped: bool, role: str, own_grad: bool, size: int, batch: int) -> Tensor:
    """Bring one operand to ``[X, B, ...]`` without copying, or leave it alone where all samples can share it."""
    if role == SEQUENTIAL or (role == GLOBAL and (mapped or own_grad)):
        raise _CannotFold
    if role == GLOBAL or (role == BATCH and not mapped and _is_nothing(tensor)):
        return tensor
    if role == BROADCAST and not mapped and not own_grad and tensor.size(0) == 1:
        return tensor
    stacked = tensor if mapped else tensor.expand(size, *tensor.shape)
    if stacked.size(1) != batch:
        if own_grad:
            raise _CannotFold  # its gradient is summed over B but not over X
        stacked = stacked.expand(size, batch, *stacked.shape[2:])
    return stacked


def _fold(args: list[Any], mapped: list[bool], roles: Sequence[str], inputs: Sequence[int], needs: Sequence[bool],
          size: int, result_numel: int) -> list[Any]:  # fmt: skip
    """Fold every operand, or raise _CannotFold. Mapped operands come with X in front."""
    query = inputs[0]
    batch = args[query].size(1 if mapped[query] else 0)
    wanted = {at for at, need in zip(inputs, needs, strict=True) if need}
    folded = list(args)
    copied, present = 0, size * result_numel
    to_merge = []
    for at, role in enumerate(roles):
        tensor = args[at]
        if role == PLAIN or tensor is None:
            continue
        own_grad = at in wanted and role != BATCH
        stacked = folded[at] = _stack(tensor, mapped[at], role, own_grad, size, batch)
        present += tensor.numel() * mapped[at]
        if at in wanted:  # its gradient
            present += tensor.numel() * (1 if mapped[at] else size)
        if stacked is not tensor or mapped[at]:
            to_merge.append(at)
            if size > 1 and batch > 1 and stacked.stride(0) != batch * stacked.stride(1):
                copied += stacked.numel()
    if copied > present:
        raise _CannotFold
    for at in to_merge:
        folded[at] = folded[at].reshape(size * batch, *folded[at].shape[2:])
    return folded


def _rule(
    operator: Callable[..., Any], roles: Sequence[str], inputs: Sequence[int], info: Any, in_dims: Sequence[Any],
    args: Sequence[Any], result_numel: int, needs: Sequence[bool],
) -> tuple[Any, Any]:  # fmt: skip
    size = info.batch_size
    mapped = [isinstance(dim, int) for dim in in_dims]
    operands = [arg.movedim(dim, 0) if isinstance(dim, int) else arg for arg, dim in zip(args, in_dims, strict=True)]
    try:
        if size == 0:
            raise _CannotFold
        folded = _fold(operands, mapped, roles, inputs, needs, size, result_numel)
    except _CannotFold:
        return _one_by_one(operator, operands, mapped, size)
    results = operator(*folded)
    outputs = tuple(r if _is_nothing(r) else r.reshape(size, r.size(0) // size, *r.shape[1:]) for r in results)
    return outputs, tuple(None if _is_nothing(r) else 0 for r in results)


def _one_by_one(operator: Callable[..., Any], operands: list[Any], mapped: list[bool], size: int) -> tuple[Any, Any]:
    if size == 0:  # the results' shapes, from one made-up sample
        pairs = zip(operands, mapped, strict=True)
        sample = [arg.new_zeros(arg.shape[1:]) if is_mapped else arg for arg, is_mapped in pairs]
        results = operator(*sample)
        return tuple(r.new_empty((0, *r.shape)) for r in results), (0,) * len(results)
    samples = [
        operator(*(arg[i] if is_mapped else arg for arg, is_mapped in zip(operands, mapped, strict=True)))
        for i in range(size)
    ]
    columns = list(zip(*samples, strict=True))
    outputs = tuple(column[0] if _is_nothing(column[0]) else torch.stack(column) for column in columns)
    return outputs, tuple(None if _is_nothing(column[0]) else 0 for column in columns)


def forward_rule(operator: Callable[..., Any], roles: Sequence[str], inputs: int) -> Callable[..., tuple[Any, Any]]:
    """The rule of a forward operator whose first `inputs` arguments are query, key, value and what else it has."""

    def rule(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        query, value = args[0], args[2]
        query_shape = [n for at, n in enumerate(query.shape) if at != in_dims[0]]
        value_shape = [n for at, n in enumerate(value.shape) if at != in_dims[2]]
        result_numel = query_shape[0] * query_shape[1] * query_shape[2] * value_shape[3]
        return _rule(operator, roles, range(inputs), info, in_dims, args, result_numel, (False,) * inputs)

    return rule


def backward_rule(
    operator: Callable[..., Any], roles: Sequence[str], inputs: Sequence[int]
) -> Callable[..., tuple[Any, Any]]:
    """The rule of a backward operator: `inputs`: where the forward's inputs are; ``needs`` is the first plain one."""
    needs = roles.index(PLAIN)

    def rule(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        return _rule(operator, roles, inputs, info, in_dims, args, 0, args[needs])

    return rule


def register(library: torch.library.Library) -> None:
    """Register the batching rules of the dot operators."""
    forward, backward = torch.ops.attnfast.dot_attention_fwd.default, torch.ops.attnfast.dot_attention_bwd.default
    torch.library.register_vmap(
        "attnfast::dot_attention_fwd", forward_rule(forward, _FWD_ROLES, len(INPUT_ROLES)), lib=library
    )
    rule = backward_rule(backward, _BWD_ROLES, _BWD_INPUTS)
    torch.library.register_vmap("attnfast::dot_attention_bwd", rule, lib=library)
