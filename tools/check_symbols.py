"""Checks with nm that code compiled for a higher ISA cannot be used by machines without it.

A kernel file is compiled once per ISA. An inline function of a shared header that is emitted as a weak symbol exists in
several objects, the linker keeps one for everybody, and if that is the AVX-512 copy every older machine stops with an
illegal instruction. So each ISA object may define global symbols in its own namespace attnfast::<isa> only, and nothing
weak or unique. The module itself must export its init function only.

    python tools/check_symbols.py [BUILD_FOLDER]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
ISAS = ("baseline", "avx2", "avx512")
# A pointer, in data, to the exception personality routine: the same in every object and never code.
HARMLESS = ("DW.ref.__gxx_personality_v0",)
# What kernels may take from elsewhere, beside the C library and the compiler's support routines.
SHARED = ("attnfast::parallel_tasks(", "attnfast::scratch(")


class Symbol(NamedTuple):
    kind: str
    name: str


def symbols(path: Path, *options: str) -> list[Symbol]:
    lines = subprocess.run(["nm", "-C", *options, str(path)], check=True, capture_output=True, text=True).stdout
    found = []
    for line in lines.splitlines():
        kind, _, name = line[17:].partition(" ")
        if kind:
            found.append(Symbol(kind, name))
    return found


def check_object(path: Path, isa: str) -> list[str]:
    """Return what is wrong with one object compiled for `isa`."""
    problems = []
    for kind, name in symbols(path):
        if name in HARMLESS:
            continue
        if kind in "WVu":  # lower case w and v are references, not definitions
            problems.append(f"{path.name}: weak or unique symbol {name} ({kind})")
        elif kind == "U" and name.startswith("attnfast::") and not name.startswith((f"attnfast::{isa}::", *SHARED)):
            problems.append(f"{path.name}: uses {name}, which is not of {isa}")
        elif kind.isupper() and kind != "U" and not name.startswith(f"attnfast::{isa}::"):
            problems.append(f"{path.name}: global symbol {name} ({kind}) outside attnfast::{isa}")
    return problems


def check_module(path: Path) -> list[str]:
    """Return what the module exports beside its init function, and the libraries it should not need."""
    allowed = ("PyInit__C",)
    problems = [
        f"{path.name}: exports {name}"
        for kind, name in symbols(path, "-D", "--defined-only")
        # libstdc++ declares its templates with default visibility, whatever the compiler is told.
        if kind in "TDRBi" and name not in allowed
    ]
    dynamic = subprocess.run(["readelf", "-d", str(path)], check=True, capture_output=True, text=True).stdout
    for line in dynamic.splitlines():
        if "(NEEDED)" in line and any(name in line for name in ("torch", "c10", "gomp", "iomp", "mkl")):
            problems.append(f"{path.name}: is linked to {line.split('[')[-1].rstrip(']')}")
    return problems


def find_objects(folder: Path) -> dict[str, list[Path]]:
    """Return the objects of each ISA under a build folder."""
    return {isa: sorted(folder.glob(f"**/attnfast_{isa}.dir/**/*.o")) for isa in ISAS}


def check(objects: dict[str, list[Path]], modules: Iterable[Path]) -> list[str]:
    problems = [problem for isa, paths in objects.items() for path in paths for problem in check_object(path, isa)]
    return problems + [problem for path in modules for problem in check_module(path)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = next(iter(sorted((ROOT / "build").glob("temp.*"))), ROOT / "build")
    parser.add_argument("folder", nargs="?", type=Path, default=default)
    folder = parser.parse_args().folder
    objects = find_objects(folder)
    if not objects["baseline"]:
        print(f"check_symbols: no kernel objects under {folder}; run `make setup` first", file=sys.stderr)
        return 1
    problems = check(objects, (ROOT / "attnfast").glob("_C*.so"))
    print("\n".join(problems) or f"check_symbols: {sum(map(len, objects.values()))} objects, nothing leaks")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
