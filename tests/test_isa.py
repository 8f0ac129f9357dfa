"""Choosing the instruction set: by environment variable, by function, and what happens to wrong names."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import attnfast
from attnfast._ext import _C

LADDER = ["baseline", "avx2", "avx512", "avx512_bf16"]
PRINT_ISA = "from attnfast._ext import _C; print(_C.get_isa())"


def run_python(code: str, isa: str | None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "ATTNFAST_ISA"}
    if isa is not None:
        environment["ATTNFAST_ISA"] = isa
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture(autouse=True)
def restore_isa() -> object:
    before = _C.get_isa()
    yield
    _C.set_isa(before)


def test_lists_are_a_ladder_and_agree_with_cpuid() -> None:
    compiled, available, features = _C.compiled_isas(), _C.available_isas(), _C.cpu_features()
    assert compiled == LADDER[: len(compiled)]
    assert available == compiled[: len(available)]
    assert "baseline" in available
    if "avx2" in compiled:
        has_avx2 = all(features[name] for name in ("avx2", "fma", "f16c"))
        has_avx512 = has_avx2 and all(features[name] for name in ("avx512f", "avx512bw", "avx512vl", "avx512dq"))
        assert ("avx2" in available) == has_avx2
        assert ("avx512" in available) == has_avx512
        assert ("avx512_bf16" in available) == (has_avx512 and features["avx512_bf16"])


@pytest.mark.skipif(not os.path.exists("/proc/cpuinfo"), reason="needs /proc/cpuinfo")
def test_features_agree_with_the_kernel_of_the_system() -> None:
    with open("/proc/cpuinfo") as lines:
        flags = next((line.split(":")[1].split() for line in lines if line.startswith("flags")), [])
    for name, present in _C.cpu_features().items():
        assert present == (name in flags), name


def test_the_best_is_chosen_at_load() -> None:
    for value in (None, "", "auto"):
        result = run_python(PRINT_ISA, value)
        assert result.stdout.strip() == _C.available_isas()[-1], result.stderr


@pytest.mark.parametrize("name", _C.available_isas())
def test_environment_forces(name: str) -> None:
    code = "import torch, attnfast; x = torch.ones(1, 1, 4, 8); attnfast.attention(x, x, x); " + PRINT_ISA
    result = run_python(code, name)
    assert result.stdout.strip() == name, result.stderr


@pytest.mark.parametrize("name", ["sse9", "AVX2", "avx2 ", "none"])
def test_environment_with_an_unknown_name(name: str) -> None:
    result = run_python("import attnfast", name)
    assert result.returncode != 0
    last = result.stderr.strip()
    assert "ImportError" in last
    assert f"environment variable ATTNFAST_ISA: unknown ISA '{name}'" in last
    assert ", ".join(["auto", *_C.available_isas()]) in last


def test_function_returns_the_one_before() -> None:
    best = _C.available_isas()[-1]
    _C.set_isa("auto")
    assert _C.get_isa() == best
    assert _C.set_isa("baseline") == best
    assert _C.get_isa() == "baseline"
    assert _C.set_isa("auto") == "baseline"
    assert _C.get_isa() == best


@pytest.mark.parametrize("name", ["", "sse9", "AVX512"])
def test_function_with_an_unknown_name(name: str) -> None:
    before = _C.get_isa()
    with pytest.raises(ValueError, match=f"unknown ISA '{name}' \\(available here: auto, baseline"):
        _C.set_isa(name)
    assert _C.get_isa() == before


@pytest.mark.parametrize("name", LADDER)
def test_a_variant_is_used_or_refused_with_the_reason(name: str) -> None:
    if name in _C.available_isas():
        _C.set_isa(name)
        assert _C.get_isa() == name
        return
    with pytest.raises(ValueError, match=r"needs CPU features this machine lacks|is not part of this build"):
        _C.set_isa(name)


def test_function_wants_a_string() -> None:
    with pytest.raises(TypeError):
        _C.set_isa(3)  # type: ignore[arg-type]


@pytest.mark.skipif(len(_C.available_isas()) < 2, reason="one variant only")
def test_variants_are_different_code_with_close_results() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 2, 70, 40) for _ in range(3))
    results = {}
    for name in _C.available_isas():
        _C.set_isa(name)
        results[name] = attnfast.attention(query, key, value)
    baseline = results.pop("baseline")
    for name, result in results.items():
        torch.testing.assert_close(result, baseline, atol=2e-6, rtol=1e-5)
        # Without fused multiply-add some last bits differ: equal bits would mean that the choice had no effect.
        assert not torch.equal(result, baseline), name


@pytest.mark.parametrize("isa", _C.available_isas())
def test_yardsticks_do_what_they_count(isa: str) -> None:
    _C.set_isa(isa)
    lanes = {"baseline": 4, "avx2": 8, "avx512": 16, "avx512_bf16": 16}[isa]
    assert _C.yardstick_fma(64 * 1000) == 64 * 1000 * 12 * lanes * 2
    assert _C.yardstick_fma(1) == 64 * 12 * lanes * 2
    # 70 000 words are more than one chunk; a checksum sees every byte.
    memory = torch.randint(0, 2**62, (70_000 // 32 * 32,)).numpy().view("uint64")
    assert _C.yardstick_read(memory) == int(memory.sum(dtype="uint64"))
    tail = torch.tensor([1, 2, 4], dtype=torch.uint8).numpy()
    assert _C.yardstick_read(tail) == 7
    assert _C.yardstick_read(torch.empty(0).numpy()) == 0
    with pytest.raises(ValueError, match="expected a contiguous buffer"):
        _C.yardstick_read(memory[::2])
    with pytest.raises(ValueError, match="steps: expected at least 1, got 0"):
        _C.yardstick_fma(0)
