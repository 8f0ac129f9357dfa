"""The copy task of neural Turing machines: read a sequence of random bits, then write it from memory, also longer ones.

As in Graves, Wayne and Danihelka (2014, section 4.1), models learn from sequences of 1 to 20 vectors of 8 bits; what
was learnt is then tried on up to six times that length. Beside the NTM, with one reading and one writing head, stands
an LSTM.

    python examples/copy_task.py
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from training import Experiment, parser

from attnfast.nn import NTMHead

BITS = 8


@dataclass(frozen=True)
class Sizes:
    slots: int
    width: int
    hidden: int
    longest: int
    batch: int
    steps: int
    lengths: tuple[int, ...]


FULL = Sizes(128, width=20, hidden=100, longest=20, batch=32, steps=5000, lengths=(5, 10, 20, 30, 40, 60, 90, 120))
QUICK = Sizes(12, width=6, hidden=8, longest=3, batch=4, steps=3, lengths=(2, 5))


class Trace(NamedTuple):
    """Logits of the answers, ``[B, T, 8]``, and where the heads were, ``[B, 2 T + 1, N]`` each (empty for the LSTM)."""

    logits: Tensor
    written: Tensor
    read: Tensor


def sequences(bits: Tensor) -> Tensor:
    """What a model reads for ``bits [B, T, 8]``: the bits, a mark on a channel of its own, and T times nothing."""
    B, T, _ = bits.shape
    x = bits.new_zeros(B, 2 * T + 1, BITS + 1)
    x[:, :T, :BITS] = bits
    x[:, T, BITS] = 1
    return x


class NTM(nn.Module):
    """An LSTM controller with one writing and one reading head, which act in this order within a step."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.slots, self.width, self.hidden = sizes.slots, sizes.width, sizes.hidden
        self.controller = nn.LSTMCell(BITS + 1 + sizes.width, sizes.hidden)
        self.writing = NTMHead(sizes.hidden, sizes.width, writes=True)
        self.reading = NTMHead(sizes.hidden, sizes.width)
        self.answer = nn.Linear(sizes.hidden + sizes.width, BITS)

    def forward(self, bits: Tensor) -> Trace:
        B, T, _ = bits.shape
        memory = bits.new_full((B, self.slots, self.width), 1e-6)
        focus = nn.functional.one_hot(torch.zeros(B, dtype=torch.long), self.slots).to(bits.dtype)
        writing, reading = focus, focus
        hidden, cell = bits.new_zeros(B, self.hidden), bits.new_zeros(B, self.hidden)
        vector = bits.new_zeros(B, self.width)
        logits, written, read = [], [], []
        for x in sequences(bits).unbind(1):
            hidden, cell = self.controller(torch.cat([x, vector], -1), (hidden, cell))
            memory, writing = self.writing(hidden, memory, writing)
            vector, reading = self.reading(hidden, memory, reading)
            logits.append(self.answer(torch.cat([hidden, vector], -1)))
            written.append(writing)
            read.append(reading)
        return Trace(torch.stack(logits[T + 1 :], 1), torch.stack(written, 1), torch.stack(read, 1))


class LSTM(nn.Module):
    """The same controller, larger, without a memory."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.rnn = nn.LSTM(BITS + 1, 2 * sizes.hidden, batch_first=True)
        self.answer = nn.Linear(2 * sizes.hidden, BITS)

    def forward(self, bits: Tensor) -> Trace:
        out, _ = self.rnn(sequences(bits))
        nothing = bits.new_zeros(bits.shape[0], 0, 0)
        return Trace(self.answer(out[:, bits.shape[1] + 1 :]), nothing, nothing)


def drawn(run: Experiment, sizes: Sizes, step: int) -> Tensor:
    """Training bits ``[B, T, 8]`` of one step; all sequences of a batch have one length."""
    generator = run.generator("bits", step)
    length = int(torch.randint(1, sizes.longest + 1, (), generator=generator))
    return torch.randint(2, (sizes.batch, length, BITS), generator=generator).float()


def wrong_bits(run: Experiment, model: nn.Module, length: int, count: int) -> float:
    """Wrong bits of a sequence of this length, on average; guessing gives four a vector."""
    bits = torch.randint(2, (count, length, BITS), generator=run.generator("test", length)).float()
    with torch.no_grad():
        return ((model(bits).logits > 0) != (bits > 0.5)).float().sum((1, 2)).mean().item()


def draw_errors(run: Experiment, sizes: Sizes, errors: dict[str, list[float]]) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.5, 4), layout="constrained")
    for name, values in errors.items():
        axes.plot(sizes.lengths, [v / (n * BITS) * 100 for v, n in zip(values, sizes.lengths)], "o-", label=name)
    axes.axvline(sizes.longest, color="gray", linestyle=":", label="longest of training")
    axes.set_xlabel("length of the sequence")
    axes.set_ylabel("wrong bits, %")
    axes.legend()
    run.figure("length", figure, "Share of wrong bits by length; guessing gives 50%. What lies right of the line was"
               " never trained.")  # fmt: skip


def draw_heads(run: Experiment, sizes: Sizes, model: nn.Module) -> None:
    """The shape of the paper's figures 4 and 6: what is to be copied, what came out, and where the heads were."""
    from matplotlib import pyplot

    length = sizes.longest
    near = min(length + 2, (sizes.slots - 1) // 2)  # heads may move either way from slot 0: it is in the middle
    bits = torch.randint(2, (1, length, BITS), generator=run.generator("picture")).float()
    with torch.no_grad():
        trace = model(bits)
    figure, axes = pyplot.subplots(4, 1, figsize=(7, 7.5), layout="constrained", height_ratios=(1, 1, 2, 2))
    written, read = (heads[0].t().roll(near, 0)[: 2 * near + 1] for heads in (trace.written, trace.read))
    pictures = (("bits", bits[0].t()), ("answer", trace.logits[0].sigmoid().t()), ("written to", written),
                ("read from", read))  # fmt: skip
    for axis, (title, picture) in zip(axes, pictures):
        axis.imshow(picture.numpy(), cmap="gray", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        axis.set_ylabel(title)
        axis.set_yticks([])
    axes[-1].set_xlabel("step")
    caption = ("Above: the bits and what was written from memory. Below: the slots around slot 0 (rows) by step"
               " (columns); the writing head leaves a trail, which the reading head follows after it.")  # fmt: skip
    run.figure("heads", figure, caption)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__.splitlines()[0])
    chosen = options.parse_args(arguments)
    sizes = QUICK if chosen.quick else FULL
    steps = chosen.steps or sizes.steps
    run = Experiment("copy_task", chosen)
    run.text(f"{steps} batches of {sizes.batch} sequences of 1 to {sizes.longest} vectors of {BITS} bits; the NTM has"
             f" {sizes.slots} slots of {sizes.width} numbers.")  # fmt: skip
    errors: dict[str, list[float]] = {}
    rows = []
    for name, make in (("NTM", NTM), ("LSTM", LSTM)):
        model = run.build(name, partial(make, sizes))
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3 if name == "NTM" else 5e-3)

        def loss_of(step: int, model: nn.Module = model) -> Tensor:
            bits = drawn(run, sizes, step)
            return nn.functional.binary_cross_entropy_with_logits(model(bits).logits, bits)

        trained = run.train(name, model, loss_of, steps, optimizer, clip=10.0, save_every=max(1, steps // 4))
        errors[name] = [wrong_bits(run, model, length, 4 if chosen.quick else 32) for length in sizes.lengths]
        rows.append((name, f"{trained.seconds / 60:.1f}", trained.loss, *errors[name]))
        if name == "NTM":
            draw_heads(run, sizes, model)
            if chosen.backend == "reference":
                run.speed(name, model, loss_of)
    columns = ("model", "minutes", "last loss", *(f"length {length}" for length in sizes.lengths))
    run.table("Wrong bits of a sequence", columns, rows)
    draw_errors(run, sizes, errors)
    run.finish()


if __name__ == "__main__":
    main()
