"""Measures what tools/scale_plan.py computes with: one core's costs, gloo between two processes, and whole calls.

Each figure is the median of several runs with one thread. The machine is what it is: shared, which the page says.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from scale_plan import PICKS, QUERIES, SIZE

import attnfast
from attnfast.cli._benchmarks import load_benchmarks
from attnfast.distributed._picks import best_of, best_of_block


def timed(run: Callable[[], Any], rounds: int = 5) -> float:
    run()
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def two_times(small: float, large: float, count: float, more: float) -> tuple[float, float]:
    """(fixed, each) of times that grow with a count."""
    each = max(0.0, (large - small) / (more - count))
    return max(0.0, small - each * count), each


def costs() -> dict[str, float]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    slots, queries = 1 << 18, 2 * QUERIES
    keys, values, query = torch.randn(slots, SIZE), torch.randn(slots, SIZE), torch.randn(queries, SIZE)
    found: dict[str, float] = {}
    found["scan_s"] = timed(lambda: attnfast.topk_scores(query, keys, PICKS)) / (queries * slots)
    found["partial_s"] = timed(lambda: best_of_block(query @ keys.mT, PICKS), 3) / (queries * slots)
    lists, numbers = torch.randn(QUERIES, 1024 * PICKS), torch.arange(1024 * PICKS).expand(QUERIES, -1)
    found["merge_s"] = timed(lambda: best_of(lists, numbers, PICKS), 3) / lists.numel()
    picks, weights = torch.randint(slots, (512, PICKS)), torch.rand(512, PICKS)
    found["fetch_s"] = timed(lambda: attnfast.weighted_gather(picks, weights, values)) / picks.numel()
    product = []
    for n in (512, 4096):
        halves, table = torch.randn(2, 1, n, SIZE // 2), torch.zeros(n * n, 1)
        asked = torch.randn(64, 1, 2, SIZE // 2)
        product.append(timed(lambda: attnfast.product_key_read(asked, *halves, table, PICKS)) / 64)  # noqa: B023
    found["product_query_s"], found["product_key_s"] = two_times(*product, 2 * 512, 2 * 4096)
    length = 4096
    offsets = torch.arange(QUERIES + 1) * length
    listed = torch.stack([torch.randperm(slots)[:length].sort().values for _ in range(QUERIES)]).flatten()
    some = query[:QUERIES]
    read = lambda: attnfast.memory_read(some, keys, values, topk=PICKS, candidates=(offsets, listed))  # noqa: E731
    found["candidate_s"] = timed(read) / len(listed)
    heads, tokens, size = 4, 1024, 64
    q, k, v = (torch.randn(1, heads, tokens, size, requires_grad=True) for _ in range(3))
    out = attnfast.attention(q, k, v)
    grad = torch.ones_like(out)
    flops = 4.0 * heads * tokens * tokens * size
    with torch.no_grad():
        found["forward_flops"] = flops / timed(lambda: attnfast.attention(q, k, v))
    backward = timed(lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True))
    found["backward_flops"] = 2.5 * flops / backward
    total, part, share = torch.randn(3, heads * tokens, size).unbind(0)

    def merge() -> None:
        total.mul_(share[:, :1])
        total.add_(part * share[:, :1])

    found["merge_output_s"] = timed(merge) / total.numel()
    return found


def link(rank: int, ranks: int, rounds: int) -> tuple[float, float, float]:
    """Seconds of an exchange of a few bytes and of each byte more, and of a read of a memory with almost nothing."""
    import torch.distributed as dist

    from attnfast.distributed import ShardedMemory
    from attnfast.distributed._group import Ring, resolve

    ring = Ring(resolve(None), "measure")
    times = []
    for count in (16, 1 << 20) if ranks > 1 else ():
        x = torch.zeros(count)
        dist.barrier()
        times.append(timed(lambda: ring.start(x).wait(), rounds))  # noqa: B023
    memory = ShardedMemory(capacity=64, key_size=SIZE, value_size=SIZE, trainable=True).requires_grad_(False)
    query = torch.randn(1, SIZE)
    exchange = two_times(*times, 64, 4 << 20) if times else (0.0, 0.0)
    return (*exchange, timed(lambda: memory(query, topk=1), rounds))


def validation() -> list[dict[str, Any]]:
    cases = load_benchmarks("cases_distributed")
    found = []
    for ranks in (2, 4):
        ring = cases.RingCase(f"ring causal, {ranks} ranks", ranks)
        reads = [cases.ReadCase(f"{kind} k=32, {ranks} ranks", ranks, kind, PICKS) for kind in ("rows", "columns")]
        for case in (ring, *reads):
            for row in cases.rows(case, 5):
                if row.status != "ok":
                    raise RuntimeError(row.note)
                what = {
                    "name": case.name,
                    "kind": getattr(case, "placement", "ring"),
                    "pass": row.pass_,
                    "ranks": ranks,
                }
                sizes = {"slots": case.slots, "queries": case.queries} if case is not ring else {
                    "tokens": case.tokens, "heads": case.heads, "size": case.size}  # fmt: skip
                found.append({**what, **sizes, "sent": row.sent_bytes, "measured_ms": row.time_ms})
    return found


def free_cores() -> int:
    """What other work leaves of the cores, by the load of the last minute."""
    return max(1, round((os.cpu_count() or 1) - os.getloadavg()[0]))


def measure() -> dict[str, Any]:
    processes = load_benchmarks("processes")
    here = load_benchmarks("machine").environment()
    cores = free_cores()
    whole = validation()
    alone = processes.run_ranks(1, "processes", "call", "scale_measure", "link", 15)[0]
    pair = processes.run_ranks(2, "processes", "call", "scale_measure", "link", 15)[0]
    facts = {"machine": f"{here['cpu']}, {here['machine']}, {here['isa']}, torch {here['torch']}", "date": here["date"]}
    times = {"message_s": pair[0], "byte_s": pair[1], "call_s": alone[2]}
    return {**facts, "commit": here["commit"], "cores": cores, **costs(), **times, "validation": whole}
