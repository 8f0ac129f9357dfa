"""What :func:`attnfast.explain` says of kernels for CUDA tensors: names, how keys are split, why not a faster one.

The binary is asked which kernel it would queue, and how much workspace that takes, which says into how many ranges keys
are split. Reasons are looked for in the tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnfast import _cuda_ops, ops, reference
from attnfast import _explain_text as text
from attnfast._ext import cuda_binary

_HALVES = (torch.bfloat16, torch.float16)
_WIDEST = 256  # head size of the kernels with tensor cores


def dot(query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor | None, grad: bool) -> list[str]:
    """Lines for a forward of the dot core, operands ``[B, H, T, D]``."""
    operands = [x.detach() for x in (query, key, value)]
    binary = cuda_binary()
    name = binary.dot_attention_kernel(*operands, _cuda_ops.allows_tf32())
    lines = [f"kernel: {name} on CUDA, {_products(name, query.dtype)}"]
    if name.endswith("_fma") and (reason := no_tensor_cores(*operands)):
        lines.append(f"not dot_attention_mma, which has tensor cores: {reason}")
    rows = query.shape[:3].numel()
    words = binary.dot_attention_workspace(*operands, cu_seqlens_q)
    if words:
        lines.append(f"split: keys in {words // (rows * (value.shape[3] + 2))} ranges, joined by attention_merge")
    return lines + ([f"backward: {name.replace('attention', 'attention_bwd')}"] if grad else [])


def no_tensor_cores(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Why `dot_attention_mma` does not take these operands; None if nothing is known that keeps it from them."""
    if query.dtype == torch.float64:
        return "products of float64 are formed in float64"
    if query.dtype == torch.float32 and not _cuda_ops.allows_tf32():
        return "torch.backends.cuda.matmul.fp32_precision does not allow tf32"
    chunk = 16 // query.element_size()
    for name, x, letter in (("query", query, "D"), ("value", value, "D_v")):
        size = x.shape[3]
        if size == 0 or size > _WIDEST or size % chunk:
            return f"{name}'s {letter} = {size} is not a multiple of {chunk} from {chunk} to {_WIDEST}"
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.stride(3) != 1:
            return f"elements of a row of {name} do not lie side by side"
        if x.data_ptr() % 16 or any(stride % chunk for stride in x.stride()[:3]):
            return f"rows of {name} do not start at multiples of 16 bytes"
    return None


def additive(query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor | None) -> list[str]:
    """Lines for a forward of the additive core."""
    lines = [f"kernel: additive_attention_fwd on CUDA, {text.arithmetic(query.dtype)}"]
    operands = (query.detach(), key.detach(), value.detach())
    words = cuda_binary().additive_attention_workspace(*operands, cu_seqlens_q, ops.WEIGHTS_NONE)[0]
    if words:
        ranges = words // (query.shape[:3].numel() * (value.shape[3] + 2))
        lines.append(f"split: keys in {ranges} ranges, joined by attention_merge")
    return lines


def topk(query: Tensor, keys: Tensor, k: int) -> list[str]:
    """Lines for topk_scores, ``query [B, D]``, ``keys [N, D]``."""
    if query.dtype == keys.dtype and query.dtype in _HALVES:
        lines = [f"kernel: topk_scores_mma on CUDA, {_products('mma', keys.dtype)}"]
    else:
        table = "int8 widened to float32" if keys.dtype == torch.int8 else text.arithmetic(keys.dtype)
        lines = [f"kernel: topk_scores on CUDA, {table}"]
        what = " and ".join(dict.fromkeys(text.dtype_name(x.dtype) for x in (query, keys)))
        lines.append(f"not topk_scores_mma, which has tensor cores: it takes two of one half type, not {what}")
    words = cuda_binary().topk_scores_workspace(keys.detach(), query.shape[0], k)
    if words:
        size = 2 if reference.real_dtype(query.dtype) == torch.float64 else 1  # words of a candidate
        lines.append(f"split: slots in {words // (size * query.shape[0] * k)} ranges, joined by topk_merge")
    return lines


def gather(values: Tensor) -> list[str]:
    """Lines for weighted_gather of ``values [N, D_v]``."""
    aligned = values.stride(1) == 1 and values.data_ptr() % 16 == 0 and values.stride(0) * values.itemsize % 16 == 0
    table: Any = "int8 widened to float32" if values.dtype == torch.int8 else text.arithmetic(values.dtype)
    lines = [f"kernel: weighted_gather on CUDA, {table}"]
    if not aligned:
        lines.append("not 16 bytes at a time: rows do not start at multiples of 16 bytes, or have gaps")
    return lines


def _products(name: str, dtype: torch.dtype) -> str:
    if name.endswith("mma"):
        products = "float32 rounded to tf32" if dtype == torch.float32 else text.dtype_name(dtype)
        return f"products of {products} on tensor cores, sums in float32"
    return text.arithmetic(dtype)
