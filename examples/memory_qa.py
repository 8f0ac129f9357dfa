"""Questions about stories of a small world: memory networks against RNN and LSTM, and a memory of a million statements.

Parts: ``world`` is the shape of the simulated-world table of Weston, Chopra and Bordes (2014), with memory networks of
one and two supporting facts; ``memn2n`` has soft reads, which learn from answers alone (Sukhbaatar et al. 2015; Miller
et al. 2016); ``words`` has input without sentence boundaries, words that were never seen and answers in sentences;
``scale`` looks answers up among many statements with and without hashing. Stories come from `small_world`.

    python examples/memory_qa.py --part world
    python examples/memory_qa.py --part scale --statements 100000
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from memory_models import EndToEnd, Facts, KeyValue, Model, Recurrent, accuracy, draw_bars, learn, some, splits
from memory_scale import scale
from memory_words import words
from small_world import SETTINGS, Data, write
from training import Experiment, parser


@dataclass(frozen=True)
class Sizes:
    """Stories for training (each has 5 questions) and test, and how each kind of model learns."""

    stories: int
    test: int
    batch: int
    facts: tuple[int, int]  # size of embeddings, steps of training
    recurrent: tuple[int, int]
    soft: tuple[int, int]


FULL = Sizes(stories=600, test=600, batch=32, facts=(50, 4000), recurrent=(100, 1800), soft=(20, 4000))
QUICK = Sizes(stories=4, test=4, batch=4, facts=(4, 3), recurrent=(4, 3), soft=(4, 4))
AGES = 50  # slots of MemN2N, and how many ages of a statement the key-value memory tells apart
HARDEST = "5: actor, object"

WORLD: dict[str, Callable[[Sizes], Model]] = {
    "RNN": lambda sizes: Recurrent("RNN", sizes.recurrent[0]),
    "LSTM": lambda sizes: Recurrent("LSTM", sizes.recurrent[0]),
    "MemNN k=1": lambda sizes: Facts(1, False, sizes.facts[0]),
    "MemNN k=1 +time": lambda sizes: Facts(1, True, sizes.facts[0]),
    "MemNN k=2": lambda sizes: Facts(2, False, sizes.facts[0]),
    "MemNN k=2 +time": lambda sizes: Facts(2, True, sizes.facts[0]),
}


@dataclass(frozen=True)
class Soft:
    """A row of the MemN2N table."""

    hops: int
    positions: bool = False
    linear_start: bool = False
    noise: float = 0.0

    def make(self, size: int) -> EndToEnd:
        return EndToEnd(size, hops=self.hops, slots=AGES, position_encoding=self.positions, noise=self.noise)


SOFT = {
    "MemN2N 1 hop": Soft(1),
    "MemN2N 2 hops": Soft(2),
    "MemN2N 3 hops": Soft(3),
    "MemN2N 3 hops PE": Soft(3, True),
    "MemN2N 3 hops PE LS": Soft(3, True, True),
    "MemN2N 3 hops PE LS RN": Soft(3, True, True, 0.1),
}


def world(run: Experiment, sizes: Sizes) -> None:
    run.text(f"Training: {sizes.stories} stories of 5 questions for each column; test: {sizes.test} others. A column is"
             " the difficulty (how many statements before the question the first supporting one is at most) and what is"
             " asked. Memory networks are told the supporting statements in training, RNN and LSTM answers alone."
             f" Stories are the scripts' own, in the manner of the paper's; seed {run.options.seed}.")  # fmt: skip
    results: dict[str, list[float]] = {name: [] for name in WORLD}
    minutes = dict.fromkeys(WORLD, 0.0)
    for setting in SETTINGS:
        data, held, test = splits(run, SETTINGS[setting], sizes.stories, sizes.test)
        for name, make in WORLD.items():
            label = f"{name} {setting}".replace(":", "").replace(",", "")
            model = run.build(label, partial(make, sizes))
            recurrent = isinstance(model, Recurrent)
            steps = run.options.steps or (sizes.recurrent if recurrent else sizes.facts)[1]
            rate, clip = ((3e-3 if name == "LSTM" else 1e-3), 5.0) if recurrent else (1e-2, 100.0)
            trained = learn(run, label, model, data, held, sizes.batch, steps, rate, clip)
            results[name].append(100 * accuracy(model, test))
            minutes[name] += trained.seconds / 60
    run.table("Answers of test questions that are right, %, by difficulty and kind of question",
              ("model", *SETTINGS, "minutes"),
              [(name, *row, f"{minutes[name]:.1f}") for name, row in results.items()])  # fmt: skip
    draw_bars(run, "difficulty", list(SETTINGS), results, "Right answers by difficulty (the number) and kind of"
              " question. The harder ones need two facts and the time at which they were written.")  # fmt: skip
    if run.options.backend == "reference":
        run.text("Facts are chosen one by one and hard, by products of small bags: no function of attnfast stands in"
                 " these models, so both backends do the same. See the parts memn2n and scale.")  # fmt: skip


def memn2n(run: Experiment, sizes: Sizes) -> None:
    settings = ("1: actor, object", HARDEST)
    run.text(f"Training: {sizes.stories} stories of 5 questions for each column; test: {sizes.test} others. PE:"
             " positions of words; LS: linear start, a quarter of the steps without softmax; RN: gaps in the"
             " ages of statements. No model is told which statements support an answer.")  # fmt: skip
    names = [*SOFT, "key-value 2 hops"]
    results: dict[str, list[float]] = {name: [] for name in names}
    minutes = dict.fromkeys(names, 0.0)
    size, steps = sizes.soft[0], run.options.steps or sizes.soft[1]
    for setting in settings:
        data, held, test = splits(run, SETTINGS[setting], sizes.stories, sizes.test)
        for name in names:
            label = f"{name} {setting}".replace(":", "").replace(",", "")
            row = SOFT.get(name)
            make: Callable[[], Model] = partial(KeyValue, size, 2, AGES) if row is None else partial(row.make, size)
            model = run.build(label, make)
            linear = steps // 4 if row is not None and row.linear_start else 0
            trained = learn(run, label, model, data, held, sizes.batch, steps, 1e-2, 40.0, linear)
            results[name].append(100 * accuracy(model, test))
            minutes[name] += trained.seconds / 60
            if setting == HARDEST and name == list(SOFT)[-1] and isinstance(model, EndToEnd):
                draw_hops(run, model, test)
                if run.options.backend == "reference":
                    run.speed(name, model, lambda step: model.loss(some(run, data, step, sizes.batch)))  # noqa: B023
    run.table("Answers of test questions that are right, %, by difficulty and kind of question",
              ("model", *settings, "minutes"),
              [(name, *row, f"{minutes[name]:.1f}") for name, row in results.items()])  # fmt: skip


def draw_hops(run: Experiment, model: EndToEnd, test: Data, count: int = 3) -> None:
    """What each hop attends to: a column for each hop, a row for each statement."""
    from matplotlib import pyplot

    two = (test.supports[:, 0] != test.supports[:, 1]) & (test.lengths <= 14)
    order = (~two).int().argsort(stable=True)  # questions of two facts and not too long a story first
    index = order[torch.arange(count) * min(41, len(order) // count)]
    figure, panels = pyplot.subplots(1, count, figsize=(5 * count, 4.6), layout="constrained")
    for axes, number in zip(panels, index):
        one = test.take(number.unsqueeze(0))
        with torch.no_grad():
            logits, weights = model(one)
        lines = [
            f"{'* ' if i in one.supports[0].tolist() else ''}{write(words)}" for i, words in enumerate(one.story[0])
        ]
        axes.imshow(weights[0, :, : len(lines)].t().numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axes.set_yticks(range(len(lines)), lines, fontsize=7)
        axes.set_xticks(range(weights.shape[1]), [f"hop {hop + 1}" for hop in range(weights.shape[1])], fontsize=7)
        got, want = (write(word.view(1)) for word in (logits.argmax(-1), one.answer))
        axes.set_title(f"{write(one.question[0])}?\n{got} (right: {want})", fontsize=8)
    run.figure("hops", figure, "MemN2N, 3 hops, PE LS RN: what each hop attends to; darker is more, white 0. A star"
               " marks the supporting statements, which the model was never told.")  # fmt: skip


PARTS: dict[str, Callable[[Experiment], None]] = {
    "world": lambda run: world(run, QUICK if run.options.quick else FULL),
    "memn2n": lambda run: memn2n(run, QUICK if run.options.quick else FULL),
    "words": words,
    "scale": scale,
}


def chosen(arguments: Sequence[str] | None) -> argparse.Namespace:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--part", choices=PARTS, default="world", help="which of the tables")
    options.add_argument("--statements", type=int, help="of part scale: the largest memory (default: a million)")
    return options.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = chosen(arguments)
    run = Experiment(f"memory_qa-{options.part}", options, script="memory_qa")
    PARTS[options.part](run)
    run.finish()


if __name__ == "__main__":
    main()
