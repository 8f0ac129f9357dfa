"""Empty stand-ins for the CUDA libraries that a CUDA build of torch names, so that it loads without them.

The wheels of torch on PyPI for Linux link a dozen libraries of CUDA, gigabytes of them, which are packages of their
own. The loader wants each file, each symbol version in it and, as far as they are bound early, the symbols; code that
runs on a CPU calls none of them but the runtime's registration of kernels. So this writes, with the C compiler, one
library for each file that is named and missing, with the versions and symbols that torch's libraries ask it for. Every
function returns 0, those of the CUDA runtime `cudaErrorNoDevice`, as the real ones do on a machine without a GPU.

For checks alone (tools/check_torch_versions.py): nothing that needs a GPU can be tried with them.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections import defaultdict
from pathlib import Path

_CUDA_LIBRARY = re.compile(r"lib(cu|nv|nccl)")
_CUDA_NAME = re.compile(r"_*(cu|nccl|nv|Nv)")
_NO_DEVICE = 100  # cudaErrorNoDevice


def _readelf(option: str, path: Path) -> str:
    return subprocess.check_output(["readelf", "-W", option, str(path)], text=True, stderr=subprocess.DEVNULL)


def wanted_symbols(libraries: list[Path]) -> dict[str, dict[str, set[str]]]:
    """What CUDA's libraries must hold: file -> version ("" for none) -> names. Names without a version, which may be in
    any of them, are put into the first file."""
    present = {path.name for path in libraries}
    wanted: dict[str, dict[str, set[str]]] = {}
    unversioned: set[str] = set()
    defined: set[str] = set()
    for path in libraries:
        for name in re.findall(r"\(NEEDED\)\s+Shared library: \[(.+)\]", _readelf("-d", path)):
            if name not in present and _CUDA_LIBRARY.match(name):
                wanted.setdefault(name, defaultdict(set))
    for path in libraries:
        file_of: dict[str, str] = {}
        file = ""
        for kind, name in re.findall(r"(File|Name): (\S+)", _readelf("-V", path)):
            if kind == "File":
                file = name
            elif file in wanted:
                file_of[name] = file
                wanted[file][name]  # a version that no symbol of this library has is asked for all the same
        for line in _readelf("--dyn-syms", path).splitlines():
            fields = line.split()
            if len(fields) < 8 or not fields[0].endswith(":"):
                continue
            name, _, version = fields[7].partition("@")
            if fields[6] != "UND":
                defined.add(name)
            elif version in file_of:
                wanted[file_of[version]][version].add(name)
            elif not version and _CUDA_NAME.match(name):
                unversioned.add(name)
    if wanted:
        wanted[min(wanted)][""] |= unversioned - defined
    return wanted


def _function(name: str) -> str:
    answer = _NO_DEVICE if re.match(r"cuda[A-Z]", name) else 0
    return f"long {name}(void) {{ return {answer}; }}\n"


def write_stubs(torch_folder: Path, folder: Path) -> list[str]:
    """Stand-ins for what the libraries of a torch in `torch_folder` miss, into `folder`; returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    libraries = [*torch_folder.glob("lib/*.so*"), *torch_folder.glob("_C.*.so")]
    wanted = wanted_symbols(libraries)
    for name, versions in wanted.items():
        source, script = folder / f"{name}.c", folder / f"{name}.map"
        source.write_text("".join(_function(symbol) for symbols in versions.values() for symbol in sorted(symbols)))
        nodes = []
        for version, symbols in versions.items():
            if version:
                names = "".join(f" {symbol};" for symbol in sorted(symbols))
                nodes.append(f"{version} {{{f' global:{names}' if names else ''} }};\n")
        script.write_text("".join(nodes))
        flags = [f"-Wl,--version-script={script}"] if nodes else []
        compiler = os.environ.get("CC", "cc")
        subprocess.check_call(
            [compiler, "-w", "-fno-builtin", "-shared", "-fPIC", "-nostdlib", f"-Wl,-soname,{name}", *flags,
             str(source), "-o", str(folder / name)]
        )  # fmt: skip
    return sorted(wanted)
