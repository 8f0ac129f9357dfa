"""End-to-end memory networks (MemN2N): several soft reads of a story, each a call of ``attnfast.attention``."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from attnfast import functional
from attnfast.nn._base import drop_head, positive
from attnfast.nn._embeddings import bag, check_words

TYINGS = ("adjacent", "layerwise")


class EndToEndMemoryOutput(NamedTuple):
    """What :class:`EndToEndMemory` returns.

    Attributes
    ----------
    answers : Tensor
        Logits of the answer, ``[B, answers]``.
    weights : Tensor
        What each hop attended to, ``[B, hops, N]``; in a linear start the scores themselves.
    """

    answers: Tensor
    weights: Tensor


class EndToEndMemory(nn.Module):
    r"""End-to-end memory network of Sukhbaatar, Szlam, Weston and Fergus (NeurIPS 2015).

    .. math::
        m_i &= \sum_j l_j \odot A x_{ij} + T_A(i), \quad c_i = \sum_j l_j \odot C x_{ij} + T_C(i), \quad
        u^1 = \sum_j l_j \odot B q_j \\
        p^k &= \mathrm{softmax}(m\,u^k), \quad o^k = \sum_i p^k_i c_i, \quad
        u^{k+1} = u^k + o^k \; (\text{layerwise: } H u^k + o^k), \quad \mathrm{logits} = W u^{K+1}

    for sentences :math:`x_i` of words :math:`x_{ij}` and a question q (sections 2 and 4.1). :math:`l_j` is the position
    encoding :math:`l_{kj} = (1 - j / J) - (k / d)(1 - 2 j / J)` of a sentence with J words, or 1. T holds a row for
    each age of a sentence; row 0 is the newest.

    Parameters
    ----------
    vocabulary : int
        Number of words, word 0 (nil, the padding) included.
    size : int
        d; the paper has 20, or 50 for all tasks jointly.
    hops : int
        K, how often the memory is read.
    slots : int
        How many sentences the memory holds; of a longer story the newest are read.
    tying : {"adjacent", "layerwise"}
        ``adjacent``: :math:`A^{k+1} = C^k`, :math:`B = A^1`, :math:`W^\top = C^K`, and the rows of T likewise.
        ``layerwise``: one A and one C for all hops; B, H and W of their own.
    answers : int, optional
        For ``layerwise``: how many answers W knows. Default (and always for ``adjacent``): the vocabulary.
    position_encoding, temporal_encoding : bool
        Whether l and T are there.
    noise : float
        In training mode up to this share of empty memories is put between the sentences, which moves their ages (random
        noise, section 4.1). `torch.manual_seed` determines the draw.
    mask_padding : bool
        Whether sentences beyond a story's length are hidden. In the paper's program they are not: their vectors are
        zero, and they take part of the softmax.

    Attributes
    ----------
    linear_start : bool
        While True, the hops have no softmax (section 4.1): the paper trains so until the validation loss stops falling,
        and then with softmax. False when made.

    Notes
    -----
    All parameters are drawn from N(0, 0.1^2), as published (section 4.2), and row 0 of a table of words is zero. The
    paper minimises the *summed* cross entropy of a batch by plain gradient descent and divides gradients whose norm
    exceeds 40. J is the sentence's own length, as the paper writes; its program takes the longest sentence's, and
    weights of another form.

    References
    ----------
    Sukhbaatar et al., "End-To-End Memory Networks", NeurIPS 2015.

    Examples
    --------
    >>> import torch
    >>> from attnfast.nn import EndToEndMemory
    >>> model = EndToEndMemory(vocabulary=30, size=20, hops=3)
    >>> story, question = torch.randint(1, 30, (4, 10, 6)), torch.randint(1, 30, (4, 5))
    >>> answers, weights = model(story, question, torch.tensor([10, 7, 3, 1]))
    >>> answers.shape, weights.shape
    (torch.Size([4, 30]), torch.Size([4, 3, 10]))
    """

    def __init__(
        self, vocabulary: int, size: int = 20, *, hops: int = 3, slots: int = 50, tying: str = "adjacent",
        answers: int | None = None, position_encoding: bool = True, temporal_encoding: bool = True, noise: float = 0.1,
        mask_padding: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        positive(vocabulary=vocabulary, size=size, hops=hops, slots=slots)
        if tying not in TYINGS:
            raise ValueError(f"tying: expected one of {', '.join(map(repr, TYINGS))}, got {tying!r}")
        if answers is not None:
            positive(answers=answers)
            if tying == "adjacent" and answers != vocabulary:
                raise ValueError(f"answers: W is a table of words when adjacent, expected {vocabulary}, got {answers}")
        if not 0.0 <= noise <= 1.0:
            raise ValueError(f"noise: expected a share in [0, 1], got {noise}")
        self.vocabulary, self.size, self.hops, self.slots, self.tying = vocabulary, size, hops, slots, tying
        self.position_encoding, self.temporal_encoding = position_encoding, temporal_encoding
        self.noise, self.mask_padding, self.linear_start = noise, mask_padding, False
        tables = hops + 1 if tying == "adjacent" else 3  # layerwise: A, C, B
        self.words = nn.Parameter(torch.empty(tables, vocabulary, size))
        ages = (hops + 1 if tying == "adjacent" else 2, slots, size)
        self.ages = nn.Parameter(torch.empty(ages)) if temporal_encoding else None
        layered = tying == "layerwise"
        self.carry = nn.Parameter(torch.empty(size, size)) if layered else None
        self.readout = nn.Parameter(torch.empty(answers or vocabulary, size)) if layered else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew, as published."""
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.1)
        with torch.no_grad():
            self.words[:, 0] = 0

    def forward(self, story: Tensor, question: Tensor, lengths: Tensor | None = None) -> EndToEndMemoryOutput:
        """Answer a question about a story.

        Parameters
        ----------
        story : Tensor
            Integers ``[B, N, J]``: N sentences, the oldest first, of up to J words; words and sentences that are not
            there are 0 and stand at the end.
        question : Tensor
            Integers ``[B, J_q]``.
        lengths : Tensor, optional
            Integer ``[B]``, 0 <= length <= N: how many sentences each story has. Default: N.

        Returns
        -------
        EndToEndMemoryOutput
            answers ``[B, answers]`` and weights ``[B, hops, N]``; of a story longer than `slots` the weights are those
            of the `slots` sentences that were read.
        """
        check_words("story", story, "[B, N, J]", 3)
        check_words("question", question, "[B, J_q]", 2)
        if question.shape[0] != story.shape[0]:
            raise ValueError(f"question: expected B = {story.shape[0]} (the story's), got {question.shape[0]}")
        if lengths is None:
            lengths = story.new_full((story.shape[0],), story.shape[1])
        elif lengths.shape != story.shape[:1]:
            raise ValueError(f"lengths: expected [B] = [{story.shape[0]}], got {list(lengths.shape)}")
        story, lengths = self._newest(story, lengths)
        present = torch.arange(story.shape[1], device=story.device) < lengths.unsqueeze(1)
        story = story * present.unsqueeze(-1)
        ages = self._ages(lengths, story.shape[1]) if self.temporal_encoding else None
        adjacent = self.tying == "adjacent"
        state = bag(question, self.words[0 if adjacent else 2], self.position_encoding)
        memories = [self._memory(story, ages, present, table) for table in range(self.hops + 1 if adjacent else 2)]
        found = []
        for hop in range(self.hops):
            keys, values = memories[hop : hop + 2] if adjacent else memories
            read, weights = drop_head(
                functional.attention(
                    state[:, None, None], keys.unsqueeze(1), values.unsqueeze(1), score="dot",
                    normalizer="none" if self.linear_start else "softmax",
                    key_lengths=lengths if self.mask_padding else None, return_weights=True,
                )
            )  # fmt: skip
            found.append(weights)
            kept = state if self.carry is None else nn.functional.linear(state, self.carry)
            state = kept + read.squeeze(1)
        logits = nn.functional.linear(state, self.words[-1] if self.readout is None else self.readout)
        return EndToEndMemoryOutput(logits, torch.cat(found, 1))  # type: ignore[arg-type]

    def _newest(self, story: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """The last `slots` sentences of each story."""
        if story.shape[1] <= self.slots:
            return story, lengths
        first = (lengths - self.slots).clamp(min=0)
        index = first.unsqueeze(1) + torch.arange(self.slots, device=story.device)
        return story.gather(1, index.unsqueeze(-1).expand(-1, -1, story.shape[2])), lengths.clamp(max=self.slots)

    def _ages(self, lengths: Tensor, count: int) -> Tensor:
        """The row of T of each sentence, ``[B, N]``: 0 for the newest, in training with gaps."""
        back = lengths.unsqueeze(1) - 1 - torch.arange(count, device=lengths.device)  # how many are newer
        back = back.clamp(min=0)
        if not (self.training and self.noise):
            return back
        # n ages among n + gaps: the n first of a random order, sorted. Those beyond the rows of T share its last.
        most = count + math.ceil(self.noise * count)
        draws = torch.rand(lengths.shape[0], most + 1, device=lengths.device)
        gaps = (draws[:, 0] * (self.noise * lengths).ceil()).long().clamp(max=most - count)
        place = torch.arange(most, device=lengths.device)
        order = draws[:, 1:].masked_fill(place >= (lengths + gaps).unsqueeze(1), 2.0).argsort(1).argsort(1)
        chosen = place.expand_as(order).masked_fill(order >= lengths.unsqueeze(1), most).sort(1).values
        return chosen.gather(1, back).clamp(max=self.slots - 1)

    def _memory(self, story: Tensor, ages: Tensor | None, present: Tensor, table: int) -> Tensor:
        """m or c of a table, ``[B, N, d]``; zero where there is no sentence."""
        vectors = bag(story, self.words[table], self.position_encoding)
        if ages is None or self.ages is None:
            return vectors
        return vectors + nn.functional.embedding(ages, self.ages[table]) * present.unsqueeze(-1)

    def extra_repr(self) -> str:
        text = f"vocabulary={self.vocabulary}, size={self.size}, hops={self.hops}, slots={self.slots}"
        text += f", tying={self.tying!r}, position_encoding={self.position_encoding}"
        return f"{text}, temporal_encoding={self.temporal_encoding}, noise={self.noise}"
