"""Memory networks of Weston, Chopra and Bordes: O finds supporting facts, R answers, `MemoryNetwork` joins I, G, O, R.

Facts are chosen one after the other and hard, so nothing here is a softmax over the memory: scores are products with
bags of embeddings, and learning is by margins against sampled negatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attnfast.nn._additive import drawn
from attnfast.nn._base import positive
from attnfast.nn._embeddings import check_words
from attnfast.nn._memory_text import ContextBags, Generalization, InputMap, Memory, Text, TextScore


def fact(memory: Memory, place: Tensor) -> Text:
    """The texts ``[B, J]`` in slots ``[B]``."""
    index = place[:, None, None].expand(-1, 1, memory.text.words.shape[2])
    return Text(*(x.gather(1, index).squeeze(1) for x in memory.text))


class OutputMap(nn.Module):
    r"""O: finds k supporting facts in the memory, one given the ones before (Weston et al., sections 3.1 and 3.4).

    .. math:: o_1 = \arg\max_i s_O(x, m_i), \quad o_2 = \arg\max_i s_O([x, m_{o_1}], m_i), \ldots

    With `times`, three 0/1 features say whether x is older than y, x older than y', and y older than y', and

    .. math:: s_{O_t}(x, y, y') = \Phi_x^\top U^\top U (\Phi_y(y) - \Phi_y(y') + \Phi_t(x, y, y'))

    prefers y to y' where it is positive. It need not be antisymmetric, so the facts are found by a tournament: t = 1,
    and for i = 2 ... N, where :math:`s_{O_t}(x, m_t, m_i) < 0`, t = i.

    Parameters
    ----------
    vocabulary, size : int
        W and n.
    supports : int
        k.
    margin : float
        gamma.
    **options
        Of `TextScore`: `contexts`, `matches`, `times`, `mixed`.

    Notes
    -----
    A question is asked after all that was written; where x holds facts, x is as old as the last of them. The paper does
    not say how old such an x is.

    Examples
    --------
    >>> import torch
    >>> from attnfast.nn import Generalization, InputMap, OutputMap
    >>> read, output = InputMap(9), OutputMap(9, 4, supports=2)
    >>> memory = Generalization(slots=3).all_at_once(read(torch.tensor([[[1, 2], [3, 4], [5, 0]]])))
    >>> places, facts = output(read(torch.tensor([[3, 8]])), memory)
    >>> places.shape, facts[0].words.shape
    (torch.Size([1, 2]), torch.Size([1, 2]))
    """

    def __init__(self, vocabulary: int, size: int, *, supports: int = 2, margin: float = 0.1, **options: Any) -> None:
        super().__init__()
        positive(supports=supports)
        self.supports, self.margin = supports, margin
        self.score = TextScore(vocabulary, size, **options)

    def forward(self, question: Text, memory: Memory) -> tuple[Tensor, list[Text]]:
        """Slots ``[B, k]`` (-1 where nothing was written) and the facts there, k texts ``[B, J]``."""
        places: list[Tensor] = []
        facts: list[Text] = []
        written = memory.times >= 0
        for _ in range(self.supports):
            scores, gains, asked = self._scores(question, facts, memory, places)
            if gains is None:
                place = scores.detach().masked_fill(~written, -torch.inf).argmax(-1)
            else:
                place = written.int().argmax(-1)
                for i in range(written.shape[1]):
                    other = torch.full_like(place, i)
                    lost = self._preference(scores, gains, asked, memory, place, other) < 0
                    place = other.where(lost & written[:, i], place)
            places.append(place)
            facts.append(fact(memory, place))
        return torch.stack(places, 1).where(written.any(-1, keepdim=True), -1), facts

    def loss(self, question: Text, memory: Memory, places: Tensor, negatives: Tensor | None = None) -> Tensor:
        """Margin ranking loss of each sample, ``[B]``, given the true slots ``[B, k]``.

        ``relu(gamma - s_O(x, m_o) + s_O(x, f))`` for each hop with one slot f other than o, drawn at random unless
        `negatives` ``[B, k]`` says which; x holds the *true* facts of the hops before. With `times`
        ``relu(gamma - s_Ot(x, m_o, f)) + relu(gamma + s_Ot(x, f, m_o))``. Where nothing but o is written the term is 0.
        """
        total = torch.zeros((), device=places.device)
        facts: list[Text] = []
        for hop in range(self.supports):
            true = places[:, hop]
            others = (memory.times >= 0).scatter(1, true.unsqueeze(1), False)
            if negatives is None:
                some, false = drawn(others.float())
            else:
                some, false = others.sum(-1), negatives[:, hop]
            scores, gains, asked = self._scores(question, facts, memory, [places[:, i] for i in range(hop)])
            if gains is None:
                term = torch.relu(self.margin - pick(scores, true) + pick(scores, false))
            else:
                right = self._preference(scores, gains, asked, memory, true, false)
                wrong = self._preference(scores, gains, asked, memory, false, true)
                term = torch.relu(self.margin - right) + torch.relu(self.margin + wrong)
            total = total + term * (some > 0)
            facts.append(fact(memory, true))
        return total

    def _scores(
        self, question: Text, facts: Sequence[Text], memory: Memory, places: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """s_O of all slots ``[B, N]``, what each time feature adds ``[B, 3]``, and the time of x ``[B]``."""
        scores = self.score(question, facts, memory.text)
        asked = pick(memory.times, places[-1]) if places else memory.times.amax(-1) + 1
        if self.score.times is None:
            return scores, None, asked
        return scores, self.score.asked(question, facts) @ self.score.times.t(), asked

    @staticmethod
    def _preference(scores: Tensor, gains: Tensor, asked: Tensor, memory: Memory, one: Tensor, other: Tensor) -> Tensor:
        """s_Ot of slots ``[B]`` against others ``[B]``."""
        first, second = pick(memory.times, one), pick(memory.times, other)
        features = torch.stack([asked < first, asked < second, first < second], -1).to(gains.dtype)
        return pick(scores, one) - pick(scores, other) + (gains * features).sum(-1)

    def extra_repr(self) -> str:
        return f"supports={self.supports}, margin={self.margin}"


def pick(x: Tensor, place: Tensor) -> Tensor:
    """Element ``place[b]`` of each row of ``[B, N]``."""
    return x.gather(1, place.unsqueeze(1)).squeeze(1)


class Response(nn.Module):
    r"""R: ranks all words as answers, :math:`r = \arg\max_w s_R([x, m_{o_1}, \ldots], w)` (Weston et al., section 3.1).

    Parameters
    ----------
    vocabulary, size : int
        W and n.
    margin : float
        gamma.
    words : int, optional
        How many words are ranked; those from `vocabulary` on, which need `contexts`, by their neighbours. Default:
        `vocabulary`.
    hide : float
        Probability that, in training, a ranked word is taken for one that was never seen, as in `InputMap`.
    **options
        Of `TextScore`: `contexts`, `matches`, `mixed`.

    Examples
    --------
    >>> import torch
    >>> from attnfast.nn import InputMap, Response
    >>> read, response = InputMap(9), Response(9, 4)
    >>> response(read(torch.tensor([[3, 8]])), [read(torch.tensor([[1, 2]]))]).shape
    torch.Size([1, 9])
    """

    def __init__(
        self, vocabulary: int, size: int, *, margin: float = 0.1, words: int | None = None, hide: float = 0.0,
        **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        if vocabulary < 3:
            raise ValueError(f"vocabulary: expected at least two words beside nil, got {vocabulary}")
        self.margin, self.words = margin, vocabulary if words is None else words
        self.score = TextScore(vocabulary, size, **options)
        self.candidates = InputMap(vocabulary, hide)
        contexts = self.score.contexts
        most = vocabulary if contexts is None else contexts.left.shape[0]
        if not vocabulary <= self.words <= most:
            raise ValueError(f"words: expected {vocabulary} <= words <= {most} (those with contexts), got {words}")

    def forward(self, question: Text, facts: Sequence[Text]) -> Tensor:
        """Scores of all words, ``[B, words]``; nil has -inf."""
        words = torch.arange(self.words, device=question.words.device).view(1, -1, 1)
        scores = self.score(question, facts, self.candidates(words))
        return scores.masked_fill(words.view(1, -1) == 0, -torch.inf)

    def loss(self, question: Text, facts: Sequence[Text], answer: Tensor, negatives: Tensor | None = None) -> Tensor:
        """``relu(gamma - s_R(x, r) + s_R(x, r'))`` of each sample, ``[B]``, with one word r' other than r ``[B]``.

        Negatives are drawn from the words that have an embedding.
        """
        if negatives is None:
            count = self.score.vocabulary - 1  # words are 1 ... count
            negatives = 1 + (answer - 1 + torch.randint_like(answer, 1, count)) % count
        scores = self(question, facts)
        return torch.relu(self.margin - pick(scores, answer) + pick(scores, negatives))

    def extra_repr(self) -> str:
        return f"margin={self.margin}, words={self.words}"


class RNNResponse(nn.Module):
    """R as an LSTM that reads the question and the facts and then writes a sentence (Weston et al., section 3.1).

    Parameters
    ----------
    vocabulary, size : int
        Number of words (those beyond are read as nothing) and size of embeddings and state.
    length : int
        How many words `forward` writes at most.
    end : int
        The word that ends a sentence, and that also begins it.

    Notes
    -----
    The paper states no initial values; those of torch's layers stand.

    Examples
    --------
    >>> import torch
    >>> from attnfast.nn import InputMap, RNNResponse
    >>> read, response = InputMap(9), RNNResponse(9, 4, length=5)
    >>> response(read(torch.tensor([[3, 8]])), [read(torch.tensor([[1, 2]]))]).shape
    torch.Size([1, 5])
    """

    def __init__(self, vocabulary: int, size: int, *, length: int = 10, end: int = 1) -> None:
        super().__init__()
        positive(vocabulary=vocabulary, size=size, length=length, end=end)
        self.vocabulary, self.size, self.length, self.end = vocabulary, size, length, end
        self.embedding = nn.Embedding(vocabulary, size, padding_idx=0)
        self.lstm = nn.LSTM(size, size, batch_first=True)
        self.output = nn.Linear(size, vocabulary)

    def read(self, question: Text, facts: Sequence[Text]) -> tuple[Tensor, Tensor]:
        """The state after the last word of question and facts, padding left out."""
        words = torch.cat([text.words * text.known for text in (question, *facts)], -1)
        order = (words == 0).int().argsort(dim=-1, stable=True)
        count = (words != 0).sum(-1).clamp(min=1)
        packed = nn.utils.rnn.pack_padded_sequence(
            self.embedding(words.gather(1, order)), count.cpu(), batch_first=True, enforce_sorted=False
        )
        return self.lstm(packed)[1]

    @torch.no_grad()
    def forward(self, question: Text, facts: Sequence[Text]) -> Tensor:
        """The likeliest word after each other, ``[B, length]``; 0 after the end, which is not written."""
        state, word = self.read(question, facts), torch.full_like(question.words[:, :1], self.end)
        written, going = [], torch.ones_like(word, dtype=torch.bool)
        for _ in range(self.length):
            hidden, state = self.lstm(self.embedding(word), state)
            word = 1 + self.output(hidden)[..., 1:].argmax(-1)
            going = going & (word != self.end)
            written.append(word * going)
        return torch.cat(written, 1)

    def loss(self, question: Text, facts: Sequence[Text], answer: Tensor, negatives: Tensor | None = None) -> Tensor:
        """Cross entropy of each answer ``[B, L]`` (padded with 0) and the end after it, summed over its words: ``[B]``.

        There are no negatives.
        """
        count = (answer != 0).sum(-1, keepdim=True)
        wanted = nn.functional.pad(answer, (0, 1)).scatter(1, count, self.end)
        given = nn.functional.pad(wanted[:, :-1], (1, 0), value=self.end)
        hidden, _ = self.lstm(self.embedding(given), self.read(question, facts))
        logits = self.output(hidden).transpose(1, 2)
        return nn.functional.cross_entropy(logits, wanted, ignore_index=0, reduction="none").sum(-1)

    def extra_repr(self) -> str:
        return f"length={self.length}, end={self.end}"


class MemoryNetworkOutput(NamedTuple):
    """What :class:`MemoryNetwork` returns.

    Attributes
    ----------
    answers : Tensor
        What R made of it: scores of all words ``[B, words]``, or with `RNNResponse` words ``[B, length]``.
    places : Tensor
        The slots of the supporting facts, int64 ``[B, k]``.
    """

    answers: Tensor
    places: Tensor


class MemoryNetwork(nn.Module):
    """Memory network (Weston, Chopra and Bordes, "Memory Networks", 2014) of four parts, each of which may be replaced.

    I turns words into features, G writes them into the memory, O finds k supporting facts for a question, and R answers
    given question and facts; formulas are at the parts. O and R have a U of their own.

    Parameters
    ----------
    vocabulary, size : int
        W and n.
    slots : int
        Of the memory.
    supports : int
        k.
    margin : float
        gamma.
    hide : float
        See `InputMap`.
    contexts : ContextBags, optional
        For words without an embedding; its `observe` is for the caller to call. R ranks words that have an embedding;
        for others too, give it as `response`, with `words` (see `Response`).
    times, matches, mixed
        See `TextScore`; R has no times.
    input_map, generalization, output_map, response : Module, optional
        Parts in place of those that the arguments above describe.

    References
    ----------
    Weston, Chopra and Bordes, "Memory Networks", ICLR 2015 (arXiv 2014).

    Examples
    --------
    >>> import torch
    >>> from attnfast.nn import MemoryNetwork
    >>> network = MemoryNetwork(vocabulary=20, size=8, supports=2, times=True)
    >>> story, question = torch.randint(1, 20, (3, 6, 4)), torch.randint(1, 20, (3, 5))
    >>> answers, places = network(story, question)
    >>> answers.shape, places.shape
    (torch.Size([3, 20]), torch.Size([3, 2]))
    >>> network.loss(story, question, torch.tensor([[0, 1], [2, 5], [3, 0]]), torch.tensor([4, 9, 7])).shape
    torch.Size([])
    """

    def __init__(
        self, vocabulary: int, size: int, *, slots: int = 50, supports: int = 2, margin: float = 0.1, hide: float = 0.0,
        contexts: ContextBags | None = None, times: bool = False, matches: bool = False, mixed: float = 0.0,
        input_map: nn.Module | None = None, generalization: nn.Module | None = None,
        output_map: nn.Module | None = None, response: nn.Module | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        common: dict[str, Any] = {"margin": margin, "contexts": contexts, "matches": matches, "mixed": mixed}
        self.contexts = contexts
        self.input_map: Any = input_map or InputMap(vocabulary, hide)
        self.generalization: Any = generalization or Generalization(slots)
        self.output_map: Any = output_map or OutputMap(vocabulary, size, supports=supports, times=times, **common)
        self.response: Any = response or Response(vocabulary, size, **common)

    def remember(self, story: Tensor, memory: Memory | None = None) -> Memory:
        """The memory with a story ``[B, N, J]`` in it, one sentence after the other; sentences of 0 are none."""
        check_words("story", story, "[B, N, J]", 3)
        text = self.input_map(story)
        if memory is None:
            memory = self.generalization.empty(story.shape[0], story.shape[2], story.device)
        for i in range(story.shape[1]):
            memory = self.generalization(memory, Text(text.words[:, i], text.known[:, i]))
        return memory

    def forward(self, story: Tensor | Memory, question: Tensor) -> MemoryNetworkOutput:
        """Answer questions ``[B, J]`` about stories ``[B, N, J']`` or what :meth:`remember` made of them."""
        check_words("question", question, "[B, J]", 2)
        asked = self.input_map(question)
        places, facts = self.output_map(asked, self._memory(story))
        return MemoryNetworkOutput(self.response(asked, facts), places)

    def loss(self, story: Tensor | Memory, question: Tensor, places: Tensor, answer: Tensor) -> Tensor:
        """The sum over the batch of O's and R's losses, given true slots ``[B, k]`` and answers (R: the *true* facts).

        Negatives are drawn at random; `torch.manual_seed` determines the draw.
        """
        check_words("question", question, "[B, J]", 2)
        check_words("places", places, "[B, k]", 2)
        asked, memory = self.input_map(question), self._memory(story)
        facts = [fact(memory, place) for place in places.unbind(1)]
        found = self.output_map.loss(asked, memory, places)
        return (found + self.response.loss(asked, facts, answer)).sum()

    def _memory(self, story: Tensor | Memory) -> Memory:
        return self.remember(story) if isinstance(story, Tensor) else story
