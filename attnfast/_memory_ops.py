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
# query [B, D], keys [N, D], mask boolean [B, N] or [1, N]; scores and indices [B, k], see reference.topk_scores.

MAX_COUNT = 2048  # the largest k: a query's candidates stay in cache


def topk_scores_fwd(query: Tensor, keys: Tensor, mask: Tensor | None, k: int, scale: float) -> tuple[Tensor, Tensor]:
    """Run the forward kernel; returns scores in the accumulation dtype, and int64 indices."""
    scores, indices = _allocate_topk(query, k)
    mask = ops.expand(mask, (query.shape[0], keys.shape[0]))
    run = _choose if query.is_cpu else _choose_on_device
    run(query, _rows(keys), mask, scores, indices, scale)
    return scores, indices


def _choose(query: Tensor, keys: Tensor, mask: Tensor | None, scores: Tensor, indices: Tensor, scale: float) -> None:
    _C.topk_scores_fwd(query, keys, mask, scores, indices, scale, torch.get_num_threads())


def _choose_on_device(
    query: Tensor, keys: Tensor, mask: Tensor | None, scores: Tensor, indices: Tensor, scale: float
) -> None:
    cuda = cuda_binary()
    words = cuda.topk_scores_workspace(keys, *indices.shape)
    cuda.topk_scores_fwd(query, keys, mask, scores, indices, scale, indices.new_empty(words))


def topk_scores_bwd(
    grad_scores: Tensor, query: Tensor, keys: Tensor, indices: Tensor, scale: float, needs: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """Gradients of (query, keys), an empty tensor for one that ``needs`` does not ask for.

    That of the keys is dense; each of its rows is a sum in the order of the queries.
    """
    run = _differentiate if query.is_cpu else _differentiate_on_device
    grad_query, grad_keys = run(grad_scores, query, keys, indices, scale, needs)
    nothing = ops.nothing
    return (
        nothing(query, query.dtype) if grad_query is None else grad_query,
        nothing(keys, keys.dtype) if grad_keys is None else grad_keys,
    )


def _differentiate(
    grad_scores: Tensor, query: Tensor, keys: Tensor, indices: Tensor, scale: float, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    grad_query = torch.empty_like(query, memory_format=torch.contiguous_format) if needs[0] else None
    grad_keys = torch.zeros_like(keys, memory_format=torch.contiguous_format) if needs[1] else None
    indices = indices.contiguous()
    order = indices.flatten().argsort(stable=True) if needs[1] else None
    _C.topk_scores_bwd(
        grad_scores.contiguous(), _rows(query), _rows(keys), indices, order, grad_query, grad_keys, scale
    )
    return grad_query, grad_keys


def _differentiate_on_device(
    grad_scores: Tensor, query: Tensor, keys: Tensor, indices: Tensor, scale: float, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients as reads by index: weighted sums of the chosen keys, and those of the queries by slot."""
    weights = grad_scores * scale
    grad_query = grad_keys = None
    if needs[0]:
        grad_query = query.new_empty(query.shape)
        _gather_ops.gather_on_device(indices, weights, keys, None, grad_query)
    if needs[1]:
        grad_keys = torch.zeros_like(keys, memory_format=torch.contiguous_format)
        _gather_ops.differentiate_on_device(query, indices, weights, keys, None, None, grad_keys, None)
    return grad_query, grad_keys


def _allocate_topk(query: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (query.shape[0], k)
    return query.new_empty(shape, dtype=ops.real_dtype(query.dtype)), query.new_empty(shape, dtype=torch.int64)


def _rows(x: Tensor) -> Tensor:
    """Rows of neighbouring elements, as the kernels read a table; a copy where they are not."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _topk_bwd_fake(grad_scores, query, keys, indices, scale, needs):  # type: ignore[no-untyped-def]
    grads = (
        torch.empty_like(x, memory_format=torch.contiguous_format) if need else ops.nothing(x, x.dtype)
        for x, need in zip((query, keys), needs, strict=True)
    )
    return tuple(grads)


def _topk_fwd_fake(query, keys, mask, k, scale):  # type: ignore[no-untyped-def]
    return _allocate_topk(query, k)


LIBRARY.define(
    "topk_scores_fwd(Tensor query, Tensor keys, Tensor? mask, SymInt k, float scale) -> "
    "(Tensor scores, Tensor indices)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define(
    "topk_scores_bwd(Tensor grad_scores, Tensor query, Tensor keys, Tensor indices, float scale, bool[2] needs) -> "
    "(Tensor grad_query, Tensor grad_keys)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
for _device in ("CPU", "CUDA"):
    LIBRARY.impl("topk_scores_fwd", topk_scores_fwd, _device)
    LIBRARY.impl("topk_scores_bwd", topk_scores_bwd, _device)
torch.library.register_fake("attnfast::topk_scores_fwd", _topk_fwd_fake, lib=LIBRARY)
torch.library.register_fake("attnfast::topk_scores_bwd", _topk_bwd_fake, lib=LIBRARY)
