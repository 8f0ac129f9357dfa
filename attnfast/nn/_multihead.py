"""torch.nn.MultiheadAttention on attnfast's fused functions: same arguments, parameters and numbers, never NaN.

The module subclasses torch's and holds nothing of its own, so that an instance of torch's becomes one of these, and the
other way round, by a change of class (`attnfast.integrations.replace_modules`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attnfast import functional
from attnfast.nn._base import unpack

linear = nn.functional.linear


def keep_off_fast_path(module: nn.Module, arguments: tuple[Any, ...]) -> None:
    """Forward pre-hook that does nothing.

    In evaluation ``torch.nn.TransformerEncoderLayer`` calls one native function with the weights of its parts and not
    the parts, unless one of them has a hook. This is the documented way of keeping it from that.
    """


class _Masks(NamedTuple):
    """The masks of a call in the polarity and shapes of :func:`attnfast.attention`."""

    mask: Tensor | None
    bias: Tensor | None
    causal: str | None


class MultiheadAttention(nn.MultiheadAttention):
    r"""Drop-in replacement of :class:`torch.nn.MultiheadAttention`.

    .. math::
        y = W_o\,[\mathrm{attention}(Q_1, K_1, V_1); \ldots; \mathrm{attention}(Q_H, K_H, V_H)] + b_o, \quad
        Q = W_q\,query + b_q, \; K = W_k\,key + b_k, \; V = W_v\,value + b_v

    Parameters
    ----------
    embed_dim : int
        E, the size of the query and of y.
    num_heads : int
        H, a divisor of E.
    dropout : float
        Probability of dropping a weight, in training mode.
    bias : bool
        Whether the projections have biases.
    add_bias_kv : bool
        One more key and value, both learned, that every query sees.
    add_zero_attn : bool
        One more key and value, both zero, that every query sees.
    kdim, vdim : int, optional
        Sizes of key and value; default E.
    batch_first : bool
        Tensors are ``[N, T, E]`` instead of ``[T, N, E]``.
    device, dtype
        Of the parameters.

    Notes
    -----
    Parameters, their initial values, ``state_dict`` and results are torch's, with these differences:

    - A query that may see no key gets ``out_proj.bias`` and weights 0, where torch gives NaN.
    - `is_causal` needs no `attn_mask`. With one it is, as torch has it, a hint that `attn_mask` is the causal mask,
      which is then not looked at.
    - Training and evaluation take the same way. ``torch.nn.TransformerEncoderLayer`` would go round its attention in
      evaluation; a forward pre-hook that does nothing keeps it from that. Nested tensors, which
      ``torch.nn.TransformerEncoder`` makes of padded batches in evaluation, are taken, and their padding is not
      computed.
    - Dropout draws other random numbers from the same seed.
    - Not scriptable (``torch.jit.script``); ``torch.compile`` and ``torch.export`` work.

    References
    ----------
    Vaswani et al., "Attention Is All You Need", NeurIPS 2017, sec. 3.2.2.

    Examples
    --------
    >>> import torch
    >>> from attnfast.nn import MultiheadAttention
    >>> attention = MultiheadAttention(32, 4, batch_first=True)
    >>> x = torch.randn(2, 7, 32)
    >>> padding = torch.arange(7) >= torch.tensor([[7], [5]])
    >>> y, weights = attention(x, x, x, key_padding_mask=padding)
    >>> y.shape, weights.shape
    (torch.Size([2, 7, 32]), torch.Size([2, 7, 7]))
    """

    def __init__(
        self, embed_dim: int, num_heads: int, dropout: float = 0.0, bias: bool = True, add_bias_kv: bool = False,
        add_zero_attn: bool = False, kdim: int | None = None, vdim: int | None = None, batch_first: bool = False,
        device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        self.register_forward_pre_hook(keep_off_fast_path)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Parameters
        ----------
        query : Tensor
            ``[T_q, N, E]``, with `batch_first` ``[N, T_q, E]``, or ``[T_q, E]``; or nested, ``[N, j, E]``.
        key, value : Tensor
            ``[T_k, N, kdim]`` and ``[T_k, N, vdim]``, likewise.
        key_padding_mask : Tensor, optional
            ``[N, T_k]`` (``[T_k]`` without N). Boolean: True = the key is ignored. Floating: added to the scores.
        need_weights : bool
            Whether weights are returned. Without them nothing of size T_q T_k is ever in memory.
        attn_mask : Tensor, optional
            ``[T_q, T_k]`` or ``[N H, T_q, T_k]``. Boolean: True = may not attend. Floating: added to the scores.
        average_attn_weights : bool
            Whether weights are averaged over the heads.
        is_causal : bool
            Query q sees keys k <= q. See the notes of the class.

        Returns
        -------
        tuple
            y, shaped as the query, and weights ``[N, T_q, T_k']`` or ``[N, H, T_q, T_k']`` (without N as the query), or
            None. T_k' counts the keys that `add_bias_kv` and `add_zero_attn` add, in this order.

        Raises
        ------
        ValueError, TypeError
            Shapes or dtypes that do not fit; the message names the argument.
        """
        if query.is_nested or key.is_nested or value.is_nested:
            if key_padding_mask is not None or attn_mask is not None or need_weights:
                raise ValueError(
                    "query: a nested tensor goes without key_padding_mask, attn_mask and need_weights: its lengths are "
                    "its padding"
                )
            return self._nested(query, key, value, is_causal), None
        batched = query.dim() == 3
        self._check_shapes(query, key, value)
        if not batched:
            same = query is key, key is value
            query = query.unsqueeze(0)
            key = query if same[0] else key.unsqueeze(0)
            value = key if same[1] else value.unsqueeze(0)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        batch_first = self.batch_first or not batched
        shape = (query if batch_first else query.transpose(0, 1)).shape[:2]
        masks = self._masks(shape[0], shape[1], key.shape[1 if batch_first else 0], key_padding_mask, attn_mask,
                            is_causal)  # fmt: skip
        # [N, H, T, D] as views of the projections, whatever comes first: the kernels take any strides.
        order = (0, 2, 1, 3) if batch_first else (1, 2, 0, 3)
        q, k, v = self._project(query, key, value)
        context, weights = self._attend(q.permute(order), k.permute(order), v.permute(order), masks, need_weights)
        context = context.permute((0, 2, 1, 3) if batch_first else (2, 0, 1, 3)).flatten(2)
        output = linear(context, self.out_proj.weight, self.out_proj.bias)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output, weights

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, masks: _Masks, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        batch, heads = query.shape[:2]
        sink = None
        extra_keys: list[Tensor] = []
        extra_values: list[Tensor] = []
        if self.bias_k is not None and self.bias_v is not None:
            for extra, bias in ((extra_keys, self.bias_k), (extra_values, self.bias_v)):
                extra.append(bias.to(query.dtype).view(1, heads, 1, self.head_dim).expand(batch, -1, -1, -1))
        if self.add_zero_attn:
            if need_weights:
                extra_keys.append(key.new_zeros(batch, heads, 1, self.head_dim))
                extra_values.append(value.new_zeros(batch, heads, 1, self.head_dim))
            else:  # a score of 0 that weighs nothing: a sink
                sink = query.new_zeros(heads)
        if extra_keys:
            masks = self._widen(masks, query.shape[2], key.shape[2], len(extra_keys), query)
            key, value = torch.cat([key, *extra_keys], 2), torch.cat([value, *extra_values], 2)
        return unpack(functional.attention(
            query, key, value, mask=masks.mask, bias=masks.bias, causal=masks.causal, sink=sink,
            dropout_p=self.dropout if self.training else 0.0, return_weights=need_weights,
        ))  # fmt: skip

    @staticmethod
    def _widen(masks: _Masks, rows: int, keys: int, extra: int, like: Tensor) -> _Masks:
        """Masks of so many keys more, which every query sees."""
        mask, bias, causal = masks
        if causal is not None:  # counted from the left, it would hide the new keys
            seen = torch.ones(rows, keys, dtype=torch.bool, device=like.device).tril()
            if mask is None or mask.dtype == torch.bool:
                mask = seen if mask is None else mask & seen
            else:
                mask, bias = seen, mask  # a call with a causal hint has no other
        if mask is not None:
            mask = nn.functional.pad(mask, (0, extra), value=mask.dtype == torch.bool)
        if bias is not None:
            bias = nn.functional.pad(bias, (0, extra))
        return _Masks(mask, bias, None)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, ``[..., H, D]``, in as few products as there are different inputs."""
        weight, bias, size = self.in_proj_weight, self.in_proj_bias, self.embed_dim
        heads = (self.num_heads, self.head_dim)
        if weight is not None and query is key and key is value:
            q, k, v = linear(query, weight, bias).view(*query.shape[:-1], 3, *heads).unbind(-3)
            return q, k, v
        if weight is not None and key is value:
            q = linear(query, weight[:size], None if bias is None else bias[:size])
            both = linear(key, weight[size:], None if bias is None else bias[size:])
            k, v = both.view(*key.shape[:-1], 2, *heads).unbind(-3)
            return q.view(*query.shape[:-1], *heads), k, v
        if weight is None:
            weights = [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight]
        else:
            weights = list(weight.chunk(3))
        biases = (None, None, None) if bias is None else bias.chunk(3)
        q, k, v = (
            linear(x, w, b).view(*x.shape[:-1], *heads)
            for x, w, b in zip((query, key, value), weights, biases, strict=True)
        )
        return q, k, v

    def _masks(
        self, batch: int, rows: int, keys: int, key_padding_mask: Tensor | None, attn_mask: Tensor | None,
        is_causal: bool,
    ) -> _Masks:  # fmt: skip
        dtype = self.out_proj.weight.dtype
        padding = attending = None
        if key_padding_mask is not None:
            if key_padding_mask.shape != (batch, keys):
                raise ValueError(
                    f"key_padding_mask: expected [N, T_k] = [{batch}, {keys}], got {list(key_padding_mask.shape)}"
                )
            padding = _own_polarity("key_padding_mask", key_padding_mask, dtype)[:, None, None]
        if attn_mask is not None and not is_causal:
            count = batch * self.num_heads
            if attn_mask.shape not in ((rows, keys), (count, rows, keys)):
                raise ValueError(
                    f"attn_mask: expected [T_q, T_k] = [{rows}, {keys}] or [N H, T_q, T_k] = [{count}, {rows}, {keys}],"
                    f" got {list(attn_mask.shape)}"
                )
            attending = _own_polarity("attn_mask", attn_mask, dtype)
            attending = attending.unflatten(0, (batch, self.num_heads)) if attending.dim() == 3 else attending
        causal = "top_left" if is_causal else None
        if padding is None or attending is None:
            return _Masks(attending if padding is None else padding, None, causal)
        if padding.dtype != torch.bool:
            return _Masks(attending, padding, causal)
        if attending.dtype != torch.bool:
            return _Masks(padding, attending, causal)
        return _Masks(padding & attending, None, causal)

    def _check_shapes(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        itself = query is key and key is value and query.dim() in (2, 3)
        if itself and query.shape[-1] == self.embed_dim == self.kdim == self.vdim:
            return
        if query.dim() not in (2, 3) or query.shape[-1] != self.embed_dim:
            layout = "[N, T_q, E]" if self.batch_first else "[T_q, N, E]"
            raise ValueError(f"query: expected {layout} or [T_q, E] with E = {self.embed_dim}, got {list(query.shape)}")
        batch = None if query.dim() == 2 else query.shape[0 if self.batch_first else 1]
        for name, x, size in (("key", key, self.kdim), ("value", value, self.vdim)):
            if x.dim() != query.dim() or x.shape[-1] != size:
                expected = f"{query.dim()} dimensions, the last of size {size}"
                raise ValueError(f"{name}: expected {expected}, got {list(x.shape)}")
            if batch is not None and x.shape[0 if self.batch_first else 1] != batch:
                got = x.shape[0 if self.batch_first else 1]
                raise ValueError(f"{name}: expected a batch of {batch} (query's), got {got}")
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(f"value: expected {list(key.shape[:-1])} tokens (key's), got {list(value.shape[:-1])}")

    def _nested(self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
        """Nested tensors ``[N, j, E]``: the sequences packed one behind the other, without padding."""
        if not (query.is_nested and key.is_nested and value.is_nested):
            raise ValueError("query: expected query, key and value all nested, or none")
        if self.bias_k is not None or self.add_zero_attn:
            raise ValueError("query: a nested tensor goes without add_bias_kv and add_zero_attn")
        sequences = {id(x): x.unbind() for x in (query, key, value)}  # each once, so that self-attention stays one
        lengths = [[len(x) for x in sequences[id(tensor)]] for tensor in (query, key, value)]
        if lengths[1] != lengths[2] or len(lengths[0]) != len(lengths[1]):
            raise ValueError("value: expected nested sequences as long as key's, and as many as query's")
        if not lengths[0]:
            return query
        packed = {identity: torch.cat(each) for identity, each in sequences.items()}
        flat = (packed[id(query)], packed[id(key)], packed[id(value)])
        q, k, v = self._project(*flat)
        starts, key_starts = (torch.tensor([0, *each]).cumsum(0).to(query.device) for each in lengths[:2])
        context, _ = unpack(functional.varlen_attention(
            q, k, v, starts, key_starts, max(lengths[0]), max(lengths[1]),
            causal="top_left" if is_causal else None, dropout_p=self.dropout if self.training else 0.0,
        ))  # fmt: skip
        output = linear(context.flatten(1), self.out_proj.weight, self.out_proj.bias)
        if query.layout == torch.jagged:
            # The query's own offsets, where it has no holes: only then can the two be added.
            jagged: Any = query
            return torch.nested.nested_tensor_from_jagged(
                output, jagged.offsets() if jagged.lengths() is None else starts
            )
        return torch.nested.as_nested_tensor(list(output.split(lengths[0])), layout=query.layout)


def _own_polarity(name: str, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Boolean masks with True = may attend; floating ones in a dtype that the kernels add."""
    if mask.dtype == torch.bool:
        return ~mask
    if not mask.is_floating_point():
        raise TypeError(f"{name}: expected a boolean or floating mask, got {mask.dtype}")
    return mask if mask.dtype in (torch.float32, dtype) else mask.to(dtype)
