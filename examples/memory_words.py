"""Part ``words`` of examples/memory_qa.py: streams of words, answers in sentences, and words that were never seen.

Weston, Chopra and Bordes (2014), sections 3.1 (R as an LSTM), 3.2 (input without sentence boundaries), 3.5 (words
without an embedding are known by their neighbours) and 3.6 (exact matches).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from memory_models import Facts, Segmenter, accuracy, draw_bars, drawn, learn, splits
from small_world import ACTOR, KNOWN, OBJECT, SENTENCES, SETTINGS, STRANGE, Cast, write
from training import Experiment

HARDEST = SETTINGS["5: actor, object"]
# Not "before": of two unseen places, one in the question and one in a fact, bags of neighbours know no difference.
WHERE = (5, (ACTOR, OBJECT))
CASTS = {
    "all known": KNOWN,
    "new actors": Cast(STRANGE.actors, KNOWN.objects, KNOWN.places),
    "new objects": Cast(KNOWN.actors, STRANGE.objects, KNOWN.places),
    "new places": Cast(KNOWN.actors, KNOWN.objects, STRANGE.places),
    "all new": STRANGE,
}


@dataclass(frozen=True)
class Sizes:
    stories: int
    test: int
    batch: int
    size: int
    steps: int
    writing: int  # steps of the LSTM that answers
    cutting: int  # steps of the segmenter


FULL = Sizes(stories=600, test=600, batch=32, size=50, steps=4000, writing=3000, cutting=1000)
QUICK = Sizes(stories=4, test=4, batch=4, size=4, steps=3, writing=3, cutting=3)
UNSEEN: dict[str, dict[str, Any]] = {
    "unseen words are nothing": {},
    "neighbours": {"contexts": True, "hide": 0.2},
    "neighbours, exact matches": {"contexts": True, "hide": 0.2, "mixed": 0.3},
}


def words(run: Experiment) -> None:
    sizes = QUICK if run.options.quick else FULL
    run.text(f"Memory networks of two facts with time; {sizes.stories} stories of 5 questions for training,"
             f" {sizes.test} others for the test.")  # fmt: skip
    streams(run, sizes)
    unseen(run, sizes)
    if run.options.backend == "reference":
        run.text("No function of attnfast stands in these models, so both backends do the same.")


def streams(run: Experiment, sizes: Sizes) -> None:
    """Sentences or streams in, words or sentences out."""
    data, held, test = splits(run, HARDEST, sizes.stories, sizes.test)
    steps = run.options.steps or sizes.steps
    ranking = run.build("ranking", lambda: Facts(2, True, sizes.size))
    learn(run, "ranking", ranking, data, held, sizes.batch, steps, 1e-2, 100.0)
    cutting = run.build("segmenter", lambda: Segmenter(sizes.size))
    learn(run, "segmenter", cutting, data, held, sizes.batch, run.options.steps or sizes.cutting, 1e-2, 100.0)
    writing = run.build("writing", lambda: Facts(2, True, sizes.size, writes=True))
    learn(run, "writing", writing, data, held, sizes.batch, run.options.steps or sizes.writing, 5e-3, 20.0)

    cut = cutting.segmented(test)
    found = f"{100 * accuracy(cutting, test):.2f}"
    with torch.no_grad():
        written = torch.cat([writing.read(batch)[0] for batch in test.batches(500)])
    forms = {form.format(write(word.view(1))) for form in SENTENCES for word in test.answer.unique()}
    shaped = [write(row) in forms for row in written]
    rows = [
        ("sentences in, a word out", 100 * accuracy(ranking, test), "-", "-"),
        ("stream of words in, a word out", 100 * accuracy(ranking, cut), found, "-"),
        ("sentences in, a sentence out", 100 * accuracy(writing, test), "-", f"{100 * sum(shaped) / len(shaped):.2f}"),
        ("stream of words in, a sentence out", 100 * accuracy(writing, cut), found, "-"),
    ]
    run.table("Difficulty 5, actor and object: what goes in and what comes out",
              ("model", "right answers, %", "stories cut rightly, %", "sentences of the grammar, %"), rows)  # fmt: skip
    said = [
        f"{write(test.question[i])}? {write(written[i])}." for i in range(0, len(written), max(1, len(written) // 5))
    ]
    run.text("Answers of the LSTM: " + " ".join(said[:5]))


def unseen(run: Experiment, sizes: Sizes) -> None:
    """Names in the test that training does not have."""
    data, held, _ = splits(run, WHERE, sizes.stories, sizes.test)
    tests = {name: drawn(run, WHERE, "test", sizes.test, cast) for name, cast in CASTS.items()}
    results: dict[str, list[float]] = {}
    for name, options in UNSEEN.items():
        model = run.build(name, partial(Facts, 2, True, sizes.size, **options))
        if options:
            model.observe(data)
        learn(run, name.replace(",", ""), model, data, held, sizes.batch, run.options.steps or sizes.steps, 1e-2, 100.0)
        if options:  # a reader sees what stands beside a new word when the word first comes
            for test in tests.values():
                model.observe(test)
        results[name] = [100 * accuracy(model, test) for test in tests.values()]
    run.table("Difficulty 5, where an actor or an object is: right answers, %, with names that training does not have",
              ("model", *CASTS), [(name, *row) for name, row in results.items()])  # fmt: skip
    draw_bars(run, "unseen", list(CASTS), results, "Right answers to where somebody or something is, by which of the"
              " names training does not have.")  # fmt: skip
