"""The torch operators of the memory functions: allocation, fake kernels. One section a function.

As :mod:`attnfast.ops` is for attention: the same function is called directly and as an operator.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnfast import _gather_ops, ops
from attnfast._ext import _C, cuda_binary
from attnfast.ops import LIBRARY

# --- topk_scores ----------------------------------------------------------------------------------------------------
# query [B, D], keys [N, D] floating or int8 with key_scales [N], mask boolean [B, N] or [1, N]; scores and indices
# [B, k], see reference.topk_scores.

MAX_COUNT = 2048  # the largest k: a query's candidates stay in cache


def topk_scores_fwd(
    query: Tensor, keys: Tensor, key_scales: Tensor | None, mask: Tensor | None, k: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Run the forward kernel; returns scores in the accumulation dtype, and int64 indices."""
    scores, indices = _allocate_topk(query, k)
    mask = ops.expand(mask, (query.shape[0], keys.shape[0]))
    run = _choose if query.is_cpu else _choose_on_device
    run(query, _rows(keys), ops.contiguous(key_scales), mask, scores, indices, scale)
    return scores, indices


def _choose(
    query: Tensor, keys: Tensor, key_scales: Tensor | None, mask: Tensor | None, scores: Tensor, indices: Tensor,
    scale: float,
) -> None:  # fmt: skip
    _C.topk_scores_fwd(query, keys, key_scales, mask, scores, indices, scale, torch.get_num_threads())


def _choose_on_device(
    query: Tensor, keys: Tensor, key_scales: Tensor | None, mask: Tensor | None, scores: Tensor, indices: Tensor,
    scale: float,
) -> None:  # fmt: skip
    cuda = cuda_binary()
    words = cuda.topk_scores_workspace(keys, *indices.shape)
    cuda.topk_scores_fwd(query, keys, key_scales, mask, scores, indices, scale, indices.new_empty(words))


def topk_scores_bwd(
    grad_scores: Tensor, query: Tensor, keys: Tensor, key_scales: Tensor | None, indices: Tensor, scale: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of (query, keys), an empty tensor for one that ``needs`` does not ask for; that of the keys is dense.

    A score is linear in its query and in its key, so a query's gradient is the weighted sum of the keys it chose, and
    that of the keys is the gradient of a table of which the queries' sums are taken: both are `weighted_gather`'s.
    """
    weights = grad_scores if scale == 1.0 else grad_scores * scale
    grad_query, grad_keys = ops.nothing(query, query.dtype), ops.nothing(keys, keys.dtype)
    if needs[0]:
        grad_query = _gather_ops.weighted_gather_fwd(indices, weights, keys, key_scales).to(query.dtype)
    if needs[1]:
        grad_keys = _gather_ops.weighted_gather_bwd(query, indices, weights, keys, None, (False, True))[1]
    return grad_query, grad_keys


def topk_scores_sparse_bwd(
    grad_scores: Tensor, query: Tensor, keys: Tensor, indices: Tensor, scale: float, needs_query: bool
) -> tuple[Tensor | None, Tensor]:
    """As :func:`topk_scores_bwd`, with a sparse, coalesced gradient of the keys: a row for each chosen slot."""
    weights = grad_scores if scale == 1.0 else grad_scores * scale
    grad_query, _ = topk_scores_bwd(weights, query, keys, None, indices, 1.0, (needs_query, False))
    grad_keys = _gather_ops.weighted_gather_sparse_bwd(query, indices, weights, keys, False)[1]
    return grad_query if needs_query else None, grad_keys


def _allocate_topk(query: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (query.shape[0], k)
    return query.new_empty(shape, dtype=ops.real_dtype(query.dtype)), query.new_empty(shape, dtype=torch.int64)


def _rows(x: Tensor) -> Tensor:
    """Rows of neighbouring elements, as the kernels read a table; a copy where they are not."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _topk_bwd_fake(grad_scores, query, keys, key_scales, indices, scale, needs):  # type: ignore[no-untyped-def]
    grads = (
        torch.empty_like(x, memory_format=torch.contiguous_format) if need else ops.nothing(x, x.dtype)
        for x, need in zip((query, keys), needs, strict=True)
    )
    return tuple(grads)


def _topk_fwd_fake(query, keys, key_scales, mask, k, scale):  # type: ignore[no-untyped-def]
    return _allocate_topk(query, k)


LIBRARY.define(
    "topk_scores_fwd(Tensor query, Tensor keys, Tensor? key_scales, Tensor? mask, SymInt k, float scale) -> "
    "(Tensor scores, Tensor indices)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define(
    "topk_scores_bwd(Tensor grad_scores, Tensor query, Tensor keys, Tensor? key_scales, Tensor indices, float scale, "
    "bool[2] needs) -> (Tensor grad_query, Tensor grad_keys)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
for _device in ("CPU", "CUDA"):
    LIBRARY.impl("topk_scores_fwd", topk_scores_fwd, _device)
    LIBRARY.impl("topk_scores_bwd", topk_scores_bwd, _device)
torch.library.register_fake("attnfast::topk_scores_fwd", _topk_fwd_fake, lib=LIBRARY)
torch.library.register_fake("attnfast::topk_scores_bwd", _topk_bwd_fake, lib=LIBRARY)
