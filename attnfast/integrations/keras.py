"""Keras's attention layers as torch modules on attnfast's kernels: Keras's arguments, call convention and numbers.

    from attnfast.integrations.keras import Attention
    attention = Attention(use_scale=True)
    out = attention([query, value, key], mask=[query_mask, value_mask], use_causal_mask=True)

For models that move from Keras to torch. Keras itself is not needed and not imported. As in Keras, sizes are taken from
the first call (or from the weights that are loaded before it): until then the parameters are
``torch.nn.UninitializedParameter``, so that an optimizer is made after one call. `MultiHeadAttention` and
`GroupQueryAttention` are in _keras_heads.py.

The numbers are Keras's with one exception: where Keras subtracts 1e9 from a hidden score, a hidden key takes no part
here (docs/semantics.md, "Beside keras"). A query that sees no key has output 0, not the mean of the values.

Source of the interface: https://keras.io/api/layers/attention_layers, Keras 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedParameter

from attnfast import functional
from attnfast.integrations._keras_base import KerasLayer, glorot_uniform_, unsized
from attnfast.integrations._keras_heads import GroupQueryAttention, MultiHeadAttention
from attnfast.nn._base import unpack

__all__ = ["AdditiveAttention", "Attention", "GroupQueryAttention", "MultiHeadAttention"]


class Attention(KerasLayer):
    r"""``keras.layers.Attention``: one head without projections, dot-product (Luong) or "concat" scores.

    .. math::
        s = c\, q \cdot k \quad\text{or}\quad s = w \sum_d \tanh(c\,(q_d + k_d)), \qquad
        y = \mathrm{softmax}(s)\, v

    Parameters
    ----------
    use_scale : bool
        Whether there is a parameter c, ``scale``, initially 1. Otherwise c is 1.
    score_mode : {"dot", "concat"}
        The first or the second score; "concat" has a parameter w, ``concat_score_weight``, initially 1.
    dropout : float
        Probability of dropping a weight, in training.
    seed : int, optional
        Makes the dropout of this layer independent of ``torch.manual_seed``: the same seed gives the same masks in each
        program, other ones in each call. Not under torch.compile.
    device, dtype
        Of the parameters.

    Notes
    -----
    Nothing of size T_q T_v is in memory unless the scores are asked for.

    References
    ----------
    Luong, Pham and Manning, "Effective Approaches to Attention-based Neural Machine Translation", EMNLP 2015.

    Examples
    --------
    >>> import torch
    >>> from attnfast.integrations.keras import Attention
    >>> query, value = torch.randn(2, 5, 8), torch.randn(2, 7, 8)
    >>> value_mask = torch.arange(7) < torch.tensor([[7], [4]])
    >>> out, scores = Attention()([query, value], mask=[None, value_mask], return_attention_scores=True)
    >>> out.shape, scores.shape
    (torch.Size([2, 5, 8]), torch.Size([2, 5, 7]))
    """

    def __init__(
        self, use_scale: bool = False, score_mode: str = "dot", dropout: float = 0.0, seed: int | None = None, *,
        device: Any = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(dropout, seed)
        if score_mode not in ("dot", "concat"):
            raise ValueError(f"score_mode: expected 'dot' or 'concat', got {score_mode!r}")
        self.use_scale, self.score_mode = use_scale, score_mode
        self.patterns = {"scale": (), "concat_score_weight": ()}
        one = torch.ones((), device=device, dtype=dtype)
        self.scale = nn.Parameter(one.clone()) if use_scale else None
        self.concat_score_weight = nn.Parameter(one.clone()) if score_mode == "concat" else None

    def forward(
        self,
        inputs: Sequence[Tensor],
        mask: Sequence[Tensor | None] | None = None,
        training: bool | None = None,
        return_attention_scores: bool = False,
        use_causal_mask: bool = False,
    ) -> Any:
        """Attend.

        Parameters
        ----------
        inputs : list of Tensor
            ``[query, value]`` or ``[query, value, key]``: ``[B, T_q, D]``, ``[B, T_v, D_v]``, ``[B, T_v, D]``. The key
            is the value unless given. There may be more leading dimensions than B.
        mask : list of Tensor or None, optional
            ``[query_mask, value_mask]``, boolean ``[B, T_q]`` and ``[B, T_v]``: False = padding. A query that is
            padding has output 0, and the weights of any other; a value that is padding has weight 0.
        training : bool, optional
            Whether there is dropout; default: whether the module is in training mode.
        return_attention_scores : bool
            Whether the weights (after dropout) are returned.
        use_causal_mask : bool
            Query q sees values k <= q.

        Returns
        -------
        Tensor or tuple
            y ``[B, T_q, D_v]``, or y and weights ``[B, T_q, T_v]``.

        Raises
        ------
        ValueError, TypeError
            Not two or three inputs, or masks; shapes or dtypes that do not fit.
        """
        _check_list("inputs", inputs, "[query, value] or [query, value, key]")
        query, value = inputs[0], inputs[1]
        key = inputs[2] if len(inputs) > 2 else value
        query_mask = value_mask = None
        if mask is not None:
            _check_list("mask", mask, "[query_mask, value_mask]")
            query_mask, value_mask = mask[0], mask[1]
        rate = self._rate(training)
        options = {
            "mask": None if value_mask is None else value_mask.to(torch.bool)[..., None, None, :],
            "causal": "top_left" if use_causal_mask else None,
            "dropout_p": rate,
            "return_weights": return_attention_scores,
        }
        with self._seeded(rate):
            out, weights = self._attend(query.unsqueeze(-3), key.unsqueeze(-3), value.unsqueeze(-3), options)
        if query_mask is not None:
            out = out.masked_fill(~query_mask.to(torch.bool).unsqueeze(-1), 0.0)
        return (out, weights) if return_attention_scores else out

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """Output and weights, without the head axis that the operands have at -3."""
        query = query if self.scale is None else query * self.scale
        if self.concat_score_weight is None:
            return _without_head(functional.attention(query, key, value, score="dot", **options))
        key = key if self.scale is None else key * self.scale
        weight = self.concat_score_weight.to(query.dtype).expand(query.shape[-1])
        return _without_head(functional.additive_attention(query, key, value, weight, **options))

    def extra_repr(self) -> str:
        return f"use_scale={self.use_scale}, score_mode={self.score_mode!r}, dropout={self.dropout}, seed={self.seed}"


class AdditiveAttention(LazyModuleMixin, Attention):
    r"""``keras.layers.AdditiveAttention``: one head without projections, additive (Bahdanau) scores.

    .. math:: s = \sum_d c_d \tanh(q_d + k_d), \qquad y = \mathrm{softmax}(s)\, v

    Parameters
    ----------
    use_scale : bool
        Whether there is a parameter c ``[D]``, ``scale``, initialised after Glorot and Bengio (uniform), when the first
        call says what D is. Otherwise c is 1.
    dropout, seed, device, dtype
        As in :class:`Attention`, and so is the call.

    Notes
    -----
    Keras computes this through a tensor ``[B, T_q, T_v, D]``; here nothing larger than ``[B, T_q, T_v]`` exists, and
    that only if the scores are asked for.

    References
    ----------
    Bahdanau, Cho and Bengio, "Neural Machine Translation by Jointly Learning to Align and Translate", ICLR 2015.

    Examples
    --------
    >>> import torch
    >>> from attnfast.integrations.keras import AdditiveAttention
    >>> attention = AdditiveAttention()
    >>> attention([torch.randn(2, 5, 8), torch.randn(2, 7, 8)]).shape
    torch.Size([2, 5, 8])
    """

    cls_to_become = None

    def __init__(
        self, use_scale: bool = True, dropout: float = 0.0, seed: int | None = None, *, device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(False, "dot", dropout, seed)
        self.use_scale = use_scale
        self.patterns = {"scale": (None,)}
        if use_scale:
            self.scale = unsized(device, dtype)

    def initialize_parameters(self, inputs: Sequence[Tensor], *_: Any, **__: Any) -> None:
        """Make the parameter, which needs the size of the query."""
        if isinstance(self.scale, UninitializedParameter):
            size = inputs[0].shape[-1]
            self.scale.materialize((size,))
            glorot_uniform_(self.scale, size, size)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        weight = query.new_ones(query.shape[-1]) if self.scale is None else self.scale.to(query.dtype)
        return _without_head(functional.additive_attention(query, key, value, weight, **options))

    def extra_repr(self) -> str:
        return f"use_scale={self.use_scale}, dropout={self.dropout}, seed={self.seed}"


def _without_head(result: Any) -> tuple[Tensor, Tensor | None]:
    output, weights = unpack(result)
    return output.squeeze(-3), None if weights is None else weights.squeeze(-3)


def _check_list(name: str, given: Any, expected: str) -> None:
    if not isinstance(given, (list, tuple)):
        raise TypeError(f"{name}: expected a list {expected}, got {type(given).__name__}")
    if len(given) not in (2, 3):
        raise ValueError(f"{name}: expected a list {expected}, got {len(given)}")
