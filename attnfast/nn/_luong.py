"""Luong's attention: global or local, with each of his scores; and location-base attention alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnfast import functional
from attnfast.nn._base import MemoryAttention, ProjectedMemory, Weights, drop_head, one_row, positive, uniform, unpack
from attnfast.reference import real_dtype

SCORES = ("dot", "general", "concat", "location")


class LuongAttention(MemoryAttention):
    r"""Attention of Luong, Pham and Manning (EMNLP 2015, section 3).

    The query is the decoder state h_t *after* the step, the memory the encoder states h_s, the scores

    - ``"dot"``: :math:`h_t \cdot h_s` (equal sizes),
    - ``"general"``: :math:`h_t^\top W h_s`,
    - ``"concat"``: :math:`v^\top \tanh(W [h_t; h_s])`, with as many rows of W as the query has elements,
    - ``"location"``: element s of :math:`W h_t`, whatever the memory holds,

    and the weights their softmax: over all positions (``local=None``); over the window ``[p - D, p + D]`` around
    ``p = t``, the number of the step (``local="m"``); or around the predicted
    :math:`p = S\,\mathrm{sigmoid}(v_p^\top \tanh(W_p h_t))`, then multiplied by
    :math:`\exp(-(s - p)^2 / (2 \sigma^2))`, :math:`\sigma = D / 2`, and not normalised again (``local="p"``). S is the
    sample's own length; positions count from 0.

    Parameters
    ----------
    query_size, memory_size : int
        Sizes of h_t and h_s.
    score : {"general", "dot", "concat", "location"}
        See above.
    local : {None, "m", "p"}
        See above.
    window : int
        D: the window is 2 D + 1 positions wide.
    max_length : int, optional
        For ``score="location"``: how many positions W knows.

    Notes
    -----
    All parameters are drawn from the uniform distribution over [-0.1, 0.1], as published (section 4.1; ``initRange`` of
    the authors' nmt.hybrid). The formulas have no biases. Both local kinds read and compute the windows only (where
    queries side by side predict centres far apart, some of what lies between too), and hold nothing of size T_q x T_k
    but the weights, if asked for.

    Examples
    --------
    >>> import torch
    >>> from attnfast.nn import LuongAttention
    >>> attention = LuongAttention(query_size=8, memory_size=6, score="general", local="m", window=2)
    >>> context, weights = attention(torch.randn(2, 4, 8), torch.randn(2, 9, 6), torch.tensor([9, 5]))
    >>> context.shape, weights.shape
    (torch.Size([2, 4, 6]), torch.Size([2, 4, 9]))
    """

    query_weight: Tensor  # what a choice of score and window does not need is None
    memory_weight: Tensor
    score_weight: Tensor
    position_weight: Tensor
    position_score: Tensor

    def __init__(
        self, query_size: int, memory_size: int, score: str = "general", local: str | None = None, window: int = 10,
        max_length: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(query_size, memory_size)
        if score not in SCORES:
            raise ValueError(f"score: expected one of {', '.join(map(repr, SCORES))}, got {score!r}")
        if local not in (None, "m", "p"):
            raise ValueError(f"local: expected None, 'm' or 'p', got {local!r}")
        positive(window=window)
        if score == "dot" and query_size != memory_size:
            raise ValueError(f"memory_size: score 'dot' needs query_size = {query_size}, got {memory_size}")
        if score == "location":
            if max_length is None:
                raise ValueError("max_length: score 'location' needs the number of positions, got None")
            positive(max_length=max_length)
        self.score, self.local, self.window, self.max_length = score, local, window, max_length
        for name, shape in self._shapes().items():
            self.register_parameter(name, None if shape is None else nn.Parameter(torch.empty(shape)))
        self.reset_parameters()

    def _shapes(self) -> dict[str, tuple[int, ...] | None]:
        q, m, score = self.query_size, self.memory_size, self.score
        predicts = self.local == "p"
        return {
            "query_weight": {"general": (m, q), "concat": (q, q), "location": (self.max_length or 0, q)}.get(score),
            "memory_weight": (q, m) if score == "concat" else None,
            "score_weight": (q,) if score == "concat" else None,
            "position_weight": (q, q) if predicts else None,
            "position_score": (q,) if predicts else None,
        }

    def reset_parameters(self) -> None:
        """Draw the parameters anew, as published."""
        uniform(*self.parameters(), bound=0.1)

    def project_memory(self, memory: Tensor) -> ProjectedMemory:
        """For ``concat`` the memory's half of ``W [h_t; h_s]``; the other scores project the query instead."""
        self._check_memory(memory)
        if self.score == "concat":
            return ProjectedMemory(nn.functional.linear(memory, self.memory_weight), memory)
        return ProjectedMemory(memory, memory)

    def step(
        self, query: Tensor, memory: ProjectedMemory, lengths: Tensor | None = None, *, return_weights: bool = True,
        position: int | None = None,
    ) -> tuple[Tensor, Weights]:  # fmt: skip
        """One step of a decoder; ``local="m"`` needs its number, counted from 0.

        Arguments and results are those of :meth:`MemoryAttention.step`.
        """
        if self.local != "m":
            return super().step(query, memory, lengths, return_weights=return_weights)
        if position is None or position < 0:
            raise ValueError(f"position: a step of local-m needs its number, counted from 0, got {position}")
        if not isinstance(memory, ProjectedMemory):
            raise TypeError(f"memory: step takes what project_memory returns, got {type(memory).__name__}")
        query, memory, single = self._prepare(query, memory)
        tokens = memory.values.shape[1]
        first = min(max(0, position - self.window), tokens)
        near = ProjectedMemory(*(x[:, first : position + self.window + 1] for x in memory))
        last = first + near.keys.shape[1]
        within = None if lengths is None else (lengths - first).clamp(0, last - first)
        context, weights = self._scored(query, near, return_weights, first, key_lengths=within)
        if weights is not None:
            weights = nn.functional.pad(weights, (first, tokens - last))
        return one_row(single, context, weights, return_weights)

    def forward(
        self, query: Tensor, memory: Tensor | ProjectedMemory, lengths: Tensor | None = None, *,
        mask: Tensor | None = None, return_weights: bool | str = True,
    ) -> tuple[Tensor, Weights]:  # fmt: skip
        """Attend to a memory; with ``local="m"`` row t of the query is step t.

        Arguments and results are those of :meth:`MemoryAttention.forward`.
        """
        if self.local == "m" and query.dim() == 2:
            raise ValueError(f"query: local-m expects all steps [B, T_q, {self.query_size}] (or use step), got one")
        return super().forward(query, memory, lengths, mask=mask, return_weights=return_weights)

    def _attend(
        self, query: Tensor, memory: ProjectedMemory, lengths: Tensor | None, mask: Tensor | None, mode: bool | str
    ) -> tuple[Tensor, Weights]:
        options: dict[str, Any] = {"key_lengths": lengths}
        if self.local == "m":
            options["window"] = (self.window, self.window)
        elif self.local == "p":
            center = self._predicted(query, memory.values.shape[1], lengths)
            options["window"], options["window_center"] = (self.window, self.window), center
            options["prior"] = ("gaussian", center, self.window / 2)
        if mask is not None:
            options["mask"] = mask
        return self._scored(query, memory, mode, 0, **options)

    def _predicted(self, query: Tensor, tokens: int, lengths: Tensor | None) -> Tensor:
        """The centre of each row, ``[B, T_q]``, in at least float32: bfloat16 cannot name every position beyond 256."""
        hidden = torch.tanh(nn.functional.linear(query, self.position_weight)).to(real_dtype(query.dtype))
        share = torch.sigmoid((hidden * self.position_score.to(hidden.dtype)).sum(-1))
        return share * (tokens if lengths is None else lengths.unsqueeze(1).to(share.dtype))

    def _scored(
        self, query: Tensor, memory: ProjectedMemory, mode: bool | str, first: int, **options: Any
    ) -> tuple[Tensor, Weights]:
        """Score and sum; `first` is the position of the first key. Options have no head axis."""
        if self.score == "concat":
            query = nn.functional.linear(query, self.query_weight)
            return unpack(
                functional.additive_attention(
                    query, memory.keys, memory.values, self.score_weight, return_weights=mode, **options
                )
            )
        keys = memory.keys
        if self.score == "general":
            query = nn.functional.linear(query, self.query_weight)
        elif self.score == "location":
            keys = location_keys(query, self.query_weight, first, keys.shape[1])
        return with_one_head(query, keys, memory.values, mode, options)

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, score={self.score!r}"
        if self.local is not None:
            text += f", local={self.local!r}, window={self.window}"
        return text if self.max_length is None else f"{text}, max_length={self.max_length}"


class LocationAttention(MemoryAttention):
    r"""Location-base attention (Luong et al. 2015, eq. 8, "location"): the query alone says where to look.

    .. math:: \alpha_t = \mathrm{softmax}(W h_t), \quad c_t = \sum_s \alpha_{ts} h_s

    W has a row for each of `max_length` positions; a shorter memory uses the first T_k rows, of which a sample's own
    length are valid.

    Parameters
    ----------
    query_size, memory_size : int
        Sizes of h_t and h_s.
    max_length : int
        The longest memory.

    Notes
    -----
    W is drawn from the uniform distribution over [-0.1, 0.1], as published (section 4.1). The rows of W are the keys of
    a dot product, shared by the batch: scores are not formed beforehand.

    Examples
    --------
    >>> import torch
    >>> from attnfast.nn import LocationAttention
    >>> attention = LocationAttention(query_size=8, memory_size=6, max_length=20)
    >>> context, weights = attention(torch.randn(2, 8), torch.randn(2, 9, 6))
    >>> context.shape, weights.shape
    (torch.Size([2, 6]), torch.Size([2, 9]))
    """

    def __init__(self, query_size: int, memory_size: int, max_length: int) -> None:
        super().__init__(query_size, memory_size)
        positive(max_length=max_length)
        self.max_length = max_length
        self.query_weight = nn.Parameter(torch.empty(max_length, query_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew, as published."""
        uniform(self.query_weight, bound=0.1)

    def _attend(
        self, query: Tensor, memory: ProjectedMemory, lengths: Tensor | None, mask: Tensor | None, mode: bool | str
    ) -> tuple[Tensor, Weights]:
        keys = location_keys(query, self.query_weight, 0, memory.keys.shape[1])
        return with_one_head(query, keys, memory.values, mode, {"key_lengths": lengths, "mask": mask})

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, max_length={self.max_length}"


def location_keys(query: Tensor, weight: Tensor, first: int, tokens: int) -> Tensor:
    """Rows ``first ... first + tokens`` of W for every sample, a view ``[B, tokens, query_size]``."""
    if first + tokens > weight.shape[0]:
        raise ValueError(f"memory: expected at most max_length = {weight.shape[0]} positions, got {first + tokens}")
    return weight[first : first + tokens].expand(query.shape[0], -1, -1)


def with_one_head(
    query: Tensor, keys: Tensor, values: Tensor, mode: bool | str, options: dict[str, Any]
) -> tuple[Tensor, Weights]:
    """``attnfast.attention`` with the plain dot product on ``[B, T, ...]``."""
    mask, prior, center = options.get("mask"), options.get("prior"), options.get("window_center")
    if isinstance(mask, Tensor) and mask.dim() == 3:
        options["mask"] = mask.unsqueeze(1)
    if isinstance(prior, tuple):
        options["prior"] = (prior[0], prior[1].unsqueeze(1), prior[2])
    if isinstance(center, Tensor):
        options["window_center"] = center.unsqueeze(1)
    heads = (x.unsqueeze(1) for x in (query, keys, values))
    return drop_head(functional.attention(*heads, score="dot", return_weights=mode, **options))
