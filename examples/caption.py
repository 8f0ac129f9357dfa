"""Show, Attend and Tell on pictures of digits: captions by soft and by hard attention, and where each word looks.

Xu et al. (2015). A picture holds two or three of scikit-learn's digits in cells of a 3 x 3 grid, some of them in
frames; its caption says which, for instance "a framed seven above a two", in the order of reading. Every word that
names a digit belongs to a known cell, so the attention that falls on it can be counted.

    python examples/caption.py
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from training import Experiment, one_cycle, parser

from attnfast.nn import BahdanauAttention, HardAttention, ProjectedMemory

CELL, GRID = 16, 3
PIXELS = CELL * GRID
SIDE = PIXELS // 8  # annotation vectors in a row: the encoder halves the picture three times
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDS = ("<pad>", "<s>", "</s>", "a", "framed", "left", "right", "of", "above", "and", *NAMES)
PAD, BEGIN, END = 0, 1, 2
LONGEST = 3 * 3 + 2 * 4 + 1  # words of a caption and its end: "a framed nine", "above and right of"
NUMBER = {word: index for index, word in enumerate(WORDS)}


@dataclass(frozen=True)
class Sizes:
    channels: int
    hidden: int
    embedding: int
    batch: int
    steps: int
    hard_steps: int
    tested: int


FULL = Sizes(channels=48, hidden=128, embedding=48, batch=48, steps=4000, hard_steps=2000, tested=1000)
QUICK = Sizes(channels=8, hidden=16, embedding=8, batch=8, steps=3, hard_steps=3, tested=12)


class Batch(NamedTuple):
    """Pictures ``[B, 1, 48, 48]``, captions with begin and end ``[B, T + 2]``, and for each word after the begin the
    cell that it names, -1 for words that name none, ``[B, T + 1]``."""

    image: Tensor
    caption: Tensor
    cell: Tensor


class Pictures:
    """Draws pictures; one digit in five is kept for the test."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        loaded = load_digits()
        small = torch.from_numpy(loaded.images).float().unsqueeze(1) / 16
        images = nn.functional.interpolate(small, size=(CELL - 4, CELL - 4), mode="bilinear", align_corners=False)[:, 0]
        labels = torch.from_numpy(loaded.target).long()
        kept = torch.arange(len(labels)) % 5 == 0
        self.train, self.test = (images[~kept], labels[~kept].tolist()), (images[kept], labels[kept].tolist())

    def draw(self, count: int, generator: torch.Generator, test: bool) -> Batch:
        images, labels = self.test if test else self.train
        pictures = torch.zeros(count, 1, PIXELS, PIXELS)
        captions, cells = [], []
        for picture in pictures:
            many = int(torch.randint(2, 4, (), generator=generator))
            places = torch.randperm(GRID * GRID, generator=generator)[:many].sort().values.tolist()
            chosen = torch.randint(len(labels), (many,), generator=generator).tolist()
            framed = (torch.rand(many, generator=generator) < 0.3).tolist()
            for place, digit, frame in zip(places, chosen, framed):
                top, left = place // GRID * CELL, place % GRID * CELL
                cell = picture[0, top : top + CELL, left : left + CELL]
                cell[2:-2, 2:-2] = images[digit]
                if frame:
                    cell[0], cell[-1], cell[:, 0], cell[:, -1] = 1.0, 1.0, 1.0, 1.0
            words, named = caption(places, [labels[digit] for digit in chosen], framed)
            captions.append([BEGIN, *(NUMBER[word] for word in words), END])
            cells.append([*named, -1])
        longest = max(map(len, captions))
        return Batch(pictures, torch.tensor([row + [PAD] * (longest - len(row)) for row in captions]),
                     torch.tensor([row + [-1] * (longest - 1 - len(row)) for row in cells]))  # fmt: skip


def caption(places: Sequence[int], digits: Sequence[int], framed: Sequence[bool]) -> tuple[list[str], list[int]]:
    """Words, and the cell that each names (-1: none). Places are in the order of reading."""
    words: list[str] = []
    cells: list[int] = []
    for index, (place, digit, frame) in enumerate(zip(places, digits, framed)):
        if index:
            before = places[index - 1]
            joint = relation(before, place).split()
            words += joint
            cells += [-1] * len(joint)
        words += ["a", *(["framed"] if frame else []), NAMES[digit]]
        cells += [-1, *([place] if frame else []), place]
    return words, cells


def relation(first: int, second: int) -> str:
    """How the earlier of two cells lies to the later one."""
    if first // GRID == second // GRID:
        return "left of"
    across = first % GRID - second % GRID
    return "above" if across == 0 else f"above and {'left' if across < 0 else 'right'} of"


class Step(NamedTuple):
    """All steps of a batch: logits ``[B, T, V]``, weights ``[B, T, L]`` and, of hard attention, log p of the
    choices."""

    logits: Tensor
    weights: Tensor
    log_prob: Tensor | None


class Captioner(nn.Module):
    r"""A convolutional encoder with 6 x 6 annotation vectors, and the paper's LSTM decoder (section 3.1).

    The read-out is :math:`p \propto \exp(L_o(E y_{t-1} + L_h h_t + L_z \hat z_t))`, the first state two networks of the
    mean annotation, and soft contexts have a scalar gate :math:`\beta_t = \sigma(f_\beta(h_{t-1}))`.
    """

    def __init__(self, sizes: Sizes, hard: bool) -> None:
        super().__init__()
        c, n, e = sizes.channels, sizes.hidden, sizes.embedding
        self.hard = hard
        self.encoder = nn.Sequential(
            nn.Conv2d(1, c // 2, 3, padding=1), nn.BatchNorm2d(c // 2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(c // 2, c, 3, padding=1), nn.BatchNorm2d(c), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.place = nn.Parameter(0.1 * torch.randn(SIDE**2, c))  # which annotation is where
        self.baseline: Tensor  # of REINFORCE: the moving mean of log p by word, a part of what a checkpoint keeps
        self.register_buffer("baseline", torch.full((LONGEST,), math.nan))
        self.attention = HardAttention(n, c, n) if hard else BahdanauAttention(n, c, n)
        self.first = nn.ModuleList(nn.Linear(c, n) for _ in range(2))
        self.gate = nn.Linear(n, 1)
        self.embedding = nn.Embedding(len(WORDS), e, padding_idx=PAD)
        self.cell = nn.LSTMCell(e + c, n)
        self.from_state, self.from_context, self.words = nn.Linear(n, e), nn.Linear(c, e), nn.Linear(e, len(WORDS))

    def begin(self, image: Tensor) -> tuple[ProjectedMemory, tuple[Tensor, Tensor]]:
        annotations = self.encoder(image).flatten(2).transpose(1, 2) + self.place
        mean = annotations.mean(1)
        first = torch.tanh(self.first[0](mean)), torch.tanh(self.first[1](mean))
        return self.attention.project_memory(annotations), first

    def step(
        self, word: Tensor, memory: ProjectedMemory, state: tuple[Tensor, Tensor], soft: bool
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor, Tensor | None]:
        """One word; `soft`: take the expected context though the attention is hard."""
        log_prob = None
        if isinstance(self.attention, HardAttention):
            context, weights, log_prob, _ = self.attention.step(state[0], memory)
            if soft:
                context, log_prob = (weights.unsqueeze(1) @ memory.values).squeeze(1), torch.zeros_like(log_prob)
        else:
            context, found = self.attention.step(state[0], memory)
            assert found is not None
            weights = found
        context = self.gate(state[0]).sigmoid() * context
        embedded = self.embedding(word)
        state = self.cell(torch.cat([embedded, context], -1), state)
        logits = self.words(torch.tanh(embedded + self.from_state(state[0]) + self.from_context(context)))
        return logits, state, weights, log_prob

    def forward(self, image: Tensor, caption: Tensor, soft: bool = False) -> Step:
        memory, state = self.begin(image)
        parts: list[list[Tensor]] = [[], [], []]
        for word in caption.unbind(1):
            logits, state, weights, log_prob = self.step(word, memory, state, soft)
            for part, value in zip(parts, (logits, weights, log_prob)):
                if value is not None:
                    part.append(value)
        logits, weights = torch.stack(parts[0], 1), torch.stack(parts[1], 1)
        return Step(logits, weights, torch.stack(parts[2], 1) if parts[2] else None)

    @torch.no_grad()
    def tell(self, image: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """The likeliest words, one after the other ``[B, most]``, and the weights behind each ``[B, most, L]``."""
        memory, state = self.begin(image)
        word = torch.full((len(image),), BEGIN)
        words, seen = [], []
        for _ in range(most):
            # In evaluation hard attention takes the likeliest place.
            logits, state, weights, _ = self.step(word, memory, state, False)
            word = logits.argmax(-1)
            words.append(word)
            seen.append(weights)
        return torch.stack(words, 1), torch.stack(seen, 1)


def loss_of(
    model: Captioner, batch: Batch, soft: bool, stochastic: float = 1.0, reinforce: float = 1.0, entropy: float = 0.02
) -> Tensor:
    """The paper's two objectives (sections 4.1 and 4.2).

    `soft` is the toss of one coin for the whole call, as in the authors' program, not one for each sample. The reward
    of a place is the log-probability of the words from there on: it has no part in those before.
    """
    given, wanted = batch.caption[:, :-1], batch.caption[:, 1:]
    there = (wanted != PAD).float()
    step = model(batch.image, given, model.hard and soft)
    log_p = -nn.functional.cross_entropy(step.logits.transpose(1, 2), wanted, reduction="none") * there
    loss = -log_p.sum(1).mean()
    if step.log_prob is None:
        # Doubly stochastic: every annotation should be looked at about once; summed over words, averaged over places.
        seen = (step.weights * there.unsqueeze(-1)).sum(1)
        return loss + stochastic * ((1 - seen) ** 2).mean(1).mean()
    reward = log_p.detach().flip(1).cumsum(1).flip(1)
    kept = model.baseline[: reward.shape[1]]
    baseline = torch.where(kept.isnan(), reward.mean(0), kept)
    if model.training and not soft:
        kept.copy_(0.9 * baseline + 0.1 * reward.mean(0))
    chosen = ((reward - baseline) * step.log_prob * there).sum(1)
    spread = -(step.weights * step.weights.clamp_min(1e-20).log()).sum(-1)
    return loss - reinforce * chosen.mean() - entropy * (spread * there).sum(1).mean()


def masses(weights: Tensor, cell: Tensor) -> Tensor:
    """Share of each word's attention that falls on the cell it names, and NaN for words that name none, ``[B, T]``."""
    in_cells = weights.unflatten(-1, (GRID, SIDE // GRID, GRID, SIDE // GRID)).sum((-3, -1)).flatten(-2)
    found = in_cells.gather(-1, cell.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return found.where(cell >= 0, math.nan)


class Result(NamedTuple):
    exact: float
    bleu: float
    mass: float  # on the digit that a word names, the true caption given
    ahead: float  # on the same digit, already at the "a" before it
    framed: float  # on the digit of "framed"


def measure(model: Captioner, batch: Batch) -> Result:
    from sacrebleu import corpus_bleu

    words, _ = model.tell(batch.image, batch.caption.shape[1] + 2)
    got = [text_of(row) for row in words.tolist()]
    want = [text_of(row[1:]) for row in batch.caption.tolist()]
    exact = sum(a == b for a, b in zip(got, want)) / len(want)
    bleu = corpus_bleu(
        [" ".join(text) for text in got], [[" ".join(text) for text in want]], tokenize="none", force=True
    ).score
    with torch.no_grad():
        weights = model(batch.image, batch.caption[:, :-1], soft=model.hard).weights
    said = batch.caption[:, 1:]
    frames, articles = said == NUMBER["framed"], said[:, :-1] == NUMBER["a"]
    mass, ahead = masses(weights, batch.cell), masses(weights[:, :-1], batch.cell[:, 1:])
    shares = (100 * part.nanmean().item() for part in (mass[~frames], ahead[articles], mass[frames]))
    return Result(100 * exact, bleu, *shares)


def text_of(numbers: Sequence[int]) -> list[str]:
    end = numbers.index(END) if END in numbers else len(numbers)
    return [WORDS[number] for number in numbers[:end]]


def draw(run: Experiment, name: str, model: Captioner, batch: Batch) -> None:
    """The shape of the paper's figure 2: the picture once for each word, bright where the word looks."""
    from matplotlib import pyplot

    words, weights = model.tell(batch.image[:2], batch.caption.shape[1] + 2)
    texts = [text_of(row) for row in words.tolist()]
    columns = max(1, min(12, max(map(len, texts))))
    figure, grid = pyplot.subplots(2, columns, figsize=(1.25 * columns, 3.2), layout="constrained", squeeze=False)
    for axes, image, text, seen in zip(grid, batch.image, texts, weights):
        for axis in axes:
            axis.set_axis_off()
        for axis, word, weight in zip(axes, text, seen):
            wide = nn.functional.interpolate(weight.view(1, 1, SIDE, SIDE), size=(PIXELS, PIXELS), mode="nearest")[0, 0]
            axis.imshow(image[0].numpy(), cmap="gray")
            axis.imshow((wide / wide.max()).numpy(), cmap="hot", alpha=0.55)
            axis.set_title(word, fontsize=8)
    run.figure(f"words-{name}", figure, f"{name} attention, two test pictures: where each written word looks.")


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__.splitlines()[0])
    chosen = options.parse_args(arguments)
    sizes = QUICK if chosen.quick else FULL
    steps = {"soft": chosen.steps or sizes.steps, "hard": chosen.steps or sizes.hard_steps}
    run = Experiment("caption", chosen)
    pictures = Pictures()
    test = pictures.draw(sizes.tested, run.generator("test"), True)
    uniform = 100 / GRID**2
    run.text(f"Pictures of {PIXELS} x {PIXELS} pixels, {SIDE} x {SIDE} annotation vectors of {sizes.channels};"
             f" {steps['soft']} steps of {sizes.batch}, and for hard attention {steps['hard']} more from the weights of"
             f" the soft one; {sizes.tested} test pictures with digits that were never seen. Uniform"
             f" attention would put {uniform:.1f}% on any cell.")  # fmt: skip
    rows = []
    learnt: dict[str, Tensor] = {}
    for name, rate in (("soft", 2e-3), ("hard", 1e-3)):
        model = run.build(name, partial(Captioner, sizes, name == "hard"))
        if learnt:  # of untrained weights no choice is rewarded more than another: hard attention starts from soft
            model.load_state_dict(learnt)
        optimizer = torch.optim.Adam(model.parameters(), lr=rate)
        schedule = one_cycle(optimizer, rate, steps[name], 0.1)

        def step_loss(step: int, model: Captioner = model) -> Tensor:
            generator = run.generator("pictures", step)
            batch = pictures.draw(sizes.batch, generator, False)
            return loss_of(model, batch, bool(torch.rand((), generator=generator) < 0.5))

        trained = run.train(
            name, model, step_loss, steps[name], optimizer, schedule=schedule, clip=5.0,
            save_every=max(1, steps[name] // 4),
        )  # fmt: skip
        learnt = model.state_dict()
        result = measure(model, test)
        rows.append((name, *result, f"{trained.seconds / 60:.1f}"))
        draw(run, name, model, test)
        if chosen.backend == "reference":
            run.speed(name, model, step_loss)
    columns = (
        "attention",
        "exact, %",
        "BLEU",
        "mass on the named digit, %",
        'at the "a" before it, %',
        'mass on the frame of "framed", %',
        "minutes",
    )
    run.table("Captions of test pictures", columns, rows)
    run.finish()


if __name__ == "__main__":
    main()
