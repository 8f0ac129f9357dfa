"""Additive scores in blocks of query rows, so that ``[B, H, T_q, T_k, D]`` never exists.

For the normalisers and priors that have no kernel. The forward keeps only its operands, the backward forms each block
anew. Where a second derivative is recorded, the backward is the formula itself with its graph, of full size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import Function

from attnfast._reference_core import ScoreFunction, additive_scores

# Elements of one [B, H, block, T_k, D] intermediate; about four of them live at a time.
_BLOCK_ELEMENTS = 2**20


def blocked_additive_scores(weight: Tensor, score_bias: Tensor | None) -> ScoreFunction:
    """:func:`_reference_core.additive_scores`, in blocks wherever torch runs eagerly and without transforms."""
    plain = additive_scores(weight, score_bias)

    def scores(query: Tensor, key: Tensor, visible: Tensor | None, exact: bool) -> Tensor:
        transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
        if torch.compiler.is_compiling() or transformed:
            return plain(query, key, visible, exact)
        return _BlockedScores.apply(query, key, weight, score_bias, visible if exact else None)

    return scores


class _BlockedScores(Function):
    """``apply(query, key, weight, score_bias or None, visible or None)``; `visible` asks to select each pair."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, weight: Tensor, score_bias: Tensor | None, visible: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(query, key, weight, score_bias, visible)
        out = query.new_empty(*query.shape[:3], key.shape[2])
        for first, size in _blocks(query, key):
            block = query.narrow(2, first, size)
            out.narrow(2, first, size).copy_(_formula((block, key, weight, score_bias), _rows(visible, first, size)))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, visible = ctx.saved_tensors
        needs = [tensor is not None and need for tensor, need in zip(inputs, ctx.needs_input_grad)]
        if torch.is_grad_enabled():
            wanted = [tensor for tensor, need in zip(inputs, needs) if need]
            grads = iter(torch.autograd.grad(_formula(inputs, visible), wanted, grad, create_graph=True))
            return (*(next(grads) if need else None for need in needs), None)
        query, *shared = inputs
        rows: list[Tensor] = []
        totals: list[Any] = [None] * 3
        with torch.enable_grad():
            for first, size in _blocks(query, shared[0]):
                block = [query.narrow(2, first, size), *shared]
                leaves = [None if x is None else x.detach().requires_grad_(need) for x, need in zip(block, needs)]
                wanted = [leaf for leaf, need in zip(leaves, needs) if need and leaf is not None]
                out = _formula(leaves, _rows(visible, first, size))
                grads = iter(torch.autograd.grad(out, wanted, grad.narrow(2, first, size)))
                if needs[0]:
                    rows.append(next(grads))
                for at, need in enumerate(needs[1:]):
                    if need:
                        piece = next(grads)
                        totals[at] = piece if totals[at] is None else totals[at] + piece
        return (torch.cat(rows, 2) if needs[0] else None, *totals, None)


def _formula(inputs: Sequence[Any], visible: Tensor | None) -> Tensor:
    query, key, weight, score_bias = inputs
    return additive_scores(weight, score_bias)(query, key, visible, visible is not None)


def _rows(visible: Tensor | None, first: int, size: int) -> Tensor | None:
    return visible if visible is None or visible.shape[2] == 1 else visible.narrow(2, first, size)


def _blocks(query: Tensor, key: Tensor) -> Iterator[tuple[int, int]]:
    """(first row, rows) of each block; one empty block where there are no rows."""
    rows = query.shape[2]
    width = query.shape[0] * query.shape[1] * key.shape[2] * query.shape[3]
    size = max(1, min(rows, _BLOCK_ELEMENTS // max(width, 1)))
    for first in range(0, max(rows, 1), size):
        yield first, min(size, rows - first)
