"""What memory networks know of texts: which words are known, what a memory holds, how a pair of texts is scored.

A text is a row of integers, 0 being nil, the padding. `Text` and `Memory` belong to the caller; the modules hold the
embedding matrix U by blocks of its columns, and `ContextBags` the company that words keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from attnfast.nn._base import positive
from attnfast.nn._embeddings import bag, check_words


class Text(NamedTuple):
    """A text as I, the input map, leaves it.

    Attributes
    ----------
    words : Tensor
        Integers ``[..., J]``; 0 is none.
    known : Tensor
        Boolean ``[..., J]``: whether a word has an embedding of its own, or is known by its context only.
    """

    words: Tensor
    known: Tensor


class Memory(NamedTuple):
    """What G, the generalisation, keeps.

    Attributes
    ----------
    text : Text
        ``[B, N, J]``.
    times : Tensor
        int64 ``[B, N]``: when each slot was written, counted from 0; -1 where nothing was.
    """

    text: Text
    times: Tensor


class InputMap(nn.Module):
    """I: words to features. Words from `vocabulary` on have no embedding; in training others are hidden at random.

    Parameters
    ----------
    vocabulary : int
        Number of words with an embedding, word 0 (nil) included.
    hide : float
        Probability that, in training, a word is taken for one that was never seen (Weston et al., section 3.5).

    Examples
    --------
    >>> import torch
    >>> from attnfast.nn import InputMap
    >>> InputMap(vocabulary=10)(torch.tensor([[3, 12, 0]])).known
    tensor([[ True, False, False]])
    """

    def __init__(self, vocabulary: int, hide: float = 0.0) -> None:
        super().__init__()
        positive(vocabulary=vocabulary)
        if not 0.0 <= hide <= 1.0:
            raise ValueError(f"hide: expected a probability in [0, 1], got {hide}")
        self.vocabulary, self.hide = vocabulary, hide

    def forward(self, words: Tensor) -> Text:
        """``[..., J]`` integers to a `Text`."""
        check_words("words", words, "[..., J]", words.dim() if isinstance(words, Tensor) else 1)
        known = (words > 0) & (words < self.vocabulary)
        if self.training and self.hide:
            known = known & (torch.rand(words.shape, device=words.device) >= self.hide)
        return Text(words, known)

    def extra_repr(self) -> str:
        return f"vocabulary={self.vocabulary}, hide={self.hide}"


class Generalization(nn.Module):
    """G: writes a text into the next slot; when all are taken, over the oldest.

    Examples
    --------
    >>> import torch
    >>> from attnfast.nn import Generalization, InputMap
    >>> read, write = InputMap(10), Generalization(slots=2)
    >>> memory = write.empty(batch=1, words=3)
    >>> for sentence in ([1, 2, 0], [3, 4, 5], [6, 7, 8]):
    ...     memory = write(memory, read(torch.tensor([sentence])))
    >>> memory.text.words.tolist(), memory.times.tolist()
    ([[[6, 7, 8], [3, 4, 5]]], [[2, 1]])
    """

    def __init__(self, slots: int) -> None:
        super().__init__()
        positive(slots=slots)
        self.slots = slots

    def empty(self, batch: int, words: int, device: torch.device | None = None) -> Memory:
        """A memory for texts of up to `words` words with nothing in it."""
        nothing = torch.zeros(batch, self.slots, words, dtype=torch.int64, device=device)
        return Memory(Text(nothing, nothing > 0), torch.full((batch, self.slots), -1, device=device))

    def forward(self, memory: Memory, text: Text) -> Memory:
        """A new memory with `text` ``[B, J]`` in it; a text without words is not written."""
        time = memory.times.amax(-1) + 1
        place = memory.times.argmin(-1).unsqueeze(-1)  # -1 comes first, and the first of them
        here = torch.arange(self.slots, device=place.device) == place
        here = here & (text.words != 0).any(-1, keepdim=True)
        old, new = memory.text, [x.unsqueeze(1) for x in text]
        kept = Text(*(torch.where(here.unsqueeze(-1), b, a) for a, b in zip(old, new, strict=True)))
        return Memory(kept, torch.where(here, time.unsqueeze(-1), memory.times))

    def all_at_once(self, story: Text) -> Memory:
        """What one text after the other, ``[B, N, J]`` with N <= slots, would leave; empty ones at the end."""
        times = torch.arange(story.words.shape[1], device=story.words.device)
        return Memory(story, times.expand(story.words.shape[:2]).where((story.words != 0).any(-1), -1))

    def extra_repr(self) -> str:
        return f"slots={self.slots}"


class ContextBags(nn.Module):
    """Which words stood to the left and to the right of each word (Weston et al., section 3.5).

    Parameters
    ----------
    vocabulary : int
        Number of words with an embedding; only these are company.
    words : int
        Number of words in all, those without an embedding included.

    Examples
    --------
    >>> import torch
    >>> from attnfast.nn import ContextBags
    >>> bags = ContextBags(vocabulary=4, words=6)
    >>> bags.observe(torch.tensor([[1, 5, 3]]))
    >>> bags.left[5].tolist(), bags.right[5].tolist()
    ([0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0])
    """

    left: Tensor
    right: Tensor

    def __init__(self, vocabulary: int, words: int) -> None:
        super().__init__()
        positive(vocabulary=vocabulary, words=words)
        if words < vocabulary:
            raise ValueError(f"words: expected at least vocabulary = {vocabulary}, got {words}")
        self.register_buffer("left", torch.zeros(words, vocabulary))
        self.register_buffer("right", torch.zeros(words, vocabulary))

    @torch.no_grad()
    def observe(self, texts: Tensor) -> None:
        """Remember who stood beside whom in texts ``[..., J]``."""
        first, second = texts[..., :-1].reshape(-1), texts[..., 1:].reshape(-1)
        both, vocabulary = (first != 0) & (second != 0), self.left.shape[1]
        before, after = both & (first < vocabulary), both & (second < vocabulary)
        self.left[second[before], first[before]] = 1
        self.right[first[after], second[after]] = 1


class TextScore(nn.Module):
    r"""The score of two texts in a memory network (Weston, Chopra and Bordes 2014, eq. 7), with U by blocks.

    .. math:: s(x, y) = \Phi_x(x)^\top U^\top U \Phi_y(y) + \lambda \Phi(x)^\top \Phi(y)

    with bags of words: one block of U for y, one for the question in x, one for the supporting facts in x (3 W
    columns). Words without an embedding have the bags of their left and right neighbours in two further blocks (5 W);
    `matches` adds to :math:`\Phi_y` the words of y that occur in the question, the first supporting fact, or a later
    one (8 W). `times` adds three columns for when things were written (section 3.4).

    Parameters
    ----------
    vocabulary, size : int
        W and n: U is ``n x D``.
    contexts : ContextBags, optional
        The neighbours of words; without it, a word without an embedding adds nothing.
    matches, times : bool
        Whether these blocks are there.
    mixed : float
        :math:`\lambda`: how much each pair of equal words in x and y adds by itself.

    Notes
    -----
    The paper states no initial values: U is drawn from N(0, 0.1^2). Nor does it say how the 3 W matching columns are
    divided; here by where a word of y occurs.

    Examples
    --------
    >>> import torch
    >>> from attnfast.nn import InputMap, TextScore
    >>> read, score = InputMap(9), TextScore(9, 4)
    >>> question, facts = read(torch.tensor([[1, 2]])), read(torch.tensor([[[3, 4], [5, 0], [6, 7]]]))
    >>> score(question, [], facts).shape
    torch.Size([1, 3])
    """

    def __init__(
        self, vocabulary: int, size: int, *, contexts: ContextBags | None = None, matches: bool = False,
        times: bool = False, mixed: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        positive(vocabulary=vocabulary, size=size)
        self.vocabulary, self.size, self.mixed = vocabulary, size, mixed
        self.contexts = contexts
        self.words = nn.Parameter(torch.empty(3, vocabulary, size))  # of y, of the question, of supporting facts
        self.neighbours = nn.Parameter(torch.empty(2, vocabulary, size)) if contexts is not None else None
        self.matches = nn.Parameter(torch.empty(3, vocabulary, size)) if matches else None
        self.times = nn.Parameter(torch.empty(3, size)) if times else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw U anew."""
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.1)

    def asked(self, question: Text, supports: Sequence[Text]) -> Tensor:
        r""":math:`U \Phi_x` of a question ``[B, J]`` and supporting facts ``[B, J']``: ``[B, n]``."""
        total = self._bag(question, 1)
        for fact in supports:
            total = total + self._bag(fact, 2)
        return total

    def stored(self, texts: Text) -> Tensor:
        r""":math:`U \Phi_y` of texts ``[..., J]`` without what depends on a question: ``[..., n]``.

        Without `matches` and `mixed` its product with :meth:`asked` is the score, so these are keys for a memory of
        many texts (:class:`attnfast.memory.MemoryStore`).
        """
        return self._bag(texts, 0)

    def forward(self, question: Text, supports: Sequence[Text], texts: Text) -> Tensor:
        """Scores ``[B, C]`` of texts ``[B, C, J]`` or, the same for all, ``[1, C, J]``."""
        vectors = self.stored(texts)
        if self.matches is not None:
            sources = [question, *supports]
            for number, source in enumerate(sources):
                seen = texts.words * self._equal(texts.words, source.words).any(-1) * texts.known
                vectors = vectors + bag(seen, self.matches[min(number, 2)])
        scores = (vectors @ self.asked(question, supports).unsqueeze(-1)).squeeze(-1)
        if self.mixed:
            for source in (question, *supports):
                scores = scores + self.mixed * self._equal(texts.words, source.words).sum((-2, -1)).to(scores.dtype)
        return scores

    def _bag(self, text: Text, block: int) -> Tensor:
        total = bag(text.words * text.known, self.words[block])
        if self.contexts is not None and self.neighbours is not None:
            sides = (self.contexts.left, self.contexts.right)
            table = sum(side.to(total.dtype) @ block for side, block in zip(sides, self.neighbours, strict=True))
            total = total + bag(text.words * ~text.known, table)
        return total

    @staticmethod
    def _equal(texts: Tensor, source: Tensor) -> Tensor:
        """Which words of ``[B or 1, C, J]`` and ``[B, J']`` are the same, ``[B, C, J, J']``."""
        return (texts.unsqueeze(-1) == source[:, None, None]) & (texts != 0).unsqueeze(-1)

    def extra_repr(self) -> str:
        flags = f"matches={self.matches is not None}, times={self.times is not None}, mixed={self.mixed}"
        return f"vocabulary={self.vocabulary}, size={self.size}, {flags}"


class WordSegmenter(nn.Module):
    r"""Cuts a stream of words into the texts that are written (Weston et al., section 3.2).

    .. math:: seg(c) = W_{seg}^\top U_S \Phi_{seg}(c)

    of the words c since the last cut; where it exceeds gamma, the text ends.

    Parameters
    ----------
    vocabulary, size : int
        W and n.
    threshold : float
        gamma, also the margin of the loss.

    Notes
    -----
    The paper states no initial values: both matrices are drawn from N(0, 0.1^2).

    Examples
    --------
    >>> import torch
    >>> from attnfast.nn import WordSegmenter
    >>> segmenter = WordSegmenter(vocabulary=9, size=4)
    >>> segmenter(torch.tensor([[1, 2, 3, 0]])).shape
    torch.Size([1, 4])
    """

    def __init__(self, vocabulary: int, size: int, threshold: float = 0.1) -> None:
        super().__init__()
        positive(vocabulary=vocabulary, size=size)
        self.vocabulary, self.size, self.threshold = vocabulary, size, threshold
        self.embedding = nn.Parameter(torch.empty(vocabulary, size))
        self.weight = nn.Parameter(torch.empty(size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew."""
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.1)

    def score(self, texts: Tensor) -> Tensor:
        """seg of texts ``[..., J]``."""
        return bag(texts, self.embedding) @ self.weight

    @torch.no_grad()
    def forward(self, words: Tensor) -> Tensor:
        """Whether a text ends with each word of ``[B, T]``, boolean ``[B, T]``."""
        check_words("words", words, "[B, T]", 2)
        gains = (self.embedding @ self.weight)[words] * (words != 0)
        total, ends = gains.new_zeros(words.shape[0]), []
        for t in range(words.shape[1]):
            total = total + gains[:, t]
            end = (total > self.threshold) & (words[:, t] != 0)
            ends.append(end)
            total = total.masked_fill(end, 0.0)
        return torch.stack(ends, 1) if ends else words != 0

    def loss(self, segments: Tensor, others: Tensor) -> Tensor:
        """Margin loss: segments ``[F, J]`` shall score over gamma, other runs of words ``[F', J]`` below -gamma."""
        margin = self.threshold
        return torch.relu(margin - self.score(segments)).sum() + torch.relu(margin + self.score(others)).sum()

    def extra_repr(self) -> str:
        return f"vocabulary={self.vocabulary}, size={self.size}, threshold={self.threshold}"
