"""Builds attnfast._cuda apart from the package and loads it: `python tools/cuda_module.py [--every]`.

It is built for every GPU if the kernels or the compiler are not those of tests/cuda_budget.json, as the digest beside
it tells, or if --every asks for it. Otherwise what the compiler makes of them is on record, and one GPU is enough to
see that they compile, link and load: a quarter of the time.

There need not be a GPU. Then the module must load all the same, say so when asked for devices, refuse CPU tensors, name
kernel and shape when a launch fails, and export nothing but its own entry. Objects are kept in build/cuda, so that only
the first run takes minutes, and tools/cuda_budget.py reads registers and instructions from what is built here.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import cmake
import ninja
import pybind11

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "cuda"
DIGEST = ROOT / "tests" / "cuda_budget.sha256"  # written with the budget (tools/cuda_budget.py)
ONE = "90-real"

USE = """
import os, torch, _cuda
_cuda.init(torch.Tensor.__dlpack_c_exchange_api__)
print(_cuda.build_info())
try:
    print(_cuda.device_count(), "GPUs")
except RuntimeError as error:
    print("no GPU:", error)
    assert os.path.exists("/dev/nvidiactl") or "there is no NVIDIA driver on this machine" in str(error), error
x = torch.zeros(1, 1, 1, 8)
try:
    _cuda.dot_attention_fwd(x, x, x, x, *[None] * 3, 0, *[None] * 12, 1.0, 0.0, 0.0, 0.0, 0, -1, -1, None, False)
except TypeError as error:
    assert "query: expected a CUDA tensor" in str(error), error
else:
    raise SystemExit("a CPU tensor was accepted")
"""
# What a failed launch must say, on the lines of tests/native/cuda_errors.cpp.
ERROR = re.compile(r"^CUDA kernel dot_attention_\w+<\w+> \(B=2, H=\d+, H_kv=\d+, T_q=\d+, T_k=5, D=\d+, D_v=\d+\): .+")


def find_nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def digest() -> str:
    """Of all that decides what the kernels become: their sources, the way they are compiled, and the compiler."""
    nvcc = find_nvcc()
    assert nvcc is not None
    found = hashlib.sha256(subprocess.check_output([nvcc, "--version"]))
    folders = [ROOT / "csrc" / name for name in ("core", "cuda")]
    for path in [ROOT / "CMakeLists.txt", *sorted(path for folder in folders for path in folder.rglob("*.*"))]:
        found.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return found.hexdigest()


def known() -> bool:
    """Whether the budget was written for these kernels and this compiler."""
    return DIGEST.exists() and DIGEST.read_text().strip() == digest()


def build(every: bool) -> Path:
    """Build module and error program, for every GPU or for `ONE`, as far as need be. Returns the module's path."""
    program, modules = str(Path(cmake.CMAKE_BIN_DIR) / "cmake"), FOLDER / "python"
    subprocess.check_call([
        program, "-S", str(ROOT), "-B", str(FOLDER), "-G", "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR) / 'ninja'}", "-DATTNFAST_CUDA=ON",
        f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={modules}",
        *(["-U", "ATTNFAST_CUDA_ARCHITECTURES"] if every else [f"-DATTNFAST_CUDA_ARCHITECTURES={ONE}"]),
    ], stdout=subprocess.DEVNULL)  # fmt: skip
    jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 1)
    targets = ["--target", "_cuda", "attnfast_cuda_errors"]
    subprocess.check_call([program, "--build", str(FOLDER), "--parallel", jobs, *targets])
    (module,) = modules.glob("_cuda*.so")
    return module


def check_errors() -> list[str]:
    """Run the program whose launches all fail; return the lines that do not name kernel and shape."""
    result = subprocess.run([str(FOLDER / "attnfast_cuda_errors")], capture_output=True, text=True, timeout=60)
    lines = result.stdout.splitlines()
    print(*lines, sep="\n")
    wrong = [line for line in lines if not ERROR.match(line)]
    return wrong if result.returncode == 0 and lines else [*wrong, f"attnfast_cuda_errors: {result.stderr}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", action="store_true", help="for every GPU, whatever is on record")
    given = parser.parse_args()
    if find_nvcc() is None:
        print("cuda_module: NOT CHECKED, there is no nvcc on this machine")
        return 0
    start = time.perf_counter()
    every = given.every or not known()
    module = build(every)
    print(f"cuda_module: for {'every GPU' if every else ONE + ', the others are on record'}")
    print(f"cuda_module: {module.stat().st_size / 2**20:.1f} MiB, built in {time.perf_counter() - start:.0f} s")
    subprocess.check_call([sys.executable, "-c", USE], cwd=module.parent)

    problems = check_errors()
    needed = subprocess.run(["readelf", "-d", str(module)], check=True, capture_output=True, text=True).stdout
    exported = subprocess.run(
        ["nm", "-D", "--defined-only", str(module)], check=True, capture_output=True, text=True
    ).stdout
    problems += [line for line in needed.splitlines() if "(NEEDED)" in line and ("cuda" in line or "torch" in line)]
    problems += [line for line in exported.splitlines() if line.split()[-2] in "TDRB" and "PyInit__cuda" not in line]
    print("\n".join(problems) or "cuda_module: loads without a GPU, links neither torch nor a CUDA library")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
