"""The vocabulary of the benchmark: a case is what is computed, a peer is who computes it.

A case makes its inputs from a fixed seed and knows its oracle. A peer turns (case, inputs) into a `Workload`, or says
with `Unsupported` why it cannot. A suite is a group of cases with one meaning; the model suite brings its own runner.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from .measure import Settings

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"
PASSES = (FORWARD, BACKWARD, BOTH)
OURS = "attnfast"
TORCH = "sdpa"  # the peer that every headline ratio is taken against
EAGER = "eager"  # the same where torch has no function of its own


@dataclass(frozen=True)
class Suite:
    """A group of cases that answer one question, and how a run treats them."""

    name: str
    title: str
    default: bool = True  # runs when no suite is named
    compared: bool = True  # the ratios to peers are wins and losses; else the suite prints a table of its own
    memory: bool = True  # peak memory is measured
    yardsticks: bool = True  # the machine's limits and one thread's time are measured in the same rounds
    hurried: bool = True  # a quick run that is late leaves its cases out
    whole_memory: bool = False  # memory of forward+backward too, which holds what the forward saves
    gpu: bool = False  # runs on a GPU when no suite is named


SUITES = {
    suite.name: suite
    for suite in (
        Suite("dot", "Dot-product attention", gpu=True),
        Suite("additive", "Additive attention", yardsticks=False),
        Suite("topk", "The best slots of a memory"),
        Suite("threads", "How work is shared by threads"),
        Suite("masks", "What a mask costs", compared=False, memory=False, yardsticks=False),
        Suite("accuracy", "Error against float64", default=False, memory=False, yardsticks=False),
        Suite("overhead", "Cost of a call", memory=False, yardsticks=False, hurried=False),
        Suite("functions", "Every public function", default=False, memory=False, yardsticks=False, hurried=False),
        Suite("sweep", "Head sizes by tokens", default=False, compared=False, memory=False, yardsticks=False),
        Suite(
            "scaling",
            "Time and memory by tokens",
            default=False,
            compared=False,
            yardsticks=False,
            whole_memory=True,
        ),
        Suite("gather", "Weighted rows of a table", default=False, memory=False, yardsticks=False),
        Suite("pkm", "Product-key memory", default=False, yardsticks=False, whole_memory=True),
        Suite("gpu", "Dot-product attention at the sizes of a GPU", default=False, yardsticks=False, gpu=True),
        Suite("store", "A memory under writes, deletes and reads", default=False, memory=False, yardsticks=False),
        Suite(
            "modules",
            "torch.nn.MultiheadAttention and TransformerEncoder",
            default=False,
            memory=False,
            yardsticks=False,
        ),
        Suite(
            "distributed",
            "Several processes: traffic, memory, waiting",
            default=False,
            compared=False,
            memory=False,
            yardsticks=False,
        ),
        Suite("model", "A transformer encoder on scikit-learn's digits"),
    )
}


class Unsupported(Exception):
    """A peer cannot run a case; the message says why and is kept in the results."""


@dataclass
class Inputs:
    """The tensors of one case by name, and which of them want a gradient."""

    tensors: dict[str, torch.Tensor]
    wanted: tuple[str, ...]
    grad_out: torch.Tensor

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def to(self, device: str) -> Inputs:
        """The same inputs on another device, as leaves."""

        if device == "cpu":
            return self

        def moved(x: torch.Tensor) -> torch.Tensor:
            return x.detach().to(device).requires_grad_(x.requires_grad)

        return Inputs({name: moved(x) for name, x in self.tensors.items()}, self.wanted, moved(self.grad_out))


@dataclass
class Workload:
    """A peer's ready-made computation: no argument left to prepare, so that only the op itself is timed."""

    call: Callable[[], torch.Tensor]
    wanted: tuple[torch.Tensor, ...]
    grad_out: torch.Tensor
    # Brings the output and each gradient to the case's own layout (identity but for padded tensors).
    unpack: Callable[[torch.Tensor], torch.Tensor] = field(default=lambda tensor: tensor)


class Case(Protocol):
    """What the runner needs of a case; `AttentionCase` in cases_dot is the usual one."""

    @property
    def settings(self) -> Settings | None: ...

    @property
    def name(self) -> str: ...
    @property
    def suite(self) -> str: ...
    @property
    def quick(self) -> bool: ...
    @property
    def passes(self) -> tuple[str, ...]: ...
    @property
    def compiled_peers(self) -> bool: ...
    def columns(self) -> dict[str, Any]: ...
    def inputs(self) -> Inputs: ...
    def small(self) -> Case: ...
    def flops(self, which: str) -> float: ...
    def streamed(self, inputs: Inputs) -> tuple[torch.Tensor, ...]: ...
    def oracle(self, inputs: Inputs) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]] | None: ...
    def oracle_part(self, name: str, tensor: torch.Tensor) -> torch.Tensor: ...


class Peer:
    """One way to compute a case. Subclasses set `name` and implement `build`."""

    name = ""
    # Compiled peers take seconds to prepare, so only cases that ask for them get them.
    compiled = False
    suites: tuple[str, ...] = ("dot", "threads", "accuracy", "overhead")

    def build(self, case: Any, inputs: Inputs) -> Workload:
        raise NotImplementedError

    def tiles(self, case: Any) -> float | None:
        """Share of the tiles of a case that the peer computes, where that is the question."""
        return None

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """Entered once around each timed sample, so that switching a backend is not part of the time."""
        return contextlib.nullcontext()


_CASES: dict[str, list[Any]] = {}
_PEERS: list[Peer] = []


def register_cases(cases: Iterable[Any]) -> None:
    for case in cases:
        if case.suite not in SUITES:
            raise ValueError(f"there is no suite {case.suite!r}")
        group = _CASES.setdefault(case.suite, [])
        if any(known.name == case.name for known in group):
            raise ValueError(f"suite {case.suite!r} already has a case {case.name!r}")
        group.append(case)


def register_peer(peer: Peer) -> None:
    if any(known.name == peer.name and set(known.suites) & set(peer.suites) for known in _PEERS):
        raise ValueError(f"peer {peer.name!r} is already registered")
    _PEERS.append(peer)


def suites() -> tuple[str, ...]:
    return tuple(SUITES)


def default_suites(device: str = "cpu") -> tuple[str, ...]:
    """What runs when no suite is named."""
    return tuple(suite.name for suite in SUITES.values() if (suite.default if device == "cpu" else suite.gpu))


def cases(suite: str, quick: bool = False) -> list[Any]:
    _load()
    return [case for case in _CASES.get(suite, []) if case.quick or not quick]


def find_case(suite: str, name: str) -> Any:
    _load()
    return next(case for case in _CASES[suite] if case.name == name)


def peers(case: Any) -> list[Peer]:
    """The peers of a case, ours first."""
    _load()
    fitting = [peer for peer in _PEERS if case.suite in peer.suites]
    return [peer for peer in fitting if case.compiled_peers or not peer.compiled]


def find_peer(suite: str, name: str) -> Peer:
    _load()
    for peer in _PEERS:
        if peer.name == name and suite in peer.suites:
            return peer
    raise ValueError(f"suite {suite!r} has no peer {name!r}")


def _load() -> None:
    """Importing the modules registers what is in them."""
    from . import (  # noqa: F401
        cases_accuracy,
        cases_additive,
        cases_distributed,
        cases_dot,
        cases_functions,
        cases_gather,
        cases_gpu,
        cases_masks,
        cases_modules,
        cases_overhead,
        cases_scaling,
        cases_store,
        cases_sweep,
        cases_threads,
        cases_topk,
        peers,
        peers_additive,
        peers_functions,
        peers_gather,
        peers_gpu,
        peers_modules,
        peers_store,
        peers_topk,
    )
