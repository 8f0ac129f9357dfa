"""What can be said of the CUDA side without a GPU: how it is found, refused and measured. The kernels: test_simt.py."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import attnfast
from attnfast import _ext, _validate

ROOT = Path(__file__).resolve().parent.parent

TOOLS = ROOT / "tools"
MANGLED = "_ZN8attnfast4cuda53_GLOBAL__N__0d17e0ef_20_dot_attention_fma_cu_3ab88306{}IfLi64EEEvNS_18DotAttentionParamsE"
FMA = MANGLED.format("24dot_attention_fma_kernel")
# As cuobjdump prints them.
RESOURCES = f"""
Fatbin elf code:
================
arch = sm_80
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:0
 Function {FMA}:
  REG:168 STACK:8 SHARED:512 LOCAL:4 CONSTANT[2]:104 CONSTANT[0]:1368 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
LISTING = f"""
arch = sm_80

\t\tFunction : {FMA}
\t.headerflags\t@"EF_CUDA_SM80 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM80)"
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;       /* 0x00000a00ff017624 */
                                                                                 /* 0x000fe400078e00ff */
        /*0010*/              @!P4 FFMA R43, R118, R41, R41 ;                    /* 0x0000000000007919 */
        /*0020*/                   LDG.E.128 R4, [R2.64] ;                        /* 0x0000000000007919 */
        /*0030*/                   LDG.E R4, [R2.64] ;                            /* 0x0000000000007919 */
        /*0040*/             @UP0  LDGSTS.E.BYPASS.128 [R4], [R2.64], P0 ;       /* 0x0000000000007919 */
        /*0050*/                   DSETP.NEU.AND P4, PT, RZ, c[0x0][0x330], PT ; /* 0x0000000000007919 */
        /*0060*/                   F2F.F32.F64 R4, R2 ;                           /* 0x0000000000007919 */
        /*10000*/                  STL [R1], R4 ;                                 /* 0x0000000000007919 */
"""


@pytest.fixture(scope="module")
def tools() -> Iterator[ModuleType]:
    """tools/cuda_budget.py, with what it imports from beside it."""
    sys.path.insert(0, str(TOOLS))
    yield importlib.import_module("cuda_budget")
    sys.path.remove(str(TOOLS))


def good_kernel(tools: ModuleType, **changes: int) -> dict[str, int]:
    """What an unobtrusive tensor-core kernel holds."""
    counts = dict.fromkeys(("instructions", *tools.cuda_sass.OPCODES, "LDG_128", "LDGSTS_128", "double"), 0)
    counts.update(instructions=900, HMMA=64, LDSM=32, LDGSTS=8, LDGSTS_128=8, FFMA=100, MUFU=64)
    memory = {"registers": 100, "stack_bytes": 0, "static_shared_bytes": 0}
    launch = {"threads": 128, "dynamic_shared_bytes": 40960, "blocks_per_sm": 3}
    return {**memory, **counts, **launch, **changes}


def test_names_are_those_of_the_source(tools: ModuleType) -> None:
    name = tools.cuda_sass.kernel_name
    (text,) = tools.cuda_sass.demangle([FMA]).values()
    assert name(text) == "dot_attention_fma_kernel<float, 64>"
    emulated = (
        "void attnfast::cuda::(anonymous namespace)::a_kernel<attnfast::cuda::(anonymous namespace)::BFloat16, 64>"
    )
    assert name(emulated + "(attnfast::DotAttentionParams)") == "a_kernel<BFloat16, 64>"
    assert name("void attnfast::cuda::plain(int)") == "plain"
    assert name("void attnfast::cuda::a_kernel<double, 64, (bool)1, (int)3>(int)") == "a_kernel<double, 64, true, 3>"
    assert name("void cub::DeviceRadixSortKernel<attnfast::cuda::Key>(attnfast::cuda::Key*)") is None


def test_what_cuobjdump_says_is_read(tools: ModuleType) -> None:
    used = tools.cuda_sass.resource_usage(RESOURCES.splitlines())
    assert used == {"sm_80": {FMA: {"registers": 168, "stack_bytes": 12, "static_shared_bytes": 512}}}
    later = RESOURCES.replace("sm_80", "sm_90").replace("SHARED:512", "SHARED:1536")
    assert tools.cuda_sass.resource_usage(later.splitlines()) == {"sm_90": used["sm_80"]}
    found = tools.cuda_sass.instruction_counts(LISTING.splitlines())["sm_80"][FMA]
    wanted = {"instructions": 8, "FFMA": 1, "LDG": 2, "LDG_128": 1, "LDGSTS": 1, "LDGSTS_128": 1, "STL": 1, "double": 2}
    assert {name: number for name, number in found.items() if number} == wanted


def test_what_a_name_promises_is_required(tools: ModuleType) -> None:
    required = tools.cuda_sass.required
    mma, fma = "a_mma_kernel<BFloat16, 64>", "a_fma_kernel<double, 64>"
    good = good_kernel(tools)
    assert required(mma, good) == []
    assert required(mma, {**good, "HMMA": 0}) == ["no HMMA"]
    assert required(mma, {**good, "LDSM": 0}) == ["no LDSM"]
    assert required(mma, {**good, "LDGSTS_128": 0}) == ["no LDGSTS_128"]
    assert required("plain_kernel", {**good, "LDL": 2, "STL": 1}) == [
        "2 LDL: local memory is read or written", "1 STL: local memory is read or written"
    ]  # fmt: skip
    assert required(fma, {**good, "HMMA": 0, "DFMA": 5}) == []
    assert required(fma, {**good, "HMMA": 0}) == ["no DFMA"]
    assert required("a_fma_kernel<float, 64>", good) == ["64 HMMA in a kernel without tensor cores"]


def test_a_budget_is_held(tools: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    def problems(used: dict[str, int], allowed: dict[str, int]) -> list[str]:
        return tools.compare({"sm_80": {"a_mma_kernel": used}}, {"sm_80": {"a_mma_kernel": allowed}})

    good = good_kernel(tools)
    assert problems(good, good) == []
    for field in ("registers", "stack_bytes", "static_shared_bytes", "dynamic_shared_bytes", "threads"):
        more = {**good, field: good[field] + 1}
        text = f"{good[field] + 1} {field}, budget {good[field]}"
        assert problems(more, good) == [f"sm_80 a_mma_kernel: {text}"]
        assert problems(good, more) == [] and "better than its budget" in capsys.readouterr().out
    fewer = {**good, "blocks_per_sm": 2}
    assert problems(fewer, good) == ["sm_80 a_mma_kernel: 2 blocks_per_sm, budget 3"]
    assert problems(good, fewer) == []
    assert problems({**good, "blocks_per_sm": 0}, {**good, "blocks_per_sm": 0})[0].endswith("fits no multiprocessor")
    # Instructions: a tenth.
    assert problems({**good, "FFMA": 110}, good) == []
    assert problems({**good, "FFMA": 111}, good) == ["sm_80 a_mma_kernel: 111 FFMA, budget 100"]
    assert problems({**good, "FFMA": 89}, good) == ["sm_80 a_mma_kernel: 89 FFMA, budget 100"]
    spilling = {**good, "STL": 1}
    assert problems(spilling, spilling) == ["sm_80 a_mma_kernel: 1 STL: local memory is read or written"]
    unknown = {name: number for name, number in good.items() if name not in ("threads", "blocks_per_sm")}
    assert "no program of tests/simt runs it" in problems(unknown, good)[0]
    usage = {"sm_80": {"a_mma_kernel": good}}
    assert tools.compare(usage, {"sm_80": {}}) == ["sm_80 a_mma_kernel: not in the budget"]
    assert tools.compare({"sm_80": {}}, usage) == ["sm_80 a_mma_kernel: no such kernel"]
    assert json.loads(tools.as_text(usage)) == usage


def test_launches_are_found_by_address(tools: ModuleType) -> None:
    symbols = """
0000000000001000 T attnfast::simt::set_seed(unsigned int)
0000000000000f00 t void attnfast::cuda::(anonymous namespace)::a_kernel<float, 64>(int)
0000000000002000 t attnfast::simt::(anonymous namespace)::mma_kernel(int)
                 U malloc
"""
    notes = f"{0xF00 - 0x1000} 128 4096\n{0xF00 - 0x1000} 64 8192\n{0x1000} 32 0\n"
    assert tools.launches_of(symbols, notes) == {"a_kernel<float, 64>": (128, 8192)}


def test_an_error_of_a_launch_names_kernel_and_shape(tools: ModuleType) -> None:
    error = tools.cuda_module.ERROR
    shape = "(B=2, H=4, H_kv=2, T_q=3, T_k=5, D=64, D_v=64)"
    assert error.match(f"CUDA kernel dot_attention_mma<float16> {shape}: there is no NVIDIA driver")
    assert not error.match("CUDA kernel dot_attention_mma<float16>: there is no NVIDIA driver")
    assert not error.match(f"CUDA kernel {shape}: there is no NVIDIA driver")
    assert not error.match(f"CUDA kernel dot_attention_mma<float16> {shape}: ")


def test_the_budget_names_every_architecture_that_is_built(tools: ModuleType) -> None:
    match = re.search(r'ATTNFAST_CUDA_ARCHITECTURES "([^"]+)"', (ROOT / "CMakeLists.txt").read_text())
    assert match is not None
    built = {f"sm_{name.removesuffix('-real')}" for name in match[1].split(";")}
    budget = json.loads((ROOT / "tests" / "cuda_budget.json").read_text())
    assert built == set(budget) == set(tools.ARCHITECTURES)
    names = [set(kernels) for kernels in budget.values()]
    assert names[0] and all(other == names[0] for other in names)
    assert tools.compare(budget, budget) == []
    occupancy = (TOOLS / "cuda_occupancy.cpp").read_text()
    assert all(f'"{architecture}"' in occupancy for architecture in built)


def test_the_budget_was_written_for_these_kernels(tools: ModuleType) -> None:
    """Otherwise `make check` would compile all of them for every GPU each time, or, worse, believe an old budget."""
    if tools.cuda_module.find_nvcc() is None:
        pytest.skip("no nvcc on this machine")
    version = subprocess.check_output([tools.cuda_module.find_nvcc(), "--version"], text=True)
    if "V13.0.88" not in version:
        pytest.skip("the budget was written with another nvcc")
    assert tools.cuda_module.known()


def test_a_digest_tells_what_the_kernels_depend_on(
    tools: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tools.cuda_module
    names = ("CMakeLists.txt", "csrc/core/a.h", "csrc/cuda/b.cu", "csrc/cuda/device/c.cuh")
    files = [tmp_path / name for name in names]
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name)
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho one\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "DIGEST", tmp_path / "digest")
    monkeypatch.setattr(module, "find_nvcc", lambda: str(nvcc))
    assert not module.known()
    for path in [*files, nvcc]:
        (tmp_path / "digest").write_text(module.digest() + "\n")
        assert module.known()
        path.write_text(path.read_text() + "echo two\n")
        assert not module.known(), path
    (tmp_path / "digest").write_text(module.digest() + "\n")
    files[1].rename(files[1].with_name("d.h"))
    assert not module.known()


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


def test_where_there_are_kernels_devices_must_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_validate, "has_cuda", lambda: True)
    with FakeTensorMode():
        query, host = torch.empty(1, 1, 4, 8, device="cuda"), torch.empty(1, 1, 4, 8)
        with pytest.raises(ValueError, match=r"key: expected a tensor on cuda:0 \(query's\), got one on cpu"):
            attnfast.attention(query, host, query)
        assert attnfast.attention(query, query, query).device.type == "cuda"
        with pytest.raises(ValueError, match=r"weight: expected a tensor on cuda:0 \(query's\), got one on cpu"):
            attnfast.additive_attention(query, query, query, torch.empty(1, 8))
        weight = torch.empty(1, 8, device="cuda")
        assert attnfast.additive_attention(query, query, query, weight).device.type == "cuda"
