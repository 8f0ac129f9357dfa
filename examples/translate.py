"""Sequence to sequence: what attention adds to an encoder-decoder, by the length of the source.

Numbers in words from English to German or French, and spelling to pronunciation (CMUdict). The models: one context for
the whole sentence in three forms, Bahdanau's, Luong's scores and windows, input feeding, and the Transformer.

    python examples/translate.py --task g2p
    python examples/translate.py --task en-de --models mapped bahdanau --quick
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from sentences import PAD, Batch, Pair, Task, Text, numbers, pronunciations
from seq2seq import Bahdanau, EncoderDecoder, FixedContext, Luong, Maker, Transformer, alignment, greedy, search
from torch import Tensor, nn
from training import Experiment, one_cycle, parser

TASKS = {
    "en-de": lambda quick: numbers("de", quick),
    "en-fr": lambda quick: numbers("fr", quick),
    "g2p": lambda quick: pronunciations(quick),
}
FIXED = ("last", "mapped", "pooled")
LUONG = {  # name: score, local, input feeding
    "luong-dot": ("dot", None, False),
    "luong-general": ("general", None, False),
    "luong-concat": ("concat", None, False),
    "luong-location": ("location", None, False),
    "luong-local-m": ("general", "m", False),
    "luong-local-p": ("general", "p", False),
    "luong-feeding": ("general", None, True),
}
MODELS = (*FIXED, "bahdanau", *LUONG, "transformer")
DEFAULT = {  # without --models
    "en-fr": MODELS,
    "en-de": ("mapped", "bahdanau", "luong-general", "luong-feeding"),
    "g2p": ("luong-general",),
}


@dataclass(frozen=True)
class Sizes:
    """How large the models are and how long they learn."""

    embedding: int
    hidden: int
    heads: int
    layers: int
    dropout: float
    batch: int
    steps: int
    rate: float


SIZES = {
    "quick": Sizes(8, 16, 2, 1, 0.0, 8, 3, 1e-3),
    "en-fr": Sizes(64, 192, 4, 3, 0.1, 64, 600, 2e-3),
    "en-de": Sizes(64, 192, 4, 3, 0.1, 64, 900, 2e-3),
    "g2p": Sizes(128, 384, 4, 3, 0.25, 256, 4500, 2e-3),
}


def make(name: str, task: Task, sizes: Sizes) -> Maker:
    """A function that builds the model of that name."""
    words = (len(task.source_words), len(task.target_words))
    shared = (*words, sizes.embedding, sizes.hidden, sizes.dropout)
    if name in FIXED:
        return lambda: FixedContext(name, *shared)
    if name == "bahdanau":
        return lambda: Bahdanau(*shared)
    if name in LUONG:
        return lambda: Luong(*shared, *LUONG[name])
    return lambda: Transformer(*words, sizes.hidden, sizes.heads, sizes.layers, sizes.dropout)


def loss_of(model: EncoderDecoder, batch: Batch, smoothing: float = 0.0) -> Tensor:
    """Cross entropy of every next token, padding left out."""
    logits = model(batch.source, batch.lengths, batch.target[:, :-1])
    return nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.target[:, 1:].flatten(), ignore_index=PAD, label_smoothing=smoothing
    )


def outputs(model: EncoderDecoder, task: Task, pairs: Sequence[Pair], beam: int, size: int = 250) -> list[Text]:
    """What the model makes of each source, by beam search, in the order of `pairs`."""
    order = sorted(range(len(pairs)), key=lambda index: len(pairs[index].source))
    most = 2 + max(len(target) for pair in pairs for target in pair.targets)
    found: dict[int, Text] = {}
    for first in range(0, len(order), size):
        chosen = order[first : first + size]
        batch = task.batch([pairs[index] for index in chosen])
        answers = search(model, batch.source, batch.lengths, most, beam)
        found.update({index: task.target_words.write(answer) for index, answer in zip(chosen, answers)})
    return [found[index] for index in range(len(pairs))]


def edits(got: Text, want: Text) -> int:
    """Levenshtein distance of two texts."""
    row = list(range(len(want) + 1))
    for i, token in enumerate(got, 1):
        above, row[0] = row[0], i
        for j, wanted in enumerate(want, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (token != wanted))
    return row[-1]


@dataclass(frozen=True)
class Scores:
    """Of some sentences: how many, the share that is exactly right, tokens wrong per token of the reference, BLEU."""

    count: int
    exact: float
    token_errors: float
    bleu: float


def score(pairs: Sequence[Pair], got: Sequence[Text]) -> Scores:
    """A word with several pronunciations is held to the one nearest to the answer, as is usual for CMUdict."""
    if not pairs:
        return Scores(0, math.nan, math.nan, math.nan)
    from sacrebleu import corpus_bleu

    nearest = [min(pair.targets, key=lambda target: edits(text, target)) for pair, text in zip(pairs, got)]
    wrong = sum(edits(text, target) for text, target in zip(got, nearest))
    bleu = corpus_bleu([" ".join(text) for text in got], [[" ".join(target) for target in nearest]],
                       tokenize="none", force=True).score  # fmt: skip
    exact = sum(text == target for text, target in zip(got, nearest)) / len(pairs)
    return Scores(len(pairs), exact, wrong / sum(map(len, nearest)), bleu)


def by_length(task: Task, pairs: Sequence[Pair], got: Sequence[Text]) -> list[Scores]:
    """Scores of the sources of each range of lengths."""
    rows = []
    for low, high in task.lengths:
        inside = [index for index, pair in enumerate(pairs) if low <= len(pair.source) <= high]
        rows.append(score([pairs[i] for i in inside], [got[i] for i in inside]))
    return rows


def draw_lengths(run: Experiment, task: Task, results: dict[str, list[Scores]]) -> None:
    """The shape of Bahdanau et al.'s figure 2: quality against length of the source, a line for each model."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.5), layout="constrained")
    names = [f"{low}-{high}" for low, high in task.lengths]
    colors = pyplot.get_cmap("tab20")  # ten dark colours and, between them, a light one of each: the dark ones first
    for number, (model, rows) in enumerate(results.items()):
        style = "--" if model in FIXED else "-"
        axes.plot(names, [100 * row.exact for row in rows], style, color=colors((2 * number + number // 10) % 20),
                  marker="o", markersize=3, label=model)  # fmt: skip
    axes.set_xlabel("tokens of the source")
    axes.set_ylabel("exactly right, %")
    axes.set_title(f"{task.name}: held-out sources")
    axes.legend(fontsize=7)
    run.figure(f"{task.name}-length", figure, f"{task.name}: share of held-out sources that come out exactly right, by"
               " their length. Dashed: one context for the whole source.")  # fmt: skip


def draw_alignment(run: Experiment, task: Task, name: str, model: EncoderDecoder, pair: Pair) -> None:
    from attnfast.viz import plot_alignment

    batch = task.batch([pair])
    output = greedy(model, batch.source, batch.lengths, 2 + 2 * len(pair.source))[0]
    text = task.target_words.write(output)
    if not text:  # a model that has learnt too little may end at once
        run.text(f"{name} writes nothing: there is no alignment to draw.")
        return
    weights = alignment(model, batch.source, batch.lengths, output[: len(text)])
    axes = plot_alignment(weights[: len(text)], pair.source, text, title=f"{task.name}, {name}")
    run.figure(f"{task.name}-{name}", axes.figure, f"{task.name}, {name}: each row is a token that was written, each"
               " column one that was read.")  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--task", choices=TASKS, default="en-fr", help="what to translate")
    options.add_argument("--models", nargs="+", choices=MODELS, metavar="MODEL", help=f"of {', '.join(MODELS)}")
    options.add_argument("--beam", type=int, default=4, help="hypotheses of the search")
    chosen = options.parse_args(arguments)
    run = Experiment(f"translate-{chosen.task}", chosen, script="translate")
    task = TASKS[chosen.task](chosen.quick)
    sizes = SIZES["quick" if chosen.quick else chosen.task]
    steps = chosen.steps or sizes.steps
    names = chosen.models or DEFAULT[chosen.task]
    run.text(
        f"{task.name}: {len(task.test)} test sources, {len(task.source_words)} and {len(task.target_words)} tokens;"
        f" {steps} steps of {sizes.batch} pairs, beam {chosen.beam}."
    )
    rows, results = [], {}
    for name in names:
        model = run.build(name, make(name, task, sizes))
        rate = sizes.rate / 2 if name == "transformer" else sizes.rate
        optimizer = torch.optim.Adam(model.parameters(), lr=rate, betas=(0.9, 0.98))
        schedule = one_cycle(optimizer, rate, steps, 0.1)
        smoothing = 0.1 if name == "transformer" else 0.0

        def step_loss(step: int, model: EncoderDecoder = model, smoothing: float = smoothing) -> Tensor:
            return loss_of(model, task.training_batch(step, sizes.batch, run.generator), smoothing)

        def validation(model: EncoderDecoder = model) -> float:
            return loss_of(model, task.batch(task.validation[:500])).item()

        trained = run.train(name, model, step_loss, steps, optimizer, schedule=schedule, clip=1.0, validate=validation,
                            validate_every=max(1, steps // 10), save_every=max(1, steps // 4))  # fmt: skip
        got = outputs(model, task, task.test, chosen.beam)
        results[name] = by_length(task, task.test, got)
        overall = score(task.test, got)
        size = sum(parameter.numel() for parameter in model.parameters())
        rows.append((name, f"{size / 1e6:.2f}", f"{trained.seconds / 60:.1f}", trained.best, 100 * overall.exact,
                     100 * overall.token_errors, overall.bleu))  # fmt: skip
        if name in {"bahdanau", "luong-local-p", "transformer"}:
            draw_alignment(run, task, name, model, max(task.test[:200], key=lambda pair: min(len(pair.source), 20)))
        if name == names[-1] and chosen.backend == "reference":
            run.speed(name, model, step_loss)
    columns = ("model", "million weights", "minutes", "validation loss", "exact, %", "token errors, %", "BLEU")
    run.table(f"{task.name}: held-out sources", columns, rows)
    ranges = [f"{low}-{high}" for low, high in task.lengths]
    counts = [row.count for row in results[names[0]]]
    for title, field, scale in (("exactly right, %", "exact", 100), ("token errors, %", "token_errors", 100),
                                ("BLEU", "bleu", 1)):  # fmt: skip
        run.table(f"{task.name}: {title}, by tokens of the source", ("model", *ranges),
                  [("(sentences)", *counts), *((name, *(scale * getattr(row, field) for row in scores))
                                               for name, scores in results.items())])  # fmt: skip
    draw_lengths(run, task, results)
    run.finish()


if __name__ == "__main__":
    main()
