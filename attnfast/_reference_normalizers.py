"""From scores to weights: every normaliser, exact, in plain PyTorch and differentiable to any order.

A normaliser gets scores with ``-inf`` where nothing may be seen, ``[..., T_k]``, and gives weights of that shape. A
sink is one more key at the end whose value is zero: it takes its share of the weight and is cut off afterwards. NaN in
a score that is visible makes its row NaN.

The support of sparsemax and entmax (which keys get any weight) is found by sorting, on values without a graph. Given
the support, threshold and weights are smooth formulas of the scores, written again with a graph: so derivatives of
every order are those of the formulas, without a backward of our own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

NORMALIZERS = ("softmax", "sparsemax", "entmax15", "sigmoid", "none", "hard", "hard_sample")


class Normalized(NamedTuple):
    """Weights ``[B, H, T_q, T_k]``; natural lse of the scores ``[B, H, T_q]`` if it was asked for; and for
    ``hard_sample`` the logarithm of the probability of what was drawn, ``[B, H, T_q]``.
    """

    weights: Tensor
    lse: Tensor | None
    log_prob: Tensor | None


def _row_max(scores: Tensor) -> Tensor:
    """``[..., 1]``, without a graph: no normaliser that uses it depends on a shift of the whole row."""
    fixed = scores.detach()
    return fixed.amax(-1, keepdim=True) if scores.shape[-1] else fixed.new_full((*scores.shape[:-1], 1), -math.inf)


def softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and natural lse ``[...]``; weights 0 and lse -inf in a row of ``-inf``."""
    shift = _row_max(scores)
    shift = shift.where(shift != -math.inf, 0.0)
    exponentials = (scores - shift).exp()
    total = exponentials.sum(-1, keepdim=True)
    seen = total != 0
    total = total.where(seen, 1.0)
    return exponentials / total, (shift + total.log()).where(seen, -math.inf).squeeze(-1)


def _sum(x: Tensor, inside: Tensor) -> Tensor:
    return x.where(inside, 0.0).sum(-1, keepdim=True)


def _supported(shifted: Tensor, threshold: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """Who is above the threshold (and how many): everybody in a row of NaN, nobody in a row of ``-inf``."""
    active = ~(shifted.detach() <= threshold) & (top != -math.inf)
    return active, active.sum(-1, keepdim=True).clamp_min(1)


def sparsemax(scores: Tensor) -> Tensor:
    r"""The point of the simplex nearest to the scores (Martins and Astudillo 2016).

    :math:`p_i = \max(z_i - \tau, 0)` with :math:`\tau = (\sum_{i \in S} z_i - 1) / |S|`; sorted downwards, the support
    S is the longest prefix with :math:`1 + k z_{(k)} > \sum_{j \le k} z_{(j)}` (algorithm 1).
    """
    top = _row_max(scores)
    z = scores - top.where(top != -math.inf, 0.0)
    # The largest is 0, so the threshold is at least -1: what lies below cannot matter and must not spoil sums.
    ordered = z.detach().clamp_min(-1.0).sort(-1, descending=True).values
    count = torch.arange(1, z.shape[-1] + 1, device=z.device, dtype=z.dtype)
    inside = 1.0 + count * ordered > ordered.cumsum(-1)
    threshold = (_sum(ordered, inside) - 1.0) / inside.sum(-1, keepdim=True)
    active, size = _supported(z, threshold, top)
    tau = (_sum(z, active) - 1.0) / size
    return (z - tau).where(active, 0.0)


def entmax15(scores: Tensor) -> Tensor:
    r"""1.5-entmax (Peters, Niculae and Martins 2019).

    :math:`p_i = \max(x_i - \tau, 0)^2` with :math:`x = z / 2` and :math:`\tau = M_S - \sqrt{(1 - V_S) / |S|}`, where
    :math:`M_S` is the mean of x over the support and :math:`V_S = \sum_{i \in S} (x_i - M_S)^2`. Sorted downwards, the
    support is the longest prefix whose own :math:`\tau` does not exceed its last element (algorithm 2).
    """
    top = _row_max(scores)
    x = (scores - top.where(top != -math.inf, 0.0)) / 2.0
    ordered = x.detach().clamp_min(-1.0).sort(-1, descending=True).values  # as in sparsemax, the threshold is >= -1
    count = torch.arange(1, x.shape[-1] + 1, device=x.device, dtype=x.dtype)
    mean = ordered.cumsum(-1) / count
    spread = ordered.square().cumsum(-1) - count * mean.square()
    inside = mean - ((1.0 - spread) / count).clamp_min(0.0).sqrt() <= ordered
    size = inside.sum(-1, keepdim=True)
    mean = _sum(ordered, inside) / size
    spread = _sum((ordered - mean).square(), inside)
    active, size = _supported(x, mean - ((1.0 - spread) / size).clamp_min(0.0).sqrt(), top)
    x = x.where(active, 0.0)  # before anything is squared: the derivative of (-inf)^2 times 0 is NaN
    mean = _sum(x, active) / size
    tau = mean - ((1.0 - _sum((x - mean).square(), active)) / size).sqrt()
    return (x - tau).where(active, 0.0).square()


def _one_hot(index: Tensor, scores: Tensor, top: Tensor) -> Tensor:
    """1 at `index`, NaN in a row of NaN, 0 in a row of ``-inf``; a constant, but part of the graph of the scores."""
    chosen = torch.arange(scores.shape[-1], device=scores.device) == index
    ones = torch.ones_like(top).where(top != -math.inf, 0.0) + (top - top).where(top.isnan(), 0.0)
    # Piecewise constant: its derivative is 0, and not missing.
    return scores.where(torch.zeros_like(chosen), ones.where(chosen | ones.isnan(), 0.0))


def hard(scores: Tensor) -> Tensor:
    """1 for the largest score, the first of equal ones; 0 for the rest."""
    if scores.shape[-1] == 0:
        return scores
    return _one_hot(scores.detach().argmax(-1, keepdim=True), scores, _row_max(scores))


def hard_sample(scores: Tensor, noise: Tensor) -> Tensor:
    """1 for one key drawn from the softmax of the scores: the largest of scores plus Gumbel noise."""
    if scores.shape[-1] == 0:
        return scores
    return _one_hot((scores.detach() + noise).argmax(-1, keepdim=True), scores, _row_max(scores))


_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sparsemax": sparsemax,
    "entmax15": entmax15,
    "sigmoid": torch.sigmoid,
    "hard": hard,
}


def normalize(
    name: str, scores: Tensor, visible: Tensor | None, sink: Tensor | None, noise: Tensor | None, need_lse: bool
) -> Normalized:
    """Apply the normaliser called `name` to scores ``[B, H, T_q, T_k]``.

    Parameters
    ----------
    name : str
        One of :data:`NORMALIZERS`.
    scores : Tensor
        Finite or not; what `visible` hides is never looked at.
    visible : Tensor or None
        Boolean, broadcastable to the scores; None = all visible.
    sink : Tensor or None
        ``[H]``.
    noise : Tensor or None
        For ``hard_sample``: Gumbel noise for the scores and, with a sink, one column more.
    need_lse : bool
        Whether lse is wanted.
    """
    tokens = scores.shape[-1]
    masked = scores if visible is None else torch.where(visible, scores, -math.inf)
    if sink is not None:
        masked = torch.cat([masked, sink.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)], -1)
    lse = log_prob = None
    if need_lse or name in ("softmax", "hard_sample"):
        weights, lse = softmax(masked)
    if name == "hard_sample":
        assert noise is not None and lse is not None
        weights, log_prob = hard_sample(masked, noise), _log_prob(masked, lse, noise)
    elif name == "none":
        weights = scores if visible is None else torch.where(visible, scores, 0.0)
    elif name != "softmax":
        weights = _FUNCTIONS[name](masked)
    weights = weights[..., :tokens]
    return Normalized(weights if visible is None else weights.where(visible, 0.0), lse, log_prob)


def _log_prob(scores: Tensor, lse: Tensor, noise: Tensor) -> Tensor:
    """Of the key (or the sink) that :func:`hard_sample` takes; 0 where there is nothing to draw from."""
    if scores.shape[-1] == 0:
        return torch.zeros_like(lse)
    chosen = scores.gather(-1, (scores.detach() + noise).argmax(-1, keepdim=True)).squeeze(-1)
    return (chosen - lse).where(lse != -math.inf, 0.0)
