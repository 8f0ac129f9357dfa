"""examples/small_world.py: every answer is that of a second simulator, which reads the statements as text."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
GOT, DROPPED = {"got", "grabbed", "took", "picked"}, {"dropped", "left", "discarded", "put"}
COUNT = 60
COLUMNS = ("1: actor, no before", "1: actor", "1: actor, object", "5: actor", "5: actor, object")


@pytest.fixture(autouse=True, scope="module")
def examples_on_path() -> Iterator[None]:
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))


def told(setting: str, seed: int = 3, count: int = COUNT, **options: Any) -> list[Any]:
    from small_world import SETTINGS, stories

    return stories(count, *SETTINGS[setting], seed, **options)


def solve(statements: Sequence[Sequence[str]], question: Sequence[str], strict: bool = False) -> str | None:
    """The answer, None where the statements do not give one. With `strict` each statement must be possible."""
    paths: dict[str, list[str]] = {}
    things: dict[str, tuple[str | None, str | None]] = {}  # holder or None, place where nobody holds it
    for actor, verb, *rest in statements:
        path = paths.setdefault(actor, [])
        if rest[-1] != "there":
            assert "to" in rest
            assert not strict or not path or path[-1] != rest[-1], "goes where it is"
            path.append(rest[-1])
            continue
        thing, here = rest[-2], path[-1] if path else None
        holder, place = things.get(thing, (None, None))
        if verb in GOT:
            assert not strict or holder is None, "takes what is held"
            assert not strict or None in (place, here) or place == here, "takes what is elsewhere"
            things[thing] = (actor, None)
        else:
            assert verb in DROPPED
            assert not strict or holder == actor, "drops what it does not hold"
            things[thing] = (None, here)
    if "before" in question:
        path = paths.get(question[2], [])
        at = [i for i, place in enumerate(path) if place == question[-1]]
        return path[at[-1] - 1] if at and at[-1] else None
    if question[2] == "the":
        holder, place = things.get(question[3], (None, None))
        return place if holder is None else (paths.get(holder) or [None])[-1]
    return (paths.get(question[2]) or [None])[-1]


@pytest.mark.parametrize("setting", COLUMNS)
def test_answers_are_those_of_another_simulator(setting: str) -> None:
    for story in told(setting):
        solve(story.statements, ("where", "is", "nobody"), strict=True)
        assert len(story.questions) == 5
        for question in story.questions:
            assert 0 < question.time <= len(story.statements)
            assert solve(story.statements[: question.time], question.words) == question.answer


@pytest.mark.parametrize("setting", COLUMNS)
def test_supporting_statements_are_all_that_is_needed(setting: str) -> None:
    from small_world import ACTOR, OBJECT

    needed = 0
    for story in told(setting):
        for question in story.questions:
            before = story.statements[: question.time]
            assert len(set(question.supports)) == len(question.supports) == (1 if question.kind == ACTOR else 2)
            assert all(0 <= place < question.time for place in question.supports)
            alone = [before[place] for place in sorted(question.supports)]
            assert solve(alone, question.words) == question.answer
            for place in range(question.time):
                less = solve(before[:place] + before[place + 1 :], question.words)
                if place not in question.supports:
                    assert less == question.answer
                elif question.kind != OBJECT and place == question.supports[-1]:
                    # An object may have been there before, and who is in Y may have come there twice from there.
                    assert less != question.answer
                    needed += 1
    assert needed > COUNT


@pytest.mark.parametrize("setting", COLUMNS)
def test_the_limit_holds_and_is_reached(setting: str) -> None:
    from small_world import SETTINGS

    limit, kinds = SETTINGS[setting]
    back = [question.time - question.supports[0] for story in told(setting) for question in story.questions]
    assert min(back) == 1 and max(back) == limit
    assert {question.kind for story in told(setting) for question in story.questions} == set(kinds)
    second = [question.time - question.supports[-1] for story in told(setting) for question in story.questions]
    assert max(second) > limit or len(kinds) == 1, "the second supporting statement has no limit"


def test_kinds_of_questions_ask_for_what_they_say() -> None:
    from small_world import ACTOR, BEFORE, KNOWN, OBJECT

    for story in told("5: actor, object"):
        for question in story.questions:
            name = question.words[3] if question.words[2] == "the" else question.words[2]
            assert (question.kind == OBJECT) == (name in KNOWN.objects)
            assert (question.kind in (ACTOR, BEFORE)) == (name in KNOWN.actors)
            assert (question.kind == BEFORE) == ("before" in question.words)
            assert question.answer in KNOWN.places and question.answer not in question.words


def test_seeds_decide() -> None:
    one, again, other = told("5: actor, object"), told("5: actor, object"), told("5: actor, object", seed=4)
    assert one == again and one != other
    assert one[0] != one[1]


def test_strange_names_are_other_words() -> None:
    from small_world import KNOWN, NUMBERS, STRANGE, VOCABULARY, collate

    assert not set(KNOWN.names) & set(STRANGE.names)
    home, abroad = (collate(told("5: actor, object", cast=cast)) for cast in (KNOWN, STRANGE))
    assert home.story.max() < VOCABULARY and home.question.max() < VOCABULARY and home.sentence.max() < VOCABULARY
    assert abroad.answer.min() >= VOCABULARY
    assert {number for number in abroad.story.unique().tolist() if number >= VOCABULARY} == {
        NUMBERS[name] for name in STRANGE.names
    }


def test_collated_stories_read_as_they_were_told() -> None:
    from small_world import WORDS, collate, write

    stories = told("5: actor, object", count=7)
    data = collate(stories, seed=1)
    row = 0
    for story in stories:
        for question in story.questions:
            lines = [write(words) for words in data.story[row]]
            assert lines[: question.time] == [" ".join(words) for words in story.statements[: question.time]]
            assert not any(lines[question.time :]) and data.lengths[row] == question.time
            assert write(data.question[row]) == " ".join(question.words)
            assert data.supports[row].tolist() == [question.supports[0], question.supports[-1]]
            assert WORDS[int(data.answer[row])] == question.answer
            assert question.answer in write(data.sentence[row]).split()
            row += 1
    assert row == len(data.answer)
    assert len({write(words) for words in data.sentence}) > 5
    few = data.take(torch.tensor([0, 3]))
    assert few.story.shape[1] == int(data.lengths[[0, 3]].max()) < data.story.shape[1]
    assert torch.cat([batch.answer for batch in data.batches(4)]).equal(data.answer)


def test_streams_are_cut_into_statements() -> None:
    """A segmenter whose gains are known: places and "there" end a statement."""
    from memory_models import Segmenter
    from small_world import KNOWN, NUMBERS, collate

    data, model = collate(told("5: actor, object", count=9)), Segmenter(1)
    with torch.no_grad():
        model.network.weight.fill_(1.0)
        model.network.embedding.zero_()
        for word in (*KNOWN.places, "there"):
            model.network.embedding[NUMBERS[word]] = 1.0
    assert model.right(data).all()
    cut = model.segmented(data)
    assert cut.story.shape == data.story.shape and cut.story.equal(data.story) and cut.lengths.equal(data.lengths)
    with torch.no_grad():
        model.network.embedding[NUMBERS["office"]] = 0.0  # the statement goes on to the next end
    wrong = model.right(data)
    goes = torch.tensor([NUMBERS["office"] in row for row in (data.story.flatten(1).tolist())])
    assert wrong.equal(~goes)
    longer = model.segmented(data)
    assert (longer.story != 0).sum().equal((data.story != 0).sum())
    assert (longer.lengths < data.lengths).equal(longer.lengths != data.lengths)


def test_a_memory_network_is_told_the_null_fact_where_one_fact_is_enough() -> None:
    from memory_models import Facts
    from small_world import END, collate

    torch.manual_seed(0)
    data, model = collate(told("5: actor, object", count=4)), Facts(2, True, 4)
    memory, seen = model.remembered(data), []
    assert memory.text.words[:, 0, 0].eq(END).all() and memory.text.words[:, 1:, :].equal(data.story)
    model.network.loss = lambda memory, question, places, answer: seen.append(places) or places.sum()
    model.loss(data)
    (places,) = seen
    single = data.supports[:, 0] == data.supports[:, 1]
    assert single.any() and not single.all()
    assert places[:, 0].equal(data.supports[:, 0] + 1)
    assert places[:, 1].equal((data.supports[:, 1] + 1) * ~single)
