"""Picks of a memory on several ranks: the best of several lists, and the gradient of scores that are known."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable


def best_of(scores: Tensor, slots: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of pairs ``[B, P k]`` that lie by slot where scores are equal; -1 is no pair, and comes last."""
    order = (slots < 0).to(torch.int8).argsort(dim=-1, stable=True)
    scores, slots = scores.gather(-1, order), slots.gather(-1, order)
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return scores.gather(-1, order), slots.gather(-1, order)


def best_of_block(scores: Tensor, k: int) -> Tensor:
    """Positions ``[B, k]``, in their own order, of the k best of ``[B, n]``; among equal scores the first."""
    if k == scores.shape[1] or bool(scores.isnan().any()):
        return scores.sort(dim=-1, descending=True, stable=True).indices[:, :k].sort(dim=-1).values
    least = scores.topk(k, dim=-1).values[:, -1:]  # which of several equal ones topk takes, nobody says
    above, equal = scores > least, scores == least
    chosen = above | (equal & (equal.cumsum(-1) <= k - above.sum(-1, keepdim=True)))
    return chosen.nonzero()[:, 1].view(len(scores), k)


class Picked(Function):
    """Scores that are known, with the gradient of ``scale * query . rows``: ``[B, k]`` of ``[B, D]`` and ``[B, k,
    D]``."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, query: Tensor, rows: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(query, rows)
        ctx.scale = scale
        return scores.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor, None]:
        query, rows = ctx.saved_tensors
        grad = grad * ctx.scale
        grad_query = (grad.unsqueeze(1) @ rows.to(grad.dtype)).squeeze(1).to(query.dtype)
        return None, grad_query, (grad.unsqueeze(-1) * query.unsqueeze(1).to(grad.dtype)).to(rows.dtype), None
