"""The torch operators ``attnfast::dot_attention_fwd`` and ``attnfast::dot_attention_bwd``.

This layer allocates every output and workspace and hands them to the binary; it holds no mathematics beyond the
preparation of ``delta_shift``. Each operator exists twice: as a Python function that the eager path calls directly (a
dispatcher round trip costs more than the binding itself), and as a ``torch.library`` operator that everything which
traces, transforms or intercepts goes through. Both run the same function.

Conventions shared by both operators: ``query [B, H, T_q, D]``, ``key [B, H_kv, T_k, D]``,
``value [B, H_kv, T_k, D_v]``, ``mask``/``bias``/``bias2`` 4-D and broadcastable to ``[B, H, T_q, T_k]``, ``sink [H]``,
``center [B, H, T_q]`` (of the Gaussian prior, accumulation dtype), ``alibi_slopes`` 2-D and broadcastable to ``[B, H]``
(``[N, H]`` for packed input of N sequences), ``window_bounds`` 4-D and broadcastable to ``[B, H, T_q, 2]``. ``lse`` is
the **base-2** log-sum-exp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from attnfast._cuda_ops import dot_attention_bwd as cuda_dot_attention_bwd
from attnfast._cuda_ops import dot_attention_fwd as cuda_dot_attention_fwd
from attnfast._ext import _C, has_cuda
from attnfast._options import (
    N_OPTION_TENSORS,
    WEIGHTS_COLUMN_SUM,
    WEIGHTS_FULL,
    WEIGHTS_NONE,
    WEIGHTS_ROW_MAX,
    DotAttentionOptions,
    PlainOptions,
    draw_seed,
)

__all__ = [
    "N_BWD_TENSORS",
    "N_FWD_TENSORS",
    "N_OPTION_TENSORS",
    "WEIGHTS_COLUMN_SUM",
    "WEIGHTS_FULL",
    "WEIGHTS_NONE",
    "WEIGHTS_ROW_MAX",
    "WHOLE_ROW_KEYS",
    "DotAttentionOptions",
    "PlainOptions",
    "dot_attention_bwd",
    "dot_attention_fwd",
    "draw_seed",
    "has_cuda",
    "ordinary_call",
    "ordinary_gradient",
    "plain_bwd",
    "plain_fwd",
]

LN2 = math.log(2.0)
N_FWD_TENSORS = 7  # query, key, value, bias, bias2, sink, center
N_BWD_TENSORS = 15  # grad_out ... center, needs


# The dtype that a kernel accumulates in, and that lse has.
_REAL = {torch.float64: torch.float64, torch.float32: torch.float32}
_F32 = torch.float32
_empty_like = torch.empty_like
ordinary_call = _C.ordinary_call
ordinary_gradient = _C.ordinary_gradient
_forward: Any = _C.dot_attention_fwd
_backward: Any = _C.dot_attention_bwd
_num_threads = torch.get_num_threads


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    return _REAL.get(dtype, torch.float32)


def allocate_out(query: Tensor, value: Tensor) -> Tensor:
    batch, heads, rows, head_size = query.shape
    value_size = value.shape[3]
    return _empty_like(query) if value_size == head_size else query.new_empty(batch, heads, rows, value_size)


def allocate_lse(query: Tensor) -> Tensor:
    batch, heads, rows, _ = query.shape
    return query.new_empty(batch, heads, rows, dtype=real_dtype(query.dtype))


def allocate_weights(query: Tensor, key: Tensor, mode: int) -> tuple[Tensor | None, Tensor | None]:
    batch, heads, query_tokens = query.shape[:3]
    if mode == WEIGHTS_FULL:
        return query.new_empty(batch, heads, query_tokens, key.size(2)), None
    if mode == WEIGHTS_COLUMN_SUM:
        return query.new_empty(batch, heads, key.size(2), dtype=real_dtype(query.dtype)), None
    if mode == WEIGHTS_ROW_MAX:
        rows = (batch, heads, query_tokens)
        return query.new_empty(rows, dtype=real_dtype(query.dtype)), query.new_empty(rows, dtype=torch.int64)
    return None, None


def expand(tensor: Tensor | None, shape: Sequence[int]) -> Tensor | None:
    return tensor if tensor is None or tensor.shape == shape else tensor.expand(shape)


def alibi_rows(query: Tensor, options: DotAttentionOptions) -> int:
    cu_seqlens = options.cu_seqlens_q
    return query.size(0) if cu_seqlens is None else cu_seqlens.size(0) - 1


def dot_attention_fwd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    bias2: Tensor | None,
    sink: Tensor | None,
    center: Tensor | None,
    options: DotAttentionOptions,
    need_lse: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Run the forward kernel.

    Returns
    -------
    tuple
        ``out [B, H, T_q, D_v]`` (in the query's memory layout when D_v == D), base-2 ``lse [B, H, T_q]`` if wanted,
        ``weights`` and ``weights_index`` as ``options.weights_mode`` asks.
    """
    (
        mask, query_lengths, key_lengths, cu_q, cu_k, alibi, seed, bounds,
        scale, softcap, dropout_p, prior_sigma, causal, window_left, window_right, mode,
    ) = options  # fmt: skip
    # allocate_out and allocate_lse written out: two calls are a tenth of a small problem's time.
    batch, heads, rows, head_size = query.shape
    value_size = value.shape[3]
    out = _empty_like(query) if value_size == head_size else query.new_empty(batch, heads, rows, value_size)
    lse = weights = index = None
    if need_lse or mode:
        lse = query.new_empty(batch, heads, rows, dtype=_REAL.get(query.dtype, torch.float32))
    if mode:
        weights, index = allocate_weights(query, key, mode)
    if mask is not None or bias is not None:
        shape = (batch, heads, rows, key.shape[2])
        mask, bias, bias2 = expand(mask, shape), expand(bias, shape), expand(bias2, shape)
    if alibi is not None:
        alibi = alibi.expand(alibi_rows(query, options), heads)
    if bounds is not None:
        bounds = bounds.expand(batch, heads, rows, 2)
    run = _forward if query.is_cpu else cuda_dot_attention_fwd
    run(
        query, key, value, out, lse, weights, index, mode, mask, bias, bias2, query_lengths, key_lengths, cu_q, cu_k,
        alibi, sink, center, seed, bounds, scale, softcap, dropout_p, prior_sigma, causal, window_left, window_right,
    )  # fmt: skip
    return out, lse, weights, index


def _backward_of(query: Tensor) -> tuple[Any, Tensor | None]:
    """The backward kernel of the query's device, and the workspace ``delta`` that it wants."""
    if query.is_cpu:
        return _backward, None
    return cuda_dot_attention_bwd, query.new_empty((3, *query.shape[:3]), dtype=real_dtype(query.dtype))


# Up to so many keys, the backward of a plain call needs neither out nor lse.
WHOLE_ROW_KEYS: int = _C.whole_row_keys()


def plain_fwd(
    query: Tensor, key: Tensor, value: Tensor, options: PlainOptions, need_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """:func:`dot_attention_fwd` of a plain call: out and lse."""
    batch, heads, rows, head_size = query.shape
    value_size = value.shape[3]
    out = _empty_like(query) if value_size == head_size else query.new_empty(batch, heads, rows, value_size)
    lse = None
    if need_lse:
        dtype = query.dtype
        # Naming a dtype costs as much again as the allocation.
        lse = query.new_empty(batch, heads, rows) if dtype in _REAL else query.new_empty(batch, heads, rows, dtype=_F32)
    run = _forward if query.is_cpu else cuda_dot_attention_fwd
    run(query, key, value, out, lse, *options.forward_tail)
    return out, lse


def plain_bwd(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor | None, lse: Tensor | None,
    options: PlainOptions, needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """:func:`dot_attention_bwd` of a plain call: the gradients of query, key and value.

    `grad_out` has passed ``ordinary_gradient``. Up to ``WHOLE_ROW_KEYS`` keys, `out` and `lse` may be None on the CPU.
    """
    grad_query = _empty_like(query) if needs[0] else None
    grad_key = _empty_like(key) if needs[1] else None
    grad_value = _empty_like(value) if needs[2] else None
    run, delta = (_backward, None) if query.is_cpu else _backward_of(query)
    run(
        grad_out, query, key, value, out, lse, delta, None, None, WEIGHTS_NONE, None,
        grad_query, grad_key, grad_value, *options.backward_tail, _num_threads(),
    )  # fmt: skip
    return grad_query, grad_key, grad_value


def dot_attention_bwd(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    grad_weights: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    weights: Tensor | None,
    index: Tensor | None,
    bias: Tensor | None,
    bias2: Tensor | None,
    sink: Tensor | None,
    center: Tensor | None,
    options: DotAttentionOptions,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Run the backward kernel.

    ``grad_lse`` belongs to the base-2 ``lse`` that the forward returned. ``needs`` says which of the gradients of
    (query, key, value, bias, bias2, sink, center) are wanted; the others come back as None.
    """
    (
        mask, query_lengths, key_lengths, cu_q, cu_k, alibi, seed, bounds,
        scale, softcap, dropout_p, prior_sigma, causal, window_left, window_right, mode,
    ) = options  # fmt: skip
    need_query, need_key, need_value, need_bias, need_bias2, need_sink, need_center = needs
    shift = None
    if grad_lse is not None or grad_weights is not None:

        def forward(query: Tensor, key: Tensor, value: Tensor, plain: DotAttentionOptions) -> Tensor:
            return dot_attention_fwd(query, key, value, bias, bias2, sink, center, plain, True)[0]

        shift = delta_shift(grad_lse, grad_weights, query, key, lse, weights, index, options, forward)
    if grad_weights is None:
        mode = WEIGHTS_NONE
    if mode != WEIGHTS_ROW_MAX:
        index = None
    if grad_out is None:
        grad_out = out.new_zeros(()).expand(out.shape)
    elif grad_out.is_neg():
        grad_out = grad_out.resolve_neg()
    grad_query = _empty_like(query) if need_query else None
    grad_key = _empty_like(key) if need_key else None
    grad_value = _empty_like(value) if need_value else None
    grad_bias = grad_bias2 = grad_sink = full_bias = full_bias2 = full_grad = full_grad2 = None
    if mask is not None or bias is not None:
        shape = (query.size(0), query.size(1), query.size(2), key.size(2))
        mask, full_bias, full_bias2 = expand(mask, shape), expand(bias, shape), expand(bias2, shape)
        if need_bias and bias is not None:
            grad_bias = torch.zeros(bias.shape, dtype=lse.dtype, device=bias.device)
            full_grad = grad_bias.expand(shape)
        if need_bias2 and bias2 is not None:
            grad_bias2 = torch.zeros(bias2.shape, dtype=lse.dtype, device=bias2.device)
            full_grad2 = grad_bias2.expand(shape)
    if need_sink and sink is not None:
        grad_sink = torch.zeros_like(sink)
    grad_center = _empty_like(center) if need_center and center is not None else None
    if alibi is not None:
        alibi = alibi.expand(alibi_rows(query, options), query.size(1))
    if bounds is not None:
        bounds = bounds.expand(*query.shape[:3], 2)
    run, delta = _backward_of(query)
    run(
        grad_out, query, key, value, out, lse, delta, grad_weights, index, mode, shift,
        grad_query, grad_key, grad_value, full_grad, full_grad2, grad_sink, grad_center,
        mask, full_bias, full_bias2, query_lengths, key_lengths, cu_q, cu_k, alibi, sink, center, seed, bounds,
        scale, softcap, dropout_p, prior_sigma, causal, window_left, window_right, _num_threads(),
    )  # fmt: skip
    if grad_bias is not None and bias is not None:
        grad_bias = grad_bias.to(bias.dtype)
    if grad_bias2 is not None and bias2 is not None:
        grad_bias2 = grad_bias2.to(bias2.dtype)
    return grad_query, grad_key, grad_value, grad_bias, grad_bias2, grad_sink, grad_center


# The forward of a core with its modifiers: (query, key, value, options) -> out.
CoreForward = Callable[[Tensor, Tensor, Tensor, DotAttentionOptions], Tensor]


def delta_shift(
    grad_lse: Tensor | None,
    grad_weights: Tensor | None,
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    weights: Tensor | None,
    index: Tensor | None,
    options: DotAttentionOptions,
    forward: CoreForward,
) -> Tensor:
    """What the gradients of lse and weights add to ``delta``: rowsum(weights * grad_weights) - grad_lse (natural)."""
    shift = None
    if grad_weights is not None:
        if options.weights_mode == WEIGHTS_COLUMN_SUM:
            shift = _weighted_columns(grad_weights, query, key, options, forward)
        elif options.weights_mode == WEIGHTS_ROW_MAX:
            assert weights is not None and index is not None
            shift = torch.where(index >= 0, weights * grad_weights, 0.0)
        else:
            assert weights is not None
            # Selected, not multiplied: a masked key's incoming gradient may be NaN or Inf.
            product = weights.to(lse.dtype) * grad_weights
            shift = torch.where(weights != 0, product, 0.0).sum(-1, dtype=lse.dtype)
    if grad_lse is not None:
        # d lse_2 / d lse_natural = 1 / ln 2
        shift = grad_lse * (-1.0 / LN2) if shift is None else torch.sub(shift, grad_lse, alpha=1.0 / LN2)
    assert shift is not None
    return shift.contiguous()


def _weighted_columns(
    columns: Tensor, query: Tensor, key: Tensor, options: DotAttentionOptions, forward: CoreForward
) -> Tensor:
    """weights @ columns for ``columns [B, H, T_k]``, as one more forward whose value is the columns.

    The heads of a group share a key head but not their column, so each key head gets its group's columns as the value's
    features; query head ``h`` reads feature ``h % group``. Half precision runs in float32, because the result is
    subtracted from the columns themselves.
    """
    batch, heads, tokens = columns.shape
    kv_heads = key.size(1)
    group = heads // max(kv_heads, 1)
    real = real_dtype(query.dtype)
    value = columns.to(real).reshape(batch, kv_heads, group, tokens).transpose(2, 3)
    result = forward(query.to(real), key.to(real), value, options._replace(weights_mode=WEIGHTS_NONE))
    result = result.reshape(batch, kv_heads, group, query.size(2), group).diagonal(dim1=2, dim2=4)  # [B, H_kv, T_q, G]
    return result.transpose(2, 3).reshape(batch, heads, query.size(2))


# --- torch.library ---------------------------------------------------------------------------------------------------

MODIFIERS = (
    "Tensor? mask, Tensor? query_lengths, Tensor? key_lengths, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "Tensor? alibi_slopes, Tensor? seed, Tensor? window_bounds, float scale, float softcap, float dropout_p, "
    "float prior_sigma, int causal, SymInt window_left, SymInt window_right, int weights_mode"
)
LIBRARY = torch.library.Library("attnfast", "DEF")
LIBRARY.define(
    "dot_attention_fwd(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? bias2, Tensor? sink, "
    f"Tensor? center, {MODIFIERS}) -> (Tensor out, Tensor lse, Tensor weights, Tensor weights_index)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define(
    "dot_attention_bwd(Tensor? grad_out, Tensor? grad_lse, Tensor? grad_weights, Tensor query, Tensor key, "
    "Tensor value, Tensor out, Tensor lse, Tensor weights, Tensor weights_index, Tensor? bias, Tensor? bias2, "
    f"Tensor? sink, Tensor? center, bool[7] needs, {MODIFIERS}) -> (Tensor grad_query, Tensor grad_key, "
    "Tensor grad_value, Tensor grad_bias, Tensor grad_bias2, Tensor grad_sink, Tensor grad_center)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def nothing(like: Tensor, dtype: torch.dtype) -> Tensor:
    """An operator cannot return None: what was not asked for is an empty tensor."""
    return like.new_empty((0,), dtype=dtype)


def fill_weights(query: Tensor, weights: Tensor | None, index: Tensor | None) -> tuple[Tensor, Tensor]:
    return (
        nothing(query, query.dtype) if weights is None else weights,
        nothing(query, torch.int64) if index is None else index,
    )


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def op_options(args: Sequence[Any]) -> DotAttentionOptions:
    """The options of an operator call, vectors contiguous as the binary wants them (a batching rule slices them)."""
    mask, query_lengths, key_lengths, cu_q, cu_k, alibi, seed, bounds, *scalars = args
    vectors = [contiguous(x) for x in (query_lengths, key_lengths, cu_q, cu_k)]
    return DotAttentionOptions._make((mask, *vectors, alibi, contiguous(seed), contiguous(bounds), *scalars))


def _fwd_op(*args):  # type: ignore[no-untyped-def]
    query, key, value, bias, bias2, sink, center = args[:N_FWD_TENSORS]
    options = op_options(args[N_FWD_TENSORS:])
    sink, center = contiguous(sink), contiguous(center)
    out, lse, weights, index = dot_attention_fwd(query, key, value, bias, bias2, sink, center, options, True)
    return (out, lse, *fill_weights(query, weights, index))


def _fwd_fake(*args):  # type: ignore[no-untyped-def]
    query, key, value = args[:3]
    options = DotAttentionOptions(*args[N_FWD_TENSORS:])
    weights, index = allocate_weights(query, key, options.weights_mode)
    return (allocate_out(query, value), allocate_lse(query), *fill_weights(query, weights, index))


def _bwd_op(*args):  # type: ignore[no-untyped-def]
    tensors, needs = list(args[: N_BWD_TENSORS - 1]), args[N_BWD_TENSORS - 1]
    for at in (7, 9, 12, 13):  # lse, weights_index, sink, center
        tensors[at] = contiguous(tensors[at])
    grads = dot_attention_bwd(*tensors, op_options(args[N_BWD_TENSORS:]), needs)
    inputs = (*tensors[3:6], *tensors[10:14])
    return tuple(
        nothing(tensors[3], (tensors[3] if source is None else source).dtype) if grad is None else grad
        for grad, source in zip(grads, inputs, strict=True)
    )


def _bwd_fake(*args):  # type: ignore[no-untyped-def]
    tensors, needs = args[: N_BWD_TENSORS - 1], args[N_BWD_TENSORS - 1]
    query, key, value = tensors[3:6]
    grads = [
        torch.empty_like(source) if need else nothing(query, source.dtype)
        for source, need in zip((query, key, value), needs[:3], strict=True)
    ]
    for source, need in zip(tensors[10:14], needs[3:], strict=True):
        if source is None or not need:
            grads.append(nothing(query, query.dtype if source is None else source.dtype))
        else:
            grads.append(source.new_empty(source.shape))
    return tuple(grads)


for device in ("CPU", "CUDA"):
    LIBRARY.impl("dot_attention_fwd", _fwd_op, device)
    LIBRARY.impl("dot_attention_bwd", _bwd_op, device)
torch.library.register_fake("attnfast::dot_attention_fwd", _fwd_fake, lib=LIBRARY)
torch.library.register_fake("attnfast::dot_attention_bwd", _bwd_fake, lib=LIBRARY)
