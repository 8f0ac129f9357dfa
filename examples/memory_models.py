"""Models that answer questions about stories, for examples/memory_qa.py, and how they learn.

Each has `loss` and `answers` of a `small_world.Data`; `learn` trains any of them, with the stories that `drawn`
returns. Memory networks are told the supporting statements in training; all others learn from answers alone. Words are
the numbers of `small_world`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from small_world import END, KNOWN, VOCABULARY, WORDS, Cast, Data, collate, numbers, stories
from torch import Tensor, nn
from training import Experiment, Trained, one_cycle

from attnfast.nn import (
    ContextBags,
    EndToEndMemory,
    KeyValueMemory,
    Memory,
    MemoryNetwork,
    Response,
    RNNResponse,
    WordSegmenter,
)

cross_entropy = nn.functional.cross_entropy
Setting = tuple[int, tuple[str, ...]]  # limit and kinds of questions, as in small_world.SETTINGS


class Model(nn.Module):
    """What `learn` and `accuracy` ask of a model."""

    def loss(self, data: Data) -> Tensor:
        raise NotImplementedError

    def answers(self, data: Data) -> Tensor:
        """A word for each question, ``[Q]``."""
        raise NotImplementedError

    def right(self, data: Data) -> Tensor:
        return self.answers(data) == data.answer


class Facts(Model):
    """A memory network: k supporting facts, each chosen given the ones before, then an answer.

    The paper does not say what the second fact is where one is enough. Here the first slot holds a lone full stop,
    which is then to be found: the null fact of Weston et al., "Towards AI-Complete Question Answering" (2015, section
    4). With `contexts` words without an embedding are known by their neighbours and can be answers; `hide` is the share
    of words that training takes for such. With `writes` R is an LSTM that writes a sentence, not a ranking of words.
    """

    def __init__(
        self, supports: int, times: bool, size: int, *, contexts: bool = False, hide: float = 0.0, mixed: float = 0.0,
        writes: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.supports = supports
        bags = ContextBags(VOCABULARY, len(WORDS)) if contexts else None
        response: nn.Module | None = None
        if writes:
            response = RNNResponse(VOCABULARY, size, length=8, end=END)
        elif bags is not None:
            response = Response(VOCABULARY, size, contexts=bags, mixed=mixed, hide=hide, words=len(WORDS))
        self.network = MemoryNetwork(VOCABULARY, size, supports=supports, times=times, contexts=bags, hide=hide,
                                     mixed=mixed, response=response)  # fmt: skip

    def observe(self, data: Data) -> None:
        """Remember which words stood beside which."""
        assert self.network.contexts is not None
        for texts in (data.story, data.question):
            self.network.contexts.observe(texts)

    def remembered(self, data: Data) -> Memory:
        """Null fact and story; they fit into the memory, so they are written at once."""
        null = torch.zeros_like(data.story[:, :1])
        null[..., 0] = END
        return self.network.generalization.all_at_once(self.network.input_map(torch.cat([null, data.story], 1)))

    def loss(self, data: Data) -> Tensor:
        target = data.sentence if isinstance(self.network.response, RNNResponse) else data.answer
        first, second = data.supports.unbind(1)
        places = torch.stack([first + 1, (second + 1).where(first != second, 0)], 1)[:, : self.supports]
        return self.network.loss(self.remembered(data), data.question, places, target) / len(target)

    def read(self, data: Data) -> tuple[Tensor, Tensor]:
        """What R makes of each question, and the statements that O found, -1 for the null fact."""
        answers, places = self.network(self.remembered(data), data.question)
        return answers, places - 1

    def answers(self, data: Data) -> Tensor:
        """Of a sentence: the place that it names, where it names one alone, else 0."""
        found = self.read(data)[0]
        if not isinstance(self.network.response, RNNResponse):
            return found.argmax(-1)
        named = found * torch.isin(found, torch.tensor(numbers(KNOWN.places)))
        return named.amax(1) * ((named != 0).sum(1) == 1)


class Recurrent(Model):
    """An RNN or LSTM that reads the story word by word, then the question, and answers from its last state."""

    def __init__(self, kind: str, size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, size, padding_idx=0)
        self.reader = {"RNN": nn.RNN, "LSTM": nn.LSTM}[kind](size, size, batch_first=True)
        self.answer = nn.Linear(size, VOCABULARY)

    def forward(self, data: Data) -> Tensor:
        words = torch.cat([data.story.flatten(1), data.question], 1)
        order = (words == 0).int().argsort(dim=1, stable=True)  # words first, in their order
        count = (words != 0).sum(1)
        states, _ = self.reader(self.embedding(words.gather(1, order)[:, : int(count.max())]))
        return self.answer(states[torch.arange(len(count)), count - 1])

    def loss(self, data: Data) -> Tensor:
        return cross_entropy(self(data), data.answer)

    def answers(self, data: Data) -> Tensor:
        return self(data).argmax(-1)


class EndToEnd(Model):
    """MemN2N."""

    def __init__(self, size: int, **options: Any) -> None:
        super().__init__()
        self.network = EndToEndMemory(VOCABULARY, size, **options)

    def forward(self, data: Data) -> tuple[Tensor, Tensor]:
        """Logits of the answers, and what each hop attended to."""
        return self.network(data.story, data.question, data.lengths)

    def loss(self, data: Data) -> Tensor:
        return cross_entropy(self(data)[0], data.answer)

    def answers(self, data: Data) -> Tensor:
        return self(data)[0].argmax(-1)


class KeyValue(Model):
    """A key-value memory: a key is a statement's words and a word for its age, the value its words."""

    def __init__(self, size: int, hops: int, ages: int) -> None:
        super().__init__()
        self.ages = ages
        self.network = KeyValueMemory(VOCABULARY + ages, size, hops=hops, tied=False)

    def forward(self, data: Data) -> tuple[Tensor, Tensor]:
        back = data.lengths.unsqueeze(1) - 1 - torch.arange(data.story.shape[1])
        age = VOCABULARY + back.clamp(0, self.ages - 1)
        keys = torch.cat([data.story, age.unsqueeze(-1)], -1)
        candidates = torch.arange(1, VOCABULARY).unsqueeze(1)
        _, weights, scores = self.network(data.question, keys, data.story, data.lengths, candidates=candidates)
        return scores, weights

    def loss(self, data: Data) -> Tensor:
        return cross_entropy(self(data)[0], data.answer - 1)

    def answers(self, data: Data) -> Tensor:
        return 1 + self(data)[0].argmax(-1)


class Segmenter(Model):
    """Cuts stories that come as one stream of words into statements; learns from statements and their beginnings."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.network = WordSegmenter(VOCABULARY, size)

    def loss(self, data: Data) -> Tensor:
        whole = data.story.flatten(0, 1)
        whole = whole[whole[:, 0] != 0]
        last = (whole != 0).sum(1, keepdim=True) - 1
        cut = (torch.rand(last.shape) * last).long() + 1  # 1 to all but one of the words
        begun = whole * (torch.arange(whole.shape[1]) < cut)
        return self.network.loss(whole, begun) / len(whole)

    def right(self, data: Data) -> Tensor:
        """Whether each story is cut where its statements end and nowhere else."""
        _, ends = self.ends(data)
        last = (data.story != 0).sum(-1).cumsum(1) - 1
        return (ends == torch.zeros_like(ends).scatter(1, last, True)).all(1)

    def ends(self, data: Data) -> tuple[Tensor, Tensor]:
        """Each story as one row of words, ``[Q, T]``, and the words after which the segmenter cuts."""
        words = data.story.flatten(1)
        words = words.gather(1, (words == 0).int().argsort(dim=1, stable=True))
        return words, self.network(words)

    def segmented(self, data: Data) -> Data:
        """The same questions, with what the segmenter makes of the stream; what is left at the end is a statement."""
        words, ends = self.ends(data)
        number = ends.long().cumsum(1) - ends.long()
        real = words != 0
        first = torch.ones_like(real)
        first[:, 1:] = number[:, 1:] != number[:, :-1]
        place = torch.arange(words.shape[1]).expand_as(words)
        within = place - (place * first).cummax(1).values
        story = words.new_zeros(len(words), int(number[real].max()) + 1, int(within[real].max()) + 1)
        row = torch.arange(len(words)).unsqueeze(1).expand_as(words)
        story[row[real], number[real], within[real]] = words[real]
        return data._replace(story=story, lengths=(story != 0).any(-1).sum(1))


def drawn(run: Experiment, setting: Setting, use: str, count: int, cast: Cast = KNOWN) -> Data:
    """All questions of stories for one use, the same for all models."""
    seed = int(run.generator("stories", setting, use, cast.names).initial_seed())
    return collate(stories(count, *setting, seed, cast), seed)


def splits(run: Experiment, setting: Setting, train: int, test: int) -> tuple[Data, Data, Data]:
    """Questions for training, for validation (of a quarter as many stories as the test has), and for the test."""
    data, held, last = (
        drawn(run, setting, use, count)
        for use, count in (("train", train), ("held out", max(1, test // 4)), ("test", test))
    )
    return data, held, last


def some(run: Experiment, data: Data, step: int, size: int) -> Data:
    """The questions of one step."""
    return data.take(torch.randint(len(data.answer), (size,), generator=run.generator("batch", step)))


def accuracy(model: Model, data: Data) -> float:
    with torch.no_grad():
        right = [model.right(batch) for batch in data.batches(500)]
    return torch.cat(right).float().mean().item()


def learn(
    run: Experiment, label: str, model: Model, data: Data, held: Data, batch: int, steps: int, rate: float, clip: float,
    linear: int = 0,
) -> Trained:  # fmt: skip
    """Train with Adam; the best of some validations is kept. For the first `linear` steps MemN2N has no softmax."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    schedule = one_cycle(optimizer, rate, steps, 0.05)

    def loss_of(step: int) -> Tensor:
        if isinstance(model, EndToEnd):
            model.network.linear_start = step < linear
        return model.loss(some(run, data, step, batch))

    def validation() -> float:
        linearly = isinstance(model, EndToEnd) and model.network.linear_start
        return math.inf if linearly else 1 - accuracy(model, held)

    trained = run.train(label, model, loss_of, steps, optimizer, schedule=schedule, clip=clip, validate=validation,
                        validate_every=max(1, steps // 8), save_every=max(1, steps // 4))  # fmt: skip
    if isinstance(model, EndToEnd):
        model.network.linear_start = False
    return trained


def draw_bars(
    run: Experiment, name: str, columns: Sequence[str], results: Mapping[str, Sequence[float]], caption: str
) -> None:
    """Shares of right answers in %, a group of bars for each column and in it one for each model."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8.5, 4), layout="constrained")
    width = 0.8 / len(results)
    for number, (model, row) in enumerate(results.items()):
        axes.bar([x + (number - (len(results) - 1) / 2) * width for x in range(len(row))], row, width, label=model)
    axes.set_xticks(range(len(columns)), [column.replace(": ", "\n") for column in columns])
    axes.set_ylabel("right answers, %")
    axes.set_ylim(0, 125)  # room for the legend
    axes.legend(fontsize=7, ncols=4, loc="upper left")
    run.figure(name, figure, caption)
