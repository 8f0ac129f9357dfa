"""Attention with a normaliser other than softmax, or with a tensor as prior: plain torch operations, no kernel yet.

The fused kernels never see a whole row of scores. Sparsemax and entmax need one (their threshold depends on all of it),
and the others wait for their turn, so these calls run the core of the specification on the prepared operands: memory
``O(T_q T_k)`` (times D only where a token that some rows see and others do not holds NaN or infinity), and exact
derivatives of every order from torch itself, in every mode that torch's own operations support.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnfast import _local
from attnfast import _validate as check
from attnfast._options import DotAttentionOptions, draw_seed
from attnfast._reference_core import Attended, ScoreFunction, attend, dot_scores


def is_normalized(normalizer: str, prior: Any) -> bool:
    """Whether a call with this checked prior takes this way; the kernels know the softmax and a Gaussian after it."""
    return normalizer != "softmax" or not (prior is None or _local.is_gaussian(prior))


def sample_seed(normalizer: str, options: DotAttentionOptions) -> DotAttentionOptions:
    """Options with the seed that sampling needs; dropout and sampling share one, in streams of their own."""
    return options._replace(seed=draw_seed()) if normalizer == "hard_sample" and options.seed is None else options


def prior_operand(prior: Any, query: Tensor, tokens_k: int, leading: tuple[int, ...] | None) -> Any:
    """A checked prior in the form of ``_reference_core.attend``.

    `query` is the folded ``[B, H, T_q, D]``; `leading` is ``[..., H]`` as the caller sees it, ``()`` for operands of
    two dimensions and None for packed ones.
    """
    if prior is None:
        return None
    heads, tokens_q = query.shape[1], query.shape[2]
    if leading is None:
        leading, rows, keys = (heads,), "[H, total_q", "total_k"
    else:
        rows, keys = "[..., H, T_q" if leading else "[T_q", "T_k"
    batch = leading[:-1]
    if isinstance(prior, Tensor):
        check.score_bias("prior", prior, query)
        check.broadcastable("prior", prior, f"{rows}, {keys}]", (*leading, tokens_q, tokens_k))
        return check.fold_score_shaped(prior.resolve_neg(), batch, 3)
    if not isinstance(prior, tuple | list) or len(prior) != 3 or prior[0] != "gaussian":
        got = type(prior).__name__ if not isinstance(prior, tuple | list) else repr(prior[:1])
        raise TypeError(f'prior: expected a tensor or ("gaussian", center, sigma), got {got}')
    center, sigma = prior[1], check.number("prior's sigma", prior[2], "a finite number > 0")
    check.score_bias("prior's center", center, query)
    check.broadcastable("prior's center", center, f"{rows}]", (*leading, tokens_q))
    if not sigma > 0:
        raise ValueError(f"prior's sigma: expected a finite number > 0, got {sigma}")
    return "gaussian", check.fold_score_shaped(center.resolve_neg().unsqueeze(-1), batch, 3), sigma


def attend_normalized(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, bias2: Tensor | None, sink: Tensor | None,
    options: DotAttentionOptions, return_lse: bool, *, normalizer: str, prior: Any, score: ScoreFunction = dot_scores,
) -> Attended:  # fmt: skip
    """The arguments of ``autograd.dot_attention``, then normaliser and prior."""
    _check_lengths("query_lengths", options.query_lengths, "T_q", query.shape[2])
    _check_lengths("key_lengths", options.key_lengths, "T_k", key.shape[2])
    _check_offsets("cu_seqlens_q", options.cu_seqlens_q, "total_q", query.shape[2])
    _check_offsets("cu_seqlens_k", options.cu_seqlens_k, "total_k", key.shape[2])
    with torch.autocast(query.device.type, enabled=False):
        return attend(score, query, key, value, bias, bias2, sink, options, return_lse, None, normalizer, prior)


def _readable(x: Tensor | None) -> list[int] | None:
    """The numbers of a vector; None where there is none or where it carries none (tracing, vmap)."""
    if x is None or torch.compiler.is_compiling():
        return None
    try:
        return x.tolist()
    except RuntimeError:
        return None


def _check_lengths(name: str, lengths: Tensor | None, limit_name: str, limit: int) -> None:
    """What the binary checks of lengths when a kernel reads them."""
    for index, length in enumerate(_readable(lengths) or ()):
        if not 0 <= length <= limit:
            raise ValueError(f"{name}: expected values from 0 to {limit_name} = {limit}, got {length} at index {index}")


def _check_offsets(name: str, offsets: Tensor | None, total_name: str, total: int) -> None:
    values = _readable(offsets)
    if values is None:
        return
    if values[0] != 0:
        raise ValueError(f"{name}: expected its first value to be 0, got {values[0]}")
    for index in range(1, len(values)):
        if values[index] < values[index - 1]:
            got = f"{values[index]} after {values[index - 1]} at index {index}"
            raise ValueError(f"{name}: expected nondecreasing values, got {got}")
    if values[-1] != total:
        raise ValueError(f"{name}: expected its last value to be {total_name} = {total}, got {values[-1]}")
