"""What several processes send one another, hold and wait for: ring attention, and reads of a sharded memory.

Beside what is counted stand the formulas of attnfast/distributed/_traffic.py, which docs/distributed.md explains.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from . import traffic
from .memory import available, peak_here
from .processes import SUITE, run_ranks
from .registry import BACKWARD, FORWARD, OURS, register_cases
from .results import FAILED, Row


def _columns(heads: int, kv_heads: int, query_tokens: int, key_tokens: int, size: int) -> dict[str, Any]:
    """What a row says of a case's shape; D = D_v."""
    sizes = {"query_tokens": query_tokens, "key_tokens": key_tokens, "head_size": size, "value_size": size}
    return {"dtype": "fp32", "batch": 1, "heads": heads, "kv_heads": kv_heads, **sizes}


@dataclass(frozen=True)
class RingCase:
    """`context_parallel_attention` of `tokens` in all, float32."""

    name: str
    ranks: int
    causal: bool = True
    tokens: int = 2048
    heads: int = 8
    kv_heads: int = 8
    size: int = 64
    passes: tuple[str, ...] = (FORWARD, BACKWARD)
    quick: bool = True
    suite: str = SUITE
    program: str = "ring"

    def columns(self) -> dict[str, Any]:
        return _columns(self.heads, self.kv_heads, self.tokens, self.tokens, self.size)


@dataclass(frozen=True)
class ReadCase:
    """`ShardedMemory.read` of `queries` of each rank, float32; `picks` 0 is a soft read."""

    name: str
    ranks: int
    placement: str
    picks: int
    slots: int = 1 << 17
    queries: int = 16
    size: int = 64
    passes: tuple[str, ...] = (FORWARD,)
    quick: bool = True
    suite: str = SUITE
    program: str = "read"

    def columns(self) -> dict[str, Any]:
        return {**_columns(1, 1, self.queries, self.slots, self.size), "options": f"k:{self.picks}"}


def rows(case: RingCase | ReadCase, rounds: int) -> list[Row]:
    """A row for each pass: the largest figures of any rank, and bytes of one whose are not the formula's if any is."""
    plain = [Row(case.suite, case.name, which, 1, OURS, ranks=case.ranks, **case.columns()) for which in case.passes]
    try:
        parts = run_ranks(case.ranks, "cases_distributed", case.program, case, rounds)
    except RuntimeError as error:
        for row in plain:
            row.status, row.note = FAILED, str(error).strip().splitlines()[-1]
        return plain
    for row in plain:
        found = [part[row.pass_] for part in parts]
        for name in ("time_ms", "waited_ms", "alone_ms", "peak_extra_mib", "peak_formula_mib", "wire_bytes"):
            values = [each[name] for each in found if each.get(name) is not None]
            setattr(row, name, max(values) if values else None)
        most = max(found, key=lambda each: (each["sent_bytes"] != each["sent_formula"], each["sent_bytes"]))
        row.sent_bytes, row.sent_formula, row.rounds = most["sent_bytes"], most["sent_formula"], rounds
    return plain


class _Waits:
    """Time that this process spends in waiting for exchanges of the ring."""

    def __enter__(self) -> _Waits:
        from attnfast.distributed._group import Transfer

        self.seconds = 0.0
        self._transfer, self._wait = Transfer, Transfer.wait

        def wait(transfer: Any, *args: Any) -> torch.Tensor:
            start = time.perf_counter()
            try:
                return self._wait(transfer, *args)
            finally:
                self.seconds += time.perf_counter() - start

        Transfer.wait = wait  # type: ignore[method-assign, assignment]
        return self

    def __exit__(self, *error: object) -> None:
        self._transfer.wait = self._wait  # type: ignore[method-assign]


def _measure(run: Callable[[], Any], rounds: int) -> dict[str, Any]:
    """Counts of one call, then the median times of several; after a call that made buffers and connections."""
    import torch.distributed as dist

    run()
    dist.barrier()
    found: dict[str, Any] = {"peak_extra_mib": None, "wire_bytes": None}
    if not available():
        found["peak_extra_mib"] = peak_here(run) / 2**20
    dist.barrier()
    before = traffic.wire()
    with traffic.Traffic() as counted:
        run()
    dist.all_reduce(torch.zeros(1))  # all have received what was sent
    after = traffic.wire()
    found["sent_bytes"] = counted.sent
    if before is not None and after is not None:
        found["wire_bytes"] = after - before
    times, waits = [], []
    for _ in range(rounds):
        dist.barrier()
        with _Waits() as waited:
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        waits.append(waited.seconds)
    found["time_ms"] = 1e3 * statistics.median(times)
    found["waited_ms"] = 1e3 * statistics.median(waits)
    return found


def ring(rank: int, ranks: int, case: RingCase, rounds: int) -> dict[str, dict[str, Any]]:
    """One rank's figures, by pass."""
    from attnfast.distributed import _group, context_parallel_attention
    from attnfast.distributed import _traffic as formulas
    from attnfast.distributed.context_parallel import FACTS

    torch.manual_seed(rank)
    tokens = case.tokens // ranks
    query = torch.randn(1, case.heads, tokens, case.size, requires_grad=True)
    key, value = (torch.randn(1, case.kv_heads, tokens, case.size, requires_grad=True) for _ in range(2))

    def forward() -> Any:
        return context_parallel_attention(query, key, value, causal=case.causal)

    formula = formulas.Ring(
        ranks, 1, case.heads, case.kv_heads, tokens, tokens, case.size, case.size, query.element_size(), 4
    )
    found = {FORWARD: _measure(forward, rounds)}
    out = forward()
    grad = torch.ones_like(out)
    found[BACKWARD] = _measure(lambda: torch.autograd.grad(out, (query, key, value), grad, retain_graph=True), rounds)
    found[FORWARD]["sent_formula"] = formula.sent_forward() + formulas.agreement(ranks, len(FACTS))
    found[BACKWARD]["sent_formula"] = formula.sent_backward()
    found[FORWARD]["peak_formula_mib"] = formula.peak_forward() / 2**20
    found[BACKWARD]["peak_formula_mib"] = formula.peak_backward() / 2**20
    packet = torch.zeros(formula.key_value_elements())

    def exchange(steps: int) -> float:
        """Milliseconds of so many exchanges, one after the other, with nothing to compute."""
        import torch.distributed as dist

        times = []
        for _ in range(rounds):
            dist.barrier()
            line = _group.Ring(_group.resolve(None), "exchange")
            start = time.perf_counter()
            for _ in range(steps):
                line.start(packet).wait()
            times.append(time.perf_counter() - start)
        return 1e3 * statistics.median(times)

    found[FORWARD]["alone_ms"] = exchange(ranks - 1)
    found[BACKWARD]["alone_ms"] = exchange(2 * ranks - 1)
    return found


def read(rank: int, ranks: int, case: ReadCase, rounds: int) -> dict[str, dict[str, Any]]:
    from attnfast.distributed import ShardedMemory
    from attnfast.distributed import _traffic as formulas

    torch.manual_seed(rank)
    memory = ShardedMemory(
        None, case.placement, capacity=case.slots, key_size=case.size, value_size=case.size, trainable=True
    )
    memory.requires_grad_(False)
    query = torch.randn(case.queries, case.size)
    found = _measure(lambda: memory(query, topk=case.picks or None), rounds)
    elsewhere = served = 0
    if case.picks and case.placement == "rows":
        _, slots, _, usage = memory(query, topk=case.picks, return_aux=True)
        elsewhere = int((slots // memory.rows_of_rank != rank).sum())
        served = int(usage.sum()) - (slots.numel() - elsewhere)
    formula = formulas.Read(ranks, case.slots, case.queries, case.picks, case.size, case.size, 4, 4, elsewhere, served)
    kind = "best" if case.picks else "soft"
    found["sent_formula"] = getattr(formula, f"{case.placement}_{kind}")()
    if case.placement == "columns":
        found["peak_formula_mib"] = formula.columns_peak() / 2**20
    return {FORWARD: {**found, "waited_ms": None}}


register_cases(
    case
    for ranks in (2, 4)
    for case in (
        RingCase(f"ring causal, {ranks} ranks", ranks),
        RingCase(f"ring full, 8:2 heads, {ranks} ranks", ranks, causal=False, kv_heads=2, quick=False),
        ReadCase(f"rows k=32, {ranks} ranks", ranks, "rows", 32),
        ReadCase(f"rows soft, {ranks} ranks", ranks, "rows", 0, quick=False),
        ReadCase(f"columns k=32, {ranks} ranks", ranks, "columns", 32),
        ReadCase(f"columns soft, {ranks} ranks", ranks, "columns", 0, quick=False),
    )
)
