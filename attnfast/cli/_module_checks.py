"""The rows of ``python -m attnfast gradcheck`` for the modules of attnfast.nn, with their parameters as inputs.

Modules are in evaluation mode: nothing is drawn. Networks around a memory that answer with words, or with -inf where
nothing may be seen, are checked by their losses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnfast import nn

from ._derivatives import Check, draw

Checks = dict[tuple[str, str], Check]


def module_checks() -> Checks:
    """By public name and case."""
    return {**_attention(), **_networks(), **_memory_networks()}


def _attention() -> Checks:
    query, memory, lengths = draw(2, 3, 4), draw(2, 5, 3), torch.tensor([5, 3])
    same, step = draw(2, 5, 4), draw(2, 4)
    mask = torch.rand(2, 3, 5) < 0.6
    mask[0, 0] = False  # one row that sees nothing
    previous = torch.rand(2, 5, dtype=torch.float64).softmax(-1).requires_grad_()
    tokens = draw(3, 2, 4), draw(5, 2, 4), draw(5, 2, 4)
    padding = torch.tensor([[False] * 5, [False, True, False, True, True]])

    def attend(module: torch.nn.Module, *inputs: Tensor, **options: Any) -> Check:
        return _module(module, *inputs, call=lambda m, *x: m(*x, lengths, **options))

    def luong(score: str, *, local: str | None = None, keys: Tensor = memory) -> Check:
        module = nn.LuongAttention(4, keys.shape[-1], score, local, window=2, max_length=6)
        return attend(module, query, keys)

    def located(m: Any, q: Tensor, memory: Tensor, before: Tensor) -> Any:
        return m(q, memory, lengths, previous=before)

    return {
        ("nn.Attention", "plain"): attend(nn.Attention(4, 3), query, memory),
        ("nn.Attention", "grouped heads, cosine, entmax15"): attend(
            nn.Attention(4, 3, heads=2, kv_heads=1, score="cosine", normalizer="entmax15"), query, memory
        ),
        ("nn.Attention", "additive, mask"): attend(
            nn.Attention(4, 3, score="additive"), query, memory, mask=mask[:, None], return_weights=True
        ),
        ("nn.BahdanauAttention", "plain"): attend(nn.BahdanauAttention(4, 3, 2), query, memory),
        ("nn.ContentAttention", "plain"): attend(nn.ContentAttention(4, 3), query, memory),
        ("nn.HardAttention", "evaluation"): _module(
            nn.HardAttention(4, 3, 2), query, memory, call=lambda m, *x: m(*x, lengths)[:3]
        ),
        ("nn.LocationAttention", "plain"): attend(nn.LocationAttention(4, 3, max_length=6), query, memory),
        ("nn.LocationSensitiveAttention", "second step"): _module(
            nn.LocationSensitiveAttention(4, 3, 2, filters=2, kernel_size=3), step, memory, previous, call=located
        ),
        ("nn.LuongAttention", "general"): luong("general"),
        ("nn.LuongAttention", "dot"): luong("dot", keys=same),
        ("nn.LuongAttention", "concat"): luong("concat"),
        ("nn.LuongAttention", "location, local-m"): luong("location", local="m"),
        ("nn.LuongAttention", "general, local-p"): luong("general", local="p"),
        ("nn.MultiheadAttention", "plain"): _module(nn.MultiheadAttention(4, 2), *tokens),
        ("nn.MultiheadAttention", "bias_kv, zero_attn"): _module(
            nn.MultiheadAttention(4, 2, add_bias_kv=True, add_zero_attn=True),
            *tokens,
            call=lambda m, *x: m(*x, key_padding_mask=padding, average_attn_weights=False),
        ),
    }


def _networks() -> Checks:
    words = torch.tensor([[1, 4, 0], [3, 2, 5]])
    story = torch.tensor([[[1, 2], [4, 0], [5, 3]], [[2, 2], [3, 1], [0, 0]]])
    features = draw(2, 5), draw(2, 3, 5), draw(2, 3, 5)
    state, memory = draw(2, 3), draw(2, 4, 2)
    focus = torch.rand(2, 4, dtype=torch.float64).softmax(-1).requires_grad_()
    return {
        ("nn.NTMHead", "reading"): _module(nn.NTMHead(3, 2), state, memory, focus),
        ("nn.NTMHead", "writing"): _module(nn.NTMHead(3, 2, writes=True), state, memory, focus),
        ("nn.KeyValueMemory", "plain"): _module(nn.KeyValueMemory(5, 2), *features, call=lambda m, *x: m(*x).state),
        ("nn.EndToEndMemory", "plain"): _module(
            nn.EndToEndMemory(6, 2, slots=3, hops=2), call=lambda m: m(story, words).answers
        ),
        ("nn.ProductKeyMemory", "plain"): _module(
            nn.ProductKeyMemory(3, n_keys=3, heads=2, d_key=4, k=4, d_value=2), draw(3, 3)
        ),
    }


def _memory_networks() -> Checks:
    words = torch.tensor([[1, 4, 0], [3, 2, 5]])
    story = torch.tensor([[[1, 2], [4, 0], [5, 3]], [[2, 2], [3, 1], [0, 0]]])
    places, answers = torch.tensor([[0, 2], [1, 0]]), torch.tensor([3, 5])
    options: dict[str, Any] = {"slots": 3, "supports": 2, "margin": 5.0, "times": True, "matches": True, "mixed": 0.3}
    network = nn.MemoryNetwork(6, 2, **options)
    bags = nn.ContextBags(6, 8)
    bags.observe(torch.tensor([[6, 2, 7, 3]]))
    unknown = torch.tensor([[1, 6, 0], [7, 2, 5]])  # words 6 and 7 are known by their neighbours only

    def facts_loss(o: Any) -> Any:
        return o.loss(network.input_map(words), network.remember(story), places, places.roll(1, 1))

    def answer_loss(r: Any, *more: Any) -> Any:
        asked = network.input_map(words)
        return r.loss(asked, [asked], *more)

    def whole_loss(m: Any) -> Any:
        with torch.random.fork_rng():  # negatives are drawn: the same ones at every evaluation
            torch.manual_seed(0)
            return m.loss(story, words, places, answers)

    def score(s: Any) -> Any:
        return s(network.input_map(unknown), [network.input_map(words)], network.input_map(story))

    return {
        ("nn.MemoryNetwork", "loss"): _module(nn.MemoryNetwork(6, 2, **options), call=whole_loss),
        ("nn.OutputMap", "loss"): _module(network.output_map, call=facts_loss),
        ("nn.Response", "loss"): _module(network.response, call=lambda r: answer_loss(r, answers, answers - 1)),
        ("nn.RNNResponse", "loss"): _module(
            nn.RNNResponse(6, 2, length=3), call=lambda r: answer_loss(r, words.fliplr()[:, :2].clamp(min=1))
        ),
        ("nn.TextScore", "plain"): _module(
            nn.TextScore(6, 2, contexts=bags, matches=True, times=False, mixed=0.3), call=score
        ),
        ("nn.WordSegmenter", "loss"): _module(
            nn.WordSegmenter(6, 2, threshold=5.0), call=lambda s: s.loss(words, story[:, 0])
        ),
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
    point = [0.7 * draw(*p.shape).detach() for p in whole.parameters()]

    def function(*leaves: Tensor) -> Any:
        given = dict(zip(names, leaves[len(inputs) :], strict=True))
        found = torch.func.functional_call(whole, given, leaves[: len(inputs)])
        return tuple(x for x in found if x is not None) if isinstance(found, tuple) else found

    return Check(function, (*inputs, *(x.requires_grad_() for x in point)), len(point))
