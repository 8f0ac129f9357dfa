"""Local attention: windows around a centre that each row names, and the Gaussian prior around one.

A window becomes an interval of keys for each row before anything else sees it, so that kernels compare integers only,
and a centre may be any number. The prior is multiplied in by the kernel, where dropout is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnfast import _validate as check

_FAR = 2.0**62  # beyond every position, and exact in every floating type but float16, which is widened first


def window_center(x: Any, window: Any, names: str, target: Sequence[int]) -> None:
    """A centre for each row: numbers of any kind, with a window around them."""
    check.tensor("window_center", x)
    if x.dtype not in check.DTYPES and x.dtype not in check.LENGTH_DTYPES:
        raise TypeError(
            f"window_center: expected a floating or integer dtype, got {str(x.dtype).removeprefix('torch.')}"
        )
    if window is None:
        raise ValueError("window_center: expected a window (left, right) around it, got window=None")
    check.broadcastable("window_center", x, names, target)


def window_bounds(center: Tensor, left: int, right: int, tokens_k: int) -> Tensor:
    """The keys ``[begin, end)`` with ``center - left <= k <= center + right``, int64 ``[..., 2]``.

    A side of -1 is unbounded. Both ends lie in ``[0, tokens_k]``; a row whose centre is NaN gets ``[tokens_k, 0)``,
    which is empty. The window is piecewise constant in its centre, so there is no gradient.
    """
    center = center.detach().resolve_neg()
    if center.dtype.is_floating_point:
        # k is whole: k >= center - left means k >= ceil(center) - left, without a rounding.
        wide = center.double().clamp(-_FAR, _FAR)
        known = wide == wide
        wide = wide.where(known, 0.0)
        low, high = wide.ceil().long(), wide.floor().long()
    else:
        low = high = center.long()
        known = torch.ones_like(low, dtype=torch.bool)
    left, right = min(left, 2**61), min(right, 2**61)
    begin, end = torch.zeros_like(low), torch.full_like(high, tokens_k)
    if left >= 0:
        begin = low.clamp(left, left + tokens_k) - left
    if right >= 0:
        end = high.clamp(-right - 1, tokens_k - right - 1) + right + 1
    return torch.stack([begin.where(known, tokens_k), end.where(known, 0)], -1)


def is_gaussian(prior: Any) -> bool:
    """Whether a checked prior is the Gaussian, which the kernels know."""
    return isinstance(prior, tuple)


def gaussian_center(center: Tensor, query: Tensor) -> Tensor:
    """The centre of a checked Gaussian prior, ``[B or 1, H or 1, T_q or 1, 1]``, as the cores take it.

    Returns
    -------
    Tensor
        Contiguous ``[B, H, T_q]`` in the accumulation dtype; `query` is the folded ``[B, H, T_q, D]``.
    """
    real = torch.float64 if query.dtype == torch.float64 else torch.float32
    return center.squeeze(-1).to(real).expand(query.shape[:3]).contiguous()
