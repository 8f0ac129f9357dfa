"""`memory_read`: documentation and checks; what it does is in `_memory_hops`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnfast import _validate as check
from attnfast import autograd
from attnfast._memory_hops import Lists, Picked, Plan, Tables, count_usage, read_tables
from attnfast._memory_ops import MAX_COUNT
from attnfast.reference import MemoryReadOutput

SCORES = ("dot", "cosine", "l2")
NORMALIZERS = ("softmax", "sparsemax", "entmax15", "sigmoid", "none", "hard")
HOPS = ("add", "replace")


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
    r"""Read a memory of N slots that all queries share.

    .. math::
        s_n = scale \cdot score(query, keys_n), \quad w = normalizer(s_n : n \in S), \quad out = \sum_{n \in S} w_n\,
        values_n

    where S is all slots, the `topk` slots of the largest scores, the candidates of the query, or the `topk` of those.
    With `hops` the read is repeated: the next query is query + out (``hop="add"``) or out (``hop="replace"``), and
    the result is the last read.

    Parameters
    ----------
    query : Tensor
        ``[..., D]``; float64, float32, bfloat16 or float16.
    keys : Tensor
        ``[N, D]``; the query's dtype.
    values : Tensor
        ``[N, D_v]``; the query's dtype. More than one hop needs D_v = D.
    topk : int, optional
        1 <= topk <= N, and at most 2048. Equal scores: the lowest slot. The choice has no derivative; what is chosen
        has. None: no choice.
    score : {"dot", "cosine", "l2"} or ("additive", weight) or ("additive", weight, score_bias)
        ``q . k``; ``q . k / (max(|q|, 1e-8) max(|k|, 1e-8))``; ``-|q - k|^2``; ``sum_d weight_d tanh(q_d + k_d +
        score_bias_d)`` with vectors ``[D]``, as in :func:`attnfast.additive_attention`.
    scale : float
        Multiplies the score.
    normalizer : {"softmax", "sparsemax", "entmax15", "sigmoid", "none", "hard"}
        See :func:`attnfast.attention`. Over all slots, all but softmax take O(queries x N) memory.
    mask : Tensor, optional
        Boolean, broadcastable to ``[..., N]``, True = may be read. A slot that is masked is selected out: NaN in it
        reaches nothing.
    candidates : (offsets, slots), optional
        Lists from an index (:mod:`attnfast.memory`): integer ``[Q + 1]`` and ``[nnz]`` for the Q queries in order; list
        i is ``slots[offsets[i]:offsets[i + 1]]``, ascending without duplicates. They may lie on the host.
    hops : int
        Number of reads, at least 1.
    hop : {"add", "replace"}
        The query of the next hop.
    eps : float
        With ``hop="replace"``: stop as soon as no element of any query changes by more than `eps` (0: never), which
        costs one synchronisation a hop.
    sparse_grad : bool
        With `topk` or `candidates`: the gradients of keys and values are sparse tensors, in memory that does not depend
        on N (:func:`attnfast.weighted_gather`, which says where they exist).
    return_aux : bool
        Return :class:`MemoryReadOutput` ``(output, indices, weights, usage)``. For a read over all slots its weights
        are a tensor ``[..., N]``.

    Returns
    -------
    Tensor or MemoryReadOutput
        ``[..., D_v]``, the query's dtype. A query that may read nothing gets 0, and no gradient.

    Raises
    ------
    ValueError
        Shapes that do not fit, a value out of range (candidates included), `topk` > N.
    TypeError
        Arguments of the wrong kind or dtype.
    NotImplementedError
        Sparse gradients under torch.compile, ``torch.func`` transforms or ``create_graph=True``. Under ``torch.vmap``:
        `eps`, lists or a mask of lists that are mapped; and a sparse gradient.

    Notes
    -----
    With the score ``dot``, gradients of keys and values are those of `topk_scores` and `weighted_gather`; with another
    score and `topk`, and with candidates, the rows of chosen keys come from `weighted_gather` too.

    References
    ----------
    Sukhbaatar et al., "End-To-End Memory Networks", NeurIPS 2015, eq. 1 to 4 (all slots, "add"); Weston et al., "Memory
    Networks", ICLR 2015, section 3.3 (candidates); Ramsauer et al., "Hopfield Networks is All You Need", ICLR 2021
    ("replace" until nothing changes).

    Examples
    --------
    >>> import torch, attnfast
    >>> query, keys, values = torch.randn(4, 16), torch.randn(1000, 16), torch.randn(1000, 32)
    >>> attnfast.memory_read(query, keys, values, topk=8).shape
    torch.Size([4, 32])
    """
    flat, plan, seen, lists = memory_call(
        query,
        keys,
        values,
        topk=topk,
        score=score,
        scale=scale,
        normalizer=normalizer,
        mask=mask,
        candidates=candidates,
        hops=hops,
        hop=hop,
        eps=eps,
        sparse_grad=sparse_grad,
        return_aux=return_aux,
    )
    slots, leading = keys.shape[0], query.shape[:-1]
    usage = torch.zeros(
        slots,
        dtype=torch.int64 if plan.topk is not None else torch.float32,
        device=query.device,
    )

    def observe(picked: Picked) -> None:
        nonlocal usage
        if return_aux:
            usage = count_usage(usage, picked)

    picked, _ = read_tables(
        flat,
        Tables(keys, values),
        plan,
        seen,
        lists,
        copy=False,
        soft_weights="full" if return_aux else "",
        observe=observe,
    )
    output = picked.output.reshape(*leading, values.shape[1])
    if not return_aux:
        return output
    return MemoryReadOutput(output, *shaped(picked, leading, listed=lists is not None and plan.topk is None), usage)


def shaped(picked: Picked, leading: Sequence[int], listed: bool) -> tuple[Tensor | None, Tensor | None]:
    """Indices and weights with the query's leading dimensions; those of whole lists stay as they are."""
    if listed:
        return picked.indices, picked.weights
    both = (picked.indices, picked.weights)
    indices, weights = (None if x is None else x.reshape(*leading, x.shape[-1]) for x in both)
    return indices, weights


def memory_call(
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
) -> tuple[Tensor, Plan, Tensor | None, Lists | None]:
    """Queries ``[Q, D]``, how to read, mask and lists of a call of :func:`memory_read`, checked."""
    check_tables(query, keys, values)
    slots = keys.shape[0]
    plan = make_plan(
        query,
        slots,
        values.shape[1],
        topk=topk,
        score=score,
        scale=scale,
        normalizer=normalizer,
        hops=hops,
        hop=hop,
        eps=eps,
        sparse_grad=sparse_grad,
    )
    if plan.sparse_grad and topk is None and candidates is None:
        raise ValueError("sparse_grad: expected False for a read over all slots, whose gradients are dense")
    check.flag("return_aux", return_aux)
    leading = query.shape[:-1]
    flat = query.reshape(leading.numel(), query.shape[-1])
    seen = _flat_mask(mask, leading, slots)
    lists = None
    if candidates is not None:
        lists = make_lists(candidates, flat, slots, seen)
        seen = None
    return flat, plan, seen, lists


# --- checks ---------------------------------------------------------------------------------------------------------


def check_tables(query: Tensor, keys: Tensor, values: Tensor) -> None:
    check.floating("query", query)
    for name, table, size in (("keys", keys, "D"), ("values", values, "D_v")):
        check.floating(name, table)
        if table.dtype != query.dtype:
            raise TypeError(f"{name}: expected dtype {query.dtype} (query's), got {table.dtype}")
        if table.dim() != 2:
            raise ValueError(f"{name}: expected [N, {size}], got {check.shape_text(table.shape)}")
    check_query(query, keys.shape[1])
    if values.shape[0] != keys.shape[0]:
        raise ValueError(
            f"values: expected [N, D_v] of N = {keys.shape[0]} (keys'), got {check.shape_text(values.shape)}"
        )


def check_query(query: Any, size: int) -> None:
    check.floating("query", query)
    if query.dim() < 1 or query.shape[-1] != size:
        raise ValueError(f"query: expected [..., D] of D = {size} (keys'), got {check.shape_text(query.shape)}")


def whole(name: str, x: Any, least: int = 1) -> int:
    if isinstance(x, bool) or not isinstance(x, int):
        raise TypeError(f"{name}: expected an integer >= {least}, got {x!r}")
    if x < least:
        raise ValueError(f"{name}: expected an integer >= {least}, got {x}")
    return x


def make_plan(
    query: Tensor,
    slots: int,
    value_size: int,
    *,
    topk: Any,
    score: Any,
    scale: Any,
    normalizer: Any,
    hops: Any,
    hop: Any,
    eps: Any,
    sparse_grad: bool = False,
) -> Plan:
    """Check how to read; `slots` is N or the capacity, the query is checked already."""
    if topk is not None and whole("topk", topk) > min(slots, MAX_COUNT):
        limit = f"N = {slots}" if slots <= MAX_COUNT else str(MAX_COUNT)
        raise ValueError(f"topk: expected at most {limit}, got {topk}")
    name, weight, bias = _score(score, query)
    plan = Plan(
        topk=topk,
        score=name,
        score_weight=weight,
        score_bias=bias,
        scale=check.number("scale", scale),
        normalizer=check.choice("normalizer", normalizer, NORMALIZERS),
        hops=whole("hops", hops),
        hop=check.choice("hop", hop, HOPS),
        eps=check.number("eps", eps, "a finite number >= 0 (0 = all hops)"),
        sparse_grad=check.flag("sparse_grad", sparse_grad),
    )
    if plan.eps < 0:
        raise ValueError(f"eps: expected a finite number >= 0 (0 = all hops), got {plan.eps}")
    if plan.eps > 0 and plan.hop != "replace":
        raise ValueError('eps: only hop="replace" can come to rest; expected 0 with hop="add"')
    if plan.hops > 1 and value_size != query.shape[-1]:
        raise ValueError(f"hops: more than one needs D_v = D, got D_v = {value_size} and D = {query.shape[-1]}")
    return plan


def _score(score: Any, query: Tensor) -> tuple[str, Tensor | None, Tensor | None]:
    if not isinstance(score, tuple | list):
        if score == "additive":
            raise ValueError('score: "additive" needs its vector: ("additive", weight) or ("additive", weight, bias)')
        return check.choice("score", score, SCORES), None, None
    if not 2 <= len(score) <= 3 or score[0] != "additive":
        raise ValueError(f'score: expected a name, ("additive", weight) or ("additive", weight, bias), got {score!r}')
    vectors: list[Tensor] = []
    for name, x in zip(("score's weight", "score's bias"), score[1:]):
        check.floating(name, x)
        if x.shape != query.shape[-1:]:
            raise ValueError(f"{name}: expected [D] = [{query.shape[-1]}], got {check.shape_text(x.shape)}")
        vectors.append(x)
    return "additive", vectors[0], vectors[1] if len(vectors) > 1 else None


def _flat_mask(mask: Any, leading: torch.Size, slots: int) -> Tensor | None:
    """``[N]`` or ``[Q, N]``; one row for all queries stays one."""
    if mask is None:
        return None
    check.tensor("mask", mask)
    if mask.dtype is not torch.bool:
        raise TypeError(f"mask: expected dtype bool, got {mask.dtype}")
    shape = (*leading, slots)
    try:
        full = mask.expand(shape)
    except RuntimeError:
        expected = "[..., N] = " + check.shape_text(shape)
        raise ValueError(f"mask: expected broadcastable to {expected}, got {check.shape_text(mask.shape)}") from None
    if all(size == 1 for size in mask.shape[:-1]):
        return mask.reshape(mask.shape[-1:]).expand(slots) if mask.dim() else mask.expand(slots)
    return full.reshape(leading.numel(), slots)


def make_lists(candidates: Any, query: Tensor, slots: int, mask: Tensor | None) -> Lists:
    """Check the candidate lists of queries ``[Q, D]`` where they lie, take them to the queries' device, and drop what
    the mask hides.
    """
    queries = query.shape[0]
    if not isinstance(candidates, tuple | list) or len(candidates) != 2:
        raise TypeError(f"candidates: expected (offsets, slots), got {type(candidates).__name__}")
    offsets, found = candidates
    for name, x in (("candidates' offsets", offsets), ("candidates' slots", found)):
        check.integers(name, x)
        if x.dim() != 1:
            raise ValueError(f"{name}: expected one dimension, got {check.shape_text(x.shape)}")
    if autograd.is_mapped(offsets) or autograd.is_mapped(found) or (mask is not None and autograd.is_mapped(mask)):
        raise NotImplementedError(
            "candidates: under torch.vmap all samples share the lists and their mask; for lists of their own make one "
            "call with the samples in the leading dimensions of query"
        )
    offsets, found = offsets.long(), found.long()
    if offsets.shape[0] != queries + 1:
        raise ValueError(f"candidates' offsets: expected [Q + 1] = [{queries + 1}], got [{offsets.shape[0]}]")
    counts = offsets.diff()
    if int(offsets[0]) != 0 or int(offsets[-1]) != found.shape[0] or bool((counts < 0).any()):
        raise ValueError(f"candidates' offsets: expected to rise from 0 to nnz = {found.shape[0]}")
    if found.shape[0] and not 0 <= int(found.min()) <= int(found.max()) < slots:
        worst = int(found.min()) if int(found.min()) < 0 else int(found.max())
        raise ValueError(f"candidates' slots: expected 0 <= slot < N = {slots}, got {worst}")
    row = torch.repeat_interleave(torch.arange(queries, device=found.device), counts)
    if bool(((row[1:] == row[:-1]) & (found[1:] <= found[:-1])).any()):
        raise ValueError("candidates' slots: expected each list ascending without duplicates")
    offsets, found, row = (x.to(query.device) for x in (offsets, found, row))
    if mask is not None:
        kept = mask[found] if mask.dim() == 1 else mask[row, found]
        found, row = found[kept], row[kept]
        offsets = torch.nn.functional.pad(torch.bincount(row, minlength=queries).cumsum(0), (1, 0))
    return Lists(offsets, found, row)
