"""Keras's MultiHeadAttention and GroupQueryAttention as torch modules; see keras.py.

Kernels have Keras's shapes, ``[E, H, D]`` and ``[H, D_v, E]``, so that weights are copied as they are.
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
from attnfast.nn._base import positive, unpack


class Projection(LazyModuleMixin, nn.Module):
    """x ``[..., *inner]`` times a kernel ``[*inner, *outer]``, plus a bias ``[*outer]``.

    `inner` and `outer` hold None where the first call decides: the size of x, or what the caller passes as `sizes`.
    """

    cls_to_become = None

    def __init__(
        self, inner: tuple[int | None, ...], outer: tuple[int | None, ...], bias: bool, device: Any, dtype: Any
    ) -> None:
        super().__init__()
        self.patterns = {"kernel": (*inner, *outer), "bias": outer}
        self.contracted = len(inner)
        self.kernel = unsized(device, dtype)
        self.bias = unsized(device, dtype) if bias else None

    def initialize_parameters(self, x: Tensor, sizes: tuple[int, ...]) -> None:
        if isinstance(self.kernel, UninitializedParameter):
            inner = x.shape[-self.contracted :]
            self.kernel.materialize((*inner, *sizes))
            glorot_uniform_(self.kernel, inner.numel(), torch.Size(sizes).numel())
        if isinstance(self.bias, UninitializedParameter):
            self.bias.materialize(sizes)
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
        inner = self.kernel.shape[: self.contracted]
        if x.shape[-self.contracted :] != inner:
            raise ValueError(f"expected a last dimension of {inner[-1]}, as at the first call, got {list(x.shape)}")
        matrix = self.kernel.reshape(inner.numel(), -1)
        bias = None if self.bias is None else self.bias.flatten()
        out = nn.functional.linear(x.flatten(-self.contracted), matrix.t(), bias)
        return out.unflatten(-1, self.kernel.shape[self.contracted :])


class _HeadsAttention(KerasLayer):
    """Projections, attention of H heads on H_kv heads of keys and values, and a projection of the result."""

    def __init__(
        self, heads: int, kv_heads: int, key_dim: int, value_dim: int, output_shape: Sequence[int] | int | None,
        dropout: float, use_bias: bool, sliding_window: int | None, use_gate: bool, seed: int | None, device: Any,
        dtype: Any,
    ) -> None:  # fmt: skip
        super().__init__(dropout, seed)
        if sliding_window is not None:
            positive(sliding_window=sliding_window)
        self.heads, self.kv_heads, self.use_bias, self.use_gate = heads, kv_heads, use_bias, use_gate
        self.sliding_window = sliding_window
        self.sizes = (key_dim, value_dim)
        self.output_shape = (output_shape,) if isinstance(output_shape, int) else tuple(output_shape or ())
        options = (use_bias, device, dtype)
        # In the order of Keras's weights.
        self.query = Projection((None,), (heads, key_dim), *options)
        self.key = Projection((None,), (kv_heads, key_dim), *options)
        self.gate = Projection((None,), (heads, value_dim), *options) if use_gate else None
        self.value = Projection((None,), (kv_heads, value_dim), *options)
        self.attention_output = Projection((heads, value_dim), self.output_shape or (None,), *options)

    def forward(
        self,
        query: Tensor,
        value: Tensor,
        key: Tensor | None = None,
        query_mask: Tensor | None = None,
        value_mask: Tensor | None = None,
        key_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_attention_scores: bool = False,
        training: bool | None = None,
        use_causal_mask: bool = False,
    ) -> Any:
        """Attend.

        Parameters
        ----------
        query, value, key : Tensor
            ``[B, T, E]``, ``[B, S, E_v]``, ``[B, S, E_k]``; the key is the value unless given.
        query_mask, value_mask, key_mask : Tensor, optional
            Boolean ``[B, T]``, ``[B, S]``, ``[B, S]``: False = padding. A query that is padding sees nothing.
        attention_mask : Tensor, optional
            Boolean ``[T, S]``, ``[B, T, S]`` or ``[B, H, T, S]``: True = may attend.
        return_attention_scores : bool
            Whether the weights, before dropout, are returned.
        training : bool, optional
            Whether there is dropout; default: whether the module is in training mode.
        use_causal_mask : bool
            Query q sees keys k <= q.

        Returns
        -------
        Tensor or tuple
            y ``[B, T, E]`` (or the output shape in place of E), or y and weights ``[B, H, T, S]``.

        Raises
        ------
        ValueError, TypeError
            Shapes or dtypes that do not fit.
        """
        key = value if key is None else key
        for name, x in (("query", query), ("value", value), ("key", key)):
            if x.dim() != 3:
                raise ValueError(f"{name}: expected [B, T, E], got {list(x.shape)}")
        heads, kv_heads, (key_dim, value_dim) = self.heads, self.kv_heads, self.sizes
        q = self.query(query, (heads, key_dim)).transpose(1, 2)
        k = self.key(key, (kv_heads, key_dim)).transpose(1, 2)
        v = self.value(value, (kv_heads, value_dim)).transpose(1, 2)
        mask = _joined(query_mask, value_mask, key_mask, attention_mask)
        reach = None if self.sliding_window is None else self.sliding_window - 1
        options: dict[str, Any] = {
            "mask": mask,
            "causal": "top_left" if use_causal_mask else None,
            "window": None if reach is None else (reach, reach),
        }
        rate = self._rate(training)
        with self._seeded(rate):
            result = functional.attention(
                q, k, v, dropout_p=rate, return_weights=return_attention_scores and not rate, **options
            )
        out, weights = unpack(result)
        if return_attention_scores and rate:
            weights = unpack(functional.attention(q, k, v, return_weights=True, **options))[1]
        out = out.transpose(1, 2)
        if self.gate is not None:
            out = out * torch.sigmoid(self.gate(query, (heads, value_dim)))
        y = self.attention_output(out, self.output_shape or (query.shape[-1],))
        return (y, weights) if return_attention_scores else y


def _joined(
    query_mask: Tensor | None, value_mask: Tensor | None, key_mask: Tensor | None, attention_mask: Tensor | None
) -> Tensor | None:
    """All masks in one, broadcastable to ``[B, H, T, S]``."""
    masks = []
    if query_mask is not None:
        masks.append(query_mask[:, None, :, None])
    masks += [x[:, None, None] for x in (value_mask, key_mask) if x is not None]
    if attention_mask is not None:
        masks.append(attention_mask.unsqueeze(-3) if attention_mask.dim() == 3 else attention_mask)
    mask = None
    for each in masks:
        mask = each.to(torch.bool) if mask is None else mask & each.to(torch.bool)
    return mask


class MultiHeadAttention(_HeadsAttention):
    r"""``keras.layers.MultiHeadAttention`` on inputs ``[B, T, E]``.

    .. math::
        y = W_o\,[\mathrm{attention}(Q_1, K_1, V_1); \ldots; \mathrm{attention}(Q_H, K_H, V_H)] + b_o

    Parameters
    ----------
    num_heads : int
        H.
    key_dim : int
        Size of a head of queries and keys.
    value_dim : int, optional
        Size of a head of values; default `key_dim`.
    dropout : float
        Probability of dropping a weight, in training.
    use_bias : bool
        Whether the projections have biases.
    output_shape : int or tuple of int, optional
        Size of y; default: that of the query.
    attention_axes : optional
        None or 1: there is one axis.
    sliding_window : int, optional
        Query q sees keys k with ``abs(q - k) < sliding_window``.
    flash_attention : optional
        Without meaning: every call is fused.
    use_gate : bool
        Whether a sigmoid of another projection of the query multiplies the heads.
    seed : int, optional
        As in :class:`Attention`.
    device, dtype
        Of the parameters.

    Notes
    -----
    Keras's constructor also takes initialisers, regularisers and constraints; initial values are those of its defaults.

    Raises
    ------
    NotImplementedError
        Attention over more than one axis.

    References
    ----------
    Vaswani et al., "Attention Is All You Need", NeurIPS 2017, sec. 3.2.2.

    Examples
    --------
    >>> import torch
    >>> from attnfast.integrations.keras import MultiHeadAttention
    >>> attention = MultiHeadAttention(num_heads=4, key_dim=8)
    >>> attention(torch.randn(2, 5, 32), torch.randn(2, 7, 16), use_causal_mask=True).shape
    torch.Size([2, 5, 32])
    """

    def __init__(
        self, num_heads: int, key_dim: int, value_dim: int | None = None, dropout: float = 0.0, use_bias: bool = True,
        output_shape: Sequence[int] | int | None = None, attention_axes: Any = None, sliding_window: int | None = None,
        flash_attention: bool | None = None, use_gate: bool = False, seed: int | None = None, *, device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        value_dim = key_dim if value_dim is None else value_dim
        positive(num_heads=num_heads, key_dim=key_dim, value_dim=value_dim)
        if attention_axes not in (None, 1, (1,), [1]):
            raise NotImplementedError(f"attention_axes: expected None or 1, got {attention_axes!r}")
        super().__init__(
            num_heads, num_heads, key_dim, value_dim, output_shape, dropout, use_bias, sliding_window, use_gate, seed,
            device, dtype,
        )  # fmt: skip


class GroupQueryAttention(_HeadsAttention):
    """``keras.layers.GroupQueryAttention``: each head of keys and values serves several heads of queries.

    Parameters
    ----------
    head_dim : int
        Size of a head.
    num_query_heads, num_key_value_heads : int
        H and H_kv, a divisor of H. Keys and values are not repeated.
    dropout, use_bias, sliding_window, flash_attention, use_gate, seed, device, dtype
        As in :class:`MultiHeadAttention`, and so is the call.

    References
    ----------
    Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models", EMNLP 2023.

    Examples
    --------
    >>> import torch
    >>> from attnfast.integrations.keras import GroupQueryAttention
    >>> attention = GroupQueryAttention(8, num_query_heads=4, num_key_value_heads=2)
    >>> attention(torch.randn(2, 5, 32), torch.randn(2, 7, 32)).shape
    torch.Size([2, 5, 32])
    """

    def __init__(
        self, head_dim: int, num_query_heads: int, num_key_value_heads: int, dropout: float = 0.0,
        use_bias: bool = True, sliding_window: int | None = None, flash_attention: bool | None = None,
        use_gate: bool = False, seed: int | None = None, *, device: Any = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        positive(head_dim=head_dim, num_query_heads=num_query_heads, num_key_value_heads=num_key_value_heads)
        if num_query_heads % num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads: expected a divisor of num_query_heads = {num_query_heads}, got "
                f"{num_key_value_heads}"
            )
        super().__init__(
            num_query_heads, num_key_value_heads, head_dim, head_dim, None, dropout, use_bias, sliding_window, use_gate,
            seed, device, dtype,
        )  # fmt: skip
