"""Plain PyTorch specification of `memory_read`: every query has the rows it sees gathered, and works on those."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnfast._reference_core import real_dtype
from attnfast._reference_normalizers import normalize


class MemoryReadOutput(NamedTuple):
    """What a memory read returns when more than the output is asked for.

    Attributes
    ----------
    output : Tensor
        ``[..., D_v]``.
    indices : Tensor or None
        int64 slots of the last hop, ``[..., K]`` in the order of their scores, -1 where there was nothing left to pick;
        of a read over candidate lists without `topk`, the visible candidates one after another ``[nnz]``; None for a
        read over all slots.
    weights : Tensor or None
        The weights of the last hop, in the shape of `indices`; ``[..., N]`` for a read over all slots.
    usage : Tensor
        ``[N]`` over all queries and hops: how often each slot was picked (int64, top-k reads), or the sum of the
        weights it got.
    """

    output: Tensor
    indices: Tensor | None
    weights: Tensor | None
    usage: Tensor


def memory_read(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    topk: int | None = None,
    score: str | tuple[Any, ...] = "dot",
    scale: float = 1.0,
    normalizer: str = "softmax",
    mask: Tensor | None = None,
    candidates: tuple[Tensor, Tensor] | None = None,
    hops: int = 1,
    hop: str = "add",
    eps: float = 0.0,
    sparse_grad: bool = False,
    return_aux: bool = False,
) -> Tensor | MemoryReadOutput:
    """Specification of :func:`attnfast.memory_read`, in ``O(Q N D)`` memory. `sparse_grad` changes nothing here, and
    arguments are not validated.
    """
    leading, slots = query.shape[:-1], keys.shape[0]
    rows = leading.numel()
    real = real_dtype(query.dtype)
    q, k, v = query.reshape(rows, query.shape[-1]).to(real), keys.to(real), values.to(real)
    visible = torch.ones(rows, slots, dtype=torch.bool, device=query.device)
    if mask is not None:
        visible = mask.expand(*leading, slots).reshape(rows, slots)
    if candidates is not None:
        offsets, listed = (x.long() for x in candidates)
        among = torch.zeros_like(visible)
        among[torch.repeat_interleave(torch.arange(rows, device=query.device), offsets.diff()), listed] = True
        visible = visible & among
    everything = torch.arange(slots, device=query.device).expand(rows, slots).where(visible, -1)
    usage = torch.zeros(slots, dtype=torch.int64 if topk is not None else torch.float32, device=query.device)
    for number in range(hops):
        indices = everything
        if topk is not None:
            with torch.no_grad():
                scores = _pair_scores(score, q, k, indices, scale)
            first = scores.sort(dim=-1, descending=True, stable=True).indices  # the lowest of equal ones
            hidden = (indices.gather(-1, first) < 0).to(torch.int8)
            indices = indices.gather(-1, first.gather(-1, hidden.sort(dim=-1, stable=True).indices))[:, :topk]
        missing = indices < 0
        weights = normalize(normalizer, _pair_scores(score, q, k, indices, scale), ~missing, None, None, False).weights
        output = (weights.unsqueeze(-1) * _rows(v, indices)).sum(-2)
        shares = weights.detach().to(usage.dtype) if topk is None else torch.ones_like(indices)
        usage.index_add_(0, indices[~missing], shares[~missing])
        if number + 1 == hops:
            break
        following = q + output if hop == "add" else output
        if eps > 0 and bool(((following - q).abs() <= eps).all()):
            break
        q = following
    result = output.to(query.dtype).reshape(*leading, values.shape[1])
    if not return_aux:
        return result
    if topk is not None:
        return MemoryReadOutput(result, indices.reshape(*leading, topk), weights.reshape(*leading, topk), usage)
    if candidates is not None:
        return MemoryReadOutput(result, indices[visible], weights[visible], usage)
    return MemoryReadOutput(result, None, weights.reshape(*leading, slots), usage)


def _rows(table: Tensor, indices: Tensor) -> Tensor:
    """``[Q, K, D]``: rows of a table; 0 where the index is -1, whatever the table holds."""
    if table.shape[0] == 0:
        return table.new_zeros(*indices.shape, table.shape[1])
    return table[indices.clamp_min(0)].masked_fill((indices < 0).unsqueeze(-1), 0.0)


def _pair_scores(score: Any, query: Tensor, keys: Tensor, indices: Tensor, scale: float) -> Tensor:
    q, k = query.unsqueeze(-2), _rows(keys, indices)
    if isinstance(score, tuple | list):
        total = q + k if len(score) == 2 else q + k + score[2]
        return scale * (torch.tanh(total) * score[1]).sum(-1)
    if score == "l2":
        return -scale * (q - k).square().sum(-1)
    if score == "cosine":
        q, k = (x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-8) for x in (q, k))
    return scale * (q * k).sum(-1)
