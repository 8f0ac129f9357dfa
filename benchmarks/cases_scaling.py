"""How time and memory grow with the number of tokens T: both cores dense, with a local window, and as Luong's local-p.

Dense attention does work in T^2, and what a fused one needs beside its results grows with T. A window of 2 x 10 + 1
keys leaves work in T, which is set beside dense calls of attnfast over as many pairs of a query and a key: one with the
same queries and 21 keys, and one with as many queries as keys, which reads and writes far less for its pairs. Local-p
has its window around a centre of each query, which moves along the keys with some noise, and the Gaussian prior there.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from .cases_additive import AdditiveCase
from .cases_dot import AttentionCase
from .measure import Settings
from .peers import eager_additive, eager_attention
from .registry import EAGER, OURS, PASSES, TORCH, Inputs, Peer, Unsupported, Workload, register_cases, register_peer

TOKENS = tuple(2**i for i in range(7, 14))
LOCAL_TOKENS = tuple(2**i for i in range(10, 14))
WINDOW = 10  # keys on either side of a query's own position
DENSE_ROWS, DENSE_SQUARE = "dense T x 21", "dense square"
MOST_BYTES = 4 * 2**30  # what eager may hold
# Beside one another in a training step of the eager additive formula: tanh, the gradient by it, and what comes of that.
_TRIPLE_TENSORS = 3
_BRIEF = Settings(sample_s=0.002, budget_s=0.4, min_rounds=3, max_rounds=21)


def local_pairs(tokens: int, window: int) -> int:
    """Pairs of a query and a key at most `window` positions apart, of `tokens` each."""
    reach = min(window, tokens - 1)
    return tokens * (2 * reach + 1) - reach * (reach + 1)


@dataclass(frozen=True)
class ScalingCase(AttentionCase):
    """Dot-product attention over T tokens; `window` 0 is none. Correctness is the tests' business."""

    suite: str = "scaling"
    settings: Settings | None = _BRIEF
    window: int = 0
    predicted: bool = False  # local-p

    @property
    def options(self) -> str:
        return f"window:{self.window}" if self.window else ""

    def visible_pairs(self) -> float:
        tokens = self.query_tokens
        return float(self.batch * (local_pairs(tokens, self.window) if self.window else tokens * self.key_tokens))

    def oracle(self, inputs: Inputs) -> Any:
        return None


@dataclass(frozen=True)
class AdditiveScalingCase(AdditiveCase):
    """Additive attention over T tokens; `window` 0 is none."""

    suite: str = "scaling"
    settings: Settings | None = _BRIEF
    compiled_peers: bool = False
    window: int = 0
    predicted: bool = False

    @property
    def options(self) -> str:
        return f"window:{self.window}" if self.window else ""

    def triples(self) -> float:
        tokens = self.query_tokens
        pairs = local_pairs(tokens, self.window) if self.window else tokens * self.key_tokens
        return float(self.batch * pairs * self.head_size)

    def small(self) -> AdditiveScalingCase:
        return replace(self, query_tokens=min(self.query_tokens, 8), key_tokens=min(self.key_tokens, 8))

    def oracle(self, inputs: Inputs) -> Any:
        return None


Case = ScalingCase | AdditiveScalingCase


def _workload(function: Callable[..., Any], tensors: dict[str, torch.Tensor], grad: torch.Tensor) -> Workload:
    return Workload(functools.partial(function, *tensors.values()), tuple(tensors.values()), grad)


def _ours(case: Case, **options: Any) -> Callable[..., Any]:
    import attnfast

    function = attnfast.additive_attention if isinstance(case, AdditiveCase) else attnfast.attention
    return functools.partial(function, **options)


def centers(case: Case) -> torch.Tensor:
    """Where the queries of a local-p case look, ``[T]``: their own places, but for a few keys this way or that. Whole
    numbers, so that a window holds as many keys as one around the place itself.
    """
    noise = torch.randn(case.query_tokens, generator=torch.Generator().manual_seed(0))
    return torch.arange(case.query_tokens) + (2.0 * noise).round()


class Attnfast(Peer):
    name = OURS
    suites = ("scaling",)

    def build(self, case: Case, inputs: Inputs) -> Workload:
        options: dict[str, Any] = {"window": (case.window, case.window)} if case.window else {}
        if not case.predicted:
            return _workload(_ours(case, **options), inputs.tensors, inputs.grad_out)
        center = centers(case).requires_grad_()
        options |= {"window_center": center.detach(), "prior": ("gaussian", center, case.window / 2)}
        plain = _workload(_ours(case, **options), inputs.tensors, inputs.grad_out)
        return replace(plain, wanted=(*plain.wanted, center))


class Dense(Peer):
    """attnfast without a window, over as many pairs as the window leaves: the first tokens of the case's own."""

    suites = ("scaling",)

    def __init__(self, name: str, square: bool) -> None:
        self.name, self.square = name, square

    def build(self, case: Case, inputs: Inputs) -> Workload:
        if not case.window:
            raise Unsupported("")
        queries, keys = case.query_tokens, min(2 * case.window + 1, case.query_tokens)
        if self.square:
            queries = keys = round(math.sqrt(local_pairs(case.query_tokens, case.window)))
        tokens = {"query": queries, "key": keys, "value": keys}

        def first(name: str, tensor: torch.Tensor) -> torch.Tensor:
            part = tensor.detach()
            part = part[..., : tokens[name], :].clone() if name in tokens else part.clone()
            return part.contiguous().requires_grad_()

        tensors = {name: first(name, tensor) for name, tensor in inputs.tensors.items()}
        return _workload(_ours(case), tensors, inputs.grad_out[..., :queries, :].contiguous())


class TorchSdpa(Peer):
    name = TORCH
    suites = ("scaling",)

    def build(self, case: Case, inputs: Inputs) -> Workload:
        if case.window or isinstance(case, AdditiveCase):
            raise Unsupported("")
        return _workload(F.scaled_dot_product_attention, inputs.tensors, inputs.grad_out)


class Eager(Peer):
    """The textbook formulas, as far as their tensors of all pairs, or of all triples, are small enough to try."""

    name = EAGER
    suites = ("scaling",)

    def build(self, case: Case, inputs: Inputs) -> Workload:
        if case.window:
            raise Unsupported("")
        if isinstance(case, AdditiveCase):
            size = inputs["query"].element_size()
            needed = _TRIPLE_TENSORS * case.triples() * size
            if needed > MOST_BYTES:
                raise Unsupported(
                    f"its {_TRIPLE_TENSORS} tensors of T_q x T_k x D = {case.query_tokens} x {case.key_tokens} x "
                    f"{case.head_size} need {needed / 2**30:.0f} GiB, more than {MOST_BYTES / 2**30:.0f}"
                )
            return _workload(eager_additive, inputs.tensors, inputs.grad_out)
        return _workload(eager_attention, inputs.tensors, inputs.grad_out)


for _peer in (Attnfast(), TorchSdpa(), Eager(), Dense(DENSE_ROWS, False), Dense(DENSE_SQUARE, True)):
    register_peer(_peer)


def _name(kind: str, tokens: int, size: int) -> str:
    return f"{kind} T={tokens} D={size}"


def _dot(kind: str, tokens: int, window: int = 0, predicted: bool = False) -> ScalingCase:
    return ScalingCase(
        _name(kind, tokens, 64),
        heads=2,
        query_tokens=tokens,
        quick=tokens <= 1024,
        passes=PASSES,
        window=window,
        predicted=predicted,
    )


def _additive(kind: str, tokens: int, window: int = 0, predicted: bool = False) -> AdditiveScalingCase:
    return AdditiveScalingCase(
        _name(kind, tokens, 256),
        query_tokens=tokens,
        head_size=256,
        quick=tokens <= 1024,
        passes=PASSES,
        window=window,
        predicted=predicted,
    )


register_cases(
    [
        *(_dot("dot", tokens) for tokens in TOKENS),
        *(_additive("additive", tokens) for tokens in TOKENS),
        *(_dot("dot, window", tokens, WINDOW) for tokens in LOCAL_TOKENS),
        *(_additive("additive, window", tokens, WINDOW) for tokens in LOCAL_TOKENS),
        *(_dot("dot, local-p", tokens, WINDOW, True) for tokens in LOCAL_TOKENS),
        *(_additive("additive, local-p", tokens, WINDOW, True) for tokens in LOCAL_TOKENS),
    ]
)
