"""docs/roofline.md is what tools/roofline.py writes, and its arithmetic is that of the benchmark and of the kernels."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from attnfast.cli._benchmarks import load_benchmarks

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def roofline() -> Iterator[ModuleType]:
    sys.path.insert(0, str(ROOT / "tools"))
    yield importlib.import_module("roofline")
    sys.path.remove(str(ROOT / "tools"))


def test_the_document_is_up_to_date(roofline: ModuleType) -> None:
    text = roofline.document(json.loads(roofline.BUDGET.read_text()))
    assert roofline.DOCUMENT.read_text() == text, "run python tools/roofline.py --write"
    assert "predicted, never measured" in text.splitlines()[0]
    for line in text.splitlines():
        assert "TFLOP/s" not in line or "predicted" in line or "published" in line or "peak" in line, line


def test_flops_are_those_of_the_benchmark(roofline: ModuleType) -> None:
    registry = load_benchmarks("registry")
    cases = {case.name: case for case in registry.cases("gpu")}
    for kernel in roofline.KERNELS:
        for tokens in roofline.LENGTHS:
            name = f"{16384 // tokens},{2048 // kernel.head},{tokens},{kernel.head} bf16"
            assert roofline.predict(kernel, roofline.A100, tokens).flops == cases[name].flops("forward")


def test_the_busiest_unit_decides(roofline: ModuleType) -> None:
    kernel, gpu = roofline.dot_mma(64), roofline.A100
    # Four warps read 2 x 64 rows of 128 bytes and cp.async writes them; two products of 64 x 64 x 64.
    assert kernel.cycles(gpu)["shared memory"] == 2 * 64 * 128 * 5 / 128
    assert kernel.cycles(gpu)["tensor cores"] == 2 * 2 * 64**3 / 2048
    found = roofline.predict(kernel, gpu, 4096)
    assert found.bound == "shared memory" and found.best_s < found.worst_s
    assert found.tflops[1] < gpu.tensor * gpu.processors * gpu.ghz * 1e-3
    without = dataclasses.replace(kernel, shared=lambda k: 0.0)
    assert roofline.predict(without, gpu, 4096).bound == "tensor cores"
    slow = dataclasses.replace(gpu, hbm=1)
    assert roofline.predict(kernel, slow, 4096).bound == "HBM"
    assert roofline.predict(kernel, slow, 4096).best_s == pytest.approx(4 * 16384 * 2048 * 2 / 1e9 + roofline.LAUNCH_S)
