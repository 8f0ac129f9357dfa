"""docs/scale.md is what tools/scale_plan.py writes, and the plan's arithmetic is that of the library."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator
from types import ModuleType

import pytest
from helpers import imported_tool

from attnfast.distributed import _traffic as formulas
from attnfast.distributed._shards import block


@pytest.fixture(scope="module")
def plan() -> Iterator[ModuleType]:
    with imported_tool("scale_plan") as tool:
        yield tool


def test_the_document_is_up_to_date(plan: ModuleType) -> None:
    text = plan.document(plan.Costs.load())
    assert plan.DOCUMENT.read_text() == text, "run python tools/scale_plan.py --write"
    assert "simulated, not run" in text.splitlines()[0]
    other = dataclasses.replace(plan.Costs.load(), scan_s=2 * plan.Costs.load().scan_s)
    assert plan.document(other) != text


def test_measurements_say_where_they_come_from(plan: ModuleType) -> None:
    costs = plan.Costs.load()
    assert costs.machine and costs.date and costs.commit and costs.cores >= 1
    numbers = [value for name, value in dataclasses.asdict(costs).items() if name.endswith(("_s", "_flops"))]
    assert len(numbers) == 13 and all(value > 0 for value in numbers)
    assert {(case["kind"], case["ranks"]) for case in costs.validation} == {
        (kind, ranks) for kind in ("ring", "rows", "columns") for ranks in (2, 4)
    }


def test_the_model_is_near_what_was_measured_here(plan: ModuleType) -> None:
    """Of stored times. 2.2 is the worst on a machine without other work, see docs/scale.md."""
    costs = plan.Costs.load()
    for case in costs.validation:
        assert 1 / 2.5 < plan.predicted_ms(costs, case) / case["measured_ms"] < 2.5, case["name"]


def test_traffic_is_that_of_the_library(plan: ModuleType) -> None:
    read = plan.read_of(64, 10**10)
    assert (read.ranks, read.slots, read.queries, read.picks) == (64, 10**10, plan.QUERIES, plan.PICKS)
    assert read.rows_best() == plan.read_of(64, 10**9).rows_best() < plan.read_of(512, 10**9).rows_best()
    shape = formulas.Ring(64, 1, plan.HEADS, plan.KV_HEADS, *[plan.TOKENS // 64] * 2, plan.HEAD, plan.HEAD, 2, 4)
    assert plan.ring_step(64, 1.0, False).sent * 63 == shape.sent_forward()
    sums = plan.ring_step(64, 1.0, True).sent - plan.ring_step(64, 1.0, False).sent
    assert 63 * plan.ring_step(64, 1.0, False).sent + 64 * sums == shape.sent_backward()


def test_zig_zag_leaves_half_of_every_block(plan: ModuleType) -> None:
    for source in range(8):
        found = block(3, source, "zigzag", True)
        assert found is not None
        halves = [part is not None for part in (found.queries, found.keys)]
        assert found.causal if source == 3 else sum(halves) == 1  # a triangle, or half of one side
    assert plan.block_flops(100, 0.5) == 2 * plan.HEADS * plan.HEAD * 100 * 100


def test_steps_are_as_long_as_the_longer_of_two(plan: ModuleType) -> None:
    for link in plan.LINKS:
        enough = plan.least_tokens(link, 1e14, plan.KV_HEADS)
        step = plan.ring_step(8, 1e14, False)
        # Work in the square of the tokens, traffic in their number.
        share = enough / (plan.TOKENS / 8)
        assert step.compute_s * share**2 == pytest.approx(step.sent * share / (link.gb_s * 1e9))
    slow = dataclasses.replace(plan.NDR, gb_s=1e-3)
    step = plan.ring_step(8, 1e14, False)
    assert step.total_s(plan.NVLINK) == step.compute_s
    assert step.total_s(slow) == pytest.approx(step.sent / 1e6 + slow.message_s)


def test_scans_grow_with_slots_and_exchanges_with_ranks(plan: ModuleType) -> None:
    costs = plan.Costs.load()
    assert plan.scan_core_s(costs, 8, 10**10) == pytest.approx(10 * plan.scan_core_s(costs, 8, 10**9))
    assert plan.scan_gpu_s(8, 10**10) == pytest.approx(10 * plan.scan_gpu_s(8, 10**9))
    # Few queries: keys are read at the rate of HBM. Many: they are multiplied.
    assert plan.scan_gpu_s(1, 10**9) == pytest.approx(10**9 * 256 / 3350e9)
    assert plan.scan_gpu_s(1024, 10**9) == pytest.approx(2.0 * 16 * 10**9 * 64 / (2 * 128 * 132 * 1.83e9))
    assert plan.exchange_s(9, 10**9, plan.NDR, 2) == pytest.approx(2 * 8 * 4e-6 + 0.02)
    assert plan.product_s(costs, 10**10) < plan.scan_core_s(costs, 1024, 10**10) / 100


def test_fixed_and_growing_costs_are_told_apart(plan: ModuleType) -> None:
    measure = importlib.import_module("scale_measure")
    assert measure.two_times(5.0, 25.0, 10, 50) == pytest.approx((0.0, 0.5))
    assert measure.two_times(7.0, 17.0, 10, 30) == pytest.approx((2.0, 0.5))
