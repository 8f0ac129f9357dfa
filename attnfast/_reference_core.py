"""The parts that :mod:`attnfast.reference` is made of: random numbers, visibility, selecting products, the core.

A plain matrix product cannot select (``0 * NaN`` is NaN), so a product over partially masked non-finite operands is
formed element by element (:func:`select_operands` decides; memory ``O(T_q T_k D)``, only in that case).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnfast._reference_normalizers import normalize

COSINE_EPS = 1e-8
CAUSAL_CODES = {None: 0, "top_left": 1, "bottom_right": 2}

# (query, key, visible, exact) -> scores [B, H, T_q, T_k]; `exact` asks to select each pair, see `select_operands`.
ScoreFunction = Callable[[Tensor, Tensor, "Tensor | None", bool], Tensor]


# --- random numbers -------------------------------------------------------------------------------------------------


def _mulhilo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    # int64 wraps modulo 2^64, so the arithmetic shift and the mask give the unsigned high and low words.
    product = b * a
    return (product >> 32) & 0xFFFFFFFF, product & 0xFFFFFFFF


def philox(counter: Sequence[Tensor], key: Sequence[Tensor], rounds: int = 7) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32 (Salmon et al., SC 2011) with 32-bit words held in int64 tensors; everything broadcasts."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        hi0, lo0 = _mulhilo(0xD2511F53, c0)
        hi1, lo1 = _mulhilo(0xCD9E8D57, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def _random_words(seed: Tensor, rows: Tensor, columns: Tensor, stream: int) -> Tensor:
    """32 random bits for every (row, column): word ``column % 4`` of Philox4x32-7 at counter
    ``(column // 4, row, row >> 32 | stream << 31, offset)`` under the key ``seed``. Rows stay below 2^63.
    """
    low = 0xFFFFFFFF
    key = (seed[0] & low, (seed[0] >> 32) & low)
    words = philox(((columns >> 2) & low, rows & low, (rows >> 32) & low | stream << 31, seed[1] & low), key)
    lane = columns & 3
    return torch.where(lane < 2, words[0].where(lane == 0, words[1]), words[2].where(lane == 2, words[3]))


def dropout_keep(seed: Tensor, dropout_p: float, rows: Tensor, columns: Tensor) -> Tensor:
    """Which weights survive dropout.

    Parameters
    ----------
    seed : Tensor
        int64 ``[2]``: seed and offset.
    dropout_p : float
        Probability of dropping.
    rows : Tensor
        int64, ``(b * H + h) * T_q + q`` of each weight; broadcasts against `columns`.
    columns : Tensor
        int64, key position ``k`` of each weight.

    Returns
    -------
    Tensor
        bool, true = kept: the random word of (row, column), stream 0, is at least ``ceil(dropout_p * 2^32)``.
    """
    return _random_words(seed, rows, columns, 0) >= min(math.ceil(dropout_p * 2.0**32), 2**32)


def gumbel_noise(seed: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """``-log(-log(u))``, float64, with ``u = (word + 1/2) / 2^32`` of the random word of (row, column), stream 1.

    Arguments as for :func:`dropout_keep`; column -1 is the sink.
    """
    uniform = (_random_words(seed, rows, columns, 1).double() + 0.5) * 2.0**-32
    return -(-uniform.log()).log()


# --- who sees whom --------------------------------------------------------------------------------------------------


class _Positions(NamedTuple):
    """Token positions inside their own sequence; all broadcast to ``[B, H, T_q, T_k]``."""

    query: Tensor
    key: Tensor
    query_len: Tensor | int
    key_len: Tensor | int
    sequence_q: Tensor | None = None  # packed input: which sequence a token belongs to
    sequence_k: Tensor | None = None


def _positions(options: Any, rows: tuple[int, int, int], tokens_k: int, device: torch.device) -> _Positions:
    first_row, last_row, tokens_q = rows
    q = torch.arange(first_row, last_row, device=device).view(1, 1, last_row - first_row, 1)
    k = torch.arange(tokens_k, device=device).view(1, 1, 1, tokens_k)
    if options.cu_seqlens_q is None:
        q_len = tokens_q if options.query_lengths is None else options.query_lengths.view(-1, 1, 1, 1)
        k_len = tokens_k if options.key_lengths is None else options.key_lengths.view(-1, 1, 1, 1)
        return _Positions(q, k, q_len, k_len)
    cu_q, cu_k = options.cu_seqlens_q, options.cu_seqlens_k
    # The number of sequences that end at or before a token is the index of its own sequence (empty ones included).
    sequence_q = torch.searchsorted(cu_q[1:].contiguous(), q, right=True)
    sequence_k = torch.searchsorted(cu_k[1:].contiguous(), k, right=True)
    return _Positions(
        q - cu_q[sequence_q],
        k - cu_k[sequence_k],
        (cu_q[1:] - cu_q[:-1])[sequence_q],
        (cu_k[1:] - cu_k[:-1])[sequence_q],
        sequence_q,
        sequence_k,
    )


def _visibility(options: Any, pos: _Positions, biases: Sequence[Tensor]) -> tuple[Tensor | None, Tensor]:
    """Visible pairs (None = all) and the signed distance ``q + off - k`` of each pair."""
    offset = pos.key_len - pos.query_len if options.causal == CAUSAL_CODES["bottom_right"] else 0
    distance = pos.query + offset - pos.key
    rules: list[Any] = []  # tensors; comparisons are typed as bool
    if pos.sequence_q is not None:
        rules.append(pos.sequence_q == pos.sequence_k)
    if options.query_lengths is not None:
        rules.append(pos.query < pos.query_len)
    if options.key_lengths is not None:
        rules.append(pos.key < pos.key_len)
    if options.causal:
        rules.append(distance >= 0)
    if options.window_left >= 0:
        rules.append(distance <= options.window_left)
    if options.window_right >= 0:
        rules.append(distance >= -options.window_right)
    if options.window_bounds is not None:
        begin, end = options.window_bounds.split(1, -1)
        rules.append((pos.key >= begin) & (pos.key < end))
    if options.mask is not None:
        rules.append(options.mask)
    rules.extend(bias != -math.inf for bias in biases)
    visible: Tensor | None = None
    for rule in rules:
        visible = rule if visible is None else visible & rule
    return visible, distance


def _alibi(slopes: Tensor, pos: _Positions, distance: Tensor) -> Tensor:
    """``slope |q + off - k|`` for slopes ``[B or 1, H]``, in packed input ``[N or 1, H]``."""
    if pos.sequence_q is not None and slopes.shape[0] > 1:
        return slopes[pos.sequence_q.flatten()].t()[None, :, :, None] * distance.abs()
    return slopes.unsqueeze(-1).unsqueeze(-1) * distance.abs()


def near_center(center: Tensor, window: Sequence[int], key: Tensor) -> Tensor:
    """``center - left <= key <= center + right``, ``[..., T_q, T_k]``, for centres ``[..., T_q]``; a side of -1 is
    unbounded, and nothing is near NaN.
    """
    left, right = (min(side, 2**61) for side in window)
    center = center.detach().unsqueeze(-1)
    center, key = (center.double(), key.double()) if center.is_floating_point() else (center.long(), key)
    near = (center == center).expand(torch.broadcast_shapes(center.shape, key.shape))
    if left >= 0:
        near = near & (key + left >= center)
    return near & (key - right <= center) if right >= 0 else near


# --- products that select -------------------------------------------------------------------------------------------


def _all_finite(*tensors: Tensor) -> bool | None:
    """Whether every element is finite; None where values cannot be read (tracing)."""
    if torch.compiler.is_compiling():
        return None
    try:
        for tensor in tensors:
            values = torch.func.debug_unwrap(tensor.detach(), recurse=True).detach()
            # One read in the ordinary case: a sum is finite unless an element is not or the sum overflows.
            if not bool(values.sum().isfinite()) and not bool(values.isfinite().all()):
                return False
    except RuntimeError:  # fake tensors and proxies refuse to give data
        return None
    return True


def select_operands(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, traced_mask: bool
) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Clear non-finite rows that nothing sees; the flag says that partially masked non-finite rows remain."""
    if visible is None:
        return query, key, value, False
    finite = _all_finite(query, key, value)
    if finite or (finite is None and not traced_mask):
        return query, key, value, False
    kv_heads = key.shape[1]
    used_q = visible.any(-1).unsqueeze(-1)
    used_k = visible.any(-2)
    if used_k.shape[1] > 1 and used_k.shape[1] != kv_heads:
        used_k = used_k.unflatten(1, (kv_heads, used_k.shape[1] // kv_heads)).any(2)
    used_k = used_k.unsqueeze(-1)
    query, key, value = query.where(used_q, 0.0), key.where(used_k, 0.0), value.where(used_k, 0.0)
    return query, key, value, finite is False and not _all_finite(query, key, value)


def _group(x: Tensor, kv_heads: int) -> Tensor:
    """``[B, H, T, X] -> [B, H_kv, (H / H_kv) T, X]``, so that grouped heads need no repeated keys."""
    b, h, t, d = x.shape
    return x if h == kv_heads else x.reshape(b, kv_heads, (h // kv_heads) * t if kv_heads else 0, d)


def _repeat(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def dot_scores(query: Tensor, key: Tensor, visible: Tensor | None, exact: bool) -> Tensor:
    """``s[q, k] = sum_d query[q, d] key[k, d]``, ``[B, H, T_q, T_k]``."""
    if exact:
        assert visible is not None
        pair = visible.unsqueeze(-1)
        q, k = query.unsqueeze(-2), _repeat(key, query.shape[1]).unsqueeze(-3)
        return (torch.where(pair, q, 0.0) * torch.where(pair, k, 0.0)).sum(-1)
    scores = _group(query, key.shape[1]) @ key.transpose(-2, -1)
    return scores.reshape(*query.shape[:3], key.shape[2])


def l2_scores(query: Tensor, key: Tensor, visible: Tensor | None, exact: bool) -> Tensor:
    """``s[q, k] = -sum_d (query[q, d] - key[k, d])^2``, ``[B, H, T_q, T_k]``."""
    difference = query.unsqueeze(-2) - _repeat(key, query.shape[1]).unsqueeze(-3)
    if exact:
        assert visible is not None
        difference = torch.where(visible.unsqueeze(-1), difference, 0.0)
    return -difference.square().sum(-1)


def additive_scores(weight: Tensor, score_bias: Tensor | None) -> ScoreFunction:
    """``s[q, k] = sum_d weight[d] tanh(query[q, d] + key[k, d] + score_bias[d])`` for ``[H or 1, D]`` parameters."""

    def scores(query: Tensor, key: Tensor, visible: Tensor | None, exact: bool) -> Tensor:
        if score_bias is not None:
            query = query + score_bias.unsqueeze(-2)
        total = query.unsqueeze(-2) + _repeat(key, query.shape[1]).unsqueeze(-3)
        if exact:
            assert visible is not None
            total = torch.where(visible.unsqueeze(-1), total, 0.0)
        return (total.tanh() @ weight.unsqueeze(-2).unsqueeze(-1)).squeeze(-1)

    return scores


def _weighted_sum(weights: Tensor, value: Tensor, visible: Tensor | None, exact: bool) -> Tensor:
    """``out[q] = sum_k weights[q, k] value[k]`` over visible keys, ``[B, H, T_q, D_v]``."""
    if exact:
        assert visible is not None
        v = _repeat(value, weights.shape[1]).unsqueeze(-3)
        pair = visible.unsqueeze(-1)
        return (torch.where(pair, weights.unsqueeze(-1), 0.0) * torch.where(pair, v, 0.0)).sum(-2)
    out = _group(weights, value.shape[1]) @ value
    return out.reshape(*weights.shape[:3], value.shape[3])


def unit_vectors(x: Tensor, eps: float = COSINE_EPS) -> Tensor:
    """``x / max(|x|, eps)`` over the last dimension, in at least float32.

    Written so that a masked row stays selected out: a non-finite row becomes NaN and passes its gradient through
    unchanged (a zero gradient stays zero). The largest element is divided out first, so that squares cannot overflow.
    """
    x = x.to(real_dtype(x.dtype))
    if x.shape[-1] == 0:
        return x
    finite = x.detach().isfinite().all(-1, keepdim=True)
    safe = x.where(finite, 0.0)
    largest = safe.detach().abs().amax(-1, keepdim=True).clamp_min(eps)
    safe = safe / largest
    unit = safe * safe.square().sum(-1, keepdim=True).clamp_min((eps / largest).square()).rsqrt()
    return torch.where(finite, unit, x + math.nan)


# --- the core -------------------------------------------------------------------------------------------------------


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """The accumulation type: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Attended(NamedTuple):
    """What :func:`attend` gives; `log_prob` ``[B, H, T_q]`` for the normaliser ``hard_sample`` only."""

    out: Tensor
    lse: Tensor | None
    weights: Tensor | None
    log_prob: Tensor | None


def attend(
    score: ScoreFunction, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, bias2: Tensor | None,
    sink: Tensor | None, options: Any, return_lse: bool, rows: tuple[int, int] | None = None,
    normalizer: str = "softmax", prior: Any = None,
) -> Attended:  # fmt: skip
    """What every score function shares: masks, biases, normaliser, prior, dropout and the weighted sum.

    `prior` is a tensor broadcastable to ``[B, H, T_q, T_k]``, or ``("gaussian", center, sigma)`` with a center
    broadcastable to ``[B, H, T_q, 1]``.
    """
    dtype, real = query.dtype, real_dtype(query.dtype)
    query, key, value = query.to(real), key.to(real), value.to(real)
    biases = [b.to(real) for b in (bias, bias2) if b is not None]
    (b, h, tokens_q), tokens_k = query.shape[:3], key.shape[2]
    first_row, total_rows = (0, tokens_q) if rows is None else rows
    row_range = (first_row, first_row + tokens_q, total_rows)
    positions = _positions(options, row_range, tokens_k, query.device)
    visible, distance = _visibility(options, positions, biases)
    masks = (options.mask, options.query_lengths, options.key_lengths, options.cu_seqlens_q, options.window_bounds)
    traced_mask = any(x is not None for x in masks)
    query, key, value, exact = select_operands(query, key, value, visible, traced_mask)
    scores = score(query, key, visible, exact) * options.scale
    if options.softcap > 0:
        if visible is not None:  # an overflowed masked score would give 0 * NaN in tanh's derivative
            scores = scores.where(visible, 0.0)
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if options.alibi_slopes is not None:
        scores = scores - _alibi(options.alibi_slopes.to(real), positions, distance)
    for term in biases:
        scores = scores + term
    row = torch.arange(first_row, first_row + tokens_q, device=query.device).view(1, 1, tokens_q, 1)
    row = row + total_rows * torch.arange(b * h, device=query.device).view(b, h, 1, 1)
    noise = None
    if normalizer == "hard_sample":
        columns = positions.key if sink is None else torch.nn.functional.pad(positions.key, (0, 1), value=-1)
        noise = gumbel_noise(options.seed, row, columns).to(real)
    weights, lse, log_prob = normalize(
        normalizer, scores, visible, None if sink is None else sink.to(real), noise, return_lse
    )
    if prior is not None:
        weights = weights * _prior(prior, positions, visible, real)
    if options.dropout_p >= 1:
        weights = weights.masked_fill(torch.ones((), dtype=torch.bool, device=weights.device), 0.0)  # keeps the graph
    elif options.dropout_p > 0:
        keep = dropout_keep(options.seed, options.dropout_p, row, positions.key)
        weights = weights.where(keep, 0.0) / (1.0 - options.dropout_p)
    out = _weighted_sum(weights, value, visible, exact)
    if visible is not None:  # what comes back into a row that saw nothing (a gradient of NaN, say) ends here
        out = out.where(visible.any(-1, keepdim=True), 0.0)
    reduced = _reduce_weights(weights, options.weights_mode, dtype)
    return Attended(out.to(dtype), lse if return_lse else None, reduced, log_prob)


def _prior(prior: Any, positions: _Positions, visible: Tensor | None, real: torch.dtype) -> Tensor:
    """The factor of every weight, ``exp(-(k - center)^2 / (2 sigma^2))`` for a Gaussian; 0 where nothing is visible."""
    if isinstance(prior, Tensor):
        return prior.to(real) if visible is None else torch.where(visible, prior.to(real), 0.0)
    _, center, sigma = prior
    center = center.to(real)
    if visible is not None:  # before the formula: its derivative in a center of NaN is NaN
        center = torch.where(visible.any(-1, keepdim=True), center, 0.0)
    gauss = torch.exp(-0.5 * ((positions.key - center) / sigma).square())
    return gauss if visible is None else gauss.where(visible, 0.0)


def _reduce_weights(weights: Tensor, mode: int, dtype: torch.dtype) -> Tensor | None:
    if mode == 0:
        return None
    if mode == 1:
        return weights.to(dtype)
    if mode == 2:
        return weights.sum(-2)
    if weights.shape[-1] == 0:
        return weights.sum(-1)
    # argmax documents that the first of equal maxima is taken; the gradient goes there and nowhere else.
    return weights.gather(-1, weights.detach().argmax(-1, keepdim=True)).squeeze(-1)
