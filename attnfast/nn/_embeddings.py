"""How memory networks turn words into vectors: bags of embeddings, with positions of words if asked for.

Words are integers, and 0 is nil, the padding: it adds nothing, whatever (finite) row 0 of a table holds. The tables
belong to the modules that call.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def bag(words: Tensor, table: Tensor, positions: bool = False) -> Tensor:
    r"""Sum of a sentence's embeddings, ``[..., J]`` words to ``[..., d]``.

    With `positions` the elements of word j are weighted by :math:`l_{kj} = (1 - j / J) - (k / d)(1 - 2 j / J)`, where j
    and k count from 1 and J is the number of the sentence's own words. The weights are a sum of two products, so two
    weighted bags are formed and no ``[J, d]``.
    """
    real = (words != 0).to(table.dtype)
    embedded = nn.functional.embedding(words, table)
    if not positions:
        return torch.einsum("...j,...jd->...d", real, embedded)
    count = real.sum(-1, keepdim=True).clamp(min=1)
    share = torch.arange(1, words.shape[-1] + 1, device=words.device).to(table.dtype) / count
    level = torch.arange(1, table.shape[-1] + 1, device=words.device).to(table.dtype) / table.shape[-1]
    first = torch.einsum("...j,...jd->...d", real * (1 - share), embedded)
    return first - level * torch.einsum("...j,...jd->...d", real * (1 - 2 * share), embedded)


def features(x: Tensor, table: Tensor) -> Tensor:
    """``A phi``: a bag of integers ``[..., J]``, or features ``[..., D]`` as they are, times the rows ``[D, d]``."""
    return x @ table if x.is_floating_point() else bag(x, table)


def check_words(name: str, words: Tensor, pattern: str, dims: int) -> None:
    if not isinstance(words, Tensor) or words.is_floating_point() or words.dtype == torch.bool:
        kind = words.dtype if isinstance(words, Tensor) else type(words).__name__
        raise TypeError(f"{name}: expected integers {pattern}, got {kind}")
    if words.dim() != dims:
        raise ValueError(f"{name}: expected {pattern}, got {list(words.shape)}")
