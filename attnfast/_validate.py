"""Checks of arguments, and the shape bookkeeping between ``[..., H, T, D]`` and the kernels' ``[B, H, T, D]``.

Every failed check raises one ValueError (shape, value, device) or TypeError (kind, dtype) that names the argument, the
expected dimensions by name, and what came. Values of tensors are never read here: reading would synchronise, break
tracing and cost time. The ranges of lengths and cu_seqlens are checked by the binary, which reads them anyway.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from attnfast.ops import has_cuda

DTYPES = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
TABLE_DTYPES = DTYPES | {torch.int8}
LENGTH_DTYPES = frozenset({torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8})
SCORES = ("dot", "scaled_dot", "cosine", "l2")
NORMALIZERS = ("softmax", "sparsemax", "entmax15", "sigmoid", "none", "hard", "hard_sample")
CAUSAL_CODES = {"top_left": 1, "bottom_right": 2}
LARGEST = sys.float_info.max
WEIGHTS_MODES = {"full": 1, "column_sum": 2, "row_max": 3}


def shape_text(shape: Sequence[Any]) -> str:
    return f"[{', '.join(str(size) for size in shape)}]"


def _dtype_text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- single tensors -------------------------------------------------------------------------------------------------


def tensor(name: str, x: Any) -> None:
    """A dense tensor on a device that has kernels."""
    if type(x) is Tensor and x.layout is torch.strided and x.is_cpu and not (x.is_nested or x.is_quantized):
        return
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if x.is_nested:
        if x.layout is torch.jagged:
            raise TypeError(f"{name}: a nested tensor is accepted only if query, key and value all are jagged, got one")
        raise TypeError(f"{name}: nested tensors need layout=torch.jagged, got one with layout=torch.strided")
    if x.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense (strided) tensor, got layout {x.layout}; use .to_dense()")
    if x.is_quantized:
        raise TypeError(f"{name}: quantized tensors are not supported, got {_dtype_text(x.dtype)}; use .dequantize()")
    if x.device.type != "cpu" and not (x.device.type == "cuda" and has_cuda()):
        raise ValueError(f"{name}: this build has kernels for cpu tensors only, got a tensor on {x.device}")


def floating(name: str, x: Any, allowed: Sequence[torch.dtype] | frozenset[torch.dtype] = DTYPES) -> None:
    tensor(name, x)
    if x.dtype not in allowed:
        names = ", ".join(sorted(_dtype_text(dtype) for dtype in allowed))
        raise TypeError(f"{name}: expected dtype {names}, got {_dtype_text(x.dtype)}")


def table(name: str, x: Any, columns: str, scales_name: str, scales: Any) -> None:
    """A table ``[N, columns]`` of floats, or of int8 with a float32 scale for each row."""
    floating(name, x, TABLE_DTYPES)
    if x.dim() != 2:
        raise ValueError(f"{name}: expected 2 dimensions [N, {columns}], got {shape_text(x.shape)}")
    if x.dtype != torch.int8:
        absent(scales_name, scales, f"{name} in {_dtype_text(x.dtype)}")
        return
    if scales is None:
        raise ValueError(f"{scales_name}: expected a float32 tensor [N] with {name} in int8, got None")
    floating(scales_name, scales, (torch.float32,))
    if scales.shape != x.shape[:1]:
        got = shape_text(scales.shape)
        raise ValueError(f"{scales_name}: expected [N] = [{x.shape[0]}] (the rows of {name}), got {got}")
    if scales.requires_grad:
        raise ValueError(f"{scales_name}: has no gradient, got a tensor with requires_grad=True; use .detach()")


def operands(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Three dense floating tensors of one dtype on one device."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        floating(name, x)
    for name, x in (("key", key), ("value", value)):
        if x.dtype != query.dtype:
            raise TypeError(f"{name}: expected dtype {_dtype_text(query.dtype)} (query's), got {_dtype_text(x.dtype)}")
        if x.device != query.device:
            raise ValueError(f"{name}: expected a tensor on {query.device} (query's), got one on {x.device}")


def score_bias(name: str, x: Any, query: Tensor) -> None:
    """A tensor that is added to scores: float32 or the query's dtype."""
    tensor(name, x)
    if x.dtype is not torch.float32 and x.dtype is not query.dtype:
        expected = "float32" if query.dtype is torch.float32 else f"float32 or {_dtype_text(query.dtype)} (query's)"
        boolean = "bool, " if name.endswith("mask") else ""
        raise TypeError(f"{name}: expected dtype {boolean}{expected}, got {_dtype_text(x.dtype)}")


def integers(name: str, x: Any, dtypes: frozenset[torch.dtype] = LENGTH_DTYPES) -> None:
    tensor(name, x)
    if x.dtype not in dtypes:
        names = ", ".join(sorted(_dtype_text(dtype) for dtype in dtypes))
        raise TypeError(f"{name}: expected an integer tensor ({names}), got dtype {_dtype_text(x.dtype)}")


# --- numbers and names ----------------------------------------------------------------------------------------------


def number(name: str, x: Any, expected: str = "a finite number") -> float:
    if type(x) is float and -LARGEST <= x <= LARGEST:
        return x
    if torch.compiler.is_compiling() and isinstance(x, float | int | torch.SymFloat | torch.SymInt):
        return x  # type: ignore[return-value]  # may be symbolic: what follows would need its value
    if isinstance(x, bool | Tensor) or not hasattr(x, "__float__"):
        raise TypeError(f"{name}: expected {expected}, got {type(x).__name__}")
    result = float(x)
    if not math.isfinite(result):
        raise ValueError(f"{name}: expected {expected}, got {result}")
    return result


def softcap(x: Any) -> float:
    result = number("softcap", x, "a finite number >= 0 (0 = off)")
    if result < 0:
        raise ValueError(f"softcap: expected a finite number >= 0 (0 = off), got {result}")
    return result


def dropout(x: Any) -> float:
    result = number("dropout_p", x, "a probability in [0, 1]")
    if not 0 <= result <= 1:
        raise ValueError(f"dropout_p: expected a probability in [0, 1], got {result}")
    return result


def flag(name: str, x: Any) -> bool:
    if not isinstance(x, bool):
        raise TypeError(f"{name}: expected True or False, got {x!r}")
    return x


def choice(name: str, x: Any, choices: Sequence[str]) -> str:
    if not isinstance(x, str) or x not in choices:
        names = ", ".join(repr(c) for c in choices)
        kind = ValueError if isinstance(x, str) else TypeError
        raise kind(f"{name}: expected one of {names}, got {x!r}")
    return x


def causal_code(x: Any) -> int:
    if x is None:
        return 0
    if not isinstance(x, str) or x not in CAUSAL_CODES:
        kind = ValueError if isinstance(x, str) else TypeError
        raise kind(f"causal: expected None, 'top_left' or 'bottom_right', got {x!r}")
    return CAUSAL_CODES[x]


def weights_mode(x: Any) -> int:
    if isinstance(x, bool):
        return int(x)
    if not isinstance(x, str) or x not in WEIGHTS_MODES:
        kind = ValueError if isinstance(x, str) else TypeError
        raise kind(f"return_weights: expected False, True, 'full', 'column_sum' or 'row_max', got {x!r}")
    return WEIGHTS_MODES[x]


def window_sizes(x: Any) -> tuple[int, int]:
    if x is None:
        return -1, -1
    if not isinstance(x, tuple | list) or len(x) != 2:
        raise TypeError(f"window: expected a pair (left, right) of integers >= -1 (-1 = unbounded), got {x!r}")
    sizes = []
    for side, size in zip(("left", "right"), x, strict=True):
        try:
            size = operator.index(size)
        except TypeError:
            raise TypeError(f"window: expected an integer {side} >= -1 (-1 = unbounded), got {size!r}") from None
        if not -1 <= size < 2**63:
            raise ValueError(f"window: expected {side} >= -1 (-1 = unbounded) and below 2^63, got {size}")
        sizes.append(size)
    return sizes[0], sizes[1]


def absent(name: str, x: Any, where: str) -> None:
    if x is not None:
        raise ValueError(f"{name}: not supported with {where}, got {type(x).__name__}")


def length_bound(name: str, x: Any) -> None:
    """max_seqlen_q and max_seqlen_k: nonnegative integers (the kernels read the true lengths from cu_seqlens)."""
    try:
        size = operator.index(x)
    except TypeError:
        raise TypeError(f"{name}: expected an integer >= 0, got {type(x).__name__}") from None
    if size < 0:
        raise ValueError(f"{name}: expected an integer >= 0, got {size}")


# --- shapes ---------------------------------------------------------------------------------------------------------

_LAYOUTS = {"query": ("H", "T_q", "D"), "key": ("H_kv", "T_k", "D"), "value": ("H_kv", "T_k", "D_v")}


def _pattern(name: str, rank: int, packed: bool) -> str:
    heads, tokens, size = _LAYOUTS[name]
    if packed:
        return f"[total_{tokens[-1]}, {heads}, {size}]"
    return f"[{tokens}, {size}]" if rank == 2 else f"[..., {heads}, {tokens}, {size}]"


def ranks(query: Tensor, key: Tensor, value: Tensor, *, packed: bool = False) -> None:
    """Either all three are 2-D or all have a head dimension; packed operands have three dimensions."""
    rank = query.dim()
    for name, x in (("query", query), ("key", key), ("value", value)):
        if (x.dim() == 3) if packed else (x.dim() >= 2 and (x.dim() == 2) == (rank == 2)):
            continue  # texts are made for errors only: sizes may be symbolic
        expected, got = _pattern(name, rank, packed), shape_text(x.shape)
        if packed:
            raise ValueError(f"{name}: expected 3 dimensions {expected}, got {got}")
        if x.dim() < 2:
            both = f"{_pattern(name, 3, False)} or {_pattern(name, 2, False)}"
            raise ValueError(f"{name}: expected at least 2 dimensions {both}, got {got}")
        raise ValueError(f"{name}: expected {expected} as query has {rank} dimensions, got {got}")


def shapes(query: Tensor, key: Tensor, value: Tensor, *, packed: bool = False, equal_heads: bool = True) -> None:
    """Ranks, head sizes, token counts and head counts of the three operands (batch dims: :func:`broadcast`)."""
    ranks(query, key, value, packed=packed)
    rank = query.dim()

    def fail(name: str, x: Tensor, rule: str) -> NoReturn:
        raise ValueError(f"{name}: expected {_pattern(name, rank, packed)} with {rule}, got {shape_text(x.shape)}")

    if key.shape[-1] != query.shape[-1]:
        fail("key", key, f"D = {query.shape[-1]} (query's)")
    tokens = 0 if packed else -2
    if value.shape[tokens] != key.shape[tokens]:
        fail("value", value, f"{'total_k' if packed else 'T_k'} = {key.shape[tokens]} (key's)")
    if rank == 2:
        return
    heads = -2 if packed else -3
    if key.shape[heads] != value.shape[heads] and equal_heads:
        fail("value", value, f"H_kv = {key.shape[heads]} (key's)")
    h = query.shape[heads]
    for name, x in (("key", key), ("value", value)):
        count = x.shape[heads]
        if h != count and (count == 0 or h == 0 or h % count):
            fail(name, x, f"H_kv dividing H = {h} (query's)")


def broadcast(named: Sequence[tuple[str, Sequence[int]]], what: str) -> tuple[int, ...]:
    """The common shape of several right-aligned shapes, or an error that names the first that does not fit."""
    first = named[0][1]
    if all(shape == first for _, shape in named):
        return tuple(first)
    result: list[int] = []
    for name, shape in named:
        result = [1] * (len(shape) - len(result)) + result
        shift = len(result) - len(shape)
        for i, size in enumerate(shape):
            if size == result[shift + i] or size == 1:
                continue
            if result[shift + i] != 1:
                common = shape_text(result)
                raise ValueError(f"{name}: expected {what} broadcastable to {common}, got {shape_text(shape)}")
            result[shift + i] = size
    return tuple(result)


def broadcastable(name: str, x: Tensor, names: str, target: Sequence[int]) -> None:
    shape = x.shape
    fits = len(shape) <= len(target)
    if fits:
        for size, full in zip(reversed(shape), reversed(target), strict=False):
            fits = fits and (size == full or size == 1)
    if not fits:
        expected = f"{names} = {shape_text(target)}"
        raise ValueError(f"{name}: expected a shape broadcastable to {expected}, got {shape_text(shape)}")


def fold(x: Tensor, batch: Sequence[int]) -> Tensor:
    """``[..., X, Y, Z] -> [B, X, Y, Z]``: a view wherever strides allow it (always, unless a broadcast or permuted
    batch dimension stands between others).
    """
    if tuple(x.shape[:-3]) != tuple(batch):
        x = x.expand(*batch, *x.shape[-3:])
    if len(batch) == 1:
        return x
    return x.flatten(0, len(batch) - 1) if batch else x.unsqueeze(0)


def fold_score_shaped(x: Tensor, batch: Sequence[int], trailing: int) -> Tensor:
    """A tensor broadcastable to ``[*batch, ...]`` -> ``[B or 1, ...]`` of `trailing` more dims, own sizes kept."""
    missing = trailing - x.dim()
    if missing > 0:
        x = x[(None,) * missing]
    leading = x.shape[: x.dim() - trailing]
    if all(size == 1 for size in leading):
        while x.dim() > trailing:
            x = x.squeeze(0)
        return x.unsqueeze(0)
    x = x.expand(*batch, *x.shape[x.dim() - trailing :])
    return x if len(batch) == 1 else x.flatten(0, len(batch) - 1)
