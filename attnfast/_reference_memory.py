"""Plain PyTorch specification of the memory functions: formulas, differentiable to any order. See `reference`.

One section a function.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnfast._reference_core import real_dtype

# --- topk_scores ----------------------------------------------------------------------------------------------------


def topk_scores(
    query: Tensor, keys: Tensor, k: int, *, scale: float = 1.0, mask: Tensor | None = None,
    key_scales: Tensor | None = None, sparse_grad: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    r"""Specification of :func:`attnfast.topk_scores`: the k largest of :math:`s_n = (scale\, query) \cdot keys_n`.

    Equal scores in the order of their slots, NaN as the largest score of all, and (-inf, -1) in the places for which no
    slot is visible. The choice has no derivative; the chosen scores have those of the formula. Forms ``[..., N]`` and
    ``[..., k, D]``. `sparse_grad` changes nothing here, and arguments are not validated.
    """
    real = torch.promote_types(real_dtype(query.dtype), real_dtype(keys.dtype))
    q, rows = query.to(real) * scale, keys.to(real)
    if key_scales is not None:
        rows = rows * key_scales.unsqueeze(-1)
    with torch.no_grad():
        indices = _largest(q @ rows.transpose(0, 1), k, mask)
    scores = picked_scores(q, rows, indices)
    # Products of rows are rounded otherwise than those of a matrix: near ties may change places.
    indices, order = indices.sort(dim=-1, stable=True)
    scores, final = scores.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    indices = indices.gather(-1, final)
    missing = indices < 0  # first in the order of slots, last in that of scores
    last = missing.to(torch.int8).sort(dim=-1, stable=True).indices
    return scores.gather(-1, last), indices.gather(-1, last)


def _largest(scores: Tensor, k: int, mask: Tensor | None) -> Tensor:
    """Slots of the k largest scores ``[..., N]``, in order; -1 for what is hidden."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices  # NaN first
    if mask is None:
        return order[..., :k]
    hidden = ~mask.expand(scores.shape).gather(-1, order)
    last = hidden.to(torch.int8).sort(dim=-1, stable=True).indices
    return order.masked_fill(hidden, -1).gather(-1, last)[..., :k]


def picked_scores(query: Tensor, keys: Tensor, indices: Tensor, key_scales: Tensor | None = None) -> Tensor:
    """``query [..., D]`` times the rows of ``keys [N, D]`` at ``indices [..., K]``; -inf where the index is -1."""
    missing = indices < 0
    rows = keys[indices.clamp_min(0)].to(query.dtype)
    if key_scales is not None:
        rows = rows * key_scales[indices.clamp_min(0)].unsqueeze(-1)
    rows = rows.masked_fill(missing.unsqueeze(-1), 0.0)
    return (query.unsqueeze(-2) * rows).sum(-1).masked_fill(missing, -torch.inf)
