"""The recurrent attention model on digits somewhere in a larger image, plain and cluttered: where does it look?

Mnih, Heess, Graves and Kavukcuoglu (2014): a sensor reads a small glimpse, a recurrent core says where to look next,
and only the last state is classified. Places are learnt by REINFORCE. Beside it stand glimpses at random places and a
fully connected network on the whole image. The digits are scikit-learn's (8 x 8, enlarged to 24 x 24), so no figure
here can be compared with one on MNIST.

    python examples/glimpse.py --task cluttered
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from training import Experiment, one_cycle, parser

from attnfast.nn import GlimpseSensor

DIGIT = 24  # pixels of an enlarged digit
CLUTTER, PIECE = 4, 8  # pieces of other digits, and their width


@dataclass(frozen=True)
class Sizes:
    canvas: int
    glimpse: int
    scales: int
    features: int
    hidden: int
    batch: int
    steps: int
    tested: int
    glimpses: tuple[int, ...]


FULL = Sizes(60, 10, 3, 128, 256, 128, 8000, 2000, (2, 4, 6))
QUICK = Sizes(60, 4, 2, 8, 16, 8, 3, 16, (2, 3))


class Digits:
    """scikit-learn's digits, enlarged; one in five is kept for the test, so no test digit was ever seen."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        loaded = load_digits()
        small = torch.from_numpy(loaded.images).float().unsqueeze(1) / 16
        images = nn.functional.interpolate(small, size=(DIGIT, DIGIT), mode="bilinear", align_corners=False)
        labels = torch.from_numpy(loaded.target).long()
        kept = torch.arange(len(labels)) % 5 == 0
        self.train, self.test = (images[~kept], labels[~kept]), (images[kept], labels[kept])

    def place(
        self, batch: int, sizes: Sizes, cluttered: bool, generator: torch.Generator, test: bool
    ) -> tuple[Tensor, Tensor]:
        """Canvases ``[B, 1, H, H]`` with one whole digit each, somewhere, and its label."""
        images, labels = self.test if test else self.train
        chosen = torch.randint(len(labels), (batch,), generator=generator)
        canvas = torch.zeros(batch, sizes.canvas, sizes.canvas)
        if cluttered:
            for _ in range(CLUTTER):
                others = torch.randint(len(labels), (batch,), generator=generator)
                corner = torch.randint(DIGIT - PIECE + 1, (batch, 2), generator=generator)
                paste(canvas, cut(images[others, 0], corner, PIECE), generator)
        paste(canvas, images[chosen, 0], generator)
        return canvas.unsqueeze(1), labels[chosen]


def windows(corner: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of a square of each sample, by its upper left corner ``[B, 2]``."""
    along = torch.arange(width)
    rows, columns = corner[:, 0, None] + along, corner[:, 1, None] + along
    return torch.arange(len(corner)).view(-1, 1, 1), rows.unsqueeze(2), columns.unsqueeze(1)


def cut(images: Tensor, corner: Tensor, width: int) -> Tensor:
    return images[windows(corner, width)]


def paste(canvas: Tensor, piece: Tensor, generator: torch.Generator) -> None:
    """Lay a piece on each canvas at a random place; of two pixels the brighter one is seen."""
    corner = torch.randint(canvas.shape[1] - piece.shape[1] + 1, (len(canvas), 2), generator=generator)
    at = windows(corner, piece.shape[1])
    canvas[at] = torch.maximum(canvas[at], piece)


class Walk(NamedTuple):
    """What a model did with a batch: class scores ``[B, 10]``; of each of T glimpses its place ``[B, T, 2]``, the
    logarithm of the probability of having gone there ``[B, T]`` (0 for the first, which is random), and the reward it
    expected ``[B, T]``."""

    logits: Tensor
    places: Tensor
    log_prob: Tensor
    expected: Tensor


class RecurrentAttention(nn.Module):
    """The paper's network (section 3.1); `random`: it goes anywhere, and only the rest is learnt."""

    def __init__(self, sizes: Sizes, glimpses: int, random: bool = False, deviation: float = 0.3) -> None:
        super().__init__()
        self.glimpses, self.random, self.deviation, self.hidden = glimpses, random, deviation, sizes.hidden
        self.sensor = GlimpseSensor(sizes.glimpse, sizes.scales)
        self.what = nn.Linear(sizes.scales * sizes.glimpse**2, sizes.features)
        self.where = nn.Linear(2, sizes.features)
        self.join = nn.ModuleList(nn.Linear(sizes.features, sizes.hidden) for _ in range(2))
        self.core = nn.ModuleList(nn.Linear(sizes.hidden, sizes.hidden) for _ in range(2))
        self.place = nn.Linear(sizes.hidden, 2)
        self.reward = nn.Linear(sizes.hidden, 1)
        self.digit = nn.Linear(sizes.hidden, 10)

    def forward(self, image: Tensor, generator: torch.Generator | None = None) -> Walk:
        B = image.shape[0]
        hidden = image.new_zeros(B, self.hidden)
        place = 2 * torch.rand(B, 2, generator=generator) - 1
        places, log_probs, expected = [], [], []
        log_prob = image.new_zeros(B)
        for _ in range(self.glimpses):
            seen = self.sensor(image, place).flatten(1)
            glimpse = self.join[0](self.what(seen).relu()) + self.join[1](self.where(place).relu())
            places.append(place)
            log_probs.append(log_prob)
            # Neither of these two may train the core: both see its state, and send nothing back.
            expected.append(self.reward(hidden.detach()).squeeze(-1))
            hidden = (self.core[0](hidden) + self.core[1](glimpse.relu())).relu()
            place, log_prob = self._next(hidden.detach(), generator)
        return Walk(self.digit(hidden), torch.stack(places, 1), torch.stack(log_probs, 1), torch.stack(expected, 1))

    def _next(self, hidden: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Where to go, drawn around the mean in training and the mean itself in evaluation, and log p of it."""
        if self.random:
            return 2 * torch.rand(len(hidden), 2, generator=generator) - 1, hidden.new_zeros(len(hidden))
        mean = torch.tanh(self.place(hidden))
        if not self.training:
            return mean.detach(), hidden.new_zeros(len(hidden))
        drawn = (mean + self.deviation * torch.randn(mean.shape, generator=generator)).detach()
        # Up to a constant, which has no gradient. The place is clamped for the sensor, not for its probability.
        log_prob = -((drawn - mean) ** 2).sum(-1) / (2 * self.deviation**2)
        return drawn.clamp(-1, 1), log_prob


class Connected(nn.Module):
    """Two hidden layers on all pixels, as the paper's baseline."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        n = sizes.hidden
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(sizes.canvas**2, n), nn.ReLU(), nn.Linear(n, n), nn.ReLU(),
                                    nn.Linear(n, 10))  # fmt: skip

    def forward(self, image: Tensor, generator: torch.Generator | None = None) -> Walk:
        nothing = image.new_zeros(len(image), 0)
        return Walk(self.layers(image), nothing.unsqueeze(-1).expand(-1, -1, 2), nothing, nothing)


def loss_of(walk: Walk, labels: Tensor, strength: float = 0.1) -> Tensor:
    """Cross entropy of the last state, and REINFORCE on whether it was right, less what was expected (section 3.2)."""
    loss = nn.functional.cross_entropy(walk.logits, labels)
    if walk.log_prob.shape[1] == 0:
        return loss
    right = (walk.logits.argmax(-1) == labels).to(walk.logits.dtype).unsqueeze(1)
    advantage = (right - walk.expected).detach()
    return loss + ((walk.expected - right) ** 2).mean() - strength * (walk.log_prob * advantage).mean()


def error(run: Experiment, digits: Digits, model: nn.Module, sizes: Sizes, cluttered: bool) -> float:
    """Wrong digits, %, on test canvases that every model sees alike."""
    image, labels = digits.place(sizes.tested, sizes, cluttered, run.generator("test"), True)
    with torch.no_grad():
        return 100 * (model(image, run.generator("test places")).logits.argmax(-1) != labels).float().mean().item()


def draw_paths(run: Experiment, digits: Digits, model: nn.Module, sizes: Sizes, cluttered: bool) -> None:
    from matplotlib import pyplot

    count = 8
    image, labels = digits.place(count, sizes, cluttered, run.generator("paths"), True)
    with torch.no_grad():
        walk = model(image, run.generator("first places"))
    figure, grid = pyplot.subplots(2, 4, figsize=(8, 4.4), layout="constrained")
    for axes, picture, label, path, answer in zip(grid.flat, image, labels, walk.places, walk.logits.argmax(-1)):
        axes.imshow(picture[0].numpy(), cmap="gray")
        x, y = (((path + 1) / 2 * sizes.canvas) - 0.5).unbind(-1)
        axes.plot(x, y, "-", color="tab:orange", linewidth=1)
        axes.scatter(x, y, c=range(len(x)), cmap="autumn", s=14, zorder=3)
        half = sizes.glimpse / 2
        axes.add_patch(
            pyplot.Rectangle((x[-1] - half, y[-1] - half), 2 * half, 2 * half, fill=False, color="tab:green")
        )
        axes.set_title(f"{label}, read as {answer}", fontsize=8)
        axes.set_axis_off()
    run.figure("paths", figure, "Paths of glimpses on test images, from red to yellow; the square is the finest patch"
               " of the last one.")  # fmt: skip


def draw_errors(run: Experiment, sizes: Sizes, errors: dict[str, list[float]], connected: float) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name, values in errors.items():
        axes.plot(sizes.glimpses, values, "o-", label=f"{name} glimpses")
    axes.axhline(connected, color="gray", linestyle="--", label="fully connected, all pixels")
    axes.set_xlabel("glimpses")
    axes.set_ylabel("wrong digits, %")
    axes.set_ylim(bottom=0)
    axes.legend()
    run.figure("errors", figure, "Error on test digits against the number of glimpses.")


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--task", choices=("translated", "cluttered"), default="translated", help="clutter or not")
    chosen = options.parse_args(arguments)
    sizes = QUICK if chosen.quick else FULL
    steps = chosen.steps or sizes.steps
    cluttered = chosen.task == "cluttered"
    run = Experiment(f"glimpse-{chosen.task}", chosen, script="glimpse")
    digits = Digits()
    run.text(f"{len(digits.train[1])} digits to learn from and {len(digits.test[1])} others to test on, {DIGIT}"
             f" x {DIGIT} pixels somewhere in {sizes.canvas} x {sizes.canvas}. Glimpses of {sizes.scales} patches"
             f" of {sizes.glimpse} x {sizes.glimpse}. {steps} steps of {sizes.batch} images.")  # fmt: skip

    def learn(label: str, model: nn.Module, rate: float = 1e-3) -> tuple[float, float]:
        optimizer = torch.optim.Adam(model.parameters(), lr=rate)
        schedule = one_cycle(optimizer, rate, steps, 0.1)

        def step_loss(step: int) -> Tensor:
            generator = run.generator("canvas", step)
            image, labels = digits.place(sizes.batch, sizes, cluttered, generator, False)
            return loss_of(model(image, generator), labels)

        trained = run.train(
            label, model, step_loss, steps, optimizer, schedule=schedule, clip=5.0, save_every=max(1, steps // 4)
        )
        if chosen.backend == "reference" and label.startswith("learnt"):
            run.speed(label, model, step_loss)
        return error(run, digits, model, sizes, cluttered), trained.seconds / 60

    rows: list[tuple[object, ...]] = []
    errors: dict[str, list[float]] = {"learnt": [], "random": []}
    for count in sizes.glimpses:
        for name in errors:
            label = f"{name}-{count}"
            model = run.build(label, partial(RecurrentAttention, sizes, count, name == "random"))
            wrong, minutes = learn(label, model)
            errors[name].append(wrong)
            rows.append((f"{count} glimpses, {name}", wrong, f"{minutes:.1f}"))
            if name == "learnt" and count == sizes.glimpses[-1]:
                draw_paths(run, digits, model, sizes, cluttered)
    connected, minutes = learn("connected", run.build("connected", partial(Connected, sizes)))
    rows.append(("fully connected, all pixels", connected, f"{minutes:.1f}"))
    run.table(f"{chosen.task}: wrong test digits", ("model", "error, %", "minutes"), rows)
    draw_errors(run, sizes, errors, connected)
    run.finish()


if __name__ == "__main__":
    main()
