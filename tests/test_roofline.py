"""docs/roofline.md is what tools/roofline.py writes, and its arithmetic is that of the benchmark and of the kernels."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from types import ModuleType

import pytest
from helpers import imported_tool

from attnfast.cli._benchmarks import load_benchmarks


@pytest.fixture(scope="module")
def roofline() -> Iterator[ModuleType]:
    with imported_tool("roofline") as tool:
        yield tool


def test_the_document_is_up_to_date(roofline: ModuleType) -> None:
    text = roofline.document(json.loads(roofline.BUDGET.read_text()))
    assert roofline.DOCUMENT.read_text() == text, "run python tools/roofline.py --write"
    assert "predicted, never measured" in text.splitlines()[0]
    for line in text.splitlines():
        assert "TFLOP/s" not in line or "predicted" in line or "published" in line or "peak" in line, line


def test_flops_are_those_of_the_benchmark(roofline: ModuleType) -> None:
    registry = load_benchmarks("registry")
    cases = {case.name: case for case in registry.cases("gpu")}
    for op in roofline.OPS:
        which = "backward" if op.backward else "forward"
        for tokens in roofline.LENGTHS:
            name = f"{16384 // tokens},{2048 // op.head},{tokens},{op.head} bf16"
            assert roofline.predict(op, roofline.A100, tokens).flops == cases[name].flops(which)


def test_the_busiest_unit_decides(roofline: ModuleType) -> None:
    kernel, gpu = roofline.dot_mma(64), roofline.A100
    # Four warps read 2 x 64 rows of 128 bytes and cp.async writes them; two products of 64 x 64 x 64.
    assert kernel.cycles(gpu)["shared memory"] == 2 * 64 * 128 * 5 / 128
    assert kernel.cycles(gpu)["tensor cores"] == 2 * 2 * 64**3 / 2048
    op = roofline.forward("", kernel)
    found = roofline.predict(op, gpu, 4096)
    assert found.bound == "shared memory" and found.best_s < found.worst_s
    assert found.tflops[1] < gpu.tensor * gpu.processors * gpu.ghz * 1e-3
    without = roofline.forward("", dataclasses.replace(kernel, shared=lambda k: 0.0))
    assert roofline.predict(without, gpu, 4096).bound == "tensor cores"
    slow = dataclasses.replace(gpu, hbm=1)
    assert roofline.predict(op, slow, 4096).bound == "HBM"
    assert roofline.predict(op, slow, 4096).best_s == pytest.approx(4 * 16384 * 2048 * 2 / 1e9 + roofline.LAUNCH_S)


def test_the_passes_of_a_backward_take_turns(roofline: ModuleType) -> None:
    op, gpu = roofline.backward_mma(64), roofline.A100
    by_queries, by_keys = op.kernels
    # Four warps read three (four) times 32 rows of 128 bytes and their own 16 rows of two tensors, and by keys 3 x 8
    # numbers a lane, each a cycle; cp.async writes 2 x 32 rows.
    tile, own = 32 * 128, 64 * 128
    assert by_queries.cycles(gpu)["shared memory"] == (4 * 3 * tile + 2 * own + 2 * tile) / 128
    assert by_keys.cycles(gpu)["shared memory"] == (4 * 4 * tile + 2 * own + 2 * tile) / 128 + 4 * 3 * 8
    assert by_queries.cycles(gpu)["tensor cores"] == 3 * 2 * 64 * 32 * 64 / 2048
    found = roofline.predict(op, gpu, 4096)
    alone = [dataclasses.replace(op, kernels=(kernel,), backward=False) for kernel in op.kernels]
    parts = [roofline.predict(one, gpu, 4096) for one in alone]
    assert found.best_s == pytest.approx(sum(p.best_s for p in parts) + roofline.LAUNCH_S)
    assert found.worst_s == pytest.approx(sum(p.worst_s for p in parts) + roofline.LAUNCH_S)
    # Once more the products S and dP, and no pass at the full rate: five of the seven products is the most.
    assert found.tflops[1] < 5 / 7 * gpu.tensor * gpu.processors * gpu.ghz * 1e-3
    slow = dataclasses.replace(gpu, hbm=1)
    assert roofline.predict(op, slow, 4096).best_s == pytest.approx(13 * 16384 * 2048 * 2 / 1e9 + 3 * roofline.LAUNCH_S)
