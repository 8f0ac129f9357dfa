"""Plain PyTorch specification of reads by index: weighted gather and product keys. See `reference`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attnfast._reference_core import real_dtype


class ProductKeyReadOutput(NamedTuple):
    """What :func:`attnfast.product_key_read` returns with ``return_aux=True``.

    Attributes
    ----------
    output : Tensor
        ``[..., D_v]``.
    indices : Tensor
        int64 ``[..., H, k]``: the slots of each head, best first.
    weights : Tensor
        ``[..., H, k]``: their softmax weights, float32 (float64 for float64).
    """

    output: Tensor
    indices: Tensor
    weights: Tensor


def weighted_gather(
    indices: Tensor, weights: Tensor, values: Tensor, *, scales: Tensor | None = None, sparse_grad: bool = False
) -> Tensor:
    r"""Specification of :func:`attnfast.weighted_gather`: :math:`\sum_j weights_j\, values_{indices_j}`.

    -1 takes no part. Forms ``[..., K, D_v]``; gradients are dense, whatever `sparse_grad` says. Arguments are not
    validated.
    """
    real = real_dtype(values.dtype)
    missing = indices < 0
    if values.shape[0]:
        rows = values[indices.clamp_min(0).long()].to(real)
    else:
        rows = values.new_zeros((*indices.shape, values.shape[1]), dtype=real)
    if scales is not None and values.shape[0]:
        rows = rows * scales[indices.clamp_min(0).long()].unsqueeze(-1)
    rows = rows.masked_fill(missing.unsqueeze(-1), 0.0)
    used = weights.to(real).masked_fill(missing, 0.0)
    return (used.unsqueeze(-1) * rows).sum(-2).to(weights.dtype)


def product_key_read(
    query: Tensor, row_keys: Tensor, column_keys: Tensor, values: Tensor, topk: int, *, scales: Tensor | None = None,
    sparse_grad: bool = False, return_aux: bool = False,
) -> Tensor | ProductKeyReadOutput:  # fmt: skip
    r"""Specification of :func:`attnfast.product_key_read`, which scores all :math:`n^2` slots.

    Slot :math:`i n + j` scores :math:`q_0 \cdot row_i + q_1 \cdot column_j`. Arguments are not validated.
    """
    real = torch.promote_types(real_dtype(query.dtype), real_dtype(row_keys.dtype))
    n = row_keys.shape[-2]
    halves = query.to(real).unbind(-2)
    rows, columns = (
        (half.unsqueeze(-2) * keys.to(real)).sum(-1) for half, keys in zip(halves, (row_keys, column_keys), strict=True)
    )
    with torch.no_grad():
        sums = rows.double().unsqueeze(-1) + columns.double().unsqueeze(-2)  # exact for all but float64
        indices = sums.flatten(-2).sort(dim=-1, descending=True, stable=True).indices[..., :topk]
    scores = rows.gather(-1, indices // n) + columns.gather(-1, indices % n)
    weights = scores.softmax(-1)
    flat = weights.flatten(-2).to(real_dtype(values.dtype))
    output = weighted_gather(indices.flatten(-2), flat, values, scales=scales)
    output = output.to(values.dtype if values.is_floating_point() else query.dtype)
    return ProductKeyReadOutput(output, indices, weights) if return_aux else output
