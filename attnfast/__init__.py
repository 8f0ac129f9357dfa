"""Fused, differentiable attention on PyTorch tensors.

>>> import torch, attnfast
>>> q, k, v = (torch.randn(2, 8, 128, 64) for _ in range(3))
>>> attnfast.scaled_dot_product_attention(q, k, v).shape
torch.Size([2, 8, 128, 64])
"""

from attnfast import reference
from attnfast.explain import explain
from attnfast.functional import AttentionOutput, attention, scaled_dot_product_attention, varlen_attention

__version__ = "0.1.0"

__all__ = [
    "AttentionOutput",
    "__version__",
    "attention",
    "explain",
    "reference",
    "scaled_dot_product_attention",
    "varlen_attention",
]
