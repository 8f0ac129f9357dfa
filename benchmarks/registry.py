"""The vocabulary of the benchmark: a case is what is computed, a peer is who computes it.

A case makes its inputs from a fixed seed and knows its oracle. A peer turns (case, inputs) into a `Workload`, or says
with `Unsupported` why it cannot. A suite is a group of cases with one meaning; the model suite brings its own runner.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"
PASSES = (FORWARD, BACKWARD, BOTH)
OURS = "attnfast"
TORCH = "sdpa"  # the peer that every headline ratio is taken against
EAGER = "eager"  # the same where torch has no function of its own


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
    def oracle(self, inputs: Inputs) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]] | None: ...
    def oracle_part(self, name: str, tensor: torch.Tensor) -> torch.Tensor: ...


class Peer:
    """One way to compute a case. Subclasses set `name` and implement `build`."""

    name = ""
    # Compiled peers take seconds to prepare, so only cases that ask for them get them.
    compiled = False
    suites: tuple[str, ...] = ("dot", "overhead")

    def build(self, case: Any, inputs: Inputs) -> Workload:
        raise NotImplementedError

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """Entered once around each timed sample, so that switching a backend is not part of the time."""
        return contextlib.nullcontext()


_CASES: dict[str, list[Any]] = {}
_PEERS: dict[str, Peer] = {}


def register_cases(cases: Iterable[Any]) -> None:
    for case in cases:
        group = _CASES.setdefault(case.suite, [])
        if any(known.name == case.name for known in group):
            raise ValueError(f"suite {case.suite!r} already has a case {case.name!r}")
        group.append(case)


def register_peer(peer: Peer) -> None:
    if peer.name in _PEERS:
        raise ValueError(f"peer {peer.name!r} is already registered")
    _PEERS[peer.name] = peer


def suites() -> tuple[str, ...]:
    _load()
    return (*sorted(_CASES), "model")


def default_suites() -> tuple[str, ...]:
    """What runs when no suite is named: all but the sweep, which takes long and answers one question."""
    return tuple(name for name in suites() if name != "sweep")


def cases(suite: str, quick: bool = False) -> list[Any]:
    _load()
    return [case for case in _CASES.get(suite, []) if case.quick or not quick]


def find_case(suite: str, name: str) -> Any:
    _load()
    return next(case for case in _CASES[suite] if case.name == name)


def peers(case: Any) -> list[Peer]:
    """The peers of a case, ours first."""
    _load()
    fitting = [peer for peer in _PEERS.values() if case.suite in peer.suites]
    return [peer for peer in fitting if case.compiled_peers or not peer.compiled]


def find_peer(name: str) -> Peer:
    _load()
    return _PEERS[name]


def _load() -> None:
    """Importing the modules registers what is in them."""
    from . import cases_additive, cases_dot, cases_overhead, cases_sweep, peers  # noqa: F401
