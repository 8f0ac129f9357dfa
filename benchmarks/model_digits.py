"""A real model on real data: a transformer encoder that reads handwritten digits.

Each 8 x 8 image of scikit-learn's digits becomes 16 tokens, its 2 x 2 patches. The model is torch.nn.TransformerEncoder
with a linear layer on either side. It is trained from one seed on the same batches with torch's attention, with it
held to its unfused path, and with attnfast's, step by step in turn; only the function behind one name differs.
Rounding differs between the three and training amplifies it, so the distance between torch's two paths says
what agreement can be asked for.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import attnfast

from .measure import Summary, round_order
from .registry import OURS, TORCH
from .results import Row

_WIDTH, _HEADS, _LAYERS, _BATCH = 64, 4, 2, 128
_WARM_UP = 3  # steps left out of the times
_MATH = "sdpa math"
_PEERS = (OURS, TORCH, _MATH)


class DigitsModel(nn.Module):
    """Patches [B, 16, 4] -> class scores [B, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, _WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn(16, _WIDTH))
        layer = nn.TransformerEncoderLayer(_WIDTH, _HEADS, 4 * _WIDTH, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, _LAYERS)
        self.classify = nn.Linear(_WIDTH, 10)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        tokens = self.encoder(self.embed(patches) + self.position)
        return self.classify(tokens.mean(dim=1))


@contextlib.contextmanager
def attention_of(name: str) -> Iterator[None]:
    """Let torch's modules compute attention with that peer inside the block."""
    original = F.scaled_dot_product_attention
    if name == OURS:
        F.scaled_dot_product_attention = attnfast.scaled_dot_product_attention
    try:
        with sdpa_kernel(SDPBackend.MATH) if name == _MATH else contextlib.nullcontext():
            yield
    finally:
        F.scaled_dot_product_attention = original


def load_digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Patches [1797, 16, 4] scaled to 0..1, and labels."""
    from sklearn.datasets import load_digits as sklearn_digits

    digits = sklearn_digits()
    images = torch.from_numpy(digits.images).float() / 16
    patches = images.unfold(1, 2, 2).unfold(2, 2, 2).reshape(len(images), 16, 4)
    return patches, torch.from_numpy(digits.target).long()


@dataclass
class Training:
    """What one of the trainings showed."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    accuracy: float = 0.0


def train(steps: int, seed: int = 0, seconds: float = math.inf) -> dict[str, Training]:
    """Train all models step by step in turn; every fifth image is kept for the accuracy.

    Past `seconds` no further step is begun, but for the few that a median needs.
    """
    patches, labels = load_digits()
    held_out = torch.arange(len(labels)) % 5 == 0
    train_x, train_y, test_x, test_y = patches[~held_out], labels[~held_out], patches[held_out], labels[held_out]
    models, optimisers, trainings = {}, {}, {}
    for name in _PEERS:
        torch.manual_seed(seed)
        models[name] = DigitsModel().train()
        optimisers[name] = torch.optim.AdamW(models[name].parameters(), lr=1e-3)
        trainings[name] = Training()
    generator = torch.Generator().manual_seed(seed)
    begin = time.perf_counter()
    for index in range(steps):
        if index > 2 * _WARM_UP and time.perf_counter() - begin > seconds:
            break
        chosen = torch.randint(len(train_y), (_BATCH,), generator=generator)
        x, y = train_x[chosen], train_y[chosen]
        for name in round_order(_PEERS, index):
            start = time.perf_counter()
            with attention_of(name):
                loss = F.cross_entropy(models[name](x), y)
                optimisers[name].zero_grad()
                loss.backward()
                optimisers[name].step()
            trainings[name].seconds.append(time.perf_counter() - start)
            trainings[name].losses.append(loss.item())
    for name, model in models.items():
        model.eval()
        # With gradients on, the module takes its ordinary path, so the attention in question is the one evaluated.
        with attention_of(name):
            found = model(test_x).argmax(dim=-1)
        trainings[name].accuracy = (found == test_y).float().mean().item()
    return trainings


def largest_difference(trainings: dict[str, Training], name: str = OURS) -> float:
    """Of the losses of torch's training and another, at any step."""
    return max(abs(a - b) for a, b in zip(trainings[TORCH].losses, trainings[name].losses))


def rows(threads: int, quick: bool) -> list[Row]:
    trainings = train(steps=40, seconds=8.0) if quick else train(steps=300)
    differences = {name: largest_difference(trainings, name) for name in _PEERS}
    kept = {name: training.seconds[_WARM_UP:] for name, training in trainings.items()}
    results = []
    for name in _PEERS:
        training, seconds = trainings[name], Summary.of(kept[name])
        ratio = Summary.of([a / b for a, b in zip(kept[name], kept[OURS])])
        results.append(
            Row(
                suite="model",
                case="digits transformer, training",
                pass_="step",
                threads=threads,
                peer=name,
                note=f"loss {training.losses[0]:.4f} -> {training.losses[-1]:.4f} in {len(training.losses)} steps, "
                f"held-out accuracy {training.accuracy:.3f}; "
                f"largest loss difference to sdpa at any step {differences[name]:.1e}",
                dtype="fp32",
                batch=_BATCH,
                heads=_HEADS,
                kv_heads=_HEADS,
                query_tokens=16,
                key_tokens=16,
                head_size=_WIDTH // _HEADS,
                value_size=_WIDTH // _HEADS,
                rounds=len(kept[name]),
                calls_per_round=1,
                time_ms=1e3 * seconds.median,
                time_ms_q25=1e3 * seconds.low,
                time_ms_q75=1e3 * seconds.high,
                ratio=ratio.median,
                ratio_q25=ratio.low,
                ratio_q75=ratio.high,
                error=None if name == TORCH else differences[name],
                quick=quick,
            )
        )
    return results
