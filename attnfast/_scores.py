"""Scores that become plain dot products of prepared queries and keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def l2_center(key: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the finite keys of each head, ``[B, H_kv, 1, D]``, and how many there are, ``[B, H_kv, 1, 1]``."""
    finite = key.detach().isfinite().all(-1, keepdim=True)
    return key.detach().where(finite, 0.0).sum(2, keepdim=True), finite.sum(2, keepdim=True)


def l2_operands(query: Tensor, key: Tensor, center: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Queries and keys with two more columns, so that their dot product is ``-|q - k|^2`` exactly.

    ``[2q, -|q|^2, 1] . [k, 1, -|k|^2]``. Both are centred first, on `center` ``[B, H_kv, 1, D]`` or the keys' mean (the
    score does not depend on the origin), since squared norms cancel. A non-finite row becomes NaN and passes its
    gradient through unchanged, so that the zero gradient of a masked row stays zero.
    """
    finite_k = key.detach().isfinite().all(-1, keepdim=True)
    finite_q = query.detach().isfinite().all(-1, keepdim=True)
    safe_k, safe_q = key.where(finite_k, 0.0), query.where(finite_q, 0.0)
    if key.shape[2] > 0:
        if center is None:
            total, count = l2_center(key)
            center = total / count.clamp_min(1)
        safe_k = safe_k - center
        groups = query.shape[1] // max(center.shape[1], 1)
        safe_q = safe_q - (center if groups == 1 else center.repeat_interleave(groups, 1))
    one_q, one_k = torch.ones_like(safe_q[..., :1]), torch.ones_like(safe_k[..., :1])
    columns_q = torch.cat([2.0 * safe_q, -safe_q.square().sum(-1, keepdim=True), one_q], -1)
    columns_k = torch.cat([safe_k, one_k, -safe_k.square().sum(-1, keepdim=True)], -1)
    bad_q = torch.nn.functional.pad(query, (0, 2)) + math.nan
    bad_k = torch.nn.functional.pad(key, (0, 2)) + math.nan
    return torch.where(finite_q, columns_q, bad_q), torch.where(finite_k, columns_k, bad_k)
