"""A small causal Transformer with and without a product-key memory, trained with attnfast and with plain torch.

Its text is the manual that Python carries for ``pydoc``. Characters, ALiBi positions (Press et al. 2022) in place of
embeddings. The same model is trained from the same seed with attnfast and with plain torch (its
`scaled_dot_product_attention`, and product keys with its `topk` and `embedding_bag`): the losses must agree within
rounding, and the table says how fast each is.

    python examples/language_model.py
"""

from __future__ import annotations

import contextlib
import math
import platform
import pydoc_data.topics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from attnfast.benchmarks.measure import Settings, interleave
from backends import backend, sampler
from torch import Tensor, nn
from training import Experiment, Trained, one_cycle, parser

import attnfast
from attnfast.nn import ProductKeyMemory
from attnfast.nn import _product_keys as product_keys


@dataclass(frozen=True)
class Sizes:
    size: int
    heads: int
    layers: int
    context: int
    batch: int
    steps: int
    keys: int  # of a half: the memory has keys ** 2 slots
    picks: int


FULL = Sizes(size=128, heads=4, layers=3, context=256, batch=8, steps=300, keys=64, picks=16)
QUICK = Sizes(size=16, heads=2, layers=2, context=24, batch=2, steps=3, keys=6, picks=4)


def manual() -> Tensor:
    """Python's manual as ``pydoc`` ships it, one number a character; what is rare is one character."""
    topics = pydoc_data.topics.topics
    text = "\n".join(topics[name] for name in sorted(topics))
    common = sorted(set(text[: len(text) // 2]))[:127]
    number = {character: index + 1 for index, character in enumerate(common)}
    return torch.tensor([number.get(character, 0) for character in text])


class Block(nn.Module):
    """Pre-norm layer; its second half is a product-key memory where `memory` is given, else a feed-forward network."""

    def __init__(self, sizes: Sizes, memory: bool) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.norms = nn.ModuleList(nn.LayerNorm(sizes.size) for _ in range(2))
        self.qkv = nn.Linear(sizes.size, 3 * sizes.size)
        self.out = nn.Linear(sizes.size, sizes.size)
        if memory:
            self.inner: nn.Module = ProductKeyMemory(sizes.size, n_keys=sizes.keys, heads=2, d_key=64, k=sizes.picks)
        else:
            self.inner = nn.Sequential(
                nn.Linear(sizes.size, 4 * sizes.size), nn.GELU(), nn.Linear(4 * sizes.size, sizes.size)
            )

    def forward(self, x: Tensor, attend: Any) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(attend(q, k, v).transpose(1, 2).flatten(2))
        return x + self.inner(self.norms[1](x))


class LanguageModel(nn.Module):
    """Logits of the next character. `plain`: with torch's own attention, else with attnfast's."""

    def __init__(self, sizes: Sizes, words: int, memory: bool, plain: bool) -> None:
        super().__init__()
        self.plain = plain
        self.embedding = nn.Embedding(words, sizes.size)
        nn.init.normal_(self.embedding.weight, std=0.02)
        # As in Lample et al.: one memory, above the middle of the network.
        self.blocks = nn.ModuleList(Block(sizes, memory and i == sizes.layers // 2) for i in range(sizes.layers))
        self.norm = nn.LayerNorm(sizes.size)
        self.slopes: Tensor
        self.bias: Tensor
        slopes = 2.0 ** (-8.0 * torch.arange(1, sizes.heads + 1) / sizes.heads)
        self.register_buffer("slopes", slopes, persistent=False)
        distance = torch.arange(sizes.context).unsqueeze(0) - torch.arange(sizes.context).unsqueeze(1)
        masked = (slopes.view(-1, 1, 1) * distance).masked_fill(distance > 0, -math.inf)
        self.register_buffer("bias", masked, persistent=False)

    def forward(self, text: Tensor) -> Tensor:
        x = self.embedding(text)
        for block in self.blocks:
            x = block(x, self._plain if self.plain else self._fused)
        return nn.functional.linear(self.norm(x), self.embedding.weight)

    def _fused(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attnfast.attention(q, k, v, causal="top_left", alibi_slopes=self.slopes)
        assert isinstance(out, Tensor)
        return out

    def _plain(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # torch has no ALiBi: the mask is H x T x T numbers, read in each layer.
        return nn.functional.scaled_dot_product_attention(q, k, v, self.bias[:, : q.shape[2], : q.shape[2]])


def plain_read(query: Tensor, row_keys: Tensor, column_keys: Tensor, values: Tensor, topk: int, **_: Any) -> Tensor:
    """The read with torch's operations: the best of each half, the best of their sums (Lample et al. 2019, section
    3.1), and a weighted bag of embeddings."""
    halves = zip(query.unbind(-2), (row_keys, column_keys))
    (first, row), (second, column) = (torch.einsum("...hd,hnd->...hn", *pair).topk(topk) for pair in halves)
    scores, pair = (first.unsqueeze(-1) + second.unsqueeze(-2)).flatten(-2).topk(topk)
    slots = row.gather(-1, pair // topk) * row_keys.shape[-2] + column.gather(-1, pair % topk)
    tokens = query.shape[:-3]
    read = nn.functional.embedding_bag(
        slots.view(tokens.numel(), -1), values, mode="sum",
        per_sample_weights=scores.softmax(-1).view(tokens.numel(), -1),
    )  # fmt: skip
    return read.view(*tokens, -1)


class PlainReads:
    """Within it product-key memories read with torch's operations."""

    def __enter__(self) -> None:
        self.before = product_keys.product_key_read
        product_keys.product_key_read = plain_read

    def __exit__(self, *_: object) -> None:
        product_keys.product_key_read = self.before


def batch_of(text: Tensor, sizes: Sizes, generator: torch.Generator) -> Tensor:
    """Random windows of the text, ``[B, T + 1]``."""
    starts = torch.randint(len(text) - sizes.context - 1, (sizes.batch,), generator=generator)
    return text[starts.unsqueeze(1) + torch.arange(sizes.context + 1)]


def loss_of(model: nn.Module, window: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())


def perplexity(model: nn.Module, text: Tensor, sizes: Sizes, most: int) -> float:
    """Per character, over up to `most` windows side by side, from the first on."""
    count = min(most, (len(text) - 1) // sizes.context)
    starts = torch.arange(count).unsqueeze(1) * sizes.context + torch.arange(sizes.context + 1)
    with torch.no_grad():
        total = [loss_of(model, text[rows]).item() * len(rows) for rows in starts.split(sizes.batch)]
    return math.exp(sum(total) / count)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--double", action="store_true", help="float64, where rounding parts the curves later")
    chosen = options.parse_args(arguments)
    sizes = QUICK if chosen.quick else FULL
    steps = chosen.steps or sizes.steps
    run = Experiment(f"language_model{'-double' if chosen.double else ''}", chosen, script="language_model")
    text = manual()
    words = int(text.max()) + 1
    kept = max(2 * sizes.context, len(text) // 20)
    train, test = text[:-kept], text[-kept:]
    run.text(
        f"The topics of pydoc, Python {platform.python_version()}: {len(train)} characters to learn from, {kept} to"
        f" test on, {words} different ones. {sizes.layers} layers of {sizes.size}, {sizes.heads} heads, context"
        f" {sizes.context}; the memory has {sizes.keys**2} slots, of which 2 heads read {sizes.picks} each. {steps}"
        f" steps of {sizes.batch} windows."
    )
    rows, curves = [], {}
    for memory in (False, True):
        trained: dict[str, Trained] = {}
        models: dict[str, LanguageModel] = {}
        for name in (chosen.backend, "torch"):
            label = f"{name}{'-memory' if memory else ''}"
            # One label for both: the same first weights.
            model = run.build(f"memory {memory}", partial(LanguageModel, sizes, words, memory, name == "torch"))
            if chosen.double:
                model.double()
            with PlainReads() if name == "torch" else contextlib.nullcontext():
                trained[name] = teach(run, label, model, train, sizes, steps)
                quality = perplexity(model, test, sizes, 4 if chosen.quick else 64)
            models[name] = model
            curves[label] = trained[name].losses
            tokens = steps * sizes.batch * sizes.context / trained[name].seconds
            size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
            minutes = f"{trained[name].seconds / 60:.1f}"
            rows.append((label, f"{size:.2f}", minutes, quality, math.log2(quality), f"{tokens:.0f}"))
        compare(run, sizes, train, memory, trained, models)
        if memory and chosen.backend == "reference":
            model = models["reference"]

            def step_loss(step: int, model: LanguageModel = model) -> Tensor:
                return loss_of(model, batch_of(train, sizes, run.generator("windows", step)))

            run.speed("the model with the memory", model, step_loss)
    run.table(
        "Held-out text", ("model", "million weights", "minutes", "perplexity", "bits a character", "tokens/s"), rows
    )
    draw(run, curves)
    run.finish()


def teach(run: Experiment, label: str, model: LanguageModel, text: Tensor, sizes: Sizes, steps: int) -> Trained:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = one_cycle(optimizer, 2e-3, steps, 0.1)
    return run.train(
        label, model, lambda step: loss_of(model, batch_of(text, sizes, run.generator("windows", step))), steps,
        optimizer, schedule=schedule, clip=1.0, save_every=max(1, steps // 3),
    )  # fmt: skip


def compare(
    run: Experiment,
    sizes: Sizes,
    train: Tensor,
    memory: bool,
    trained: dict[str, Trained],
    models: dict[str, LanguageModel],
) -> None:
    """How far the two loss curves are apart, and how long a step takes on each, in turn."""
    window = batch_of(train, sizes, run.generator("timing"))

    def step(name: str) -> None:
        models[name].zero_grad(set_to_none=True)
        if name == "torch":
            with PlainReads():
                loss_of(models[name], window).backward()
        else:
            loss_of(models[name], window).backward()

    ours = next(name for name in models if name != "torch")
    with backend(ours):
        settings = Settings(budget_s=0.2 if run.options.quick else 10.0)
        timing = interleave({name: sampler(partial(step, name)) for name in models}, settings)
    seconds = {name: timing.time(name).median for name in models}
    apart = [abs(a - b) for a, b in zip(trained[ours].losses, trained["torch"].losses)]
    what = "with the memory" if memory else "without the memory"
    run.text(
        f"One step {what}, interleaved, {run.options.threads} thread(s): {ours} {1e3 * seconds[ours]:.1f} ms, torch"
        f" {1e3 * seconds['torch']:.1f} ms, {seconds['torch'] / seconds[ours]:.2f} times as fast. Loss curves: first"
        f" step apart by {apart[0]:.1e}, the first ten by {max(apart[:10]):.1e} at most, all by {max(apart):.1e}."
    )


def draw(run: Experiment, curves: dict[str, list[float]]) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.5, 4), layout="constrained")
    for label, losses in curves.items():
        axes.plot(losses, "--" if label.startswith("torch") else "-", label=label, linewidth=1)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats a character")
    axes.legend()
    run.figure("loss", figure, "Training loss from the same seed; the dashed lines (torch) lie on the solid ones.")


if __name__ == "__main__":
    main()
