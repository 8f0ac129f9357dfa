"""The empty CUDA libraries under which a CUDA build of torch is loaded: does the loader take them?"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import load_tool

pytestmark = pytest.mark.skipif(
    shutil.which("cc") is None or shutil.which("readelf") is None, reason="needs a C compiler and binutils"
)
LOAD = "import ctypes, sys; x = ctypes.CDLL(sys.argv[1]); print(x.devices(), x.others())"


def library(folder: Path, name: str, code: str, *options: str) -> Path:
    source, target = folder.parent / f"{name}.c", folder / name
    source.write_text(code)
    subprocess.check_call(["cc", "-shared", "-fPIC", str(source), "-o", str(target), f"-Wl,-soname,{name}", *options])
    return target


@pytest.fixture
def torch_folder(tmp_path: Path) -> Path:
    """A folder like torch's whose one library needs a libcudart with versions and a libnccl without, both gone."""
    cuda = tmp_path / "cuda"
    folder = tmp_path / "torch" / "lib"
    cuda.mkdir()
    folder.mkdir(parents=True)
    script = tmp_path / "cudart.map"
    script.write_text("libcudart.so.99 { global: cudaGetDeviceCount; __cudaRegister; };\n")
    runtime = library(
        cuda, "libcudart.so.99", "int cudaGetDeviceCount(void) { return 0; }\nint __cudaRegister(void) { return 1; }",
        f"-Wl,--version-script={script}",
    )  # fmt: skip
    nccl = library(cuda, "libnccl.so.2", "int ncclGetVersion(void) { return 2; }")
    code = (
        "int cudaGetDeviceCount(void);\nint __cudaRegister(void);\nint ncclGetVersion(void);\n"
        "int devices(void) { return cudaGetDeviceCount(); }\n"
        "int others(void) { return __cudaRegister() + ncclGetVersion(); }\n"
    )
    # Bound at once, like the tables of functions in torch's libraries.
    library(folder, "libtorch_cuda.so", code, str(runtime), str(nccl), "-Wl,-z,now")
    shutil.rmtree(cuda)
    return folder.parent


def load(folder: Path, stubs: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LOAD, str(folder / "lib" / "libtorch_cuda.so")]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(stubs)}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)


def test_the_loader_takes_them_and_there_is_no_gpu(torch_folder: Path, tmp_path: Path) -> None:
    stubs = tmp_path / "stubs"
    assert "libcudart.so.99: cannot open shared object file" in load(torch_folder, stubs).stderr
    assert load_tool("cuda_stubs").write_stubs(torch_folder, stubs) == ["libcudart.so.99", "libnccl.so.2"]
    answer = load(torch_folder, stubs)
    assert answer.stdout.split() == ["100", "0"], answer.stderr


def test_a_cpu_build_needs_none(tmp_path: Path) -> None:
    folder = tmp_path / "torch" / "lib"
    folder.mkdir(parents=True)
    library(folder, "libtorch_cpu.so", "int nothing(void) { return 0; }")
    assert load_tool("cuda_stubs").write_stubs(folder.parent, tmp_path / "stubs") == []
