"""Every public function, forward and backward, at a small and a medium size, and the quick cases of dot-product
attention under pytest-benchmark, for those who want its statistics, histograms and `--benchmark-compare`:

    pytest benchmarks/test_speed.py --benchmark-only

Each peer runs by itself here, one thread. Ratios to rely on come from `python -m attnfast bench`, which runs the peers
in turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from .measure import step, thread_count
from .registry import EAGER, OURS, TORCH, Unsupported, cases, find_peer, peers

CASES = [case for suite in ("functions", "dot", "overhead") for case in cases(suite, quick=True)]
RUNS = [pytest.param(case, which, id=f"{case.name}-{which}") for case in CASES for which in case.passes]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with thread_count(1):
        yield


@pytest.mark.parametrize("peer", [OURS, TORCH, EAGER])
@pytest.mark.parametrize(("case", "which"), RUNS)
def test_speed(benchmark: Any, case: Any, which: str, peer: str) -> None:
    benchmark.group = f"{case.name}, {which}"
    if peer not in {known.name for known in peers(case)}:
        pytest.skip("no such peer in this suite")
    try:
        workload = find_peer(case.suite, peer).build(case, case.inputs())
    except Unsupported as reason:
        pytest.skip(str(reason) or "this case has another peer")
    run, grad = step(workload, which)
    with torch.set_grad_enabled(grad):
        result = benchmark(run)
    results = result if isinstance(result, tuple) else (result,)
    assert all(bool(x.isfinite().all()) for x in results)
