"""Who is measured: attnfast and the ways a PyTorch user has to compute the same attention today.

What a peer needs beyond the case's own tensors (a padded batch, a mask made from lengths, a compiled function) is made
in `build`, outside the timed part, so each peer is shown from its best side.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from .cases_additive import AdditiveCase
from .cases_dot import AttentionCase
from .registry import EAGER, OURS, TORCH, Inputs, Peer, Unsupported, Workload, register_peer


def eager_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """The textbook formula, as a user would write it before handing it to ``torch.compile``."""
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.size(-1))
    if bias is not None:
        scores = scores + bias
    if causal:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~visible, -math.inf)
    return torch.softmax(scores, dim=-1) @ value


def eager_additive(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Bahdanau's formula as users write it: a tensor of T_q x T_k x D."""
    scores = torch.tanh(query.unsqueeze(-2) + key.unsqueeze(-3)) @ weight
    return torch.softmax(scores, dim=-1) @ value


def _additive(function: Callable[..., torch.Tensor], inputs: Inputs) -> Workload:
    tensors = tuple(inputs[name] for name in ("query", "key", "value", "weight"))
    return Workload(functools.partial(function, *tensors), tensors, inputs.grad_out)


class Attnfast(Peer):
    """This library: the drop-in function where torch's signature suffices, ``attention`` otherwise."""

    name = OURS
    suites = ("dot", "additive", "threads", "accuracy", "overhead", "sweep", "gpu")

    def build(self, case: AttentionCase, inputs: Inputs) -> Workload:
        import attnfast

        if isinstance(case, AdditiveCase):
            return _additive(attnfast.additive_attention, inputs)
        query, key, value = inputs["query"], inputs["key"], inputs["value"]
        causal = "top_left" if case.causal else None
        call: Callable[[], torch.Tensor]
        if case.varlen:
            offsets, longest = inputs["cu_seqlens"], max(case.lengths())
            call = functools.partial(
                attnfast.varlen_attention, query, key, value, offsets, offsets, longest, longest, causal=causal
            )
        elif case.bias or case.key_lengths:
            call = functools.partial(
                attnfast.attention,
                query,
                key,
                value,
                bias=inputs.tensors.get("bias"),
                mask=inputs.tensors.get("mask"),
                key_lengths=inputs.tensors.get("key_lengths"),
                causal=causal,
                dropout_p=case.dropout_p,
            )
        else:
            call = _sdpa_call(attnfast.scaled_dot_product_attention, case, inputs)
        return Workload(call, tuple(inputs[name] for name in inputs.wanted), inputs.grad_out)


class AttnfastBinary(Peer):
    """The bare extension call with preallocated results: how much of a call is Python around it."""

    name = "attnfast._C"
    suites = ("overhead",)

    def build(self, case: AttentionCase, inputs: Inputs) -> Workload:
        from attnfast._ext import _C

        query, key, value = (inputs[name].detach() for name in ("query", "key", "value"))
        if not query.is_cpu:
            raise Unsupported("attnfast._C is the CPU's binary")
        out = torch.empty_like(inputs.grad_out)
        lse = torch.empty(query.shape[:-1], dtype=torch.float32)
        modifications = (None,) * 12  # mask, biases, lengths, offsets, slopes, sink, centre, seed, bounds
        scale, causal = 1 / math.sqrt(case.head_size), int(case.causal)
        forward = functools.partial(
            _C.dot_attention_fwd,
            *(query, key, value, out, lse, None, None, 0, *modifications, scale, 0.0, 0.0, 0.0, causal, -1, -1),
        )

        def call() -> torch.Tensor:
            forward()
            return out

        return Workload(call, (), inputs.grad_out)


def _sdpa_call(
    function: Callable[..., torch.Tensor], case: AttentionCase, inputs: Inputs
) -> Callable[[], torch.Tensor]:
    """A call with the signature of ``F.scaled_dot_product_attention``, without arguments that keep their default."""
    options: dict[str, Any] = {}
    if case.mask:
        options["attn_mask"] = inputs["mask"]
    if case.bias:
        options["attn_mask"] = inputs["bias"]
    if case.key_lengths:
        positions = torch.arange(case.key_tokens, device=inputs["query"].device)
        options["attn_mask"] = (positions < inputs["key_lengths"][:, None])[:, None, None, :]
    if case.dropout_p:
        options["dropout_p"] = case.dropout_p
    if case.causal:
        options["is_causal"] = True
    if case.kv_heads != case.heads:
        options["enable_gqa"] = True
    return functools.partial(function, inputs["query"], inputs["key"], inputs["value"], **options)


def _padded(case: AttentionCase, inputs: Inputs) -> Workload:
    """A ragged batch the usual way: padded to the longest sequence, with a mask."""
    lengths = case.lengths()
    longest = max(lengths)
    starts = inputs["cu_seqlens"].tolist()

    def pad(packed: torch.Tensor) -> torch.Tensor:
        rows = [F.pad(packed[s:e].transpose(0, 1), (0, 0, 0, longest - (e - s))) for s, e in itertools.pairwise(starts)]
        return torch.stack(rows)

    def unpack(padded: torch.Tensor) -> torch.Tensor:
        return torch.cat([padded[i, :, :n].transpose(0, 1) for i, n in enumerate(lengths)])

    query, key, value = (pad(inputs[name].detach()).requires_grad_() for name in inputs.wanted)
    device = query.device
    mask = (torch.arange(longest, device=device) < torch.tensor(lengths, device=device)[:, None])[:, None, None, :]
    if case.causal:
        mask = mask & torch.ones(longest, longest, dtype=torch.bool, device=device).tril()
    call = functools.partial(F.scaled_dot_product_attention, query, key, value, attn_mask=mask)
    return Workload(call, (query, key, value), pad(inputs.grad_out), unpack)


class TorchSdpa(Peer):
    """``F.scaled_dot_product_attention`` as it chooses by itself (the CPU flash kernel where that applies)."""

    name = TORCH
    suites = ("dot", "threads", "accuracy", "overhead", "sweep", "gpu")

    def build(self, case: AttentionCase, inputs: Inputs) -> Workload:
        if case.varlen:
            return _padded(case, inputs)
        call = _sdpa_call(F.scaled_dot_product_attention, case, inputs)
        return Workload(call, tuple(inputs[name] for name in inputs.wanted), inputs.grad_out)


class TorchMath(TorchSdpa):
    """The same function held to its unfused path."""

    name = "sdpa math"
    suites = ("dot", "accuracy", "overhead")

    def context(self) -> contextlib.AbstractContextManager[Any]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        return sdpa_kernel(SDPBackend.MATH)


class TorchLoop(Peer):
    """A ragged batch as one torch call per sequence: no padding, more calls."""

    name = "sdpa loop"
    suites = ("dot", "threads")

    def build(self, case: AttentionCase, inputs: Inputs) -> Workload:
        if not case.varlen:
            raise Unsupported("")  # an empty reason: the peer has no meaning here and is left out of the results
        query, key, value = (inputs[name] for name in ("query", "key", "value"))
        starts = inputs["cu_seqlens"].tolist()

        def call() -> torch.Tensor:
            outputs = []
            for start, end in itertools.pairwise(starts):
                one = (tensor[start:end].transpose(0, 1).unsqueeze(0) for tensor in (query, key, value))
                outputs.append(F.scaled_dot_product_attention(*one, is_causal=case.causal)[0].transpose(0, 1))
            return torch.cat(outputs)

        return Workload(call, (query, key, value), inputs.grad_out)


class TorchCompile(Peer):
    """``torch.compile`` of the textbook formula (inductor is free to recognise it and call its own SDPA)."""

    name = "compile"
    compiled = True
    suites = ("additive", "dot")

    def build(self, case: AttentionCase, inputs: Inputs) -> Workload:
        if isinstance(case, AdditiveCase):
            return _additive(_compile(eager_additive), inputs)
        if case.mask or case.key_lengths or case.varlen or case.dropout_p or case.kv_heads != case.heads:
            raise Unsupported("the compiled formula covers plain, causal and biased attention")
        compiled = _compile(eager_attention)
        call = functools.partial(
            compiled,
            inputs["query"],
            inputs["key"],
            inputs["value"],
            bias=inputs.tensors.get("bias"),
            causal=case.causal,
        )
        return Workload(call, tuple(inputs[name] for name in inputs.wanted), inputs.grad_out)


class Eager(Peer):
    """The textbook formula, operation by operation; torch has no function for the additive score."""

    name = EAGER
    suites = ("additive",)

    def build(self, case: AdditiveCase, inputs: Inputs) -> Workload:
        return _additive(eager_additive, inputs)


class TorchFlex(Peer):
    """FlexAttention, compiled as its documentation asks."""

    name = "flex"
    compiled = True
    suites = ("dot",)

    def build(self, case: AttentionCase, inputs: Inputs) -> Workload:
        if case.mask or case.key_lengths or case.varlen or case.dropout_p or case.kv_heads != case.heads:
            raise Unsupported("the FlexAttention peer covers plain, causal and biased attention")
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        options: dict[str, Any] = {}
        if case.causal:
            tokens = (case.query_tokens, case.key_tokens)
            device = str(inputs["query"].device)
            options["block_mask"] = create_block_mask(lambda b, h, q, k: q >= k, None, None, *tokens, device=device)
        if case.bias:
            bias = inputs["bias"].detach()
            options["score_mod"] = lambda score, b, h, q, k: score + bias[0, h, q, k]
        compiled = _compile(flex_attention)

        def call() -> torch.Tensor:
            tensors = [inputs[name] for name in ("query", "key", "value")]
            if not torch.is_grad_enabled():
                # It refuses tensors that require a gradient on CPU even where none is recorded.
                tensors = [tensor.detach() for tensor in tensors]
            return compiled(*tensors, **options)

        return Workload(call, tuple(inputs[name] for name in inputs.wanted), inputs.grad_out)


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    import torch._functorch.config as functorch_config

    # A backward that is run more than once over one graph (so that it can be timed alone) may not eat its own buffers.
    functorch_config.donated_buffer = False
    return torch.compile(function, dynamic=False)


for _peer in (
    Attnfast(),
    AttnfastBinary(),
    TorchSdpa(),
    TorchMath(),
    TorchLoop(),
    Eager(),
    TorchCompile(),
    TorchFlex(),
):
    register_peer(_peer)
