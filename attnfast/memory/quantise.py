"""int8 rows with a scale each: ``x ~ scale * code``, code an integer in [-127, 127].

``scale = max(abs(x)) / 127`` over the row, so the error of an element is at most half a step, ``max(abs(x)) / 254``,
and a few units of float32 rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST_CODE = 127


def quantise(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Codes ``[n, D]`` int8 and scales ``[n]`` float32 of finite rows ``[n, D]``."""
    exact = rows.float()
    scale = exact.abs().amax(-1) / LARGEST_CODE if rows.shape[-1] else exact.new_zeros(rows.shape[0])
    # A row of zeros has scale 0; so has one whose scale is below what float32 holds.
    steps = exact / scale.where(scale > 0, 1.0).unsqueeze(-1)
    return steps.round().clamp(-LARGEST_CODE, LARGEST_CODE).to(torch.int8), scale


def dequantise(codes: Tensor, scale: Tensor) -> Tensor:
    """``[..., D]`` codes and ``[...]`` scales to float32 rows."""
    return codes.float() * scale.unsqueeze(-1)
