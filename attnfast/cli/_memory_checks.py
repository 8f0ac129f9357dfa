"""The rows of ``python -m attnfast gradcheck`` for the memory functions and the networks around a memory.

Which slots are chosen has no derivative, so a point must not lie where two scores are equal: all operands are drawn at
random, and steps of finite differences are far smaller than what scores differ by.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import attnfast
from attnfast import nn

Check = tuple[Callable[..., Any], tuple[Tensor, ...]]


def _draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def memory_checks() -> dict[str, Check]:
    """A function of differentiable float64 tensors and the point to check it at, by name."""
    return {**_functions(), **_networks()}


def _functions() -> dict[str, Check]:
    query, keys, values = _draw(3, 4), _draw(7, 4), _draw(7, 4)
    weights, vector, bias = _draw(3, 2), _draw(4), _draw(4)
    indices = torch.tensor([[0, 5], [5, -1], [2, 2]])
    mask = torch.rand(3, 7) < 0.6
    mask[0] = False  # one query that sees nothing
    lists = torch.tensor([0, 3, 3, 7]), torch.tensor([0, 2, 6, 1, 3, 4, 5])
    halves = _draw(2, 2, 2, 3), _draw(2, 4, 3), _draw(2, 4, 3), _draw(16, 2)

    def read(**options: Any) -> Check:
        return lambda q, k, v: attnfast.memory_read(q, k, v, **options), (query, keys, values)

    return {
        "topk_scores": (lambda q, k: attnfast.topk_scores(q, k, 3, scale=0.7)[0], (query, keys)),
        "weighted_gather": (lambda w, v: attnfast.weighted_gather(indices, w, v), (weights, values)),
        "memory_read": read(),
        "memory_read, mask": read(mask=mask),
        "memory_read, entmax15": read(normalizer="entmax15"),
        "memory_read, candidates": read(candidates=lists),
        "memory_read, 3 hops": read(hops=3),
        "memory_read, topk": read(topk=3),
        "memory_read, topk cosine": read(topk=3, score="cosine"),
        "memory_read, topk l2 2 hops": read(topk=3, score="l2", hops=2, hop="replace"),
        "memory_read, topk candidates": read(topk=2, candidates=lists),
        "memory_read, topk additive": (
            lambda q, k, v, w, b: attnfast.memory_read(q, k, v, topk=3, score=("additive", w, b)),
            (query, keys, values, vector, bias),
        ),
        "product_key_read": (lambda q, r, c, v: attnfast.product_key_read(q, r, c, v, 5), halves),
    }


def _networks() -> dict[str, Check]:
    words = torch.tensor([[1, 4, 0], [3, 2, 5]])
    story = torch.tensor([[[1, 2], [4, 0], [5, 3]], [[2, 2], [3, 1], [0, 0]]])
    features = _draw(2, 5), _draw(2, 3, 5), _draw(2, 3, 5)
    state, memory = _draw(2, 3), _draw(2, 4, 2)
    focus = torch.rand(2, 4, dtype=torch.float64).softmax(-1).requires_grad_()
    network = nn.MemoryNetwork(6, 2, slots=3, supports=2, margin=5.0, times=True, matches=True, mixed=0.3)
    places, answers = torch.tensor([[0, 2], [1, 0]]), torch.tensor([3, 5])
    responder = nn.RNNResponse(6, 2, length=3)

    def facts_loss(o: Any) -> Tensor:
        loss: Tensor = o.loss(network.input_map(words), network.remember(story), places, places.roll(1, 1))
        return loss

    def answer_loss(r: Any, *more: Any) -> Tensor:
        asked = network.input_map(words)
        loss: Tensor = r.loss(asked, [asked], *more)
        return loss

    return {
        "NTMHead, reading": _module(nn.NTMHead(3, 2), state, memory, focus),
        "NTMHead, writing": _module(nn.NTMHead(3, 2, writes=True), state, memory, focus),
        "KeyValueMemory": _module(nn.KeyValueMemory(5, 2), *features, call=lambda m, *x: m(*x).state),
        "EndToEndMemory": _module(nn.EndToEndMemory(6, 2, slots=3, hops=2), call=lambda m: m(story, words).answers),
        "MemoryNetwork, O": _module(network.output_map, call=facts_loss),
        "MemoryNetwork, R": _module(network.response, call=lambda r: answer_loss(r, answers, answers - 1)),
        "MemoryNetwork, RNN": _module(responder, call=lambda r: answer_loss(r, words.fliplr()[:, :2].clamp(min=1))),
        "ProductKeyMemory": _module(nn.ProductKeyMemory(3, n_keys=3, heads=2, d_key=4, k=4, d_value=2), _draw(3, 3)),
    }


class _Called(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.inner, self.call = inner, call

    def forward(self, *inputs: Tensor) -> Any:
        return self.call(self.inner, *inputs)


def _module(module: torch.nn.Module, *inputs: Tensor, call: Callable[..., Any] = lambda m, *x: m(*x)) -> Check:
    """A module as a function of its inputs and parameters, these drawn anew at an ordinary size."""
    whole = _Called(module.double(), call).eval()  # nothing random
    names = [name for name, _ in whole.named_parameters()]
    point = [0.7 * _draw(*p.shape).detach() for p in whole.parameters()]

    def function(*leaves: Tensor) -> Any:
        given = dict(zip(names, leaves[len(inputs) :], strict=True))
        return torch.func.functional_call(whole, given, leaves[: len(inputs)])

    return function, (*inputs, *(x.requires_grad_() for x in point))
