"""Part ``scale`` of examples/memory_qa.py: questions to a memory of many statements, with and without hashing.

The large-scale setting of Weston, Chopra and Bordes (2014, sections 3.3 and 5.1), with statements of our own: "<first
name> <last name> <relation> <thing>". Every name and relation is one of two words, in a statement and in a question
drawn independently, so that some questions share no name with their answer; that the two words mean the same is learnt,
by a `TextScore`, from pairs. The embedded statements are the keys of a `MemoryStore`; a question is answered by the
slot of the best score among all slots, among those that share a name with it (`WordIndex`), or among those in the
clusters of keys nearest to it (`ClusterIndex`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from training import Experiment, one_cycle

import attnfast
from attnfast.memory import ClusterIndex, MemoryStore, WordIndex
from attnfast.nn import InputMap, TextScore

Lists = tuple[Tensor, Tensor]
SECOND = 0.2  # how often the second of two words of one meaning stands


@dataclass(frozen=True)
class Sizes:
    """Numbers of first and last names, relations and things; the memory; training; clusters and how many are probed."""

    firsts: int
    lasts: int
    relations: int
    things: int
    memories: tuple[int, ...]
    size: int
    steps: int
    questions: int
    clusters: int
    probes: int


FULL = Sizes(firsts=250, lasts=250, relations=20, things=1000, memories=(1_000, 10_000, 100_000, 1_000_000), size=64,
             steps=10_000, questions=200, clusters=1000, probes=16)  # fmt: skip
QUICK = Sizes(firsts=8, lasts=8, relations=4, things=10, memories=(50, 200), size=8, steps=3, questions=10, clusters=8,
              probes=2)  # fmt: skip


class Facts(NamedTuple):
    """n facts, by number: first and last name, relation and thing, ``[n]`` each."""

    first: Tensor
    last: Tensor
    relation: Tensor
    thing: Tensor

    def take(self, index: Tensor) -> Facts:
        return Facts(*(x[index] for x in self))


class Language:
    """Words for facts: nil, names (two words each), relations of statements, relations of questions, things."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.relations = 1 + 2 * (sizes.firsts + sizes.lasts)  # words below are names
        self.vocabulary = self.relations + 4 * sizes.relations + sizes.things

    def _names(self, facts: Facts, generator: torch.Generator) -> list[Tensor]:
        first, last = 1 + 2 * facts.first, 1 + 2 * (self.sizes.firsts + facts.last)
        return [word + self._form(word, generator) for word in (first, last)]

    def _form(self, word: Tensor, generator: torch.Generator) -> Tensor:
        return (torch.rand(word.shape, generator=generator) < SECOND).long()

    def statements(self, facts: Facts, generator: torch.Generator) -> Tensor:
        """``[n, 4]``."""
        relation = self.relations + 2 * facts.relation
        relation = relation + self._form(relation, generator)
        thing = self.relations + 4 * self.sizes.relations + facts.thing
        return torch.stack([*self._names(facts, generator), relation, thing], 1)

    def questions(self, facts: Facts, generator: torch.Generator) -> Tensor:
        """``[n, 3]``; relations have other words than in statements."""
        relation = self.relations + 2 * self.sizes.relations + 2 * facts.relation
        return torch.stack([*self._names(facts, generator), relation + self._form(relation, generator)], 1)


def world(sizes: Sizes, count: int, generator: torch.Generator) -> Facts:
    """So many facts, no two of them of one person and relation."""
    people = sizes.firsts * sizes.lasts
    number = torch.randperm(people * sizes.relations, generator=generator)[:count]
    thing = torch.randint(sizes.things, (count,), generator=generator)
    person = number % people
    return Facts(person % sizes.firsts, person // sizes.firsts, number // people, thing)


class Matcher(torch.nn.Module):
    """A `TextScore` of question and statement, with margins against the other statements of a batch."""

    def __init__(self, language: Language, margin: float = 1.0) -> None:
        super().__init__()
        self.language, self.margin = language, margin
        self.read = InputMap(language.vocabulary)
        self.score = TextScore(language.vocabulary, language.sizes.size)

    def loss(self, generator: torch.Generator) -> Tensor:
        """Of all facts about some people and relations: a question's wrong statements differ in one part or more."""
        sizes, chosen = self.language.sizes, []
        for count in (sizes.firsts, sizes.lasts, sizes.relations):
            chosen.append(torch.randperm(count, generator=generator)[:6])
        first, last, relation = (x.flatten() for x in torch.meshgrid(*chosen, indexing="ij"))
        facts = Facts(first, last, relation, torch.randint(sizes.things, first.shape, generator=generator))
        asked = self.read(self.language.questions(facts, generator))
        stored = self.read(self.language.statements(facts, generator).unsqueeze(0))
        scores = self.score(asked, [], stored)
        gaps = torch.relu(self.margin - scores.diagonal().unsqueeze(1) + scores)
        return (gaps.square().sum(1) - self.margin**2).mean()  # each question's own statement has a gap of the margin


@dataclass(frozen=True)
class Read:
    """Of one way to find candidates in one memory: how many, milliseconds a question, share of right answers."""

    candidates: float
    index_ms: float
    read_ms: float
    right: float


def scale(run: Experiment) -> None:
    sizes = QUICK if run.options.quick else FULL
    most = run.options.statements or sizes.memories[-1]
    if not 0 < most <= sizes.firsts * sizes.lasts * sizes.relations:
        raise ValueError(f"--statements: expected at most one for each person and relation, got {most}")
    language = Language(sizes)
    model = run.build("matcher", lambda: Matcher(language))
    steps = run.options.steps or sizes.steps
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = one_cycle(optimizer, 1e-2, steps, 0.05)
    trained = run.train("matcher", model, lambda step: model.loss(run.generator("pairs", step)), steps, optimizer,
                        schedule=schedule, save_every=max(1, steps // 4))  # fmt: skip
    run.text(f"{language.vocabulary} words; embeddings of {sizes.size} numbers, learnt in {steps} steps,"
             f" {trained.seconds / 60:.1f} minutes, last loss {trained.loss:.4f}. One of two words of a name stands"
             f" with probability {1 - SECOND} and {SECOND}. {sizes.questions} questions, one at a time.")  # fmt: skip
    results: dict[str, dict[int, Read]] = {}
    for count in sorted({min(count, most) for count in sizes.memories} | {most}):
        answered(run, sizes, model, count, results, last=count == most)
    rows = [
        (name, f"{count:,}", f"{read.candidates:,.0f}", read.index_ms, read.read_ms, 100 * read.right)
        for name, reads in results.items() for count, read in reads.items()
    ]  # fmt: skip
    columns = ("candidates", "statements", "scored a question", "finding them, ms", "reading, ms", "right answers, %")
    run.table("Questions to a memory", columns, rows)
    draw(run, results)


def answered(
    run: Experiment, sizes: Sizes, model: Matcher, count: int, results: dict[str, dict[int, Read]], last: bool
) -> None:
    """Fill a memory with `count` statements, index it, and ask."""
    language, generator = model.language, run.generator("world", count)
    facts = world(sizes, count, generator)
    statements = language.statements(facts, generator)
    wanted = torch.randint(count, (sizes.questions,), generator=generator)
    questions = language.questions(facts.take(wanted), generator)
    with torch.no_grad():
        keys = torch.cat([model.score.stored(model.read(part)) for part in statements.split(100_000)])
        asked = model.score.asked(model.read(questions), [])
    store = MemoryStore(count, sizes.size, 1)
    numbers = torch.arange(count).float().unsqueeze(1)  # the value of a statement is its number: float32 holds it
    begin = time.perf_counter()
    clusters = ClusterIndex(store, min(sizes.clusters, max(2, count // 50)), min(sizes.probes, max(2, count // 50)),
                            seed=run.options.seed)  # fmt: skip
    slots = [store.write(keys[:100_000], numbers[:100_000])]
    clusters.fit()  # on a sample; what comes later goes to the nearest cluster
    if count > 100_000:
        slots.append(store.write(keys[100_000:], numbers[100_000:]))
        clusters.add(slots[-1])
    clustered = time.perf_counter() - begin
    place = torch.cat(slots)
    begin = time.perf_counter()
    named = WordIndex(store)
    # Names alone: a bucket of a relation would hold one statement in every few dozen.
    named.add(place, (2 * torch.arange(count + 1), statements[:, :2].flatten()))
    hashed = time.perf_counter() - begin
    ways: dict[str, Callable[[int], Lists | None]] = {
        "all": lambda i: None,
        "share a name": lambda i: named.candidates([questions[i, :2].tolist()]),
        "near clusters": lambda i: clusters.candidates(asked[i : i + 1]),
    }
    for name, find in ways.items():
        results.setdefault(name, {})[count] = ask(store, asked, wanted, find)
    if last:
        run.text(f"Filling the largest memory and its clusters took {clustered:.1f} s, its word index {hashed:.1f} s.")
        if run.options.backend == "reference":
            compared(run, store, asked, named.candidates(questions[:, :2].tolist()))


def ask(store: MemoryStore, asked: Tensor, right: Tensor, find: Callable[[int], Lists | None]) -> Read:
    """Each question by itself; the first is asked twice and not counted the first time."""
    found, scored, indexing, reading = [], 0, 0.0, 0.0
    for number in range(-1, len(asked)):
        i = max(number, 0)
        start = time.perf_counter()
        lists = find(i)
        middle = time.perf_counter()
        read = store.read(asked[i : i + 1], 1, candidates=lists, count=False)
        end = time.perf_counter()
        if number >= 0:
            assert isinstance(read, Tensor)
            found.append(int(read))
            scored += len(store) if lists is None else len(lists[1])
            indexing, reading = indexing + middle - start, reading + end - middle
    n = len(asked)
    return Read(scored / n, 1e3 * indexing / n, 1e3 * reading / n, sum(map(int.__eq__, found, right.tolist())) / n)


def compared(run: Experiment, store: MemoryStore, asked: Tensor, lists: Lists) -> None:
    """The reads themselves on both backends, all questions in one call."""
    offsets, slots = lists
    few = asked[: min(len(asked), 20)]
    part = (offsets[: len(few) + 1], slots[: int(offsets[len(few)])])
    for title, candidates in (("all", None), ("share a name", part)):

        def read(candidates: Lists | None = candidates) -> None:
            attnfast.memory_read(few, store.keys, store.values, topk=1, candidates=candidates)

        run.compare(f"Reading {len(few)} questions, candidates: {title}", read)


def draw(run: Experiment, results: dict[str, dict[int, Read]]) -> None:
    """Candidates, time and accuracy against the number of statements."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    for name, reads in results.items():
        values = list(reads.values())
        columns = ([read.candidates for read in values], [read.index_ms + read.read_ms for read in values],
                   [100 * read.right for read in values])  # fmt: skip
        for axes, column in zip(panels, columns):
            axes.plot(list(reads), column, marker="o", markersize=3, label=name)
    for axes, title in zip(panels, ("statements scored a question", "ms a question", "right answers, %")):
        axes.set_xscale("log")
        axes.set_xlabel("statements in the memory")
        axes.set_title(title, fontsize=9)
    for axes in panels[:2]:
        axes.set_yscale("log")
    panels[2].set_ylim(0, 105)
    panels[0].legend(fontsize=7)
    run.figure("scale", figure, "What a question costs and how often its answer is right, by size of the memory; time"
               " is that of finding candidates and of reading.")  # fmt: skip
