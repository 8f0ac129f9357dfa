"""The two backends of the examples, and how they are compared.

``attnfast`` is the package as it is. ``reference`` is the same modules with every function of attnfast replaced by the
function of that name in `attnfast.reference`: the formula in plain PyTorch, unfused. What a script calls itself must be
looked up in `attnfast` or its modules at each call, as ``attnfast.attention(...)``.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from types import ModuleType

from attnfast.benchmarks.measure import Settings, Summary, interleave, quiet_gc
from attnfast.benchmarks.memory import available, peak_here

import attnfast
from attnfast import functional, reference

BACKENDS = ("attnfast", "reference")


def _replacements() -> list[tuple[ModuleType, str, object]]:
    """(module, name, what stands there in the reference) for all that modules and scripts look up."""
    functions = {
        getattr(attnfast, name): getattr(reference, name)
        for name in attnfast.__all__
        if inspect.isfunction(getattr(attnfast, name)) and hasattr(reference, name)
    }
    found: list[tuple[ModuleType, str, object]] = []
    for module in [
        module for name, module in sys.modules.items() if name == "attnfast" or name.startswith("attnfast.nn")
    ]:
        for name, value in list(vars(module).items()):
            if value is functional:
                found.append((module, name, reference))
            elif inspect.isfunction(value) and value in functions:
                found.append((module, name, functions[value]))
    return found


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Within it modules of `attnfast.nn` and calls of ``attnfast.<function>`` take this backend."""
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    if name == "attnfast":
        yield
        return
    replaced = _replacements()
    before = [(module, key, getattr(module, key)) for module, key, _ in replaced]
    try:
        for module, key, value in replaced:
            setattr(module, key, value)
        yield
    finally:
        for module, key, value in before:
            setattr(module, key, value)


@dataclass(frozen=True)
class Comparison:
    """Seconds and peak memory of one step by backend; `ratio` is the reference's time over attnfast's, per round."""

    seconds: dict[str, Summary]
    peak: dict[str, int | None]
    ratio: Summary


def sampler(
    step: Callable[[], object], context: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
) -> Callable[[int], float]:
    """What `interleave` times: so many steps within a context, after one that is not counted."""

    def sample(calls: int) -> float:
        with context():
            step()  # the exchange of functions leaves caches cold
            start = perf_counter()
            for _ in range(calls):
                step()
            return perf_counter() - start

    return sample


def compare(step: Callable[[], object], budget_s: float) -> Comparison:
    """Time `step` on both backends in turn within this process, then the peak of memory that each holds."""

    samplers = {name: sampler(step, partial(backend, name)) for name in BACKENDS}
    with quiet_gc():
        timing = interleave(samplers, Settings(budget_s=budget_s, min_rounds=5))
    peak: dict[str, int | None] = dict.fromkeys(BACKENDS)
    if not available():
        for name in BACKENDS:
            gc.collect()
            with backend(name):
                peak[name] = peak_here(step)
    return Comparison({name: timing.time(name) for name in BACKENDS}, peak, timing.ratio("reference", "attnfast"))
