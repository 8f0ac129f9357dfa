"""The torch operators ``attnfast::additive_attention_fwd`` and ``attnfast::additive_attention_bwd``.

As :mod:`attnfast.ops` is for the dot core: allocation, and the same function called directly and as an operator.
``query``, ``key``, ``value`` and the modifiers are those of the dot operators; ``weight`` and ``score_bias`` are
``[H, D]`` or ``[1, D]`` in the accumulation dtype. There is no scale.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnfast import ops
from attnfast._ext import _C, cuda_binary
from attnfast.ops import LIBRARY, N_OPTION_TENSORS, WEIGHTS_NONE, WEIGHTS_ROW_MAX, DotAttentionOptions, expand

N_INPUTS = 9  # query, key, value, weight, score_bias, bias, bias2, sink, center
N_BWD_TENSORS = 17  # grad_out, grad_lse, grad_weights, the inputs up to score_bias, out ... index, the rest, needs

_forward: Any = _C.additive_attention_fwd
_backward: Any = _C.additive_attention_bwd


def cuda_forward(binary: Any, *args: Any) -> None:
    """The forward of a CUDA binary, called as ``_C``'s: its kernels get their workspace here, from torch."""
    weights_mode, cu_seqlens_q = args[9], args[15]
    elements = binary.additive_attention_workspace(*args[:3], cu_seqlens_q, weights_mode)[0]
    binary.additive_attention_fwd(*args, _workspace(args[0], elements))


def cuda_backward(binary: Any, *args: Any) -> None:
    """The backward of a CUDA binary, as :func:`cuda_forward`."""
    cu_seqlens_q = args[26]
    elements = binary.additive_attention_workspace(*args[1:4], cu_seqlens_q, WEIGHTS_NONE)[1]
    binary.additive_attention_bwd(*args, _workspace(args[1], elements))


def _workspace(query: Tensor, elements: int) -> Tensor | None:
    return query.new_empty(elements, dtype=ops.real_dtype(query.dtype)) if elements else None


def additive_attention_fwd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    score_bias: Tensor | None,
    bias: Tensor | None,
    bias2: Tensor | None,
    sink: Tensor | None,
    center: Tensor | None,
    options: DotAttentionOptions,
    need_lse: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Run the forward kernel; returns what :func:`attnfast.ops.dot_attention_fwd` returns."""
    (
        mask, query_lengths, key_lengths, cu_q, cu_k, alibi, seed, bounds,
        _, softcap, dropout_p, prior_sigma, causal, window_left, window_right, mode,
    ) = options  # fmt: skip
    out = ops.allocate_out(query, value)
    lse = ops.allocate_lse(query) if need_lse or mode else None
    weights, index = ops.allocate_weights(query, key, mode)
    if mask is not None or bias is not None:
        shape = (*query.shape[:3], key.shape[2])
        mask, bias, bias2 = expand(mask, shape), expand(bias, shape), expand(bias2, shape)
    if alibi is not None:
        alibi = alibi.expand(ops.alibi_rows(query, options), query.size(1))
    if bounds is not None:
        bounds = bounds.expand(*query.shape[:3], 2)
    run = _forward if query.is_cpu else functools.partial(cuda_forward, cuda_binary())
    run(
        query, key, value, weight, score_bias, out, lse, weights, index, mode, mask, bias, bias2, query_lengths,
        key_lengths, cu_q, cu_k, alibi, sink, center, seed, bounds, softcap, dropout_p, prior_sigma, causal,
        window_left, window_right,
    )  # fmt: skip
    return out, lse, weights, index


def _bias_buffer(bias: Tensor | None, wanted: bool, dtype: torch.dtype) -> Tensor | None:
    return torch.zeros(bias.shape, dtype=dtype, device=bias.device) if wanted and bias is not None else None


def additive_attention_bwd(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    grad_weights: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    score_bias: Tensor | None,
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
    (query, key, value, weight, score_bias, bias, bias2, sink, center) are wanted; the others come back as None.
    """
    (
        mask, query_lengths, key_lengths, cu_q, cu_k, alibi, seed, bounds,
        _, softcap, dropout_p, prior_sigma, causal, window_left, window_right, mode,
    ) = options  # fmt: skip
    shift = None
    if grad_lse is not None or grad_weights is not None:

        def forward(query: Tensor, key: Tensor, value: Tensor, plain: DotAttentionOptions) -> Tensor:
            return additive_attention_fwd(
                query, key, value, weight, score_bias, bias, bias2, sink, center, plain, True
            )[0]

        shift = ops.delta_shift(grad_lse, grad_weights, query, key, lse, weights, index, options, forward)
    if grad_weights is None:
        mode = WEIGHTS_NONE
    if mode != WEIGHTS_ROW_MAX:
        index = None
    if grad_out is None:
        grad_out = out.new_zeros(()).expand(out.shape)
    elif grad_out.is_neg():
        grad_out = grad_out.resolve_neg()
    grad_query, grad_key, grad_value, grad_weight = (
        torch.empty_like(x) if need else None for x, need in zip((query, key, value, weight), needs[:4], strict=True)
    )
    grad_score_bias = torch.empty_like(score_bias) if needs[4] and score_bias is not None else None
    grad_bias, grad_bias2 = _bias_buffer(bias, needs[5], lse.dtype), _bias_buffer(bias2, needs[6], lse.dtype)
    grad_sink = torch.zeros_like(sink) if needs[7] and sink is not None else None
    grad_center = torch.empty_like(center) if needs[8] and center is not None else None
    shape = (*query.shape[:3], key.shape[2])
    if alibi is not None:
        alibi = alibi.expand(ops.alibi_rows(query, options), query.size(1))
    if bounds is not None:
        bounds = bounds.expand(*query.shape[:3], 2)
    run = _backward if query.is_cpu else functools.partial(cuda_backward, cuda_binary())
    run(
        grad_out, query, key, value, weight, score_bias, out, lse, grad_weights, index, mode, shift,
        grad_query, grad_key, grad_value, grad_weight, grad_score_bias,
        expand(grad_bias, shape), expand(grad_bias2, shape), grad_sink, grad_center,
        expand(mask, shape), expand(bias, shape), expand(bias2, shape), query_lengths, key_lengths, cu_q, cu_k, alibi,
        sink, center, seed, bounds, softcap, dropout_p, prior_sigma, causal, window_left, window_right,
        torch.get_num_threads(),
    )  # fmt: skip
    if grad_bias is not None and bias is not None:
        grad_bias = grad_bias.to(bias.dtype)
    if grad_bias2 is not None and bias2 is not None:
        grad_bias2 = grad_bias2.to(bias2.dtype)
    return grad_query, grad_key, grad_value, grad_weight, grad_score_bias, grad_bias, grad_bias2, grad_sink, grad_center


# --- torch.library ---------------------------------------------------------------------------------------------------

_MODIFIERS = ops.MODIFIERS.replace("float scale, ", "")
_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor weight, Tensor? score_bias"
LIBRARY.define(
    f"additive_attention_fwd({_INPUTS}, Tensor? bias, Tensor? bias2, Tensor? sink, Tensor? center, {_MODIFIERS}) -> "
    "(Tensor out, Tensor lse, Tensor weights, Tensor weights_index)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define(
    f"additive_attention_bwd(Tensor? grad_out, Tensor? grad_lse, Tensor? grad_weights, {_INPUTS}, Tensor out, "
    "Tensor lse, Tensor weights, Tensor weights_index, Tensor? bias, Tensor? bias2, Tensor? sink, Tensor? center, "
    f"bool[9] needs, {_MODIFIERS}) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_weight, "
    "Tensor grad_score_bias, Tensor grad_bias, Tensor grad_bias2, Tensor grad_sink, "
    "Tensor grad_center)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def operator_options(options: DotAttentionOptions) -> tuple[Any, ...]:
    """The options as the operators take them: without the scale."""
    return (*options[:N_OPTION_TENSORS], *options[N_OPTION_TENSORS + 1 :])


def options_of(args: Sequence[Any]) -> DotAttentionOptions:
    """The inverse of :func:`operator_options`, vectors contiguous as the binary wants them."""
    return ops.op_options((*args[:N_OPTION_TENSORS], 1.0, *args[N_OPTION_TENSORS:]))


def _fwd_op(*args):  # type: ignore[no-untyped-def]
    query, key, value, weight, score_bias, bias, bias2, sink, center = args[:N_INPUTS]
    weight, score_bias = weight.contiguous(), ops.contiguous(score_bias)
    sink, center = ops.contiguous(sink), ops.contiguous(center)
    options = options_of(args[N_INPUTS:])
    out, lse, weights, index = additive_attention_fwd(
        query, key, value, weight, score_bias, bias, bias2, sink, center, options, True
    )
    return (out, lse, *ops.fill_weights(query, weights, index))


def _fwd_fake(*args):  # type: ignore[no-untyped-def]
    query, key, value = args[:3]
    weights, index = ops.allocate_weights(query, key, args[-1])
    return (ops.allocate_out(query, value), ops.allocate_lse(query), *ops.fill_weights(query, weights, index))


def _bwd_op(*args):  # type: ignore[no-untyped-def]
    tensors, needs = list(args[: N_BWD_TENSORS - 1]), args[N_BWD_TENSORS - 1]
    for at in (6, 7, 9, 11, 14, 15):  # weight, score_bias, lse, weights_index, sink, center
        tensors[at] = ops.contiguous(tensors[at])
    grads = additive_attention_bwd(*tensors, options_of(args[N_BWD_TENSORS:]), needs)
    inputs = (*tensors[3:8], *tensors[12:16])
    return tuple(
        ops.nothing(tensors[3], (tensors[3] if source is None else source).dtype) if grad is None else grad
        for grad, source in zip(grads, inputs, strict=True)
    )


def _bwd_fake(*args):  # type: ignore[no-untyped-def]
    tensors, needs = args[: N_BWD_TENSORS - 1], args[N_BWD_TENSORS - 1]
    query = tensors[3]
    grads = []
    for at, (source, need) in enumerate(zip((*tensors[3:8], *tensors[12:16]), needs, strict=True)):
        if source is None or not need:
            grads.append(ops.nothing(query, query.dtype if source is None else source.dtype))
        else:
            grads.append(torch.empty_like(source) if at < 3 else source.new_empty(source.shape))
    return tuple(grads)


for device in ("CPU", "CUDA"):
    LIBRARY.impl("additive_attention_fwd", _fwd_op, device)
    LIBRARY.impl("additive_attention_bwd", _bwd_op, device)
torch.library.register_fake("attnfast::additive_attention_fwd", _fwd_fake, lib=LIBRARY)
torch.library.register_fake("attnfast::additive_attention_bwd", _bwd_fake, lib=LIBRARY)
