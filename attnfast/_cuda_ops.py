"""What ops of attnfast._cuda need beside the arguments of attnfast._C: workspace, and torch's switch for tf32.

Torch allocates it, as everything else: its cache gives the memory of one call to the next on the same stream, and a
captured graph keeps it.
"""

from __future__ import annotations

from typing import Any

import torch

from attnfast._ext import cuda_binary

CU_SEQLENS_Q = 13  # its place among the arguments


def allows_tf32() -> bool:
    """Whether torch's own products of float32 matrices may round their operands to tf32 on a GPU.

    ``torch.backends.cuda.matmul.fp32_precision`` says so by whichever name it was set: ``allow_tf32``,
    ``torch.set_float32_matmul_precision``, ``torch.backends.fp32_precision``.
    """
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def dot_attention_fwd_of(binary: Any, *args: Any) -> None:
    """``binary.dot_attention_fwd`` with the arguments of ``_C.dot_attention_fwd``."""
    query, key, value = args[:3]
    size = binary.dot_attention_workspace(query, key, value, args[CU_SEQLENS_Q])
    real = torch.float64 if query.dtype is torch.float64 else torch.float32
    binary.dot_attention_fwd(*args, query.new_empty(size, dtype=real) if size else None, allows_tf32())


def dot_attention_bwd_of(binary: Any, *args: Any) -> None:
    """``binary.dot_attention_bwd`` with the arguments of ``_C.dot_attention_bwd``."""
    binary.dot_attention_bwd(*args, allows_tf32())


def dot_attention_fwd(*args: Any) -> None:
    """:func:`dot_attention_fwd_of` the module for GPUs."""
    dot_attention_fwd_of(cuda_binary(), *args)


def dot_attention_bwd(*args: Any) -> None:
    """:func:`dot_attention_bwd_of` the module for GPUs."""
    dot_attention_bwd_of(cuda_binary(), *args)
