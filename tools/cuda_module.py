"""Builds attnfast._cuda for every GPU, apart from the package, and loads it: `python tools/cuda_module.py`.

There need not be a GPU. Then the module must load all the same, say so when asked for devices, refuse CPU tensors, and
export nothing but its own entry.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import cmake
import ninja
import pybind11

ROOT = Path(__file__).resolve().parent.parent

USE = """
import torch, _cuda
_cuda.init(torch.Tensor.__dlpack_c_exchange_api__)
print(_cuda.build_info())
try:
    print(_cuda.device_count(), "GPUs")
except RuntimeError as error:
    print("no GPU:", error)
x = torch.zeros(1, 1, 1, 8)
try:
    _cuda.dot_attention_fwd(x, x, x, x, *[None] * 3, 0, *[None] * 12, 1.0, 0.0, 0.0, 0.0, 0, -1, -1, None)
except TypeError as error:
    assert "query: expected a CUDA tensor" in str(error), error
else:
    raise SystemExit("a CPU tensor was accepted")
"""


def main() -> int:
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        print("cuda_module: NOT CHECKED, there is no nvcc on this machine")
        return 0
    start = time.perf_counter()
    folder, program = ROOT / "build" / "cuda", str(Path(cmake.CMAKE_BIN_DIR) / "cmake")
    modules = folder / "python"
    subprocess.check_call([
        program, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR) / 'ninja'}", "-DATTNFAST_CUDA=ON",
        f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={modules}",
    ], stdout=subprocess.DEVNULL)  # fmt: skip
    jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 1)
    subprocess.check_call([program, "--build", str(folder), "--parallel", jobs, "--target", "_cuda"])
    (module,) = modules.glob("_cuda*.so")
    print(f"cuda_module: {module.stat().st_size / 2**20:.1f} MiB, built in {time.perf_counter() - start:.0f} s")
    subprocess.check_call([sys.executable, "-c", USE], cwd=modules)

    needed = subprocess.run(["readelf", "-d", str(module)], check=True, capture_output=True, text=True).stdout
    exported = subprocess.run(
        ["nm", "-D", "--defined-only", str(module)], check=True, capture_output=True, text=True
    ).stdout
    problems = [line for line in needed.splitlines() if "(NEEDED)" in line and ("cuda" in line or "torch" in line)]
    problems += [line for line in exported.splitlines() if line.split()[-2] in "TDRB" and "PyInit__cuda" not in line]
    print("\n".join(problems) or "cuda_module: loads without a GPU, links neither torch nor a CUDA library")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
