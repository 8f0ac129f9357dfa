"""Stories of a small simulated world, with questions, answers and the statements that an answer rests on.

The world is that of Weston, Chopra and Bordes (2014, section 5.2 and appendix A), programmed anew ("bAbI-style"): 4
actors go between 5 places and, if there are objects, get and drop 3 of them. Every statement is a random valid action
in words, and every story has 5 questions: "where is X" of an actor or an object, and "where was X before the Y" of an
actor. The difficulty is a limit: the first supporting statement stands at most so many statements before the question.
The second one may lie anywhere before.

A `Story` owns text and events; `collate` turns the questions of stories into tensors, a `Data`. Words are numbers: 0 is
no word, 1 ends a sentence, then come the words of the world, then those that no model is trained on.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

Words = tuple[str, ...]
QUESTIONS = 5  # of a story
ACTOR, BEFORE, OBJECT = "where is the actor", "where was the actor before", "where is the object"
SETTINGS = {  # name of a column: limit, kinds of questions
    "1: actor, no before": (1, (ACTOR,)),
    "1: actor": (1, (ACTOR, BEFORE)),
    "1: actor, object": (1, (ACTOR, BEFORE, OBJECT)),
    "5: actor": (5, (ACTOR, BEFORE)),
    "5: actor, object": (5, (ACTOR, BEFORE, OBJECT)),
}
VERBS = {
    "go": ("went to", "journeyed to", "travelled to", "moved to"),
    "get": ("got", "grabbed", "took", "picked up"),
    "drop": ("dropped", "left", "discarded", "put down"),
}
SENTENCES = ("he is in the {} i believe", "i think he is in the {}", "in the {}", "it must be the {}")


@dataclass(frozen=True)
class Cast:
    actors: Words
    objects: Words
    places: Words

    @property
    def names(self) -> Words:
        return self.actors + self.objects + self.places


KNOWN = Cast(
    ("bill", "fred", "john", "mary"),
    ("apple", "football", "milk"),
    ("bathroom", "bedroom", "garden", "kitchen", "office"),
)
STRANGE = Cast(
    ("bilbo", "frodo", "gollum", "sauron"),
    ("ring", "sword", "torch"),
    ("cave", "forest", "grey-havens", "mount-doom", "shire"),
)
_grammar = {word for verbs in VERBS.values() for verb in verbs for word in verb.split()}
_grammar |= {word for sentence in SENTENCES for word in sentence.split() if word != "{}"}
_grammar |= {"where", "was", "before", "there", *KNOWN.names}
WORDS: Words = ("", ".", *sorted(_grammar), *STRANGE.names)
NUMBERS = {word: number for number, word in enumerate(WORDS)}
END, VOCABULARY = 1, len(WORDS) - len(STRANGE.names)  # the words that models are trained on are those below VOCABULARY


class Event(NamedTuple):
    actor: str
    action: str  # of VERBS
    target: str  # a place or an object


class Question(NamedTuple):
    """Asked after `time` statements; `supports` are the statements it rests on, the one that is found first first."""

    kind: str
    time: int
    words: Words
    answer: str
    supports: tuple[int, ...]


@dataclass
class Story:
    statements: list[Words] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)


class World:
    """Who is where and holds what; `act` is one random valid action of a random actor."""

    def __init__(self, source: random.Random, cast: Cast, objects: bool) -> None:
        self.source, self.cast = source, cast
        self.place = {name: source.choice(cast.places) for name in cast.actors + cast.objects * objects}
        self.holder: dict[str, str | None] = dict.fromkeys(cast.objects * objects)

    def act(self) -> Event:
        actor = self.source.choice(self.cast.actors)
        targets = {"go": [place for place in self.cast.places if place != self.place[actor]]}
        for thing, holder in self.holder.items():
            if holder == actor:
                targets.setdefault("drop", []).append(thing)
            elif holder is None and self.place[thing] == self.place[actor]:
                targets.setdefault("get", []).append(thing)
        action = self.source.choice(list(targets))
        target = self.source.choice(targets[action])
        if action == "go":
            self.place[actor] = target
            self.place |= {thing: target for thing, holder in self.holder.items() if holder == actor}
        else:
            self.holder[target] = actor if action == "get" else None
        return Event(actor, action, target)


def possible(events: Sequence[Event], kind: str, limit: int) -> Iterator[tuple[Words, str, tuple[int, ...]]]:
    """Questions of this kind that can be asked after these events: words, answer, supporting statements."""
    for first in range(len(events) - 1, max(len(events) - limit, 0) - 1, -1):
        event = events[first]
        if (event.action == "go") == (kind == OBJECT):
            continue
        later = events[first + 1 :]
        if kind == OBJECT:
            if all(other.action == "go" or other.target != event.target for other in later):
                # What was dropped stays where it was dropped; what was got goes where its holder goes.
                told = _moves(events if event.action == "get" else events[:first], event.actor)
                if told:
                    yield ("where", "is", "the", event.target), events[told[-1]].target, (first, told[-1])
        elif not _moves(later, event.actor):
            told = _moves(events[:first], event.actor)
            if kind == ACTOR:
                yield ("where", "is", event.actor), event.target, (first,)
            elif told:
                words = ("where", "was", event.actor, "before", "the", event.target)
                yield words, events[told[-1]].target, (first, told[-1])


def _moves(events: Sequence[Event], actor: str) -> list[int]:
    return [i for i, event in enumerate(events) if event.actor == actor and event.action == "go"]


def tell(
    source: random.Random, limit: int, kinds: Sequence[str], cast: Cast = KNOWN, questions: int = QUESTIONS
) -> Story:
    """One story: a question after every 1 to 3 statements, later where no question of the kind drawn is possible."""
    world, story = World(source, cast, OBJECT in kinds), Story()

    def state() -> None:
        event = world.act()
        verb = source.choice(VERBS[event.action]).split()
        story.events.append(event)
        # With "there", what stands beside an object is not what stands beside a place: unseen ones can be told apart.
        story.statements.append((event.actor, *verb, "the", event.target, *["there"] * (event.action != "go")))

    while len(story.questions) < questions:
        for _ in range(source.randint(1, 3)):
            state()
        kind = source.choice(kinds)
        while not (found := list(possible(story.events, kind, limit))):
            state()
            kind = source.choice(kinds)
        words, answer, supports = source.choice(found)
        story.questions.append(Question(kind, len(story.events), words, answer, supports))
    return story


def stories(count: int, limit: int, kinds: Sequence[str], seed: int, cast: Cast = KNOWN) -> list[Story]:
    """So many stories; the seed determines them."""
    source = random.Random(seed)
    return [tell(source, limit, kinds, cast) for _ in range(count)]


class Data(NamedTuple):
    """Q questions, each with the part of its story that comes before it.

    story ``[Q, N, J]`` and question ``[Q, J_q]`` are words, 0 where there is none; lengths ``[Q]`` says how many
    statements there are, supports ``[Q, 2]`` which to find (a question that rests on one statement names it twice),
    answer ``[Q]`` the word, sentence ``[Q, L]`` a sentence with that word.
    """

    story: Tensor
    lengths: Tensor
    question: Tensor
    supports: Tensor
    answer: Tensor
    sentence: Tensor

    def take(self, index: Tensor) -> Data:
        """These questions, without statements that none of them has."""
        chosen = Data(*(x[index] for x in self))
        return chosen._replace(story=chosen.story[:, : int(chosen.lengths.max())])

    def batches(self, size: int) -> Iterator[Data]:
        for index in torch.arange(self.answer.shape[0]).split(size):
            yield self.take(index)


def collate(told: Sequence[Story], seed: int = 0) -> Data:
    """All questions of stories; `seed` chooses the forms of the sentences that answer."""
    source = random.Random(seed)
    rows = [(story.statements[: question.time], question) for story in told for question in story.questions]
    count, longest = max(len(story) for story, _ in rows), max(len(words) for story, _ in rows for words in story)
    texts = torch.zeros(len(rows), count, longest, dtype=torch.int64)
    for row, (statements, _) in zip(texts, rows):
        for line, words in zip(row, statements):
            line[: len(words)] = torch.tensor(numbers(words))
    asked = [question for _, question in rows]
    return Data(
        texts,
        torch.tensor([len(story) for story, _ in rows]),
        padded([numbers(question.words) for question in asked]),
        torch.tensor([(question.supports[0], question.supports[-1]) for question in asked]),
        torch.tensor([NUMBERS[question.answer] for question in asked]),
        padded([numbers(source.choice(SENTENCES).format(question.answer).split()) for question in asked]),
    )


def numbers(words: Sequence[str]) -> list[int]:
    return [NUMBERS[word] for word in words]


def write(words: Tensor) -> str:
    """The text of a row of numbers."""
    return " ".join(WORDS[number] for number in words.tolist() if number)


def padded(rows: Sequence[Sequence[int]]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
