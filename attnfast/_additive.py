"""The public function :func:`additive_attention`: documentation, checks, and the way to the additive core and back."""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from attnfast import _prepare
from attnfast import _validate as check
from attnfast._additive_autograd import additive_attention as additive_core
from attnfast._normalized import attend_normalized, is_normalized
from attnfast._row_blocks import blocked_additive_scores
from attnfast.reference import AttentionOutput, SampledAttentionOutput, real_dtype


def additive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    *,
    score_bias: Tensor | None = None,
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
    dropout_p: float = 0.0,
    prior: Any = None,
    return_lse: bool = False,
    return_weights: bool | str = False,
) -> Tensor | AttentionOutput | SampledAttentionOutput:
    r"""Additive (Bahdanau) attention in one fused call, forward and backward, without a tensor of T_q x T_k x D.

    .. math::
        s_{qk} &= \sum_d weight_d \tanh(query_{qd} + key_{kd} + score\_bias_d) \\
        out_q &= \sum_k \mathrm{softmax}_k(s_{qk})\, value_k

    Everything after the score (soft cap, ALiBi, bias, masks, sink, dropout, weighted sum) is that of :func:`attention`,
    with the same keywords and the same contract. Queries and keys come projected: for the paper's
    :math:`v^T \tanh(W s + U h + b)` pass `query` = :math:`W s`, `key` = :math:`U h`, `weight` = v, `score_bias` = b.

    Parameters
    ----------
    query : Tensor
        ``[..., T_q, D]`` with a `weight` ``[D]``: there is no head axis, and every leading dimension is a batch
        dimension. ``[..., H, T_q, D]`` with a `weight` ``[H, D]``. float64, float32, bfloat16 or float16 (half types
        are computed in float32). Any strides; batch dimensions broadcast.
    key : Tensor
        ``[..., T_k, D]``, or ``[..., H_kv, T_k, D]`` where H_kv divides H; the query's dtype.
    value : Tensor
        ``[..., T_k, D_v]``, or ``[..., H_kv, T_k, D_v]``; the query's dtype.
    weight : Tensor
        ``[D]``, ``[H, D]``, or ``[1, D]`` for all heads; any floating dtype; differentiable.
    score_bias : Tensor, optional
        ``[D]``, or with a head axis ``[H, D]`` or ``[1, D]``; any floating dtype; differentiable.
    normalizer, causal, window, query_lengths, key_lengths, softcap, dropout_p, return_lse, return_weights
        See :func:`attention`. A `normalizer` other than softmax, and a tensor as `prior`, run as plain torch operations
        on the formula, in O(T_q T_k) memory; their second derivatives, and all of them in forward mode and
        under ``torch.func`` transforms, take O(T_q T_k D).
    mask, bias, window_center, prior : optional
        See :func:`attention`; without a head axis they have none either: broadcastable to ``[..., T_q, T_k]``, centres
        to ``[..., T_q]``.
    alibi_slopes, sink : Tensor, optional
        See :func:`attention`; without a head axis H is 1.

    Returns
    -------
    Tensor, AttentionOutput or SampledAttentionOutput
        As :func:`attention`; without a head axis the results have none: output ``[..., T_q, D_v]``, lse ``[..., T_q]``,
        weights ``[..., T_q, T_k]``, ``[..., T_k]`` or ``[..., T_q]``.

    Raises
    ------
    ValueError
        Shapes that do not fit, a value out of range, tensors on different or unsupported devices.
    TypeError
        Arguments of the wrong kind or dtype.

    Notes
    -----
    In the half types and float32 a score is formed from :math:`e^{2 query}` and :math:`e^{2 key}`, one exponential for
    each element of a token instead of one hyperbolic tangent for each element of each pair; its error is that of
    float32 sums of tanh. float64 evaluates tanh itself.

    References
    ----------
    Bahdanau, Cho and Bengio, "Neural Machine Translation by Jointly Learning to Align and Translate", ICLR 2015,
    section A.1.2.

    Examples
    --------
    >>> import torch, attnfast
    >>> decoder, encoder, values = torch.randn(8, 5, 64), torch.randn(8, 30, 64), torch.randn(8, 30, 128)
    >>> lengths = torch.randint(1, 31, (8,))
    >>> attnfast.additive_attention(decoder, encoder, values, torch.randn(64), key_lengths=lengths).shape
    torch.Size([8, 5, 128])
    """
    given = additive_call(
        query,
        key,
        value,
        weight,
        score_bias=score_bias,
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
        dropout_p=dropout_p,
        prior=prior,
        return_lse=return_lse,
        return_weights=return_weights,
    )
    call = given.call
    if is_normalized(call.normalizer, call.prior):
        score = blocked_additive_scores(given.weight, given.score_bias)
        results = attend_normalized(*call.arguments, normalizer=normalizer, prior=call.prior, score=score)
        result = _prepare.finish(call, *results)
    else:
        arguments: Any = (*call.arguments[:3], given.weight, given.score_bias, *call.arguments[3:])
        result = _prepare.finish(call, *additive_core(*arguments))
    return _without_head(result, call.arguments[6].weights_mode) if given.headless else result


class AdditiveCall(NamedTuple):
    """A checked call: that of the dot core, and ``weight`` and ``score_bias`` as ``[H or 1, D]``."""

    call: _prepare.Call
    weight: Tensor
    score_bias: Tensor | None
    headless: bool  # the caller's tensors have no head axis


def additive_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    *,
    score_bias: Tensor | None = None,
    normalizer: str = "softmax",
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    window_center: Tensor | None = None,
    prior: Any = None,
    **options: Any,
) -> AdditiveCall:
    """Check and prepare the arguments of :func:`additive_attention`."""
    check.choice("normalizer", normalizer, check.NORMALIZERS)
    query, key, value = _prepare._operands(query, key, value)
    check.floating("weight", weight)
    if weight.dim() not in (1, 2):
        raise ValueError(f"weight: expected [D] or [H, D], got {check.shape_text(weight.shape)}")
    headless = weight.dim() == 1
    if headless:
        _check_headless(query, key, value)
        query, key, value = query.unsqueeze(-3), key.unsqueeze(-3), value.unsqueeze(-3)
        mask, bias, prior = _insert_head(mask, 3), _insert_head(bias, 3), _prior_with_head(prior)
        window_center = _insert_head(window_center, 2)
    elif query.dim() < 3:
        shape = check.shape_text(query.shape)
        raise ValueError(f"query: expected [..., H, T_q, D] with a weight of 2 dimensions [H, D], got {shape}")
    call = _prepare._call(query, key, value, score="dot", mask=mask, bias=bias, window_center=window_center, **options)
    vector = _score_vector("weight", weight, query, headless)
    shift = None if score_bias is None else _score_vector("score_bias", score_bias, query, headless)
    if normalizer != "softmax" or prior is not None:
        call = _prepare._normalized(call, normalizer, prior)
    return AdditiveCall(call, vector, shift, headless)


def _score_vector(name: str, x: Tensor, query: Tensor, headless: bool) -> Tensor:
    """`weight` or `score_bias` as ``[H or 1, D]`` in the accumulation dtype; `query` has its head axis."""
    check.floating(name, x)
    if x.device != query.device:
        raise ValueError(f"{name}: expected a tensor on {query.device} (query's), got one on {x.device}")
    heads, size = query.shape[-3], query.shape[-1]
    good = x.shape == (size,) if headless else x.dim() == 2 and x.shape[0] in (heads, 1) and x.shape[1] == size
    if not good:
        expected = f"[D] = [{size}]" if headless else f"[H, D] = [{heads}, {size}] or [1, D]"
        raise ValueError(f"{name}: expected {expected}, got {check.shape_text(x.shape)}")
    return torch.atleast_2d(x.to(real_dtype(query.dtype)).resolve_neg()).contiguous()


def _check_headless(query: Tensor, key: Tensor, value: Tensor) -> None:
    """What ``check.shapes`` checks, in the words of a caller without a head axis."""

    def fail(name: str, x: Tensor, pattern: str) -> NoReturn:
        raise ValueError(f"{name}: expected {pattern} with a weight [D], got {check.shape_text(x.shape)}")

    for name, x, pattern in (("query", query, "[..., T_q, D]"), ("key", key, "[..., T_k, D]")):
        if x.dim() < 2:
            fail(name, x, pattern)
    if key.shape[-1] != query.shape[-1]:
        fail("key", key, f"[..., T_k, D] of D = {query.shape[-1]} (query's)")
    if value.dim() < 2 or value.shape[-2] != key.shape[-2]:
        fail("value", value, f"[..., T_k, D_v] of T_k = {key.shape[-2]} (key's)")


def _insert_head(x: Any, rank: int) -> Any:
    return x.unsqueeze(-rank) if isinstance(x, Tensor) and x.dim() >= rank else x


def _prior_with_head(prior: Any) -> Any:
    if isinstance(prior, tuple | list) and len(prior) == 3:
        return (prior[0], _insert_head(prior[1], 2), prior[2])
    return _insert_head(prior, 3)


def _without_head(result: Any, weights_mode: int) -> Any:
    if isinstance(result, Tensor):
        return result.squeeze(-3)
    at = [-3, -2, -3 if weights_mode == check.WEIGHTS_MODES["full"] else -2, -2]  # output, lse, weights, log_prob
    return type(result)(*(None if x is None else x.squeeze(dim) for x, dim in zip(result, at, strict=False)))
