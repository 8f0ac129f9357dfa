"""What one call of a core is told beside its differentiable tensors, and where dropout's seed comes from."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

WEIGHTS_NONE, WEIGHTS_FULL, WEIGHTS_COLUMN_SUM, WEIGHTS_ROW_MAX = range(4)
N_OPTION_TENSORS = 8  # mask ... window_bounds


class DotAttentionOptions(NamedTuple):
    """Everything of one call that is neither a differentiable tensor nor an output.

    Attributes
    ----------
    mask : Tensor, optional
        Boolean, 4-D, broadcastable to ``[B, H, T_q, T_k]``; True = may attend.
    query_lengths, key_lengths : Tensor, optional
        int64 ``[B]``.
    cu_seqlens_q, cu_seqlens_k : Tensor, optional
        int64 ``[N + 1]``; both or neither. Packed input: B is 1 and the token axes hold N sequences one after another.
    alibi_slopes : Tensor, optional
        Accumulation dtype, 2-D, broadcastable to ``[B, H]``.
    seed : Tensor, optional
        int64 ``[2]`` = (seed, offset); required when ``dropout_p > 0``.
    window_bounds : Tensor, optional
        int64, 4-D, broadcastable to ``[B, H, T_q, 2]``: row q sees no key of its sequence outside ``[begin, end)``.
    scale, softcap, dropout_p : float
        ``softcap`` 0 is off.
    prior_sigma : float
        Width of the Gaussian prior, whose centre is a differentiable tensor ``[B, H, T_q]``; 0 is off.
    causal : int
        0 none, 1 top-left, 2 bottom-right.
    window_left, window_right : int
        -1 is unbounded.
    weights_mode : int
        ``WEIGHTS_NONE``, ``WEIGHTS_FULL``, ``WEIGHTS_COLUMN_SUM`` or ``WEIGHTS_ROW_MAX``.
    """

    mask: Tensor | None = None
    query_lengths: Tensor | None = None
    key_lengths: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    alibi_slopes: Tensor | None = None
    seed: Tensor | None = None
    window_bounds: Tensor | None = None
    scale: float = 1.0
    softcap: float = 0.0
    dropout_p: float = 0.0
    prior_sigma: float = 0.0
    causal: int = 0
    window_left: int = -1
    window_right: int = -1
    weights_mode: int = WEIGHTS_NONE


class PlainOptions(DotAttentionOptions):
    """Options of a call that chooses nothing but its scale and causal alignment.

    It is the common call, and a small one costs what its Python costs: everything that the binary is told beside the
    tensors is therefore put together once, here.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        scalars = self[N_OPTION_TENSORS:-1]
        modifiers = (None,) * (4 + N_OPTION_TENSORS)  # beside the option tensors: bias, bias2, sink, prior's centre
        self.forward_tail: tuple[Any, ...] = (None, None, WEIGHTS_NONE, *modifiers, *scalars)
        self.backward_tail: tuple[Any, ...] = (None, None, None, None, *modifiers, *scalars)
        if (
            any(x is not None for x in self[:N_OPTION_TENSORS])
            or self.weights_mode
            or self.dropout_p
            or self.prior_sigma
        ):
            raise ValueError("PlainOptions: only scale and causal may be chosen")


def draw_seed() -> Tensor:
    """int64 ``[2]``: a (seed, offset) pair from torch's CPU generator, so that ``torch.manual_seed`` rules."""
    return torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64, device="cpu")
