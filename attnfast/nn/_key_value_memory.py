"""Key-value memory networks: hops over pairs of key and value, each read a call of ``attnfast.attention``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from attnfast import functional
from attnfast.nn._base import drop_head, positive
from attnfast.nn._embeddings import features


class KeyValueMemoryOutput(NamedTuple):
    """What :class:`KeyValueMemory` returns.

    Attributes
    ----------
    state : Tensor
        The query after the last hop, ``[B, size]``.
    weights : Tensor
        What each hop attended to, ``[B, hops, N]``.
    scores : Tensor or None
        Of each candidate, ``[B, candidates]``; their softmax is the answer's distribution.
    """

    state: Tensor
    weights: Tensor
    scores: Tensor | None


class KeyValueMemory(nn.Module):
    r"""Key-value memory network of Miller et al. (EMNLP 2016, section 3.1).

    .. math::
        q_1 = A \Phi_X(x), \quad p_i = \mathrm{softmax}_i(q_j^\top A \Phi_K(k_i)), \quad
        o = \sum_i p_i A \Phi_V(v_i), \quad q_{j+1} = R_j (q_j + o), \quad s_y = q_{H+1}^\top B \Phi_Y(y)

    for a question x, pairs of key k and value v, hops j = 1 ... H and candidate answers y.

    Parameters
    ----------
    features : int
        D, the size of the feature maps :math:`\Phi`; for bags of words the vocabulary, word 0 (nil, the padding)
        included.
    size : int
        d, the size of an embedding.
    hops : int
        H.
    tied : bool
        Whether B is A, as the paper allows.

    Notes
    -----
    The paper states no initial values. All parameters are drawn from N(0, 0.1^2), as in the end-to-end memory networks
    that these extend, and row 0 of A and B is zero. Keys are embedded once for all hops. Key hashing, the choice of the
    pairs that a question is compared with, comes before this module.

    References
    ----------
    Miller et al., "Key-Value Memory Networks for Directly Reading Documents", EMNLP 2016.

    Examples
    --------
    >>> import torch
    >>> from attnfast.nn import KeyValueMemory
    >>> model = KeyValueMemory(features=30, size=20, hops=2)
    >>> question, keys, values = torch.randint(30, (4, 5)), torch.randint(30, (4, 9, 3)), torch.randint(30, (4, 9, 1))
    >>> state, weights, scores = model(question, keys, values, candidates=torch.arange(1, 30).unsqueeze(1))
    >>> state.shape, weights.shape, scores.shape
    (torch.Size([4, 20]), torch.Size([4, 2, 9]), torch.Size([4, 29]))
    """

    def __init__(self, features: int, size: int, *, hops: int = 2, tied: bool = True) -> None:
        super().__init__()
        positive(features=features, size=size, hops=hops)
        self.features, self.size, self.hops = features, size, hops
        self.embedding = nn.Parameter(torch.empty(features, size))
        self.answer_embedding = None if tied else nn.Parameter(torch.empty(features, size))
        self.hop_weight = nn.Parameter(torch.empty(hops, size, size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew."""
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.1)
        with torch.no_grad():
            for table in (self.embedding, self.answer_embedding):
                if table is not None:
                    table[0] = 0

    def forward(
        self, question: Tensor, keys: Tensor, values: Tensor, lengths: Tensor | None = None, *,
        mask: Tensor | None = None, candidates: Tensor | None = None,
    ) -> KeyValueMemoryOutput:  # fmt: skip
        """Read the memory and score the candidates.

        Parameters
        ----------
        question : Tensor
            Words ``[B, J]``, integers (0 is none), or features ``[B, D]``, floating.
        keys, values : Tensor
            Words ``[B, N, J_k]`` and ``[B, N, J_v]`` or features ``[B, N, D]``, each either.
        lengths : Tensor, optional
            Integer ``[B]``: how many pairs of each memory are there. Default: all.
        mask : Tensor, optional
            Boolean ``[B, N]``, True = may be read. A question that may read nothing reads 0.
        candidates : Tensor, optional
            Words ``[C, J_y]`` or ``[B, C, J_y]`` or features ``[C, D]`` or ``[B, C, D]``.

        Returns
        -------
        KeyValueMemoryOutput
            state ``[B, size]``, weights ``[B, hops, N]``, scores ``[B, C]`` or None.
        """
        given: dict[str, tuple[Tensor, tuple[int, ...]]]
        given = {"question": (question, (2,)), "keys": (keys, (3,)), "values": (values, (3,))}
        if candidates is not None:
            given["candidates"] = (candidates, (2, 3))
        for name, (x, dims) in given.items():
            self._check(name, x, dims, question.shape[0])
        if keys.shape[1] != values.shape[1]:
            raise ValueError(f"values: expected N = {keys.shape[1]} (the keys'), got {values.shape[1]}")
        state, memory, contents = (features(x, self.embedding) for x in (question, keys, values))
        found = []
        for hop in range(self.hops):
            read, weights = drop_head(
                functional.attention(
                    state[:, None, None], memory.unsqueeze(1), contents.unsqueeze(1), score="dot", key_lengths=lengths,
                    mask=None if mask is None else mask[:, None, None], return_weights=True,
                )
            )  # fmt: skip
            found.append(weights)
            state = nn.functional.linear(state + read.squeeze(1), self.hop_weight[hop])
        scores = None
        if candidates is not None:
            answers = features(candidates, self.embedding if self.answer_embedding is None else self.answer_embedding)
            scores = (answers @ state.unsqueeze(-1)).squeeze(-1) if answers.dim() == 3 else state @ answers.t()
        return KeyValueMemoryOutput(state, torch.cat(found, 1), scores)  # type: ignore[arg-type]

    def _check(self, name: str, x: Tensor, dims: tuple[int, ...], batch: int) -> None:
        if x.dim() not in dims:
            raise ValueError(f"{name}: expected {' or '.join(map(str, dims))} dimensions, got {list(x.shape)}")
        if x.is_floating_point() and x.shape[-1] != self.features:
            raise ValueError(f"{name}: expected features [..., D] of D = {self.features}, got {list(x.shape)}")
        if x.dtype == torch.bool or x.is_complex():
            raise TypeError(f"{name}: expected words (integers) or features (floating), got {x.dtype}")
        if x.dim() == max(dims) and x.shape[0] != batch:
            raise ValueError(f"{name}: expected B = {batch} (the question's), got {x.shape[0]}")

    def extra_repr(self) -> str:
        tied = self.answer_embedding is None
        return f"features={self.features}, size={self.size}, hops={self.hops}, tied={tied}"
