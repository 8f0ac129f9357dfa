"""What can be said of the CUDA side without a GPU: how it is found, refused and measured. The kernels: test_simt.py."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import attnfast
from attnfast import _ext, _validate

ROOT = Path(__file__).resolve().parent.parent

LOG = """
ptxas info    : Compiling entry function '_ZN8attnfast4cuda12_GLOBAL__N_18a_kernelIfLi64EEEvi' for 'sm_80'
ptxas info    : Function properties for _ZN8attnfast4cuda12_GLOBAL__N_18a_kernelIfLi64EEEvi
    8 bytes stack frame, 16 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 512 bytes smem, 1312 bytes cmem[0]
"""


@pytest.fixture(scope="module")
def budget_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cuda_budget", ROOT / "tools" / "cuda_budget.py")
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def test_the_compiler_s_report_is_read(budget_tool: ModuleType) -> None:
    (used,) = budget_tool.usage_of(LOG).values()
    assert used == {"registers": 168, "spill_bytes": 36, "stack_bytes": 8, "static_shared_bytes": 512}


def test_a_budget_is_held(budget_tool: ModuleType) -> None:
    good = {"registers": 100, "spill_bytes": 0, "stack_bytes": 0, "static_shared_bytes": 0}
    usage = {"sm_80": {"a_kernel": good}}
    assert budget_tool.compare(usage, usage) == []
    spilling = {"sm_80": {"a_kernel": {**good, "spill_bytes": 8}}}
    assert budget_tool.compare(spilling, spilling) == ["sm_80 a_kernel: 8 bytes of spills"]
    tight = {"sm_80": {"a_kernel": {**good, "registers": 99}}}
    assert budget_tool.compare(usage, tight) == ["sm_80 a_kernel: 100 registers, budget 99"]
    assert budget_tool.compare(usage, {"sm_80": {}}) == ["sm_80 a_kernel: not in the budget"]
    assert budget_tool.compare({"sm_80": {}}, usage) == ["sm_80 a_kernel: no such kernel"]


def test_the_budget_names_every_architecture_that_is_built(budget_tool: ModuleType) -> None:
    match = re.search(r'ATTNFAST_CUDA_ARCHITECTURES "([^"]+)"', (ROOT / "CMakeLists.txt").read_text())
    assert match is not None
    built = {f"sm_{name.removesuffix('-real')}" for name in match[1].split(";")}
    budget = json.loads((ROOT / "tests" / "cuda_budget.json").read_text())
    assert built == set(budget) == set(budget_tool.ARCHITECTURES)
    names = [set(kernels) for kernels in budget.values()]
    assert names[0] and all(other == names[0] for other in names)
    for kernels in budget.values():
        assert not any(used["spill_bytes"] for used in kernels.values())


def test_the_module_is_loaded_only_when_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []

    def load(name: str) -> ModuleType:
        loaded.append(name)
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", load)
    _ext.cuda_binary.cache_clear()
    query = torch.randn(1, 1, 4, 8)
    attnfast.attention(query, query, query)
    assert loaded == []
    with pytest.raises(ImportError, match=r"attnfast's CUDA kernels cannot be used: .*\n.*ATTNFAST_CUDA=ON"):
        _ext.cuda_binary()
    assert loaded == ["attnfast._cuda"]


def test_cuda_tensors_are_refused_where_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode():
        query = torch.empty(1, 1, 4, 8, device="cuda")
        monkeypatch.setattr(_validate, "has_cuda", lambda: False)
        with pytest.raises(ValueError, match=r"query: this build has kernels for cpu tensors only, .* on cuda:0"):
            attnfast.attention(query, query, query)


def test_where_there_are_kernels_devices_must_agree_and_additive_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_validate, "has_cuda", lambda: True)
    with FakeTensorMode():
        query, host = torch.empty(1, 1, 4, 8, device="cuda"), torch.empty(1, 1, 4, 8)
        with pytest.raises(ValueError, match=r"key: expected a tensor on cuda:0 \(query's\), got one on cpu"):
            attnfast.attention(query, host, query)
        with pytest.raises(NotImplementedError, match=r"additive_attention has no CUDA kernel yet \(query on cuda:0\)"):
            attnfast.additive_attention(query, query, query, torch.empty(8, device="cuda"))
        assert attnfast.attention(query, query, query).device.type == "cuda"
