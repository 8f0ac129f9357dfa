"""What ranks send and hold is what attnfast/distributed/_traffic.py says; docs/distributed.md explains it."""

from __future__ import annotations

import pytest
import ranks as processes
import torch

from attnfast.cli._benchmarks import load_benchmarks
from attnfast.distributed import ShardedMemory, context_parallel_attention
from attnfast.distributed import _traffic as formulas
from attnfast.distributed.context_parallel import FACTS

REAL = {torch.float64: 8, torch.float32: 4, torch.bfloat16: 4}
Count = tuple[str, int, int]  # what, counted, by the formula


def rings(rank: int, ranks: int) -> list[Count]:
    traffic = load_benchmarks("traffic")
    found: list[Count] = []
    for causal, kv_heads, dtype in ((True, 4, torch.float32), (False, 2, torch.bfloat16), (True, 1, torch.float64)):
        q = torch.randn(2, 4, 8, 6, dtype=dtype, requires_grad=True)
        k, v = (torch.randn(2, kv_heads, 8, size, dtype=dtype, requires_grad=True) for size in (6, 5))
        formula = formulas.Ring(ranks, 2, 4, kv_heads, 8, 8, 6, 5, q.element_size(), REAL[dtype])
        with traffic.Traffic() as forward:
            out = context_parallel_attention(q, k, v, causal=causal)
        with traffic.Traffic() as backward:
            out.sum().backward()
        agreement = formulas.agreement(ranks, len(FACTS))
        found.append((f"forward, {dtype}", forward.sent, formula.sent_forward() + agreement))
        found.append((f"backward, {dtype}", backward.sent, formula.sent_backward()))
    return found


def reads(rank: int, ranks: int) -> list[Count]:
    traffic = load_benchmarks("traffic")
    found: list[Count] = []
    for placement in ("rows", "columns"):
        for slots, dtype in ((64, torch.float32), (1027, torch.float64)):
            torch.manual_seed(1 + rank)
            memory = ShardedMemory(
                None, placement, capacity=slots, key_size=6, value_size=5, trainable=True, dtype=dtype
            )
            query = torch.randn(3, 6, dtype=dtype)
            _, picks, _, usage = memory(query, topk=7, return_aux=True)
            elsewhere = int((picks // memory.rows_of_rank != rank).sum())
            served = int(usage.sum()) - (picks.numel() - elsewhere)
            sizes = (ranks, slots, 3, 7, 6, 5, query.element_size(), REAL[dtype])
            formula = formulas.Read(*sizes, elsewhere, served)
            for topk in (7, None):
                leaf = query.clone().requires_grad_()
                with traffic.Traffic() as forward:
                    out = memory(leaf, topk=topk)
                with traffic.Traffic() as backward:
                    out.sum().backward()
                with torch.no_grad(), traffic.Traffic() as plain:
                    memory(query, topk=topk)
                name = "soft" if topk is None else "best"
                read = getattr(formula, f"{placement}_{name}")
                ahead, back = (
                    (read(), formula.soft_backward(placement))
                    if topk is None
                    else (read(recorded=True), getattr(formula, f"{placement}_best_backward")())
                )
                where = f"{placement} {name} of {slots}"
                found += [(where, plain.sent, read()), (f"{where}, recorded", forward.sent, ahead),
                          (f"{where}, backward", backward.sent, back)]  # fmt: skip
    return found


def counts(rank: int, ranks: int) -> list[Count]:
    return rings(rank, ranks) + reads(rank, ranks)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_counted_bytes_are_those_of_the_formula(ranks: int) -> None:
    for rank, found in enumerate(processes.run(ranks, counts)):
        assert len(found) == 6 + 2 * 2 * 2 * 3
        for what, counted, formula in found:
            assert counted == formula, f"{what}, rank {rank} of {ranks}"
            assert (counted > 0) == (ranks > 1), what


def test_rows_cost_the_same_for_any_number_of_slots_and_columns_do_not() -> None:
    few, many = (formulas.Read(4, slots, 3, 7, 6, 5, 4, 4, 5, 6) for slots in (64, 10**9))
    assert few.rows_best() == many.rows_best() and few.rows_soft() == many.rows_soft()
    assert many.columns_best() - few.columns_best() == 3 * 3 * (10**9 - 64) * 4


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_benchmark_shows_counts_beside_formulas(ranks: int) -> None:
    """Sockets carry headers beside the payload. Memory is held in pages, and gloo has some of its own."""
    cases = load_benchmarks("cases_distributed")
    found = cases.rows(cases.RingCase("ring", ranks, causal=False, tokens=512 * ranks, heads=6, kv_heads=6), 1)
    found += cases.rows(cases.ReadCase("columns", ranks, "columns", 32, slots=1 << 14), 1)
    found += cases.rows(cases.ReadCase("rows", ranks, "rows", 32, slots=1 << 14), 1)
    assert [row.pass_ for row in found] == ["forward", "backward", "forward", "forward"]
    for row in found:
        assert row.status == "ok" and row.ranks == ranks, row.note
        assert row.sent_bytes == row.sent_formula
        if row.wire_bytes is not None:
            assert row.sent_bytes <= row.wire_bytes <= 1.02 * row.sent_bytes + 8192, row.case
        assert row.time_ms > 0 and (row.case != "ring" or row.waited_ms <= row.time_ms)
    for row in found[:3]:
        if row.peak_extra_mib is not None:
            assert 0.85 * row.peak_formula_mib <= row.peak_extra_mib <= 1.1 * row.peak_formula_mib + 1.5, row.case
    found[0].sent_bytes += 1
    console = load_benchmarks("report").make_console()
    with console.capture() as capture:
        load_benchmarks("processes").print_processes(found, console)
    shown = capture.get()
    assert f"{found[0].sent_formula:,}".replace(",", " ") in shown and "hidden" in shown


def test_a_rank_that_fails_is_a_row_that_says_so() -> None:
    cases = load_benchmarks("cases_distributed")
    row, _ = cases.rows(cases.RingCase("ring", 2, tokens=6), 1)
    assert row.status == "failed" and "even number of tokens" in row.note
