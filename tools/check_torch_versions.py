"""Does one built binary work with other versions of torch, and a wheel with other Pythons?

    python tools/check_torch_versions.py                                     # 2.10.0 and 2.15.0, the ends of the range
    python tools/check_torch_versions.py 2.12.0                              # one version
    python tools/check_torch_versions.py 2.13.0@/usr/bin/python3.12 ...      # another Python: a wheel is built with it

One wheel is built for each Python, the same file for every version of torch, and the kernels are compiled once for all
of them. Each pair of Python and torch gets an environment of its own in build/torch-versions/, kept between runs, with
the wheel and torch in it, and tools/smoke.py runs there.

torch comes from the package index without what it depends on: those for Linux are CUDA builds, of which the libraries
of CUDA, three times as large, are replaced by empty ones (tools/cuda_stubs.py). Half a gigabyte to one is downloaded
for each version the first time, so this is not part of `make check`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from cuda_stubs import write_stubs

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "torch-versions"
ENDS = ("2.10.0", "2.15.0")
# What `import torch` needs beside itself, all of it small, and numpy, without which torch warns.
NEEDED = ("filelock", "fsspec", "jinja2", "networkx", "numpy", "setuptools>=77.0.3", "sympy", "typing-extensions>=4.13")


def pip(python: str, *arguments: str, **environment: str) -> None:
    command = [python, "-m", "pip", "--disable-pip-version-check", *arguments]
    subprocess.check_call(command, env={**os.environ, **environment})


def tag(python: str) -> str:
    """``cp312`` of an interpreter."""
    code = "import sys; print('cp%d%d' % sys.version_info[:2])"
    return subprocess.check_output([python, "-c", code], text=True).strip()


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def build_wheel(python: str) -> Path:
    """A wheel for an interpreter, compiled in a folder that all of them share: only the bindings know which it is."""
    folder = FOLDER / "wheels" / tag(python)
    shutil.rmtree(folder, ignore_errors=True)
    settings = FOLDER / "build.cfg"
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text("[build_ext]\nbuild_temp = build/torch-versions/objects\n")
    # What CMake remembers of the Python before would be believed.
    forget = "-UPython_* -U_Python_* -UPYTHON_* -UPYBIND11_*"
    environment = {
        "DIST_EXTRA_CONFIG": str(settings), "ATTNFAST_CUDA": "OFF",
        "CMAKE_ARGS": f"{forget} -DPython_EXECUTABLE={interpreter(python)} {os.environ.get('CMAKE_ARGS', '')}",
    }  # fmt: skip
    pip(python, "wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT), **environment)
    (wheel,) = folder.glob("*.whl")
    return wheel


def interpreter(python: str) -> str:
    return subprocess.check_output([python, "-c", "import sys; print(sys.executable)"], text=True).strip()


def environment_for(python: str, version: str) -> tuple[Path, Path]:
    """Python of an environment with this torch, and the folder of the empty libraries; made if it is not there."""
    folder = FOLDER / f"{version}-{tag(python)}"
    inside = folder / "bin" / "python"
    stubs = folder / "cuda-stubs"
    ready = folder / ".ready"
    if not ready.exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.check_call([python, "-m", "venv", str(folder)])
        pip(str(inside), "install", "--quiet", *NEEDED)
        pip(str(inside), "install", "--quiet", "--no-deps", f"torch=={version}")
        code = "import sysconfig; print(sysconfig.get_paths()['platlib'])"
        packages = subprocess.check_output([str(inside), "-c", code], text=True).strip()
        write_stubs(Path(packages) / "torch", stubs)
        ready.touch()
    return inside, stubs


def smoke(python: Path, stubs: Path, wheel: Path) -> dict[str, object]:
    """Installs the wheel, runs the smoke test outside of the checkout, and returns what it says of itself."""
    pip(str(python), "install", "--quiet", "--no-deps", "--no-index", "--force-reinstall", str(wheel))
    environment = {**os.environ, "LD_LIBRARY_PATH": str(stubs)}
    environment.pop("PYTHONPATH", None)
    said = subprocess.check_output(
        [str(python), str(ROOT / "tools" / "smoke.py")], text=True, env=environment, cwd=FOLDER
    )
    found: dict[str, object] = json.loads(said.splitlines()[-1])
    if not str(found["from"]).startswith(str(python.parent.parent)):
        sys.exit(f"the smoke test imported {found['from']}, not the wheel")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="*", metavar="VERSION[@PYTHON]", help=f"default: {' '.join(ENDS)}")
    wheels: dict[str, Path] = {}
    for pair in parser.parse_args().pairs or ENDS:
        version, _, python = pair.partition("@")
        python = python or sys.executable
        if python not in wheels:
            wheels[python] = build_wheel(python)
            print(f"{wheels[python].name}, sha256 {digest(wheels[python])}", flush=True)
        found = smoke(*environment_for(python, version), wheels[python])
        if str(found["torch"]).partition("+")[0] != version:
            sys.exit(f"torch {version} was asked for, {found['torch']} was imported")
        print(
            f"good: torch {found['torch']}, Python {found['python']}, {found['machine']}, {found['isas']}", flush=True
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
