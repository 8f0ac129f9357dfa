"""The ring of context_parallel_attention: a plan of who sees what, and the function that goes round with it.

In step i rank r holds the keys and values of rank r - i. An exchange is posted before the block is computed and waited
for after it; in the backward the sums of gradients that belong to the keys of the step before travel with them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from attnfast import _additive_ops, ops
from attnfast.distributed._group import Group, Ring
from attnfast.distributed._shards import Block, block, chunks_of
from attnfast.ops import DotAttentionOptions

NAME = "context_parallel_attention"


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
                _merge(plan, found, out, lse, *_forward_block(plan, found, source, query, packet, weight, score_bias))
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
                grads = _backward_block(
                    plan, found, source, query, packet, weight, score_bias, out, lse, grad_out, grad_lse
                )
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
        grads, travelling = (), None  # not held on the way home
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


# Functions of their own, so that no view of a block's keys or of its results outlives the step and keeps a buffer.
def _forward_block(
    plan: Plan, found: Block, source: int, query: Tensor, packet: Packet, weight: Tensor | None,
    score_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    k, v = (plan.half(x, found.keys) for x in packet.parts())
    options = plan.options_of(found, source, k.shape[2])
    return _forward(plan.half(query, found.queries), k, v, weight, score_bias, options)


def _backward_block(
    plan: Plan, found: Block, source: int, query: Tensor, packet: Packet, weight: Tensor | None,
    score_bias: Tensor | None, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    k, v = (plan.half(x, found.keys) for x in packet.parts())
    q, o, go = (plan.half(x, found.queries) for x in (query, out, grad_out))
    rows, gl = (_rows(plan, x, found.queries) for x in (lse, grad_lse))
    options = plan.options_of(found, source, k.shape[2])
    return _backward(go, gl, q, k, v, weight, score_bias, o, rows, options)


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
