"""The public functions: signatures, documentation and the short way of the plain call.

Checks and preparation are in :mod:`attnfast._prepare`, differentiation and the choice of a route in
:mod:`attnfast.autograd`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnfast import _prepare, _validate, ops
from attnfast._additive import additive_attention
from attnfast._normalized import attend_normalized, is_normalized
from attnfast._prepare import Call
from attnfast.autograd import dot_attention, plain_attention, whole_row_attention
from attnfast.ops import PlainOptions
from attnfast.reference import AttentionOutput, SampledAttentionOutput

__all__ = [
    "AttentionOutput",
    "SampledAttentionOutput",
    "additive_attention",
    "attention",
    "scaled_dot_product_attention",
    "varlen_attention",
]

_ordinary_call = ops.ordinary_call  # a global costs half of what two attribute look-ups do
_plain_fwd = ops.plain_fwd
_WHOLE_ROW_KEYS = ops.WHOLE_ROW_KEYS
_is_compiling = torch.compiler.is_compiling
# Options of plain calls by (D, is_causal or causal), or (D, is_causal, scale) where the caller chose the scale:
# building them anew would cost as much as all checks together.
_PLAIN_OPTIONS: dict[tuple[Any, ...], PlainOptions] = {}


def _new_options(kind: tuple[Any, ...]) -> PlainOptions:
    head_size, causal, *chosen = kind
    code = int(causal) if isinstance(causal, bool) else _validate.causal_code(causal)
    scale = chosen[0] if chosen else _prepare.default_scale("scaled_dot", head_size)
    options = PlainOptions(scale=_validate.number("scale", scale), causal=code)
    if len(_PLAIN_OPTIONS) < 4096:
        _PLAIN_OPTIONS[kind] = options
    return options


def _run(call: Call) -> Any:
    if is_normalized(call.normalizer, call.prior):
        results = attend_normalized(*call.arguments, normalizer=call.normalizer, prior=call.prior)
        return _prepare.finish(call, *results)
    out, lse, weights = dot_attention(*call.arguments)
    return _prepare.finish(call, out, lse, weights)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    r"""Drop-in replacement of :func:`torch.nn.functional.scaled_dot_product_attention`.

    .. math:: out = \mathrm{softmax}(scale \cdot Q K^T + mask)\, V

    Parameters
    ----------
    query : Tensor
        ``[..., H, T_q, D]``, float64, float32, bfloat16 or float16. All leading dimensions, H included, broadcast.
    key : Tensor
        ``[..., H, T_k, D]``, the query's dtype; with `enable_gqa` ``[..., H_kv, T_k, D]`` where H_kv divides H.
    value : Tensor
        ``[..., H, T_k, D_v]``, the query's dtype; with `enable_gqa` ``[..., H_kv, T_k, D_v]``.
    attn_mask : Tensor, optional
        Broadcastable to ``[..., H, T_q, T_k]``. Boolean: True = may attend. Floating (float32 or the query's dtype):
        added to the scores, and its gradient is honoured.
    dropout_p : float
        Probability in [0, 1] of dropping a weight. Applied whenever it is positive, as torch does: pass 0 in
        evaluation. `torch.manual_seed` determines the draw.
    is_causal : bool
        Row q sees keys k <= q (aligned top-left when T_q != T_k). Composes with `attn_mask`.
    scale : float, optional
        Default ``1 / sqrt(D)``.
    enable_gqa : bool
        Query head h uses key and value head ``h // (H / H_kv)``; nothing is repeated in memory.

    Returns
    -------
    Tensor
        ``[..., H, T_q, D_v]``. A row that sees no key is 0. Jagged nested tensors ``[B, H, j, D]`` give a jagged one.

    Raises
    ------
    ValueError
        Shapes that do not fit, a value out of range, tensors on different or unsupported devices.
    TypeError
        Arguments of the wrong kind or dtype (mixed, integer, complex, sparse or quantized tensors).

    References
    ----------
    Vaswani et al., "Attention Is All You Need", NeurIPS 2017, eq. 1.

    Examples
    --------
    >>> import torch, attnfast
    >>> q, k, v = (torch.randn(2, 8, 128, 64) for _ in range(3))
    >>> attnfast.scaled_dot_product_attention(q, k, v, is_causal=True).shape
    torch.Size([2, 8, 128, 64])
    """
    if dropout_p == 0.0 and (is_causal is False or is_causal is True) and not _is_compiling():
        size = _ordinary_call(query, key, value)  # not to be traced
        if size and attn_mask is None and (scale is None or type(scale) is float):
            head_size = size if size > 0 else -size
            kind = (head_size, is_causal) if scale is None else (head_size, is_causal, scale)
            options = _PLAIN_OPTIONS.get(kind) or _new_options(kind)
            if size > 0:
                return _plain_fwd(query, key, value, options, False)[0]
            if key.shape[2] <= _WHOLE_ROW_KEYS:
                return whole_row_attention(query, key, value, options)
            return plain_attention(query, key, value, options)
        call = _prepare.short_sdpa_call(query, key, value, attn_mask, is_causal, scale, abs(size))
        if call is not None:
            out = dot_attention(*call)[0]
            return out if size else out.squeeze(0)
    return _run(_prepare.sdpa_call(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa))


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    score: str = "scaled_dot",
    normalizer: str = "softmax",
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: str | None = None,
    window: tuple[int, int] | None = None,
    window_center: Tensor | None = None,
    query_lengths: Tensor | None = None,
    key_lengths: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    dropout_p: float = 0.0,
    prior: Any = None,
    return_lse: bool = False,
    return_weights: bool | str = False,
) -> Tensor | AttentionOutput | SampledAttentionOutput:
    r"""Attention with every score modification the kernels know, in one fused call.

    .. math::
        s_{qk} &= \mathrm{cap}(scale \cdot score(query_q, key_k)) - slope\,|q + off - k| + bias_{qk} + mask_{qk} \\
        lse_q &= \log\Big(e^{sink} + \sum_{k \text{ visible}} e^{s_{qk}}\Big), \quad
        w_{qk} = e^{s_{qk} - lse_q} \\
        out_q &= \sum_{k \text{ visible}} \mathrm{dropout}(w_{qk})\, value_k

    with :math:`\mathrm{cap}(s) = softcap \tanh(s / softcap)`. All masks compose: a key is visible if `causal`,
    `window`, the lengths and a boolean `mask` all allow it and no bias is -inf there. A masked key is selected out: NaN
    or Inf in it reaches neither output nor gradient. A row that sees nothing has output 0, weights 0, lse -inf (with a
    sink: the sink) and zero gradients.

    Parameters
    ----------
    query : Tensor
        ``[..., H, T_q, D]`` with any number of batch dimensions (none: ``[H, T_q, D]``), or ``[T_q, D]``; float64,
        float32, bfloat16 or float16 (half types are accumulated in float32). Any strides.
    key : Tensor
        ``[..., H_kv, T_k, D]``, H_kv divides H (grouped heads are not repeated in memory); the query's dtype. Batch
        dimensions broadcast. Folding batch dimensions copies only where no view can express it: a broadcast or permuted
        batch dimension among several.
    value : Tensor
        ``[..., H_kv, T_k, D_v]``; the query's dtype.
    score : {"scaled_dot", "dot", "cosine", "l2"}
        ``q . k / sqrt(D)``; ``q . k``; ``q . k / (max(|q|, 1e-8) max(|k|, 1e-8))``; ``-|q - k|^2`` (half types are
        computed in float32, for its cancellation).
    normalizer : {"softmax", "sparsemax", "entmax15", "sigmoid", "none", "hard", "hard_sample"}
        What turns the scores of the visible keys into weights: softmax; sparsemax, :math:`\max(s - \tau, 0)`, and
        1.5-entmax, :math:`\max(s / 2 - \tau, 0)^2`, each with the threshold that makes the sum 1; the logistic function
        of each score; the scores themselves; 1 for the largest score (the first of equal ones); 1 for a key drawn with
        its softmax probability (`torch.manual_seed` determines the draw). All but softmax run as plain torch operations
        with exact derivatives in O(T_q T_k) memory. ``hard`` and ``hard_sample`` give query and key a gradient of zero;
        REINFORCE uses `log_prob` of :class:`SampledAttentionOutput`.
    mask : Tensor, optional
        Broadcastable to ``[..., H, T_q, T_k]``. Boolean: True = may attend. Floating: added, like `bias`.
    bias : Tensor, optional
        Added to the scores; broadcastable to ``[..., H, T_q, T_k]``; float32 or the query's dtype; differentiable.
    causal : {None, "top_left", "bottom_right"}
        Row q sees keys ``k <= q + off``; off is 0 for top_left and (key length - query length) for bottom_right.
    window : (int, int), optional
        (left, right): row q sees keys ``q + off - left <= k <= q + off + right``; -1 = unbounded.
    window_center : Tensor, optional
        Broadcastable to ``[..., H, T_q]``, any floating or integer dtype: `window` lies around these positions instead,
        row q sees keys ``center_q - left <= k <= center_q + right``. A row whose centre is NaN sees nothing. The window
        is piecewise constant in its centre, which gets no gradient (that of a `prior` does). Keys outside are neither
        read nor computed, as far as rows that stand together have windows that lie together.
    query_lengths, key_lengths : Tensor, optional
        Integer, broadcastable to the batch dimensions ``[...]``: valid tokens of each sample, 0 <= length <= T.
    alibi_slopes : Tensor, optional
        ``[H]`` or ``[..., H]``, floating; no gradient (Press et al., ICLR 2022).
    sink : Tensor, optional
        ``[H]``, floating: a logit per head that takes part in the denominator only, in other words one more key with
        value 0 (which ``hard`` may choose and ``hard_sample`` draw); differentiable.
    softcap : float
        0 = off; else scores are capped smoothly at +-softcap, before bias and masks.
    scale : float, optional
        Multiplies the score. Default ``1 / sqrt(D)`` for scaled_dot, 1 for the others. May be 0 or negative.
    dropout_p : float
        Probability in [0, 1] of dropping a weight; `torch.manual_seed` determines the draw.
    prior : Tensor or ("gaussian", center, sigma), optional
        Multiplies the normalised weights, which are not normalised again: broadcastable to ``[..., H, T_q, T_k]``; or
        :math:`\exp(-(k - center_q)^2 / (2\,sigma^2))` with a `center` broadcastable to ``[..., H, T_q]`` and a number
        `sigma`. float32 or the query's dtype; differentiable. The Gaussian after a softmax is part of the kernels; a
        tensor, and any other normalizer, runs as plain torch operations in O(T_q T_k) memory.
    return_lse : bool
        Also return lse (natural logarithm, float32, or float64 for float64 input), differentiable. It is that of the
        scores, whatever the normalizer.
    return_weights : {False, True, "full", "column_sum", "row_max"}
        Also return the applied weights, their sums over queries, or the maximum of each row, differentiable.

    Returns
    -------
    Tensor, AttentionOutput or SampledAttentionOutput
        ``output [..., H, T_q, D_v]``, or ``AttentionOutput(output, lse [..., H, T_q], weights)`` when `return_lse` or
        `return_weights` asks for more; weights are ``[..., H, T_q, T_k]``, ``[..., H, T_k]`` or ``[..., H, T_q]``. With
        ``hard_sample``, ``SampledAttentionOutput(output, lse, weights, log_prob [..., H, T_q])``.

    Raises
    ------
    ValueError
        Shapes that do not fit, a value out of range (lengths included), tensors on different or unsupported devices.
    TypeError
        Arguments of the wrong kind or dtype (mixed, integer, complex, sparse or quantized tensors).

    References
    ----------
    Vaswani et al., "Attention Is All You Need", NeurIPS 2017, eq. 1; Graves et al., "Neural Turing Machines", 2014,
    eq. 6 (cosine); Luong et al., EMNLP 2015, eq. 8 (dot); Gemma Team, "Gemma 2", 2024, sec. 2 (soft cap); Xiao et al.,
    "Efficient Streaming Language Models with Attention Sinks", ICLR 2024; Martins and Astudillo, "From Softmax to
    Sparsemax", ICML 2016, algorithm 1; Peters, Niculae and Martins, "Sparse Sequence-to-Sequence Models", ACL 2019,
    algorithm 2 (entmax); Luong et al., EMNLP 2015, eq. 10 (the Gaussian prior).

    Examples
    --------
    >>> import torch, attnfast
    >>> q = torch.randn(2, 8, 100, 64)
    >>> k, v = torch.randn(2, 2, 100, 64), torch.randn(2, 2, 100, 32)
    >>> lengths = torch.tensor([100, 60])
    >>> out, lse, _ = attnfast.attention(q, k, v, causal="top_left", key_lengths=lengths, return_lse=True)
    >>> out.shape, lse.shape
    (torch.Size([2, 8, 100, 32]), torch.Size([2, 8, 100]))
    """
    if (
        score == "scaled_dot"
        and normalizer == "softmax"
        and mask is None
        and bias is None
        and (causal is None or causal == "top_left" or causal == "bottom_right")
        and window is None
        and window_center is None
        and query_lengths is None
        and key_lengths is None
        and alibi_slopes is None
        and sink is None
        and prior is None
        and scale is None
        and return_lse is False
        and return_weights is False
        and dropout_p == 0.0
        and softcap == 0.0
        and not _is_compiling()  # first: what comes next cannot be traced
        and (size := _ordinary_call(query, key, value))
    ):
        kind = (abs(size), causal)
        options = _PLAIN_OPTIONS.get(kind) or _new_options(kind)
        if size > 0:
            return _plain_fwd(query, key, value, options, False)[0]
        if key.shape[2] <= _WHOLE_ROW_KEYS:
            return whole_row_attention(query, key, value, options)
        return plain_attention(query, key, value, options)
    return _run(
        _prepare.attention_call(
            query,
            key,
            value,
            score=score,
            normalizer=normalizer,
            mask=mask,
            bias=bias,
            causal=causal,
            window=window,
            window_center=window_center,
            query_lengths=query_lengths,
            key_lengths=key_lengths,
            alibi_slopes=alibi_slopes,
            sink=sink,
            softcap=softcap,
            scale=scale,
            dropout_p=dropout_p,
            prior=prior,
            return_lse=return_lse,
            return_weights=return_weights,
        )
    )


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    score: str = "scaled_dot",
    normalizer: str = "softmax",
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: str | None = None,
    window: tuple[int, int] | None = None,
    window_center: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    dropout_p: float = 0.0,
    prior: Any = None,
    return_lse: bool = False,
    return_weights: bool | str = False,
) -> Tensor | AttentionOutput | SampledAttentionOutput:
    r"""Attention within each of N sequences packed along the token axis, without padding.

    .. math:: out_{[c_n, c_{n+1})} = attention(query_{[c_n, c_{n+1})}, key_{[c'_n, c'_{n+1})}, value_{[c'_n, c'_{n+1})})

    with c = `cu_seqlens_q` and c' = `cu_seqlens_k`. Every keyword means what it means in :func:`attention`; causal
    alignment, windows and ALiBi use positions inside each sequence.

    Parameters
    ----------
    query : Tensor
        ``[total_q, H, D]``.
    key, value : Tensor
        ``[total_k, H_kv, D]``, ``[total_k, H_kv, D_v]``; the query's dtype; H_kv divides H.
    cu_seqlens_q, cu_seqlens_k : Tensor
        Integer ``[N + 1]``: first 0, never decreasing, last total_q (total_k). Sequences may be empty.
    max_seqlen_q, max_seqlen_k : int
        Upper bounds of the lengths, as other libraries ask for them; the kernels read the lengths themselves.
    score, normalizer, causal, window, sink, softcap, scale, dropout_p, return_lse, return_weights
        See :func:`attention`.
    window_center, prior
        See :func:`attention`; centres are broadcastable to ``[H, total_q]``, positions inside the row's own sequence.
    mask, bias : Tensor, optional
        Broadcastable to ``[H, total_q, total_k]``; only each sequence's own block is read.
    alibi_slopes : Tensor, optional
        ``[H]`` or ``[N, H]``, floating; no gradient.

    Returns
    -------
    Tensor, AttentionOutput or SampledAttentionOutput
        ``output [total_q, H, D_v]``; lse ``[H, total_q]``; weights ``[H, total_q, total_k]`` (zero outside the blocks),
        ``[H, total_k]`` or ``[H, total_q]``.

    Raises
    ------
    ValueError, TypeError
        As :func:`attention`; also for cu_seqlens that do not start at 0, decrease, or do not end at the total.

    References
    ----------
    Dao, "FlashAttention-2", 2023 (the packed layout).

    Examples
    --------
    >>> import torch, attnfast
    >>> q, k, v = (torch.randn(7, 4, 16) for _ in range(3))
    >>> cu_seqlens = torch.tensor([0, 3, 7])
    >>> attnfast.varlen_attention(q, k, v, cu_seqlens, cu_seqlens, 4, 4, causal="top_left").shape
    torch.Size([7, 4, 16])
    """
    return _run(
        _prepare.varlen_call(
            query,
            key,
            value,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            score=score,
            normalizer=normalizer,
            mask=mask,
            bias=bias,
            causal=causal,
            window=window,
            window_center=window_center,
            alibi_slopes=alibi_slopes,
            sink=sink,
            softcap=softcap,
            scale=scale,
            dropout_p=dropout_p,
            prior=prior,
            return_lse=return_lse,
            return_weights=return_weights,
        )
    )
