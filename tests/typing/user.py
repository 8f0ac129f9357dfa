"""A user's program, for the type checker alone (tests/test_typing.py); it is never run.

It calls everything public the way the documents do, by position and by keyword, and says which types must come out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import assert_type

import attnfast
from attnfast import AttentionOutput, MemoryReadOutput, ProductKeyReadOutput, SampledAttentionOutput, nn


def functions(query: Tensor, key: Tensor, value: Tensor, weight: Tensor, places: Tensor) -> Tensor:
    plain = attnfast.scaled_dot_product_attention(query, key, value, None, 0.0, True, None, False)
    assert_type(plain, Tensor)
    attnfast.scaled_dot_product_attention(
        query, key, value, attn_mask=places, dropout_p=0.1, is_causal=False, scale=0.5, enable_gqa=True
    )

    result = attnfast.attention(
        query, key, value, score="cosine", normalizer="entmax15", mask=None, bias=None, causal="bottom_right",
        window=(64, 0), window_center=None, query_lengths=None, key_lengths=torch.tensor([3]), alibi_slopes=None,
        sink=None, softcap=30.0, scale=None, dropout_p=0.0, prior=None, return_lse=True, return_weights="column_sum",
    )  # fmt: skip
    assert_type(result, "Tensor | AttentionOutput | SampledAttentionOutput")
    assert isinstance(result, AttentionOutput)
    assert_type(result.output, Tensor)
    assert_type(result.lse, "Tensor | None")
    assert_type(result.weights, "Tensor | None")

    sampled = attnfast.attention(query, key, value, normalizer="hard_sample")
    assert isinstance(sampled, SampledAttentionOutput)
    assert_type(sampled.log_prob, Tensor)

    added = attnfast.additive_attention(query, key, value, weight, score_bias=weight, causal="top_left")
    offsets = torch.tensor([0, 3])
    packed = attnfast.varlen_attention(query, key, value, offsets, offsets, 3, 3, causal="top_left")
    assert isinstance(added, Tensor) and isinstance(packed, Tensor)
    return plain + added + packed


def memory(query: Tensor, keys: Tensor, values: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    scores, slots = attnfast.topk_scores(query, keys, 5, mask=None, scale=0.5, sparse_grad=False)
    assert_type(scores, Tensor)
    assert_type(slots, Tensor)
    assert_type(attnfast.weighted_gather(slots, scores, values, sparse_grad=True), Tensor)
    read = attnfast.memory_read(query, keys, values, topk=3, score="dot", hops=2, hop="replace")
    assert_type(read, "Tensor | MemoryReadOutput")
    assert not isinstance(read, MemoryReadOutput)
    product = attnfast.product_key_read(query, rows, columns, values, 7)
    assert_type(product, "Tensor | ProductKeyReadOutput")
    assert not isinstance(product, ProductKeyReadOutput)
    return read + product


def modules(query: Tensor, source: Tensor) -> Tensor:
    bahdanau = nn.BahdanauAttention(query_size=32, memory_size=48, units=64, bias=True)
    projected = bahdanau.project_memory(source)
    assert_type(projected, nn.ProjectedMemory)
    context, weights = bahdanau.step(query, projected, torch.tensor([3]), return_weights=True)
    assert_type(context, Tensor)
    assert_type(weights, "Tensor | None")
    nn.Attention(32, 48, heads=4, kv_heads=2, head_size=8, score="cosine", normalizer="sparsemax", dropout=0.1)
    nn.LuongAttention(32, 48, "general", local="p", window=5)
    nn.MultiheadAttention(32, 4, dropout=0.0, bias=True, kdim=8, vdim=8, batch_first=True)
    nn.ProductKeyMemory(32, n_keys=16, heads=2, d_key=8, k=4)
    head = nn.NTMHead(32, 48, shift=1, writes=True)
    found: tuple[Tensor, ...] = head(query, source, query)
    return context + found[0]


def tools(query: Tensor) -> str:
    before = attnfast.set_isa("auto")
    assert_type(before, str)
    assert_type(attnfast.get_isa(), str)
    assert_type(attnfast.available_isas(), "list[str]")
    options: dict[str, Any] = {"causal": "top_left"}
    text = attnfast.explain(attnfast.attention, query, query, query, **options)
    assert_type(text, str)
    assert_type(attnfast.__version__, str)
    return text
