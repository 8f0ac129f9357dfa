"""How time and error are measured. Nothing in here knows what attention is.

All peers of a case are timed in turn inside one process: round 0 runs them in order, round 1 in reverse, and so on, so
that a machine that speeds up or slows down does it to all of them. A sample is as many calls as the clock needs.
The result of a peer is the median over rounds with its quartiles; a ratio is the median of the per-round ratios.
"""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .registry import BOTH, FORWARD, Inputs, Peer, Workload


@dataclass(frozen=True)
class Summary:
    """Median and quartiles of some samples."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Summary:
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0])
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True)
class Settings:
    """How long to measure. A sample lasts at least `sample_s`; rounds fill `budget_s` within their bounds."""

    sample_s: float = 0.002
    budget_s: float = 1.0
    min_rounds: int = 7
    max_rounds: int = 60

    @classmethod
    def quick(cls) -> Settings:
        return cls(sample_s=0.001, budget_s=0.25, min_rounds=5, max_rounds=20)


def round_order(names: Sequence[str], index: int) -> list[str]:
    """The order of one round: forwards and backwards in turn, so that every peer has the same mean position."""
    return list(names) if index % 2 == 0 else list(reversed(names))


def calls_per_sample(seconds_per_call: float, sample_s: float) -> int:
    return max(1, min(10_000, math.ceil(sample_s / max(seconds_per_call, 1e-9))))


def rounds_for(seconds_per_round: float, settings: Settings) -> int:
    fitting = int(settings.budget_s / max(seconds_per_round, 1e-9))
    rounds = max(settings.min_rounds, min(settings.max_rounds, fitting))
    # Very long rounds: three are enough to see a median, and the run must end.
    return 3 if seconds_per_round * rounds > 8 * settings.budget_s else rounds


@dataclass
class Timing:
    """Seconds per call of every program, one sample a round, and how many calls a sample held."""

    samples: dict[str, list[float]]
    calls: dict[str, int]

    def time(self, name: str) -> Summary:
        return Summary.of(self.samples[name])

    def ratio(self, name: str, over: str) -> Summary:
        """How many times longer `name` takes than `over`: quartiles of the per-round ratios."""
        return Summary.of([a / b for a, b in zip(self.samples[name], self.samples[over])])


Sampler = Callable[[int], float]  # number of calls -> seconds for all of them


def interleave(samplers: dict[str, Sampler], settings: Settings) -> Timing:
    """Time all samplers in alternating order. Every sampler must have run once before (compiled, paged in)."""
    names = list(samplers)
    once = {name: samplers[name](1) for name in names}
    # A second look with a longer sample: one call of a microsecond says little.
    for name in names:
        longer = calls_per_sample(once[name], settings.sample_s)
        once[name] = samplers[name](longer) / longer
    calls = {name: calls_per_sample(once[name], settings.sample_s) for name in names}
    rounds = rounds_for(sum(once[name] * calls[name] for name in names), settings)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds):
        for name in round_order(names, index):
            samples[name].append(samplers[name](calls[name]) / calls[name])
    return Timing(samples, calls)


def step(workload: Workload, which: str) -> tuple[Callable[[], Any], bool]:
    """The computation of one pass and whether it needs a gradient graph."""
    call, wanted, grad_out = workload.call, workload.wanted, workload.grad_out
    if which == FORWARD:
        return call, False
    if which == BOTH:
        return (lambda: torch.autograd.grad(call(), wanted, grad_out)), True
    if which == "backward":
        out = call()  # one graph, used again and again
        return (lambda: torch.autograd.grad(out, wanted, grad_out, retain_graph=True)), True
    return call, True  # a forward that records its graph


def sampler(peer: Peer, workload: Workload, which: str) -> Sampler:
    """A function that times so many calls of one pass; runs it once, so errors of a peer surface here."""
    with peer.context():
        run, grad = step(workload, which)
    clock = time.perf_counter
    # A GPU is only asked to compute: a sample ends when it has.
    settle = torch.cuda.synchronize if workload.grad_out.is_cuda else lambda: None

    def sample(calls: int) -> float:
        with peer.context(), torch.set_grad_enabled(grad):
            settle()
            start = clock()
            for _ in range(calls):
                run()
            settle()
            return clock() - start

    sample(1)
    return sample


def on_threads(threads: int, sample: Sampler) -> Sampler:
    """The same sampler with so many threads."""

    def limited(calls: int) -> float:
        with thread_count(threads):
            return sample(calls)

    return limited


@contextlib.contextmanager
def quiet_gc() -> Iterator[None]:
    """No garbage collection inside a sample; one before it."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def thread_count(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest absolute difference over the largest magnitude of the oracle; NaN counts as infinite."""
    if want.numel() == 0:
        return 0.0
    difference = (got.cpu().double() - want).abs().max().item()
    return math.inf if math.isnan(difference) else difference / max(want.abs().max().item(), 1e-300)


def errors(
    case: Any, peer: Peer, workload: Workload, inputs: Inputs, oracle: tuple[torch.Tensor, tuple[torch.Tensor, ...]]
) -> tuple[float, float | None]:
    """Error of the output, and the largest error of any gradient (None: the peer has no backward, or the oracle)."""
    want_out, want_grads = oracle

    def part(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return case.oracle_part(name, workload.unpack(tensor.detach()))

    with peer.context():
        if not workload.wanted or not want_grads:
            return relative_error(part("query", workload.call()), want_out), None
        try:
            out = workload.call()
            grads = torch.autograd.grad(out, workload.wanted, workload.grad_out)
        except NotImplementedError:
            with torch.no_grad():
                return relative_error(part("query", workload.call()), want_out), None
    found = [relative_error(part(name, got), want) for name, got, want in zip(inputs.wanted, grads, want_grads)]
    return relative_error(part("query", out), want_out), max(found)
