"""Attention over a sequence whose tokens are sharded: keys and values go round a ring, outputs are merged by their lse.

Each rank keeps its queries. In step i it holds the keys and values of rank r - i, computes its queries' output against
them with the fused kernel, and merges it into what it has by the log-sum-exp; meanwhile the next keys and values
arrive. The backward goes round again: the kernel's backward with the *final* output and log-sum-exp gives exactly the
part of the gradients that belongs to a block, and the sums for keys and values travel with them (Liu, Zaharia and
Abbeel, "Ring Attention with Blockwise Transformers for Near-Infinite Context", ICLR 2024). Zig-zag shards, see
_shards.py, balance causal masks.

The ring itself is _ring.py; what a rank sends and holds is _traffic.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from attnfast import _prepare, ops
from attnfast import _validate as check
from attnfast._additive import additive_call
from attnfast._scores import l2_center, l2_operands
from attnfast.distributed._group import DTYPES, Fact, Group, agree, bits, contact, resolve
from attnfast.distributed._ring import NAME, Plan, RingAttention
from attnfast.distributed._shards import check_layout, chunks_of
from attnfast.functional import AttentionOutput
from attnfast.ops import DotAttentionOptions


def context_parallel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group: Group | None = None,
    *,
    weight: Tensor | None = None,
    score_bias: Tensor | None = None,
    score: str = "scaled_dot",
    scale: float | None = None,
    softcap: float = 0.0,
    causal: bool = False,
    key_lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    layout: str = "zigzag",
    return_lse: bool = False,
) -> Tensor | AttentionOutput:
    r"""Attention over sequences whose tokens are sharded over the ranks of a group.

    On each rank the result is this rank's rows of

    .. math:: \mathrm{softmax}(s(Q, K) + M)\, V

    where Q, K, V are the shards of all ranks put together, s is a score of :func:`attnfast.attention`, or with `weight`
    the additive score of :func:`attnfast.additive_attention`, and M the causal mask and the lengths. Nobody holds more
    than two ranks' keys and values.

    Parameters
    ----------
    query : Tensor
        This rank's shard, ``[..., H, T_q / P, D]``; with `cu_seqlens` ``[total / P, H, D]``. float64, float32, bfloat16
        or float16.
    key, value : Tensor
        ``[..., H_kv, T_k / P, D]`` and ``[..., H_kv, T_k / P, D_v]``, H_kv a divisor of H (packed: ``[total / P, H_kv,
        .]``).
    group : ProcessGroup, optional
        Default: all processes. Every rank must call, with the same shapes and options.
    weight, score_bias : Tensor, optional
        With `weight` ``[D]`` or ``[H, D]`` the score is additive, with the axes of :func:`attnfast.additive_attention`;
        the same on every rank. Their gradients are this rank's part, as those of all parameters are in data
        parallelism: DDP or FSDP over the same ranks adds them up.
    score, scale, softcap
        As in :func:`attnfast.attention`.
    causal : bool
        A query sees keys at its own position and before; T_q = T_k.
    key_lengths : Tensor, optional
        Integer, broadcastable to the batch dimensions: valid keys of each *whole* sequence; the same on every rank.
    cu_seqlens : Tensor, optional
        int32 or int64 ``[N + 1]``, the offsets of N whole sequences in the packed whole, the same on every rank. Each
        sequence is sharded by itself, so each length is a multiple of P (contiguous) or 2 P (zig-zag).
    layout : {"zigzag", "contiguous"}
        How tokens are dealt out, see :func:`shard_sequence`. Zig-zag balances causal masks.
    return_lse : bool
        Also return the log-sum-exp of each row's scores.

    Returns
    -------
    Tensor or AttentionOutput
        ``[..., H, T_q / P, D_v]`` (packed: ``[total / P, H, D_v]``), and lse ``[..., H, T_q / P]`` if wanted. A row
        that sees nothing is 0, its lse -inf.

    Raises
    ------
    ValueError, TypeError
        An argument is wrong, or is not the same on every rank; the same words on every rank.
    RuntimeError
        A rank died or did not call: within the group's timeout.

    Notes
    -----
    Dropout, biases, ALiBi, windows and weights are not offered. There is no second derivative. The result differs from
    one process's by the rounding of P partial outputs in the dtype of the query; it does not depend on timing.

    Examples
    --------
    >>> import torch, torch.distributed as dist
    >>> from attnfast.distributed import context_parallel_attention, shard_sequence
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> x = torch.randn(2, 4, 16, 8)
    >>> q = shard_sequence(x)
    >>> context_parallel_attention(q, q, q, causal=True).shape
    torch.Size([2, 4, 16, 8])
    >>> dist.destroy_process_group()
    """
    group = resolve(group)
    arguments = (query, key, value, weight, score_bias, score, scale, softcap, causal, key_lengths, cu_seqlens, layout)
    try:
        core, plan, facts = _prepared(group, *arguments)
    except (ValueError, TypeError) as error:
        device = query.device if isinstance(query, Tensor) else torch.device("cpu")
        agree(group, NAME, FACTS, error, device)
        raise
    agree(group, NAME, FACTS, facts, core.tensors[0].device)
    tensors = core.tensors
    if score == "l2":
        tensors = (*_l2(group, *tensors[:3]), *tensors[3:])
    out, lse = RingAttention.apply(plan, *tensors)
    result = core.finish(out, lse * ops.LN2)
    return result if return_lse else result.output


def _l2(group: Group, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Operands whose dot product is the score: all ranks must have one origin, the mean of all keys."""
    real = ops.real_dtype(query.dtype)
    total, count = l2_center(key.to(real))
    sums = torch.cat([total, count.to(real)], -1)
    with contact(group, NAME):
        dist.all_reduce(sums, group=group)
    center = sums[..., :-1] / sums[..., -1:].clamp_min(1)
    return (*l2_operands(query.to(real), key.to(real), center), value.to(real))


class Core(NamedTuple):
    """One of the two score cores, prepared: its tensors, options, and what gives results the caller's form."""

    tensors: tuple[Any, ...]  # query, key, value, weight, score_bias
    options: DotAttentionOptions
    finish: Any


def _prepared(
    group: Group, query: Tensor, key: Tensor, value: Tensor, weight: Tensor | None, score_bias: Tensor | None,
    score: str, scale: float | None, softcap: float, causal: bool, key_lengths: Tensor | None,
    cu_seqlens: Tensor | None, layout: str,
) -> tuple[Core, Plan, dict[str, Fact]]:  # fmt: skip
    """Check this rank's arguments, and say what must be the same on all."""
    check_layout(layout)
    check.flag("causal", causal)
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    chunks = len(chunks_of(rank, ranks, layout))
    shared: dict[str, Any] = {"softcap": softcap, "return_lse": True}
    local = None
    prepared = "dot" if score == "l2" else score  # the other half of l2 needs all ranks
    if cu_seqlens is not None:
        check.absent("key_lengths", key_lengths, "cu_seqlens")
        check.absent("weight", weight, "cu_seqlens")
        check.absent("score_bias", score_bias, "cu_seqlens")
        local = _local_offsets(cu_seqlens, ranks, chunks, layout)
        call: Any = _prepare.varlen_call(query, key, value, local, local, 0, 0, score=prepared, scale=scale, **shared)
    elif weight is not None:
        for name, given, usual in (("score", score, "scaled_dot"), ("scale", scale, None)):
            if given != usual:
                raise ValueError(f"{name}: the additive score has none, got {given!r}")
        call = additive_call(query, key, value, weight, score_bias=score_bias, **shared)
    else:
        check.absent("score_bias", score_bias, "no weight")
        call = _prepare.attention_call(query, key, value, score=prepared, scale=scale, **shared)
    core = _core_of(call)
    q, k = core.tensors[:2]
    lengths = _whole_lengths(key_lengths, call)
    if causal and q.shape[2] != k.shape[2]:
        raise ValueError(f"causal: expected as many queries as keys, got {q.shape[2]} and {k.shape[2]} on each rank")
    for name, tokens in (("query", q.shape[2]), ("key", k.shape[2])):
        if local is None and tokens % chunks:
            raise ValueError(f"{name}: expected an even number of tokens for zig-zag shards, got {tokens}")
    plan = Plan(group, rank, ranks, layout, causal, lengths, local, core.options)
    return core, plan, _facts(core, score == "l2", causal, chunks, lengths, cu_seqlens)


def _core_of(call: Any) -> Core:
    if hasattr(call, "weight"):  # additive
        q, k, v, *_, options, _ = call.call.arguments

        def finish(out: Tensor, lse: Tensor) -> AttentionOutput:
            result = _prepare.finish(call.call, out, lse, None)
            if not call.headless:
                return result
            return AttentionOutput(result.output.squeeze(-3), result.lse.squeeze(-2), None)

        return Core((q, k, v, call.weight, call.score_bias), options, finish)
    q, k, v, *_, options, _ = call.arguments
    return Core((q, k, v, None, None), options, lambda out, lse: _prepare.finish(call, out, lse, None))


def _local_offsets(cu_seqlens: Tensor, ranks: int, chunks: int, layout: str) -> Tensor:
    """Offsets of the shards of all sequences within this rank's tokens: every rank has the same number of each."""
    cu, _ = _prepare._cu_seqlens(cu_seqlens, cu_seqlens)
    lengths = cu.diff()
    if bool((lengths % (ranks * chunks) != 0).any()):
        raise ValueError(
            f"cu_seqlens: expected lengths that are multiples of {ranks * chunks} ({layout}, {ranks} ranks),"
            f" got {lengths.tolist()}"
        )
    return cu // ranks


def _whole_lengths(key_lengths: Tensor | None, call: Any) -> Tensor | None:
    if key_lengths is None:
        return None
    leading = (call.call if hasattr(call, "call") else call).leading
    batch = leading[:-1] if leading else ()
    return _prepare._lengths("key_lengths", key_lengths, batch or (1,))


FACTS = (
    "query shape", "key shape", "value shape", "dtype", "additive", "l2", "causal", "chunks of a rank (layout)",
    "scale", "softcap", "key_lengths", "cu_seqlens", "requires_grad",
)  # fmt: skip


def _facts(
    core: Core, l2: bool, causal: bool, chunks: int, lengths: Tensor | None, cu_seqlens: Tensor | None
) -> dict[str, Fact]:  # fmt: skip
    """What must be the same on every rank; long vectors by their size and two sums."""

    def vector(x: Tensor | None) -> tuple[int, ...]:
        if x is None:
            return ()
        x = x.to(torch.int64)
        return (x.numel(), int(x.sum()), int((x * torch.arange(1, x.numel() + 1, device=x.device)).sum()))

    q, k, v, weight, _ = core.tensors
    recorded = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in core.tensors)
    values: tuple[Fact, ...] = (
        tuple(q.shape), tuple(k.shape), tuple(v.shape), DTYPES.index(q.dtype), int(weight is not None), int(l2),
        int(causal), chunks, bits(core.options.scale), bits(core.options.softcap), vector(lengths), vector(cu_seqlens),
        int(recorded),
    )  # fmt: skip
    return dict(zip(FACTS, values, strict=True))
