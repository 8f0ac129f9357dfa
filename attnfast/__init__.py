"""Fused, differentiable attention on PyTorch tensors.

>>> import torch, attnfast
>>> q, k, v = (torch.randn(2, 8, 128, 64) for _ in range(3))
>>> attnfast.scaled_dot_product_attention(q, k, v).shape
torch.Size([2, 8, 128, 64])
"""

from attnfast import memory, nn, reference, viz
from attnfast._ext import _C as _binary
from attnfast._gather import ProductKeyReadOutput, product_key_read, weighted_gather
from attnfast._memory import topk_scores
from attnfast._memory_read import memory_read
from attnfast.explain import explain
from attnfast.functional import (
    AttentionOutput,
    SampledAttentionOutput,
    additive_attention,
    attention,
    scaled_dot_product_attention,
    varlen_attention,
)
from attnfast.reference import MemoryReadOutput

__version__ = "0.1.0"

# The instruction set in use: chosen at load from what the machine has and ATTNFAST_ISA; set_isa forces another one.
available_isas, get_isa, set_isa = _binary.available_isas, _binary.get_isa, _binary.set_isa

__all__ = [
    "AttentionOutput",
    "MemoryReadOutput",
    "ProductKeyReadOutput",
    "SampledAttentionOutput",
    "__version__",
    "additive_attention",
    "attention",
    "available_isas",
    "explain",
    "get_isa",
    "memory",
    "memory_read",
    "nn",
    "product_key_read",
    "reference",
    "scaled_dot_product_attention",
    "set_isa",
    "topk_scores",
    "varlen_attention",
    "viz",
    "weighted_gather",
]
