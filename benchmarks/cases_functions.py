"""Every public function that computes, once at a small and once at a medium size: what the history of timings follows.

`FUNCTIONS` says for each how its operands are made, how attnfast is called and what torch computes the same with. The
other suites measure the same functions over sizes and options; this one is complete and quick.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .registry import EAGER, PASSES, TORCH, Inputs, register_cases

Tensors = dict[str, Tensor]
SIZES = ("small", "medium")


def _draw(generator: torch.Generator, **shapes: tuple[int, ...]) -> Tensors:
    return {name: torch.randn(shape, generator=generator).requires_grad_() for name, shape in shapes.items()}


@dataclass(frozen=True)
class Function:
    """A public function of attnfast, its operands and its counterpart in torch."""

    operands: Callable[[torch.Generator, bool], Tensors]  # leaves want a gradient; `medium` or not
    ours: Callable[[Any, Tensors], Tensor]  # the module attnfast, the operands
    theirs: Callable[[Tensors], Tensor]
    peer: str = EAGER


def _heads(generator: torch.Generator, medium: bool) -> Tensors:
    shape = (2, 8, 256, 64) if medium else (1, 2, 32, 16)
    return _draw(generator, query=shape, key=shape, value=shape)


def _packed(generator: torch.Generator, medium: bool) -> Tensors:
    lengths = (256, 160, 64) if medium else (20, 9)
    shape = (sum(lengths), 8, 64) if medium else (sum(lengths), 2, 16)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return {**_draw(generator, query=shape, key=shape, value=shape), "offsets": offsets}


def _additive(generator: torch.Generator, medium: bool) -> Tensors:
    shape = (8, 1, 64, 256) if medium else (2, 1, 12, 32)
    return _draw(generator, query=shape, key=shape, value=shape, weight=shape[-1:])


def _memory(generator: torch.Generator, medium: bool) -> Tensors:
    queries, slots, size = (64, 8192, 64) if medium else (4, 128, 16)
    return _draw(generator, query=(queries, size), keys=(slots, size), values=(slots, size))


def _searched(generator: torch.Generator, medium: bool) -> Tensors:
    found = _memory(generator, medium)
    return {name: found[name] for name in ("query", "keys")}


def _picked(generator: torch.Generator, medium: bool) -> Tensors:
    rows, picks, slots, size = (256, 32, 8192, 128) if medium else (4, 8, 128, 16)
    indices = torch.randint(slots, (rows, picks), generator=generator)
    return {**_draw(generator, weights=(rows, picks), values=(slots, size)), "indices": indices}


def _halves(generator: torch.Generator, medium: bool) -> Tensors:
    queries, heads, side, half, size = (64, 4, 64, 32, 64) if medium else (4, 2, 8, 4, 8)
    keys = (heads, side, half)
    return _draw(generator, query=(queries, heads, 2, half), rows=keys, columns=keys, values=(side * side, size))


def _lengths(x: Tensors) -> list[int]:
    return x["offsets"].diff().tolist()


def _varlen(attnfast: Any, x: Tensors) -> Tensor:
    longest = max(_lengths(x))
    out: Tensor = attnfast.varlen_attention(
        x["query"], x["key"], x["value"], x["offsets"], x["offsets"], longest, longest, causal="top_left"
    )
    return out


def _loop(x: Tensors) -> Tensor:
    """One call of torch's function for each sequence."""
    parts = zip(*(x[name].split(_lengths(x)) for name in ("query", "key", "value")), strict=True)
    done = [F.scaled_dot_product_attention(*(y.transpose(0, 1) for y in part), is_causal=True) for part in parts]
    return torch.cat([y.transpose(0, 1) for y in done])


def _eager_additive(x: Tensors) -> Tensor:
    hidden = torch.tanh(x["query"].unsqueeze(-2) + x["key"].unsqueeze(-3))
    return (hidden @ x["weight"]).softmax(-1) @ x["value"]


_TOPK = 8


def _eager_read(x: Tensors) -> Tensor:
    best = (x["query"] @ x["keys"].T).topk(_TOPK)
    return (best.values.softmax(-1).unsqueeze(-1) * x["values"][best.indices]).sum(-2)


def _eager_product_keys(x: Tensors) -> Tensor:
    side = x["rows"].shape[1]
    half = [
        torch.einsum("qhd,hnd->qhn", x["query"][:, :, i], x[name]).topk(_TOPK)
        for i, name in enumerate(("rows", "columns"))
    ]
    scores = (half[0].values.unsqueeze(-1) + half[1].values.unsqueeze(-2)).flatten(-2)
    slots = (half[0].indices.unsqueeze(-1) * side + half[1].indices.unsqueeze(-2)).flatten(-2)
    best = scores.topk(_TOPK)
    picked = x["values"][slots.gather(-1, best.indices)]
    return (best.values.softmax(-1).unsqueeze(-1) * picked).sum((-3, -2))


def _qkv(x: Tensors) -> tuple[Tensor, Tensor, Tensor]:
    return x["query"], x["key"], x["value"]


FUNCTIONS = {
    "scaled_dot_product_attention": Function(
        _heads,
        lambda attnfast, x: attnfast.scaled_dot_product_attention(*_qkv(x)),
        lambda x: F.scaled_dot_product_attention(*_qkv(x)),
        TORCH,
    ),
    "attention": Function(
        _heads,
        lambda attnfast, x: attnfast.attention(*_qkv(x), causal="top_left"),
        lambda x: F.scaled_dot_product_attention(*_qkv(x), is_causal=True),
        TORCH,
    ),
    "varlen_attention": Function(_packed, _varlen, _loop),
    "additive_attention": Function(
        _additive, lambda attnfast, x: attnfast.additive_attention(*_qkv(x), x["weight"]), _eager_additive
    ),
    "topk_scores": Function(
        _searched,
        lambda attnfast, x: attnfast.topk_scores(x["query"], x["keys"], _TOPK)[0],
        lambda x: (x["query"] @ x["keys"].T).topk(_TOPK).values,
    ),
    "weighted_gather": Function(
        _picked,
        lambda attnfast, x: attnfast.weighted_gather(x["indices"], x["weights"], x["values"]),
        lambda x: F.embedding_bag(x["indices"], x["values"], mode="sum", per_sample_weights=x["weights"]),
    ),
    "memory_read": Function(
        _memory,
        lambda attnfast, x: attnfast.memory_read(x["query"], x["keys"], x["values"], topk=_TOPK),
        _eager_read,
    ),
    "product_key_read": Function(
        _halves,
        lambda attnfast, x: attnfast.product_key_read(x["query"], x["rows"], x["columns"], x["values"], _TOPK),
        _eager_product_keys,
    ),
}


@dataclass(frozen=True)
class FunctionCase:
    """One function at one size."""

    function: str
    size: str
    passes: tuple[str, ...] = PASSES
    quick: bool = True
    compiled_peers: bool = False
    suite: str = "functions"
    settings: None = None

    @property
    def name(self) -> str:
        return f"{self.function} {self.size}"

    def columns(self) -> dict[str, Any]:
        shapes = (f"{name}:{'x'.join(map(str, x.shape))}" for name, x in self.inputs().tensors.items())
        return {"dtype": "fp32", "options": " ".join(shapes)}

    def small(self) -> FunctionCase:
        return FunctionCase(self.function, SIZES[0])

    def inputs(self) -> Inputs:
        function, generator = FUNCTIONS[self.function], torch.Generator().manual_seed(0)
        tensors = function.operands(generator, self.size == "medium")
        with torch.no_grad():
            out = function.theirs(tensors)
        wanted = tuple(name for name, x in tensors.items() if x.requires_grad)
        return Inputs(tensors, wanted, torch.randn(out.shape, generator=generator))

    def flops(self, which: str) -> float:
        raise NotImplementedError("the suite has no yardsticks")

    def streamed(self, inputs: Inputs) -> tuple[Tensor, ...]:
        return ()

    def oracle_part(self, name: str, tensor: Tensor) -> Tensor:
        return tensor

    def oracle(self, inputs: Inputs) -> tuple[Tensor, tuple[Tensor, ...]]:
        """torch's formula in float64."""
        exact = {name: x.detach().double() if x.is_floating_point() else x for name, x in inputs.tensors.items()}
        leaves = [exact[name].requires_grad_() for name in inputs.wanted]
        out = FUNCTIONS[self.function].theirs(exact)
        return out.detach(), torch.autograd.grad(out, leaves, inputs.grad_out.double())


register_cases(FunctionCase(function, size) for function in FUNCTIONS for size in SIZES)
