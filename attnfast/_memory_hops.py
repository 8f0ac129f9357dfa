"""Reading a memory: score the slots, keep all or some, normalise, sum their values; one or several times.

A composition of what exists: reads over all slots are attention whose keys all queries share, top-k reads are
`topk_scores`, a normaliser and `weighted_gather`, reads of candidate lists are packed attention or a top-k of pairs. No
way forms queries x slots, unless the caller asks for the weights of a read over all slots, or for a normaliser that
attention itself computes that way. Nothing is checked here. `_memory_read` has the public function;
`attnfast.memory.MemoryStore` comes in at `read_tables` as well, with tables that may be bfloat16 or int8 and rows that
must survive later writes.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnfast import autograd
from attnfast._additive import additive_attention
from attnfast._gather import weighted_gather
from attnfast._memory import topk_scores
from attnfast._reference_core import real_dtype
from attnfast._reference_normalizers import normalize
from attnfast.functional import attention, varlen_attention

_BLOCK = 1 << 20  # elements of a table that are prepared at a time


class Tables(NamedTuple):
    """Keys ``[N, D]`` and values ``[N, D_v]``; scales ``[N]`` where they are int8 codes."""

    keys: Tensor
    values: Tensor
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None


class Plan(NamedTuple):
    """How to read; checked."""

    topk: int | None
    score: str
    score_weight: Tensor | None  # of the additive score, with
    score_bias: Tensor | None  # its bias
    scale: float
    normalizer: str
    hops: int
    hop: str
    eps: float
    sparse_grad: bool


class Picked(NamedTuple):
    """One hop: output ``[B, D_v]``, and the picks ``[B, K]``, ``[nnz]``, or the column sums ``[N]`` of a soft read."""

    output: Tensor
    indices: Tensor | None
    weights: Tensor | None
    column_sum: Tensor | None


def _largest(scores: Tensor, slots: Tensor, visible: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest visible of ``[B, M]``, whose slots ascend wherever scores are equal; the rest is -inf, -1."""
    order = scores.detach().sort(dim=-1, descending=True, stable=True).indices
    order = order.gather(-1, (~visible).gather(-1, order).to(torch.int8).sort(dim=-1, stable=True).indices)[..., :k]
    seen = visible.gather(-1, order)
    return scores.gather(-1, order).where(seen, -torch.inf), slots.gather(-1, order).where(seen, -1)


# --- scores ---------------------------------------------------------------------------------------------------------


def _unit(x: Tensor) -> Tensor:
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-8)


def _prepare_query(plan: Plan, query: Tensor) -> Tensor:
    """What makes every score but the additive one a dot product, up to a constant for each query."""
    if plan.score == "cosine":
        return _unit(query)
    return torch.cat([2.0 * query, query.new_full((*query.shape[:-1], 1), -1.0)], -1) if plan.score == "l2" else query


def _prepare_keys(plan: Plan, keys: Tensor) -> Tensor:
    if plan.score == "cosine":
        return _unit(keys)
    return torch.cat([keys, keys.square().sum(-1, keepdim=True)], -1) if plan.score == "l2" else keys


def _pair_scores(plan: Plan, query: Tensor, keys: Tensor) -> Tensor:
    """Scores ``[...]`` of pairs ``[..., D]``, by the formula."""
    if plan.score == "additive":
        assert plan.score_weight is not None
        total = query + keys if plan.score_bias is None else query + keys + plan.score_bias
        return plan.scale * (torch.tanh(total) * plan.score_weight).sum(-1)
    if plan.score == "l2":
        return -plan.scale * (query - keys).square().sum(-1)
    if plan.score == "cosine":
        query, keys = _unit(query), _unit(keys)
    return plan.scale * (query * keys).sum(-1)


def _rows(table: Tensor, scale: Tensor | None, slots: Tensor | slice, dtype: torch.dtype) -> Tensor:
    """Rows of a table as numbers of `dtype`."""
    rows = table[slots].to(dtype)
    return rows if scale is None else rows * scale[slots].to(dtype).unsqueeze(-1)


def _picked_rows(
    table: Tensor, scale: Tensor | None, slots: Tensor, real: torch.dtype, sparse_grad: bool = False
) -> Tensor:
    """Copies ``[..., D]`` of the rows in `slots` ``[...]``, 0 where the slot is -1.

    They are sums of one row each, because the gradient of indexing depends on the order in which threads come along.
    """
    if (real is torch.float64) is not (table.dtype is torch.float64):  # a store's, which has no gradient
        return _rows(table, scale, slots.clamp_min(0), real).masked_fill((slots < 0).unsqueeze(-1), 0.0)
    one = torch.ones(slots.numel(), 1, dtype=real, device=slots.device)
    rows = weighted_gather(slots.reshape(slots.numel(), 1), one, table, scales=scale, sparse_grad=sparse_grad)
    return rows.reshape(*slots.shape, table.shape[1])


# --- one hop --------------------------------------------------------------------------------------------------------


def soft_call(
    query: Tensor, keys: Tensor, values: Tensor, plan: Plan, mask: Tensor | None, weights: str
) -> tuple[Any, tuple[Tensor, ...], dict[str, Any]]:
    """The attention function that reads all slots, and its arguments."""
    options: dict[str, Any] = {"normalizer": plan.normalizer, "mask": mask, "return_weights": weights or False}
    if plan.score == "additive":
        assert plan.score_weight is not None
        arguments = (query, keys, values, plan.scale * plan.score_weight)
        return additive_attention, arguments, options | {"score_bias": plan.score_bias}
    return attention, (query, keys, values), options | {"score": plan.score, "scale": plan.scale}


def _read_all(query: Tensor, tables: Tables, plan: Plan, mask: Tensor | None, weights: str) -> Picked:
    """Attention with one batch and one head: the queries are its rows, and the memory is not repeated for them."""
    keys = _rows(tables.keys, tables.key_scale, slice(None), query.dtype)
    values = _rows(tables.values, tables.value_scale, slice(None), query.dtype)
    function, arguments, options = soft_call(query, keys, values, plan, mask, weights)
    result = function(*arguments, **options)
    if isinstance(result, Tensor):
        return Picked(result, None, None, None)
    assert result.weights is not None
    if weights == "full":
        return Picked(result.output, None, result.weights, result.weights.detach().sum(0))
    return Picked(result.output, None, None, result.weights.detach())


def block_size(query: Tensor, keys: Tensor, plan: Plan, k: int) -> int:
    """How many slots `select` prepares at a time."""
    if plan.score == "additive":
        return max(1, _BLOCK // max(1, keys.shape[1] * query.shape[0]))
    return max(1, _BLOCK // max(1, keys.shape[1]), k)


def select(query: Tensor, tables: Tables, plan: Plan, mask: Tensor | None, k: int) -> Tensor:
    """Slots ``[B, k]`` of the k largest scores, a block of prepared keys at a time."""
    real = real_dtype(query.dtype)
    query = query.to(real)
    count = tables.keys.shape[0]
    block = block_size(query, tables.keys, plan, k)
    prepared = query if plan.score == "additive" else _prepare_query(plan, query)
    best: tuple[Tensor, Tensor] | None = None
    for start in range(0, count, block):
        stop = min(count, start + block)
        keys = _rows(tables.keys, tables.key_scale, slice(start, stop), real)
        seen = None if mask is None else mask[..., start:stop]
        if plan.score == "additive":
            scores = _pair_scores(plan, query.unsqueeze(1), keys)
            slots = torch.arange(stop - start, device=keys.device).expand(scores.shape)
            visible = torch.ones_like(slots, dtype=torch.bool) if seen is None else seen.expand(scores.shape)
            scores, slots = _largest(scores, slots, visible, k)
        else:
            ready = _prepare_keys(plan, keys)
            scores, slots = topk_scores(prepared, ready, min(k, stop - start), scale=plan.scale, mask=seen)
        slots = slots.where(slots < 0, slots + start)
        if best is not None:
            # Slots of earlier blocks are lower and stand first, as ties want it.
            scores, slots = torch.cat([best[0], scores], -1), torch.cat([best[1], slots], -1)
            scores, slots = _largest(scores, slots, slots >= 0, k)
        best = scores, slots
    assert best is not None
    return best[1]


def _read_picked(
    query: Tensor, tables: Tables, plan: Plan, indices: Tensor, scores: Tensor | None, copy: bool
) -> Picked:
    """Normalise and sum the slots ``[B, K]``. `copy`: take their rows out first, so that what autograd keeps is not the
    tables.
    """
    real = real_dtype(query.dtype)
    if tables.keys.shape[0] == 0:  # nothing to index, so nothing is picked
        weights = torch.zeros(indices.shape, dtype=real, device=query.device)
        return Picked(query.new_zeros(query.shape[0], tables.values.shape[1]), indices, weights, None)
    missing = indices < 0
    if scores is None:
        keys = _picked_rows(tables.keys, tables.key_scale, indices, real, plan.sparse_grad)
        scores = _pair_scores(plan, query.to(real).unsqueeze(1), keys)
    weights = normalize(plan.normalizer, scores, ~missing, None, None, False).weights
    values, scales = tables.values, tables.value_scale
    if copy or (real is torch.float64) is not (values.dtype is torch.float64):
        output = (weights.unsqueeze(-1) * _picked_rows(values, scales, indices, real)).sum(-2)
    else:
        output = weighted_gather(indices, weights, values, scales=scales, sparse_grad=plan.sparse_grad)
    return Picked(output.to(query.dtype), indices, weights, None)


def scores_in_kernel(query: Tensor, tables: Tables, plan: Plan) -> bool:
    """Whether `topk_scores` on the whole table gives the scores of a top-k read, gradients included."""
    return plan.score == "dot" and real_dtype(tables.keys.dtype) is real_dtype(query.dtype)


def _read_topk(query: Tensor, tables: Tables, plan: Plan, mask: Tensor | None, copy: bool) -> Picked:
    assert plan.topk is not None
    # Not min(): under torch.compile both may be symbols.
    k = plan.topk if plan.topk <= tables.keys.shape[0] else tables.keys.shape[0]
    scores: Tensor | None = None
    if k == 0:
        indices = torch.empty(query.shape[0], 0, dtype=torch.int64, device=query.device)
    elif scores_in_kernel(query, tables, plan):
        with torch.set_grad_enabled(torch.is_grad_enabled() and not copy):
            scores, indices = topk_scores(
                query, tables.keys, k, scale=plan.scale, mask=mask, key_scales=tables.key_scale,
                sparse_grad=plan.sparse_grad,
            )  # fmt: skip
        scores = None if copy else scores
    else:
        with torch.no_grad():
            indices = select(query, tables, plan, mask, k)
    if k < plan.topk:
        more = (0, plan.topk - k)
        indices = torch.nn.functional.pad(indices, more, value=-1)
        scores = None if scores is None else torch.nn.functional.pad(scores, more, value=-torch.inf)
    return _read_picked(query, tables, plan, indices, scores, copy)


class Lists(NamedTuple):
    """Candidates of B queries: list b is ``slots[offsets[b] : offsets[b + 1]]``, and `row` ``[nnz]`` is its b."""

    offsets: Tensor
    slots: Tensor
    row: Tensor


def packed_call(
    query: Tensor, keys: Tensor, values: Tensor, plan: Plan, lists: Lists
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the packed attention that reads the rows ``[nnz, ...]`` of whole lists."""
    longest = int(lists.offsets.diff().max()) if query.shape[0] else 0
    starts = torch.arange(query.shape[0] + 1, device=query.device)
    arguments = (query.unsqueeze(1), keys.unsqueeze(1), values.unsqueeze(1), starts, lists.offsets, 1, longest)
    # A packed key has one query, so the sum of its column is its weight.
    options = {"score": plan.score, "scale": plan.scale, "normalizer": plan.normalizer, "return_weights": "column_sum"}
    return arguments, options


def _read_listed(query: Tensor, tables: Tables, plan: Plan, lists: Lists, copy: bool) -> Picked:
    if plan.topk is not None:
        return _read_picked(query, tables, plan, _select_listed(query, tables, plan, lists, plan.topk), None, copy)
    real = real_dtype(query.dtype)
    keys, values = (
        _picked_rows(table, scale, lists.slots, real, plan.sparse_grad).to(query.dtype)
        for table, scale in ((tables.keys, tables.key_scale), (tables.values, tables.value_scale))
    )
    if plan.score == "additive":
        # Packed attention has no additive score: one call for each query.
        bounds = lists.offsets.tolist()
        parts = [
            _read_all(query[b : b + 1], Tables(keys[i:j], values[i:j]), plan, None, "full")
            for b, (i, j) in enumerate(pairwise(bounds))
        ]
        outputs, weights = [part.output for part in parts], [part.weights for part in parts]
        if not parts:
            return Picked(values.new_empty(0, values.shape[1]), lists.slots, values.new_empty(0), None)
        return Picked(
            torch.cat(outputs), lists.slots, torch.cat([w.squeeze(0) for w in weights if w is not None]), None
        )
    arguments, options = packed_call(query, keys, values, plan, lists)
    result = varlen_attention(*arguments, **options)
    assert not isinstance(result, Tensor) and result.weights is not None
    return Picked(result.output.squeeze(1), lists.slots, result.weights.flatten(), None)


@torch.no_grad()
def _select_listed(query: Tensor, tables: Tables, plan: Plan, lists: Lists, k: int) -> Tensor:
    """The k largest of each list, ``[B, k]``: sort all pairs by score, then by list."""
    real = real_dtype(query.dtype)
    keys = _rows(tables.keys, tables.key_scale, lists.slots, real)
    scores = _pair_scores(plan, query.to(real)[lists.row], keys)
    order = scores.sort(descending=True, stable=True).indices
    order = order[lists.row[order].sort(stable=True).indices]
    row = lists.row[order]
    place = torch.arange(row.shape[0], device=row.device) - lists.offsets[row]
    # What is beyond the k-th goes to one more place, which is cut off: leaving it out is a shape that depends on data.
    found = torch.full((query.shape[0] * (k + 1),), -1, dtype=torch.int64, device=query.device)
    found = found.scatter(0, row * (k + 1) + place.clamp_max(k), lists.slots[order])
    return found.view(query.shape[0], k + 1)[:, :k]


# --- all hops -------------------------------------------------------------------------------------------------------


def read_tables(
    query: Tensor,
    tables: Tables,
    plan: Plan,
    mask: Tensor | None,
    lists: Lists | None,
    *,
    copy: bool,
    soft_weights: str,
    observe: Any = None,
) -> tuple[Picked, int]:
    """Read for queries ``[B, D]``; mask boolean ``[N]`` or ``[B, N]``. Returns the last hop and the number of hops.

    `observe` is called with every hop. `soft_weights` is what a read over all slots collects: "", "column_sum" or
    "full".
    """
    for number in range(1, plan.hops + 1):
        if lists is not None:
            picked = _read_listed(query, tables, plan, lists, copy)
        elif plan.topk is not None:
            picked = _read_topk(query, tables, plan, mask, copy)
        else:
            picked = _read_all(query, tables, plan, mask, soft_weights)
        if observe is not None:
            observe(picked)
        if number == plan.hops:
            break
        following = query + picked.output if plan.hop == "add" else picked.output
        if plan.eps > 0 and (not query.numel() or _at_rest(following, query, plan.eps)):
            break
        query = following
    return picked, number


def _at_rest(following: Tensor, query: Tensor, eps: float) -> bool:
    """One synchronisation a hop, and only if the caller wants to stop early."""
    change = (following - query).detach().abs().max()
    if autograd.is_mapped(change):
        raise NotImplementedError(
            "eps: under torch.vmap no sample can stop before the others; use eps=0, or one call with the samples in "
            "the leading dimensions of query"
        )
    return bool(change <= eps)


def count_usage(usage: Tensor, picked: Picked) -> Tensor:
    """``usage [N]`` with one hop added: counts of picks if it is an integer tensor, sums of weights otherwise.

    Nothing here has a shape that depends on data, nor is anything written in place: so it can be traced and mapped.
    """
    if picked.column_sum is not None:
        return usage + picked.column_sum.to(usage.dtype)
    if picked.indices is None or usage.shape[0] == 0:
        return usage
    assert picked.weights is not None
    counted = picked.indices >= 0 if usage.dtype is torch.int64 else picked.weights.detach()
    share = counted.to(usage.dtype)
    # A pick of nothing has weight 0.
    return usage.index_add(0, picked.indices.clamp_min(0).flatten(), share.flatten())
