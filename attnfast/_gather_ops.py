"""The torch operators of reads by index: allocation, fake kernels.

``weighted_gather``: indices int64 ``[B, K]`` (slots, or -1), weights ``[B, K]``, values ``[N, D_v]`` floating or int8
with float32 scales ``[N]``; the output ``[B, D_v]`` has the dtype of the weights. ``product_keys``: the merge of the
best of two halves. As :mod:`attnfast.ops` is for attention: the same function is called directly and as an operator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from attnfast import ops
from attnfast._ext import _C, cuda_binary
from attnfast.ops import LIBRARY

# --- weighted_gather ------------------------------------------------------------------------------------------------


def weighted_gather_fwd(indices: Tensor, weights: Tensor, values: Tensor, scales: Tensor | None) -> Tensor:
    """Run the forward kernel."""
    out = weights.new_empty(indices.shape[0], values.shape[1])
    run = _gather if values.is_cpu else gather_on_device
    run(indices, weights, values, scales, out)
    return out


def _gather(indices: Tensor, weights: Tensor, values: Tensor, scales: Tensor | None, out: Tensor) -> None:
    _C.weighted_gather_fwd(indices.contiguous(), _real(weights, values), values, ops.contiguous(scales), out)


def gather_on_device(indices: Tensor, weights: Tensor, values: Tensor, scales: Tensor | None, out: Tensor) -> None:
    """As on the CPU, but an index that is neither a slot nor -1 counts as -1: looking would wait for the device."""
    binary = cuda_binary()
    binary.weighted_gather_fwd(indices.contiguous(), _real(weights, values), values, ops.contiguous(scales), out)


def weighted_gather_bwd(
    grad_out: Tensor, indices: Tensor, weights: Tensor, values: Tensor, scales: Tensor | None, needs: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """Gradients of (weights, values), the latter dense; an empty tensor for one that ``needs`` does not ask for."""
    grad_values = torch.zeros_like(values, memory_format=torch.contiguous_format) if needs[1] else None
    grad_weights = _backward(grad_out, indices, weights, values, scales, needs[0], grad_values, None)
    return (
        ops.nothing(weights, weights.dtype) if grad_weights is None else grad_weights.to(weights.dtype),
        ops.nothing(values, values.dtype) if grad_values is None else grad_values,
    )


def weighted_gather_sparse_bwd(
    grad_out: Tensor, indices: Tensor, weights: Tensor, values: Tensor, needs_weights: bool
) -> tuple[Tensor | None, Tensor]:
    """Gradients of (weights, values), the latter sparse and coalesced: a row for each slot that occurs, ascending."""
    made: list[Tensor] = []

    def allocate(count: int) -> tuple[Tensor, Tensor]:
        rows, sums = indices.new_empty(count), values.new_empty(count, values.shape[1])
        made.extend((rows, sums))
        return rows, sums

    grad_weights = _backward(grad_out, indices, weights, values, None, needs_weights, None, allocate)
    rows, sums = made
    grad_values = torch.sparse_coo_tensor(
        rows.unsqueeze(0), sums, tuple(values.shape), is_coalesced=True, check_invariants=False
    )
    return None if grad_weights is None else grad_weights.to(weights.dtype), grad_values


# What a sparse gradient is written to, given its number of rows: their slots and the sums.
Allocate = Callable[[int], tuple[Tensor, Tensor]]


def _backward(
    grad_out: Tensor, indices: Tensor, weights: Tensor, values: Tensor, scales: Tensor | None, needs_weights: bool,
    grad_values: Tensor | None, allocate: Allocate | None,
) -> Tensor | None:  # fmt: skip
    grad_weights = None
    if needs_weights:
        grad_weights = weights.new_empty(weights.shape, dtype=ops.real_dtype(values.dtype))
    run = _differentiate if values.is_cpu else differentiate_on_device
    run(grad_out.resolve_neg(), indices, weights, values, scales, grad_weights, grad_values, allocate)
    return grad_weights


def _differentiate(
    grad_out: Tensor, indices: Tensor, weights: Tensor, values: Tensor, scales: Tensor | None,
    grad_weights: Tensor | None, grad_values: Tensor | None, allocate: Allocate | None,
) -> None:  # fmt: skip
    _C.weighted_gather_bwd(
        _real(grad_out, values), indices.contiguous(), _real(weights, values), values, ops.contiguous(scales),
        grad_weights, grad_values, allocate,
    )  # fmt: skip


def differentiate_on_device(
    grad_out: Tensor, indices: Tensor, weights: Tensor, values: Tensor, scales: Tensor | None,
    grad_weights: Tensor | None, grad_values: Tensor | None, allocate: Allocate | None,
) -> None:  # fmt: skip
    """The two gradients on CUDA. That of the values is dense (zeros in ``grad_values``) or goes to ``allocate``.

    The picks are sorted by torch, whose stable sort on a device is CUB's radix sort and knows where to get its
    workspace. Only the number of rows of a sparse gradient waits for the device.
    """
    slots = order = ranks = partial_sums = None
    binary, indices = cuda_binary(), indices.contiguous()
    if grad_values is not None or allocate is not None:
        count = values.shape[0]
        picks = indices.flatten()
        picks = picks.where((picks >= 0) & (picks < count), count)
        if count < 2**31:  # half the digits to sort by
            picks = picks.to(torch.int32)
        slots, order = picks.sort(stable=True)
        slots = slots.to(torch.int64)
        if allocate is not None:
            begins = slots < count
            begins[1:] &= slots[1:] != slots[:-1]
            ranks = begins.cumsum(0) - 1
            found = slots[begins]
            rows, grad_values = allocate(found.shape[0])
            rows.copy_(found)
        partial_sums = grad_out.new_empty(
            (binary.weighted_gather_partial_rows(indices.numel()), values.shape[1]),
            dtype=ops.real_dtype(values.dtype),
        )
    binary.weighted_gather_bwd(
        _real(grad_out, values), indices, _real(weights, values), values, ops.contiguous(scales), grad_weights,
        slots, order, ranks, partial_sums, grad_values,
    )  # fmt: skip


def _real(x: Tensor, values: Tensor) -> Tensor:
    return x.to(ops.real_dtype(values.dtype)).contiguous()


def _gather_fwd_fake(indices, weights, values, scales):  # type: ignore[no-untyped-def]
    return weights.new_empty(indices.shape[0], values.shape[1])


def _gather_bwd_fake(grad_out, indices, weights, values, scales, needs):  # type: ignore[no-untyped-def]
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) if need else ops.nothing(x, x.dtype)
        for x, need in zip((weights, values), needs, strict=True)
    )


# --- product_keys ---------------------------------------------------------------------------------------------------


_merge: Any = _C.product_keys


def product_keys(
    row_scores: Tensor, row_indices: Tensor, column_scores: Tensor, column_indices: Tensor, side: int, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The k best pairs of each row: slots, and the ranks of their halves among the candidates, int64 ``[B, k]``.

    Scores float32 or float64 ``[B, candidates]``, descending, with their indices below `side`.
    """
    slots, row_ranks, column_ranks = results = _allocate_picks(row_indices, k)
    run = _merge if row_scores.is_cpu else cuda_binary().product_keys
    run(
        row_scores.contiguous(), row_indices.contiguous(), column_scores.contiguous(), column_indices.contiguous(),
        side, slots, row_ranks, column_ranks,
    )  # fmt: skip
    return results


def _allocate_picks(row_indices: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    shape = (row_indices.shape[0], k)
    return row_indices.new_empty(shape), row_indices.new_empty(shape), row_indices.new_empty(shape)


def _product_keys_fake(row_scores, row_indices, column_scores, column_indices, side, k):  # type: ignore[no-untyped-def]
    return _allocate_picks(row_indices, k)


# --- torch.library --------------------------------------------------------------------------------------------------

LIBRARY.define(
    "weighted_gather_fwd(Tensor indices, Tensor weights, Tensor values, Tensor? scales) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define(
    "weighted_gather_bwd(Tensor grad_out, Tensor indices, Tensor weights, Tensor values, Tensor? scales, "
    "bool[2] needs) -> (Tensor grad_weights, Tensor grad_values)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define(
    "product_keys(Tensor row_scores, Tensor row_indices, Tensor column_scores, Tensor column_indices, SymInt side, "
    "SymInt k) -> (Tensor slots, Tensor row_ranks, Tensor column_ranks)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
for _device in ("CPU", "CUDA"):
    LIBRARY.impl("weighted_gather_fwd", weighted_gather_fwd, _device)
    LIBRARY.impl("weighted_gather_bwd", weighted_gather_bwd, _device)
    LIBRARY.impl("product_keys", product_keys, _device)
torch.library.register_fake("attnfast::weighted_gather_fwd", _gather_fwd_fake, lib=LIBRARY)
torch.library.register_fake("attnfast::weighted_gather_bwd", _gather_bwd_fake, lib=LIBRARY)
torch.library.register_fake("attnfast::product_keys", _product_keys_fake, lib=LIBRARY)
