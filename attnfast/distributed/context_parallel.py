"""Attention over a sequence whose tokens are sharded: keys and values go round a ring, outputs are merged by their lse.

Each rank keeps its queries. In step i it holds the keys and values of rank r - i, computes its queries' output against
them with the fused kernel, and merges it into what it has by the log-sum-exp; meanwhile the next keys and values
arrive. The backward goes round again: the kernel's backward with the *final* output and log-sum-exp gives exactly the
part of the gradients that belongs to a block, and the sums for keys and values travel with them (Liu, Zaharia and
Abbeel, "Ring Attention with Blockwise Transformers for Near-Infinite Context", ICLR 2024). Zig-zag shards, see
_shards.py, balance causal masks.

Memory of a rank: its shards, one more set of keys and values in each direction, and sums of their gradients in the
accumulation dtype. Traffic of a rank: forward (P - 1) (K + V); backward (P - 1) (K + V) + P (dK + dV), where K, V are
the bytes of its shards and dK, dV those in the accumulation dtype.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from attnfast import _additive_ops, _prepare, ops
from attnfast import _validate as check
from attnfast._additive import additive_call
from attnfast._scores import l2_center, l2_operands
from attnfast.distributed._group import DTYPES, Fact, Group, Ring, agree, bits, contact, resolve
from attnfast.distributed._shards import Block, block, check_layout, chunks_of
from attnfast.functional import AttentionOutput
from attnfast.ops import DotAttentionOptions

NAME = "context_parallel_attention"


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


class Plan(NamedTuple):
    """All that a ring needs beside its tensors."""

    group: Group
    rank: int
    ranks: int
    layout: str
    causal: bool
    key_lengths: Tensor | None  # of whole sequences, [B]
    offsets: Tensor | None  # of packed shards, [N + 1]
    options: DotAttentionOptions

    def blocks(self, source: int) -> Block | None:
        return block(self.rank, source, self.layout, self.causal)

    def copies(self, part: int | None) -> bool:
        """Whether `half` is a copy."""
        return part is not None and self.offsets is not None

    def half(self, x: Tensor, part: int | None) -> Tensor:
        """The tokens of a part, ``[B, H, tokens, D]``: a view, or for packed shards a copy."""
        if part is None:
            return x
        if self.offsets is None:
            tokens = x.shape[2] // 2
            return x.narrow(2, part * tokens, tokens)
        return x.index_select(2, self.rows(part))

    def rows(self, part: int) -> Tensor:
        """Positions of the first or second halves of all packed shards."""
        assert self.offsets is not None
        half = self.offsets.diff() // 2
        starts = self.offsets[:-1] + part * half
        # Position i of the result lies in sequence s, of which it is row i - (rows of the sequences before).
        sequence = torch.repeat_interleave(half)
        return starts[sequence] + torch.arange(len(sequence), device=half.device) - (half.cumsum(0) - half)[sequence]

    def write(self, x: Tensor, part: int | None, value: Tensor) -> None:
        """Replace the tokens of a part."""
        if part is None:
            x.copy_(value)
        elif self.offsets is None:
            self.half(x, part).copy_(value)
        else:
            x.index_copy_(2, self.rows(part), value)

    def add(self, x: Tensor, part: int | None, value: Tensor) -> None:
        """Add to the tokens of a part, in place."""
        if part is None or not self.copies(part):
            half = self.half(x, part)
            half += value
        else:
            x.index_add_(2, self.rows(part), value.to(x.dtype))

    def options_of(self, found: Block, source: int, keys: int) -> DotAttentionOptions:
        """The core's options for one block."""
        options = self.options._replace(causal=1 if found.causal else 0)
        if self.offsets is not None:
            return options._replace(
                cu_seqlens_q=self.offsets if found.queries is None else self.offsets // 2,
                cu_seqlens_k=self.offsets if found.keys is None else self.offsets // 2,
            )
        if self.key_lengths is None:
            return options
        numbers = chunks_of(source, self.ranks, self.layout)
        numbers = numbers if found.keys is None else (numbers[found.keys],)
        # Valid keys come first in a shard too: a later chunk has some only if the earlier one has nothing else.
        size = keys // len(numbers)
        valid = torch.stack([(self.key_lengths - number * size).clamp(0, size) for number in numbers]).sum(0)
        return options._replace(key_lengths=valid)


class RingAttention(Function):
    """``apply(plan, query, key, value, weight, score_bias)`` returns this rank's out and base-2 lse."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, *tensors: Any) -> tuple[Tensor, Tensor]:
        query, key, value, weight, score_bias = tensors
        ring = Ring(plan.group, f"{NAME}, forward")
        out = torch.zeros(*query.shape[:3], value.shape[3], dtype=ops.real_dtype(query.dtype), device=query.device)
        lse = torch.full_like(out[..., 0], -torch.inf)
        packet = Packet(key, value)
        for step in range(plan.ranks):
            source = (plan.rank - step) % plan.ranks
            transfer = ring.start(packet.buffer) if step < plan.ranks - 1 else None
            found = plan.blocks(source)
            if found is not None:
                k, v = (plan.half(x, found.keys) for x in packet.parts())
                q = plan.half(query, found.queries)
                options = plan.options_of(found, source, k.shape[2])
                part, part_lse = _forward(q, k, v, weight, score_bias, options)
                _merge(plan, found, out, lse, part, part_lse)
            if transfer is not None:
                packet.buffer = transfer.wait()
        out = out.to(query.dtype)
        ctx.plan = plan
        ctx.save_for_backward(query, key, value, weight, score_bias, out, lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        query, key, value, weight, score_bias, out, lse = ctx.saved_tensors
        ring = Ring(plan.group, f"{NAME}, backward")
        real = ops.real_dtype(query.dtype)
        sums = [torch.zeros(x.shape, dtype=real, device=x.device) for x in (query, weight, score_bias) if x is not None]
        grad_query, own = sums[0], sums[1:]
        packet = Packet(key, value)
        sums_kv = Packet(torch.zeros_like(key, dtype=real), torch.zeros_like(value, dtype=real))
        travelling = None
        for step in range(plan.ranks):
            source = (plan.rank - step) % plan.ranks
            transfer = ring.start(packet.buffer) if step < plan.ranks - 1 else None
            if step:
                travelling = ring.start(sums_kv.buffer)  # what belongs to the keys held one step before
            found = plan.blocks(source)
            grads: tuple[Tensor, ...] = ()
            if found is not None:
                k, v = (plan.half(x, found.keys) for x in packet.parts())
                q, o, go = (plan.half(x, found.queries) for x in (query, out, grad_out))
                rows, gl = (_rows(plan, x, found.queries) for x in (lse, grad_lse))
                options = plan.options_of(found, source, k.shape[2])
                grads = _backward(go, gl, q, k, v, weight, score_bias, o, rows, options)
                plan.add(grad_query, found.queries, grads[0])
                for at, total in enumerate(own):
                    total += grads[3 + at]
            if travelling is not None:
                sums_kv.buffer = travelling.wait()
            if found is not None:
                for at, total in enumerate(sums_kv.parts()):
                    plan.add(total, found.keys, grads[1 + at])
            if transfer is not None:
                packet.buffer = transfer.wait()
        if plan.ranks > 1:
            sums_kv.buffer = ring.start(sums_kv.buffer).wait()  # home
        grad_key, grad_value = (total.to(x.dtype) for total, x in zip(sums_kv.parts(), (key, value)))
        wanted = iter(own)
        vectors = [next(wanted) if x is not None else None for x in (weight, score_bias)]
        return None, grad_query.to(query.dtype), grad_key, grad_value, *vectors


class Packet:
    """Two tensors in one buffer, which travels as one message; gives views of it."""

    def __init__(self, first: Tensor, second: Tensor) -> None:
        self.shapes = first.shape, second.shape
        self.buffer = torch.cat([first.reshape(-1), second.reshape(-1)])

    def parts(self) -> tuple[Tensor, Tensor]:
        count = self.shapes[0].numel()
        return self.buffer[:count].view(self.shapes[0]), self.buffer[count:].view(self.shapes[1])


def _rows(plan: Plan, x: Tensor, part: int | None) -> Tensor:
    """Part of a tensor ``[B, H, tokens]``, contiguous as the kernels want it."""
    return plan.half(x.unsqueeze(-1), part).squeeze(-1).contiguous()


def _merge(plan: Plan, found: Block, out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Add a block's output, each row of both weighted by its share of the sum of exponentials."""
    old_out, old_lse = plan.half(out, found.queries), plan.half(lse.unsqueeze(-1), found.queries)
    part_lse = part_lse.unsqueeze(-1)
    new_lse = torch.logaddexp2(old_lse, part_lse)
    nothing = new_lse == -torch.inf  # neither has seen a key: 0, and not the NaN of inf - inf
    share, part_share = ((x - new_lse).exp2().masked_fill(nothing, 0) for x in (old_lse, part_lse))
    old_out *= share  # in place, which leaves one output less to hold
    old_out += part.mul_(part_share) if part.dtype is old_out.dtype else part * part_share
    if plan.copies(found.queries):
        plan.write(out, found.queries, old_out)
    plan.write(lse.unsqueeze(-1), found.queries, new_lse)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None, score_bias: Tensor | None, options: DotAttentionOptions
) -> tuple[Tensor, Tensor]:
    none = (None,) * 4
    if weight is None:
        out, lse, _, _ = ops.dot_attention_fwd(q, k, v, *none, options, True)
    else:
        out, lse, _, _ = _additive_ops.additive_attention_fwd(q, k, v, weight, score_bias, *none, options, True)
    assert lse is not None
    return out, lse


def _backward(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None,
    score_bias: Tensor | None, out: Tensor, lse: Tensor, options: DotAttentionOptions,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of query, key, value and, for the additive core, weight and, if it is there, score_bias."""
    none = (None,) * 4
    grads: tuple[Tensor | None, ...]
    if weight is None:
        needs = (True, True, True, False, False, False, False)
        grads = ops.dot_attention_bwd(grad_out, grad_lse, None, q, k, v, out, lse, None, None, *none, options, needs)
    else:
        needs_additive = (True, True, True, True, score_bias is not None, False, False, False, False)
        grads = _additive_ops.additive_attention_bwd(
            grad_out, grad_lse, None, q, k, v, weight, score_bias, out, lse, None, None, *none, options, needs_additive
        )
    return tuple(grad for grad in grads if grad is not None)
