"""Where the cycles of a tile go: builds tests/native/pieces.cpp and prints a table for each instruction set.

`python tools/profile_kernels.py [ISA ...]` (default: every one this machine can run). Each piece is timed alone, on
operands in cache, in turn with the peak of multiply-adds. A slot is the time of one vector multiply-add at that peak;
"of peak" is the share of the slots that the piece's own products fill.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cmake
import ninja
from rich.console import Console
from rich.table import Table

from attnfast._ext import _C

ROOT = Path(__file__).resolve().parent.parent


def build(isas: list[str]) -> Path:
    folder = ROOT / "build" / "pieces"
    program = str(Path(cmake.CMAKE_BIN_DIR) / "cmake")
    subprocess.check_call([
        program, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR) / 'ninja'}",
        "-DATTNFAST_BUILD_MODULE=OFF", "-DATTNFAST_BUILD_PIECES=ON",
    ], stdout=subprocess.DEVNULL)  # fmt: skip
    targets = [f"attnfast_pieces_{isa}" for isa in isas]
    subprocess.check_call(
        [program, "--build", str(folder), "--parallel", str(os.cpu_count() or 1), "--target", *targets],
        stdout=subprocess.DEVNULL,
    )
    return folder


def show(rows: list[list[str]]) -> None:
    table = Table(title=f"{rows[0][0]}: a tile of 64 keys by 64 queries, float32, one thread", title_justify="left")
    table.add_column("piece")
    for name in ("D", "ns", "slots", "of peak"):
        table.add_column(name, justify="right")
    last = rows[0][1]
    for _, depth, piece, nanoseconds, slots, share in rows:
        if depth != last:
            table.add_section()
        last = depth
        table.add_row(piece, depth, nanoseconds, slots, share)
    Console().print(table)


def main() -> int:
    available = [isa for isa in _C.available_isas() if isa != "avx512_bf16"]  # which is avx512 but for bfloat16
    isas = sys.argv[1:] or available
    unknown = [isa for isa in isas if isa not in available]
    if unknown:
        print(f"not available here: {', '.join(unknown)} (there are {', '.join(available)})", file=sys.stderr)
        return 2
    folder = build(isas)
    for isa in isas:
        output = subprocess.run([str(folder / f"attnfast_pieces_{isa}")], check=True, capture_output=True, text=True)
        show([line.split("\t") for line in output.stdout.splitlines()])
    return 0


if __name__ == "__main__":
    sys.exit(main())
