"""Multi-head attention with any score, and content-based addressing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnfast import functional
from attnfast.nn._base import MemoryAttention, ProjectedMemory, Weights, drop_head, positive, unpack
from attnfast.reference import unit_vectors

SCORES = ("scaled_dot", "dot", "cosine", "l2", "additive")


class Attention(MemoryAttention):
    r"""Multi-head attention with any score of the library.

    .. math::
        Q = W_q x, \; K = W_k m, \; V = W_v m, \quad
        y = W_o\,[\mathrm{attention}(Q_1, K_1, V_1); \ldots; \mathrm{attention}(Q_H, K_H, V_H)]

    Parameters
    ----------
    query_size : int
        Size of x and of y.
    memory_size : int, optional
        Size of m; default `query_size`.
    heads : int
        H, the number of query heads.
    kv_heads : int, optional
        H_kv, a divisor of H: each serves H / H_kv query heads (grouped-query attention). Default: H.
    head_size : int, optional
        Size of a head; default ``query_size / heads``.
    score : {"scaled_dot", "dot", "cosine", "l2", "additive"}
        ``additive`` has a weight ``[H, head_size]`` of its own.
    normalizer : str
        As in :func:`attnfast.attention`.
    dropout : float
        Probability of dropping a weight, in training mode.
    bias : bool
        Whether the four projections have biases.

    Notes
    -----
    Vaswani et al. (NeurIPS 2017) state no initial values. Projections are initialised after Glorot and Bengio (AISTATS
    2010, eq. 16: uniform), biases with zero; the additive weight, which their paper does not have, from the uniform
    distribution over +-1 / sqrt(head_size).

    A projected memory holds the keys of the cosine divided by their norms. ``l2`` has no such form in the memory's own
    dtype: its step prepares all keys anew.

    Examples
    --------
    >>> import torch
    >>> from attnfast.nn import Attention
    >>> attention = Attention(32, heads=4, kv_heads=2, score="cosine")
    >>> x = torch.randn(2, 7, 32)
    >>> y, weights = attention(x, x, causal="top_left", return_weights=True)
    >>> y.shape, weights.shape
    (torch.Size([2, 7, 32]), torch.Size([2, 4, 7, 7]))
    """

    def __init__(
        self, query_size: int, memory_size: int | None = None, *, heads: int = 1, kv_heads: int | None = None,
        head_size: int | None = None, score: str = "scaled_dot", normalizer: str = "softmax", dropout: float = 0.0,
        bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(query_size, query_size if memory_size is None else memory_size)
        kv_heads = heads if kv_heads is None else kv_heads
        positive(heads=heads, kv_heads=kv_heads)
        if heads % kv_heads:
            raise ValueError(f"kv_heads: expected a divisor of heads = {heads}, got {kv_heads}")
        if head_size is None:
            if query_size % heads:
                raise ValueError(f"heads: expected a divisor of query_size = {query_size} (or head_size), got {heads}")
            head_size = query_size // heads
        positive(head_size=head_size)
        if score not in SCORES:
            raise ValueError(f"score: expected one of {', '.join(map(repr, SCORES))}, got {score!r}")
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout: expected a probability in [0, 1], got {dropout}")
        self.heads, self.kv_heads, self.head_size = heads, kv_heads, head_size
        self.score, self.normalizer, self.dropout = score, normalizer, dropout
        self.query = nn.Linear(query_size, heads * head_size, bias)
        self.key = nn.Linear(self.memory_size, kv_heads * head_size, bias)
        self.value = nn.Linear(self.memory_size, kv_heads * head_size, bias)
        self.output = nn.Linear(heads * head_size, query_size, bias)
        self.score_weight = nn.Parameter(torch.empty(heads, head_size)) if score == "additive" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew."""
        for layer in (self.query, self.key, self.value, self.output):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        if self.score_weight is not None:
            nn.init.uniform_(self.score_weight, -(self.head_size**-0.5), self.head_size**-0.5)

    def project_memory(self, memory: Tensor) -> ProjectedMemory:
        """Keys (for the cosine of length 1) and values of all heads, ``[B, H_kv, T_k, head_size]``."""
        self._check_memory(memory)
        keys, values = (self._split(layer(memory), self.kv_heads) for layer in (self.key, self.value))
        return ProjectedMemory(self._comparable(keys), values)

    def _comparable(self, x: Tensor) -> Tensor:
        """Queries or keys as the function takes them: the cosine is the dot product of unit vectors."""
        return unit_vectors(x).to(x.dtype) if self.score == "cosine" else x

    def _split(self, x: Tensor, heads: int) -> Tensor:
        return x.unflatten(-1, (heads, self.head_size)).transpose(1, 2)

    def forward(
        self, query: Tensor, memory: Tensor | ProjectedMemory, lengths: Tensor | None = None, *,
        mask: Tensor | None = None, return_weights: bool | str = False, **options: Any,
    ) -> tuple[Tensor, Weights]:  # fmt: skip
        """Attend to a memory (for self-attention: the query itself).

        Parameters
        ----------
        query, memory, lengths
            As in :meth:`MemoryAttention.forward`.
        mask : Tensor, optional
            Broadcastable to ``[B, H, T_q, T_k]``; boolean (True = may attend) or added to the scores.
        return_weights : {False, True, "column_sum", "row_max"}
            As in :func:`attnfast.attention`.
        **options
            Other arguments of :func:`attnfast.attention`: `causal`, `window`, `bias`, `alibi_slopes`, `sink`, ...

        Returns
        -------
        tuple
            y ``[B, T_q, query_size]`` and weights ``[B, H, T_q, T_k]`` (sums ``[B, H, T_k]``, maxima ``[B, H, T_q]``,
            or None); for one step without the T_q axis.
        """
        query, memory, single = self._prepare(query, memory)
        operands = (self._comparable(self._split(self.query(query), self.heads)), memory.keys, memory.values)
        options |= {"key_lengths": lengths, "mask": mask, "return_weights": return_weights}
        options |= {"normalizer": self.normalizer, "dropout_p": self.dropout if self.training else 0.0}
        if self.score_weight is not None:
            result = functional.additive_attention(*operands, self.score_weight, **options)
        else:
            result = functional.attention(*operands, score="dot" if self.score == "cosine" else self.score, **options)
        heads, weights = unpack(result)
        context = self.output(heads.transpose(1, 2).flatten(2))
        if not single:
            return context, weights
        if weights is not None and return_weights != "column_sum":
            weights = weights.squeeze(2)
        return context.squeeze(1), weights

    def extra_repr(self) -> str:
        text = f"heads={self.heads}, kv_heads={self.kv_heads}, head_size={self.head_size}, score={self.score!r}"
        return f"{text}, normalizer={self.normalizer!r}, dropout={self.dropout}"


class ContentAttention(MemoryAttention):
    r"""Content-based addressing of neural Turing machines (Graves, Wayne and Danihelka 2014, eqs. 5, 6 and 9).

    .. math::
        w_i \propto \exp(\beta \cos(k, m_i)), \quad w_i \leftarrow w_i^\gamma / \sum_j w_j^\gamma, \quad
        r = \sum_i w_i m_i

    with :math:`k = W x + b`, strength :math:`\beta = \mathrm{softplus}(u \cdot x + c)` and sharpness
    :math:`\gamma = 1 + \mathrm{softplus}(u' \cdot x + c')` emitted by the query x. The norms of the cosine are at least
    1e-8. Without a shift in between, sharpening a softmax multiplies its scores by gamma, so both steps are one softmax
    with strength :math:`\beta \gamma`, which is how they are computed.

    Parameters
    ----------
    query_size : int
        Size of x, the controller's state.
    memory_size : int
        Size of a memory slot.
    sharpen : bool
        Whether gamma is there; without it, it is 1.

    Notes
    -----
    The paper states no initial values. Projections are initialised after Glorot and Bengio (AISTATS 2010, eq. 16:
    uniform), biases with zero: strength and sharpness then begin near softplus(0) = 0.69 and 1.69.

    Examples
    --------
    >>> import torch
    >>> from attnfast.nn import ContentAttention
    >>> addressing = ContentAttention(query_size=8, memory_size=6)
    >>> read, weights = addressing(torch.randn(2, 8), torch.randn(2, 20, 6))
    >>> read.shape, weights.shape
    (torch.Size([2, 6]), torch.Size([2, 20]))
    """

    def __init__(self, query_size: int, memory_size: int, sharpen: bool = True) -> None:
        super().__init__(query_size, memory_size)
        self.sharpen = sharpen
        self.key = nn.Linear(query_size, memory_size)
        self.strength = nn.Linear(query_size, 2 if sharpen else 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew."""
        for layer in (self.key, self.strength):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def project_memory(self, memory: Tensor) -> ProjectedMemory:
        """Slots of length 1, ``[B, T_k, memory_size]``, beside the memory itself."""
        self._check_memory(memory)
        return ProjectedMemory(unit_vectors(memory).to(memory.dtype), memory)

    def _attend(
        self, query: Tensor, memory: ProjectedMemory, lengths: Tensor | None, mask: Tensor | None, mode: bool | str
    ) -> tuple[Tensor, Weights]:
        strength = nn.functional.softplus(self.strength(query))
        if self.sharpen:
            strength = strength[..., :1] * (1.0 + strength[..., 1:])
        key = (unit_vectors(self.key(query)) * strength).to(query.dtype)
        mask = mask.unsqueeze(1) if mask is not None and mask.dim() == 3 else mask
        heads = (x.unsqueeze(1) for x in (key, *memory))
        return drop_head(functional.attention(*heads, score="dot", key_lengths=lengths, mask=mask, return_weights=mode))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, sharpen={self.sharpen}"
