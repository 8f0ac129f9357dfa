"""Drives a run: every case, every number of threads, every pass; yields rows and keeps to its time."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from . import registry
from .machine import environment
from .measure import Sampler, Settings, errors, interleave, on_threads, quiet_gc, sampler, thread_count
from .memory import MemoryMeter, measure_cuda
from .registry import OURS, Inputs, Peer, Unsupported, Workload
from .results import FAILED, OK, SKIPPED, UNSUPPORTED, Row
from .yardsticks import FMA_PEAK, Yardstick, fma_peak, stream

_ONE_THREAD = "one thread"
# A quick run ends in two minutes on a busy machine too: past the first mark it leaves out compiled peers and memory and
# takes three rounds; past the second it leaves out whole cases of the large suites (and says so).
_QUICK_HURRY, _QUICK_STOP = 65.0, 85.0


@dataclass
class Plan:
    """What to run."""

    suites: tuple[str, ...]
    threads: tuple[int, ...] = (1, 2)
    quick: bool = False
    case: str = ""  # only cases whose name contains this
    memory: bool = True
    settings: Settings | None = None
    device: str = "cpu"  # or "cuda", where `threads` means nothing

    def cases(self, suite: str) -> list[Any]:
        return [case for case in registry.cases(suite, self.quick) if self.case in case.name]

    def passes(self, case: Any) -> tuple[str, ...]:
        """A quick run leaves out the sum of two passes that it times anyway."""
        both_parts = {registry.FORWARD, registry.BACKWARD} <= set(case.passes)
        return tuple(which for which in case.passes if not (self.quick and both_parts and which == registry.BOTH))

    def chosen_settings(self) -> Settings:
        return self.settings or (Settings.quick() if self.quick else Settings())

    def total(self) -> int:
        """Steps of the progress bar: one for each pass at each number of threads."""
        chosen = [suite for suite in self.suites if suite != "distributed"]
        ranks = sum(len(self.cases(suite)) for suite in self.suites if suite == "distributed")
        attention = sum(len(self.passes(case)) for suite in chosen for case in self.cases(suite))
        return ranks + (attention + ("model" in self.suites and not self.case)) * len(self.threads)


@dataclass
class _Prepared:
    """A peer ready to run one case, with what was learnt about it once per case."""

    peer: Peer
    workload: Workload | None = None
    reason: str = ""
    status: str = UNSUPPORTED  # with a reason: whether the peer declined or broke
    output_error: float | None = None
    gradient_error: float | None = None


@dataclass
class Run:
    """One execution of a plan. `advance(text)` is called before each step, and once more at the end."""

    plan: Plan
    advance: Callable[[str], None] = lambda text: None
    rows: list[Row] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)  # cases a quick run had no time for

    def execute(self) -> list[Row]:
        self._start = time.monotonic()
        self._environment = environment(self.plan.device)
        self._meter = MemoryMeter() if self.plan.memory else None
        for suite in self.plan.suites:
            if suite == "model":
                if not self.plan.case:
                    self._model()
            elif suite == "distributed":
                self._ranks()
            else:
                for case in self.plan.cases(suite):
                    if registry.SUITES[suite].hurried and self._late(_QUICK_STOP):
                        self.left_out.append(f"{suite}: {case.name}")
                    else:
                        self._case(case)
        self.advance("")
        return self.rows

    # ------------------------------------------------------------------ attention cases

    def _late(self, mark: float = _QUICK_HURRY) -> bool:
        return self.plan.quick and time.monotonic() - self._start > mark

    def _settings(self) -> Settings:
        settings = self.plan.chosen_settings()
        return dataclasses.replace(settings, min_rounds=3, max_rounds=3) if self._late() else settings

    def _case(self, case: Any) -> None:
        torch.compiler.reset()  # compiled peers of the case before would count against this one's recompile limit
        inputs = case.inputs()
        oracle = case.oracle(inputs)
        inputs = inputs.to(self.plan.device)
        with thread_count(self.plan.threads[0]):
            prepared = [self._prepare(case, peer, inputs, oracle) for peer in self._peers(case)]
        memory: dict[tuple[str, str], tuple[int | None, str]] = {}
        for threads in self.plan.threads:
            for which in self.plan.passes(case):
                self.advance(f"{case.suite}: {case.name}, {which}, {threads} threads")
                with thread_count(threads), quiet_gc():
                    rows = self._time(case, inputs, prepared, which, threads)
                self._add_memory(case, rows, memory, prepared)
                self.rows.extend(rows)

    def _peers(self, case: Any) -> list[Peer]:
        """A quick run has time to compile for one case."""
        first = not self.plan.quick or case is next((c for c in self.plan.cases(case.suite) if c.compiled_peers), None)
        return [peer for peer in registry.peers(case) if first or not peer.compiled]

    def _prepare(self, case: Any, peer: Peer, inputs: Inputs, oracle: Any) -> _Prepared:
        if peer.compiled and self._late():
            return _Prepared(peer, reason=SKIPPED)
        try:
            ready = _Prepared(peer, peer.build(case, inputs))
            if oracle is not None and not (peer.compiled and self.plan.quick) and ready.workload is not None:
                found = errors(case, peer, ready.workload, inputs, oracle)
                ready.output_error, ready.gradient_error = found
            return ready
        except Exception as error:
            return _Prepared(peer, reason=_reason(error), status=_status(error))

    def _time(self, case: Any, inputs: Inputs, prepared: list[_Prepared], which: str, threads: int) -> list[Row]:
        rows, samplers = [], dict[str, Sampler]()
        for ready in prepared:
            row = Row(case.suite, case.name, which, threads, ready.peer.name, **case.columns(), quick=self.plan.quick)
            row = dataclasses.replace(row, **self._environment)
            row.tiles = ready.peer.tiles(case)
            if ready.workload is None:
                if not ready.reason:
                    continue  # a peer without meaning for this case
                row.status = SKIPPED if ready.reason == SKIPPED else ready.status
                row.note = "the quick run was short of time" if row.status == SKIPPED else ready.reason
            elif which != registry.FORWARD and not ready.workload.wanted:
                continue  # the bare binary has no backward of its own
            elif (
                ready.peer.compiled
                and self.plan.quick
                and (which, threads)
                != (
                    registry.FORWARD,
                    self.plan.threads[0],
                )
            ):
                continue  # each pass and number of threads would be compiled anew
            else:
                try:
                    samplers[ready.peer.name] = sampler(ready.peer, ready.workload, which)
                    row.error = ready.output_error if "backward" not in which else ready.gradient_error
                except Exception as error:
                    row.status = _status(error)
                    row.note = _reason(error)
            rows.append(row)
        yardsticks: list[Yardstick] = []
        if registry.SUITES[case.suite].yardsticks and self.plan.device == "cpu":
            streamed = case.streamed(inputs)
            yardsticks = [fma_peak(), *([stream(streamed)] if streamed else [])]
            samplers.update({yardstick.name: yardstick.sample for yardstick in yardsticks})
            if threads > 1 and OURS in samplers:
                samplers[_ONE_THREAD] = on_threads(1, samplers[OURS])
        timing = interleave(samplers, case.settings or self._settings())
        for row in rows:
            if row.status != OK:
                continue
            seconds = timing.time(row.peer)
            row.rounds, row.calls_per_round = len(timing.samples[row.peer]), timing.calls[row.peer]
            row.time_ms, row.time_ms_q25, row.time_ms_q75 = (
                1e3 * x for x in (seconds.median, seconds.low, seconds.high)
            )
            if OURS in samplers:
                ratio = timing.ratio(row.peer, OURS)
                row.ratio, row.ratio_q25, row.ratio_q75 = ratio.median, ratio.low, ratio.high
            if not yardsticks and self.plan.device == "cpu":
                continue
            flops = case.flops(which)
            row.gflops = flops / seconds.median / 1e9
            for yardstick in yardsticks:
                share = timing.ratio(yardstick.name, row.peer).median / yardstick.amount
                if yardstick.name == FMA_PEAK:
                    row.of_fma_peak = flops * share
                else:
                    row.of_stream = yardstick.amount * share
            if row.peer == OURS and _ONE_THREAD in samplers:
                row.over_one_thread = timing.ratio(_ONE_THREAD, OURS).median
        return rows

    def _add_memory(
        self,
        case: Any,
        rows: list[Row],
        known: dict[tuple[str, str], tuple[int | None, str]],
        ready: Sequence[_Prepared] = (),
    ) -> None:
        """Memory once per pass, at the largest number of threads (scratch grows with threads).

        Not for suites about something else, compiled peers (each measuring process would compile anew, for most of a
        minute) and the sum of two passes unless the suite asks for it. A quick run takes the last pass of two peers.
        """
        if self._meter is None or not registry.SUITES[case.suite].memory:
            return
        for row in rows:
            if row.status != OK or self._late() or registry.find_peer(case.suite, row.peer).compiled:
                continue
            whole = registry.SUITES[case.suite].whole_memory
            if row.pass_ == registry.BOTH and registry.BACKWARD in case.passes and not whole:
                continue
            last = self.plan.passes(case)[-1]
            if self.plan.quick and (row.pass_ != last or row.peer not in (OURS, registry.TORCH, registry.EAGER)):
                continue
            key = (row.pass_, row.peer)
            if key not in known and self.plan.device != "cpu":
                prepared = next(each for each in ready if each.peer.name == row.peer)
                assert prepared.workload is not None
                try:
                    known[key] = measure_cuda(prepared.peer, prepared.workload, row.pass_), ""
                except Exception as error:
                    known[key] = None, _reason(error)
            if key not in known:
                task = (row.suite, row.case, row.peer, row.pass_, max(self.plan.threads))
                known[key] = self._meter.measure(*task)
            size, reason = known[key]
            row.peak_extra_mib = None if size is None else size / 2**20
            row.note = row.note or (f"memory: {reason}" if reason else "")

    # ------------------------------------------------------------------ several processes

    def _ranks(self) -> None:
        """Every process has one thread, whatever the plan's numbers of threads are."""
        from . import cases_distributed

        for case in self.plan.cases("distributed"):
            self.advance(f"distributed: {case.name}")
            rows = cases_distributed.rows(case, 2 if self.plan.quick else 5)
            self.rows.extend(dataclasses.replace(row, quick=self.plan.quick, **self._environment) for row in rows)

    # ------------------------------------------------------------------ model

    def _model(self) -> None:
        from . import model_digits

        for threads in self.plan.threads:
            self.advance(f"model: digits, {threads} threads")
            with thread_count(threads), quiet_gc():
                rows = model_digits.rows(threads, self.plan.quick)
            self.rows.extend(dataclasses.replace(row, **self._environment) for row in rows)


def _status(error: Exception) -> str:
    return UNSUPPORTED if isinstance(error, (NotImplementedError, Unsupported)) else FAILED


def _reason(error: Exception) -> str:
    """The first line of an error that says something; empty only for a peer that does not apply."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, Unsupported):
        return lines[0] if lines else ""
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:300]
