"""Plain PyTorch specification of every function of the package.

Nothing here is fast and nothing here touches the binary: each function is its formula, differentiable to any order
and usable under ``torch.func``. The kernels are tested against this file in float64, and double backward, forward-mode
AD and functorch transforms of the fused functions run through :func:`dot_attention` and :func:`additive_core` below.

A masked key is *selected* out, never multiplied out: NaN or Inf in it reaches neither an output nor a gradient, of any
order. `_reference_core` holds the parts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from attnfast._options import DotAttentionOptions, draw_seed
from attnfast._reference_core import (
    CAUSAL_CODES,
    ScoreFunction,
    additive_scores,
    attend,
    dot_scores,
    l2_scores,
    near_center,
    real_dtype,
    unit_vectors,
)
from attnfast._reference_gather import ProductKeyReadOutput as ProductKeyReadOutput
from attnfast._reference_gather import product_key_read as product_key_read
from attnfast._reference_gather import weighted_gather as weighted_gather
from attnfast._reference_memory import topk_scores as topk_scores
from attnfast._reference_memory_read import MemoryReadOutput as MemoryReadOutput
from attnfast._reference_memory_read import memory_read as memory_read

WEIGHTS_MODES = {False: 0, True: 1, "full": 1, "column_sum": 2, "row_max": 3}


class AttentionOutput(NamedTuple):
    """What an attention function returns when more than the output is asked for.

    Attributes
    ----------
    output : Tensor
        ``[..., H, T_q, D_v]`` (packed: ``[total_q, H, D_v]``).
    lse : Tensor or None
        Natural logarithm of the sum of exponentials of each row, ``[..., H, T_q]``; ``-inf`` where nothing is visible.
    weights : Tensor or None
        The applied weights (after dropout): ``[..., H, T_q, T_k]``, their column sums ``[..., H, T_k]`` or row maxima
        ``[..., H, T_q]``.
    """

    output: Tensor
    lse: Tensor | None
    weights: Tensor | None


class SampledAttentionOutput(NamedTuple):
    """What an attention function with ``normalizer="hard_sample"`` returns when more than the output is asked for.

    Attributes
    ----------
    output, lse, weights
        As in :class:`AttentionOutput`; the weights are one-hot rows, before a prior and dropout.
    log_prob : Tensor
        Logarithm of the probability of the key that each query drew, ``[..., H, T_q]``, differentiable: what REINFORCE
        (Williams 1992) multiplies by the reward. 0 in a row that sees nothing; the sink's where the sink was drawn.
    """

    output: Tensor
    lse: Tensor | None
    weights: Tensor | None
    log_prob: Tensor


def dot_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, bias2: Tensor | None, sink: Tensor | None,
    options: DotAttentionOptions, return_lse: bool, rows: tuple[int, int] | None = None, center: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    r"""The dot core on 4-D tensors, with the signature and results of ``autograd.dot_attention``.

    .. math::
        s_{qk} &= \mathrm{cap}(\mathrm{scale} \sum_d query_{qd}\, key_{kd}) - slope\,|q + off - k|
                  + bias_{qk} + bias2_{qk} \\
        lse_q &= \log\Big(e^{sink} + \sum_{k \text{ visible}} e^{s_{qk}}\Big), \quad
        w_{qk} = e^{s_{qk} - lse_q} [k \text{ visible}] \cdot prior_{qk} \cdot keep_{qk} / (1 - p) \\
        out_q &= \sum_k w_{qk}\, value_k

    with ``cap(s) = softcap tanh(s / softcap)`` (identity for 0), ``off`` the alignment offset (``T_k - T_q`` of the
    sample for bottom_right, else 0) and k visible to q if every mask says so: ``k < key_length``,
    ``q < query_length``, same packed sequence, ``k <= q + off`` (causal), ``q + off - left <= k <= q + off + right``
    (window), ``begin <= k < end`` (window_bounds), ``mask`` and both biases different from ``-inf``. With
    ``prior_sigma`` the prior is ``exp(-(k - center_q)^2 / (2 prior_sigma^2))``, else 1.

    Parameters
    ----------
    query, key, value : Tensor
        ``[B, H, T_q, D]``, ``[B, H_kv, T_k, D]``, ``[B, H_kv, T_k, D_v]``; packed input has B = 1.
    bias, bias2 : Tensor or None
        Broadcastable to ``[B, H, T_q, T_k]``.
    sink : Tensor or None
        ``[H]``, a logit that takes part in the denominator only.
    options : DotAttentionOptions
    return_lse : bool
        Also return lse ``[B, H, T_q]``.
    rows : tuple of int, optional
        (first, total): ``query`` (and what has a T_q axis: mask, biases) holds only some rows, beginning at row
        `first`, of a problem of `total` query rows. The results are those rows' (column sums: their share).
    center : Tensor, optional
        ``[B, H, T_q]``, the prior's.

    Returns
    -------
    tuple
        ``(out, lse or None, weights or None)``; half types are accumulated in float32 and rounded once.
    """
    prior = None if center is None else ("gaussian", center.unsqueeze(-1), options.prior_sigma)
    return attend(dot_scores, query, key, value, bias, bias2, sink, options, return_lse, rows, prior=prior)[:3]


def additive_core(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, score_bias: Tensor | None, bias: Tensor | None,
    bias2: Tensor | None, sink: Tensor | None, options: DotAttentionOptions, return_lse: bool,
    rows: tuple[int, int] | None = None, center: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    r"""The additive core on 4-D tensors: :func:`dot_attention` with the score

    .. math:: s_{qk} = \sum_d weight_d \tanh(query_{qd} + key_{kd} + score\_bias_d)

    Parameters
    ----------
    query, key, value : Tensor
        ``[B, H, T_q, D]``, ``[B, H_kv, T_k, D]``, ``[B, H_kv, T_k, D_v]``; queries and keys are projected already.
    weight : Tensor
        ``[H, D]`` or ``[1, D]``.
    score_bias : Tensor or None
        ``[H, D]`` or ``[1, D]``.
    bias, bias2, sink, options, return_lse, rows, center
        As for :func:`dot_attention`; ``options.scale`` multiplies the score.

    Returns
    -------
    tuple
        ``(out, lse or None, weights or None)``. Forms ``[B, H, T_q, T_k, D]``.
    """
    real = real_dtype(query.dtype)
    score = additive_scores(weight.to(real), None if score_bias is None else score_bias.to(real))
    prior = None if center is None else ("gaussian", center.unsqueeze(-1), options.prior_sigma)
    return attend(score, query, key, value, bias, bias2, sink, options, return_lse, rows, prior=prior)[:3]


# --- public functions -----------------------------------------------------------------------------------------------


def _scale(score: str, scale: float | None, head_size: int) -> float:
    if scale is not None:
        return float(scale)
    return 1.0 / math.sqrt(head_size) if score == "scaled_dot" and head_size else 1.0


def _fold(x: Tensor | None, batch: Sequence[int], full: bool) -> Tensor | None:
    """``[..., X, Y, Z] -> [B, X, Y, Z]`` with leading dims broadcast to `batch`; few dims are filled with ones."""
    if x is None:
        return None
    x = x[(None,) * max(0, 3 - x.dim())]
    if not full and math.prod(x.shape[:-3]) == 1:
        return x.reshape(1, *x.shape[-3:])
    return x.expand(*batch, *x.shape[-3:]).reshape(math.prod(batch), *x.shape[-3:])


def _fold_slopes(slopes: Tensor | None, batch: Sequence[int]) -> Tensor | None:
    """``[H]`` or ``[..., H] -> [1 or B, H]``."""
    if slopes is None or slopes.dim() == 1:
        return None if slopes is None else slopes.unsqueeze(0)
    return slopes.expand(*batch, slopes.shape[-1]).reshape(-1, slopes.shape[-1])


def _fold_prior(prior: Any, batch: Sequence[int]) -> Any:
    """A tensor is folded like a bias; the center ``[..., H, T_q]`` of a Gaussian becomes ``[B or 1, H, T_q, 1]``."""
    if prior is None or isinstance(prior, Tensor):
        return _fold(prior, batch, False)
    name, center, sigma = prior
    return name, _fold(center.unsqueeze(-1), batch, False), sigma


def _pack(
    results: Sequence[Tensor | None], dtype: torch.dtype, mode: int, return_lse: bool
) -> Tensor | AttentionOutput | SampledAttentionOutput:
    """(output, lse, weights, log_prob) in the shape the caller sees -> what the caller gets."""
    out, lse, weights, log_prob = results
    assert out is not None
    out = out.to(dtype)
    if not return_lse and not mode:
        return out
    if weights is not None and mode == 1:
        weights = weights.to(dtype)
    if log_prob is not None:
        return SampledAttentionOutput(out, lse, weights, log_prob)
    return AttentionOutput(out, lse, weights)


def attention(
    query: Tensor, key: Tensor, value: Tensor, *, score: str = "scaled_dot", normalizer: str = "softmax",
    mask: Tensor | None = None, bias: Tensor | None = None, causal: str | None = None,
    window: tuple[int, int] | None = None, window_center: Tensor | None = None, query_lengths: Tensor | None = None,
    key_lengths: Tensor | None = None, alibi_slopes: Tensor | None = None, sink: Tensor | None = None,
    softcap: float = 0.0, scale: float | None = None, dropout_p: float = 0.0, prior: Any = None,
    return_lse: bool = False, return_weights: bool | str = False, dropout_seed: Tensor | None = None,
) -> Tensor | AttentionOutput | SampledAttentionOutput:  # fmt: skip
    r"""Specification of :func:`attnfast.attention`: :func:`dot_attention` with the score

    - ``"dot"``: :math:`q \cdot k` and ``"scaled_dot"``: :math:`q \cdot k / \sqrt{D}` (Vaswani et al. 2017, eq. 1);
    - ``"cosine"``: :math:`q \cdot k / (\max(|q|, \epsilon) \max(|k|, \epsilon))`, epsilon 1e-8 (Graves et al. 2014, 6);
    - ``"l2"``: :math:`-|q - k|^2`;

    each times ``scale``. The `normalizer` that takes the place of the softmax gives, over the visible keys (the sink
    among them, as a key whose value is zero), with 0 for all others:

    - ``"sparsemax"``: :math:`\max(s_k - \tau, 0)` with sum 1 (Martins and Astudillo 2016);
    - ``"entmax15"``: :math:`\max(s_k / 2 - \tau, 0)^2` with sum 1 (Peters, Niculae and Martins 2019);
    - ``"sigmoid"``: :math:`1 / (1 + e^{-s_k})`; ``"none"``: :math:`s_k`;
    - ``"hard"``: 1 for the largest score, the first of equal ones; ``"hard_sample"``: 1 for the key with the largest
      :math:`s_k + g_k`, where g is the Gumbel noise of :func:`attnfast._reference_core.gumbel_noise`, so that k is
      drawn with its softmax probability. The scores get a gradient of zero from either; ``hard_sample`` gives
      `log_prob`, which has one, whenever lse or weights are asked for.

    lse is the log-sum-exp of the scores whatever the normaliser. `prior` multiplies the normalised weights, which are
    not normalised again: a tensor broadcastable to ``[..., H, T_q, T_k]``, or ``("gaussian", center [..., H, T_q],
    sigma)`` for :math:`\exp(-(k - center_q)^2 / (2\,sigma^2))` (Luong et al. 2015, eq. 10). Dropout comes after it.

    With `window_center` ``[..., H, T_q]`` the window is ``center_q - left <= k <= center_q + right``.

    Shapes are those of :func:`attnfast.attention`; `dropout_seed` (int64 ``[2]``: seed, offset) fixes the dropout mask
    and the sample and is drawn from torch's generator when it is not given. Arguments are not validated.
    """
    dtype = query.dtype
    if score == "cosine":
        query, key = unit_vectors(query), unit_vectors(key)
    return _attention(
        l2_scores if score == "l2" else dot_scores, query, key, value, mask, bias, query_lengths, key_lengths,
        alibi_slopes, sink, dropout_seed, return_lse, return_weights, scale=_scale(score, scale, query.shape[-1]),
        softcap=softcap, dropout_p=dropout_p, causal=causal, window=window, window_center=window_center, dtype=dtype,
        normalizer=normalizer, prior=prior,
    )  # fmt: skip


def _attention(
    score: ScoreFunction, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, bias: Tensor | None,
    query_lengths: Tensor | None, key_lengths: Tensor | None, alibi_slopes: Tensor | None, sink: Tensor | None,
    dropout_seed: Tensor | None, return_lse: bool, return_weights: bool | str, *, scale: float, softcap: float,
    dropout_p: float, causal: str | None, window: tuple[int, int] | None, window_center: Tensor | None,
    dtype: torch.dtype, normalizer: str, prior: Any,
) -> Tensor | AttentionOutput | SampledAttentionOutput:  # fmt: skip
    """From ``[..., H, T, X]`` to the 4-D core and back."""
    plain = query.dim() == 2
    if plain:
        query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
    batch = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    q, k, v = (cast(Tensor, _fold(x, batch, True)) for x in (query, key, value))
    boolean = mask is not None and mask.dtype == torch.bool
    lengths = [None if x is None else x.long().expand(batch).reshape(-1) for x in (query_lengths, key_lengths)]
    if dropout_seed is None and (dropout_p > 0 or normalizer == "hard_sample"):
        dropout_seed = draw_seed()
    selected = _fold(mask, batch, False) if boolean else None
    selected, (left, right) = _window_rule(selected, window, window_center, torch.arange(k.shape[2]), batch)
    options = DotAttentionOptions(
        selected, lengths[0], lengths[1], None, None, _fold_slopes(alibi_slopes, batch), dropout_seed, None, scale,
        softcap, dropout_p, 0.0, CAUSAL_CODES[causal], left, right, WEIGHTS_MODES[return_weights],
    )  # fmt: skip
    bias2 = None if boolean else _fold(mask, batch, False)
    results = attend(
        score, q, k, v, _fold(bias, batch, False), bias2, sink, options, return_lse, None, normalizer,
        _fold_prior(prior, batch),
    )  # fmt: skip
    leading = batch if plain else (*batch, q.shape[1])

    shaped = [None if x is None else x.reshape(*leading, *x.shape[2:]) for x in results]
    return _pack(shaped, dtype, options.weights_mode, return_lse)


def _window_rule(
    mask: Tensor | None, window: tuple[int, int] | None, center: Tensor | None, key: Tensor, batch: Sequence[int]
) -> tuple[Tensor | None, tuple[int, int]]:
    """A folded boolean mask and a window, the window moved into the mask if it lies around centres."""
    if center is None:
        return mask, (-1, -1) if window is None else window
    assert window is not None
    near = cast(Tensor, _fold(near_center(center, window, key), batch, False))
    return (near if mask is None else near & mask), (-1, -1)


def _insert_head(x: Tensor | None, rank: int) -> Tensor | None:
    """A head axis in front of the last ``rank - 1`` dimensions, where there is anything in front of them."""
    return x if x is None or x.dim() < rank else x.unsqueeze(-rank)


def additive_attention(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, *, score_bias: Tensor | None = None,
    normalizer: str = "softmax", mask: Tensor | None = None, bias: Tensor | None = None, causal: str | None = None,
    window: tuple[int, int] | None = None, window_center: Tensor | None = None, query_lengths: Tensor | None = None,
    key_lengths: Tensor | None = None, alibi_slopes: Tensor | None = None, sink: Tensor | None = None,
    softcap: float = 0.0, dropout_p: float = 0.0, prior: Any = None, return_lse: bool = False,
    return_weights: bool | str = False, dropout_seed: Tensor | None = None,
) -> Tensor | AttentionOutput | SampledAttentionOutput:  # fmt: skip
    r"""Specification of :func:`attnfast.additive_attention`: :func:`attention` with the additive score

    .. math:: s_{qk} = \sum_d weight_d \tanh(query_{qd} + key_{kd} + score\_bias_d)

    of Bahdanau et al. 2015 (section A.1.2), for queries and keys that are projected already.

    A `weight` ``[D]`` means that there is no head axis: operands are ``[..., T_q, D]``, ``[..., T_k, D]``,
    ``[..., T_k, D_v]``, every leading dimension is a batch dimension, and results, masks and biases have no head axis
    either (``sink`` and ``alibi_slopes`` have H = 1). A `weight` ``[H, D]`` goes with ``[..., H, T_q, D]``,
    ``[..., H_kv, T_k, D]`` and ``[..., H_kv, T_k, D_v]`` as in :func:`attention`. ``score_bias`` is ``[D]`` or, with a
    head axis, ``[H, D]``. Arguments are not validated.
    """
    real, headless = real_dtype(query.dtype), weight.dim() == 1
    if headless:
        query, key, value = query.unsqueeze(-3), key.unsqueeze(-3), value.unsqueeze(-3)
        mask, bias = _insert_head(mask, 3), _insert_head(bias, 3)
        window_center = _insert_head(window_center, 2)
        if isinstance(prior, tuple):
            prior = (prior[0], _insert_head(prior[1], 2), prior[2])
        else:
            prior = _insert_head(prior, 3)
    parameters = [None if x is None else torch.atleast_2d(x.to(real)) for x in (weight, score_bias)]
    score = additive_scores(cast(Tensor, parameters[0]), parameters[1])
    result = _attention(
        score, query, key, value, mask, bias, query_lengths, key_lengths, alibi_slopes, sink, dropout_seed, return_lse,
        return_weights, scale=1.0, softcap=softcap, dropout_p=dropout_p, causal=causal, window=window,
        window_center=window_center, dtype=query.dtype, normalizer=normalizer, prior=prior,
    )  # fmt: skip
    if not headless:
        return result
    if isinstance(result, Tensor):
        return result.squeeze(-3)
    at = [-3, -2, -3 if WEIGHTS_MODES[return_weights] == 1 else -2, -2]  # where output, lse, weights, log_prob have H
    parts: list[Any] = [None if x is None else x.squeeze(dim) for x, dim in zip(result, at, strict=False)]
    return type(result)(*parts)


def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False, *,
    dropout_seed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    r"""Specification of :func:`attnfast.scaled_dot_product_attention`.

    :math:`\mathrm{softmax}(scale\, Q K^T + mask)\, V` with all leading dimensions (heads included) broadcast;
    ``is_causal`` aligns top-left. With `enable_gqa` query head h uses key and value head ``h // (H / H_kv)``.
    """
    if query.dim() > 2 and not enable_gqa:
        heads = torch.broadcast_shapes(query.shape[-3:-2], key.shape[-3:-2], value.shape[-3:-2])
        query, key, value = (x.expand(*x.shape[:-3], *heads, *x.shape[-2:]) for x in (query, key, value))
    elif enable_gqa and key.shape[-3] != value.shape[-3]:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    out = attention(
        query, key, value, mask=attn_mask, causal="top_left" if is_causal else None, scale=scale, dropout_p=dropout_p,
        dropout_seed=dropout_seed,
    )  # fmt: skip
    return cast(Tensor, out)


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, *, score: str = "scaled_dot", normalizer: str = "softmax", mask: Tensor | None = None,
    bias: Tensor | None = None, causal: str | None = None, window: tuple[int, int] | None = None,
    window_center: Tensor | None = None, alibi_slopes: Tensor | None = None, sink: Tensor | None = None,
    softcap: float = 0.0, scale: float | None = None, dropout_p: float = 0.0, prior: Any = None,
    return_lse: bool = False, return_weights: bool | str = False, dropout_seed: Tensor | None = None,
) -> Tensor | AttentionOutput | SampledAttentionOutput:  # fmt: skip
    """Specification of :func:`attnfast.varlen_attention`: sequences packed along the token axis attend within
    themselves. Formed as one block-diagonal problem over all tokens, ``O(total_q total_k)`` memory.
    """
    del max_seqlen_q, max_seqlen_k
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    if score == "cosine":
        q, k = unit_vectors(q), unit_vectors(k)
    boolean = mask is not None and mask.dtype == torch.bool
    if dropout_seed is None and (dropout_p > 0 or normalizer == "hard_sample"):
        dropout_seed = draw_seed()
    cu_q, cu_k, token = cu_seqlens_q.long(), cu_seqlens_k.long(), torch.arange(key.shape[0])
    place = token - cu_k[torch.searchsorted(cu_k[1:].contiguous(), token, right=True)]
    selected = _fold(mask, (), False) if boolean else None
    selected, (left, right) = _window_rule(selected, window, window_center, place, ())
    options = DotAttentionOptions(
        selected, None, None, cu_q, cu_k, _fold_slopes(alibi_slopes, (cu_seqlens_q.shape[0] - 1,)), dropout_seed, None,
        _scale(score, scale, query.shape[-1]), softcap, dropout_p, 0.0, CAUSAL_CODES[causal], left, right,
        WEIGHTS_MODES[return_weights],
    )  # fmt: skip
    bias2 = None if boolean else _fold(mask, (), False)
    formula = l2_scores if score == "l2" else dot_scores
    results = attend(
        formula, q, k, v, _fold(bias, (), False), bias2, sink, options, return_lse, None, normalizer,
        _fold_prior(prior, ()),
    )  # fmt: skip
    out, *extras = (None if x is None else x[0] for x in results)
    return _pack([cast(Tensor, out).transpose(0, 1), *extras], query.dtype, options.weights_mode, return_lse)
