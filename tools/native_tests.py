"""Builds tests/native once per sanitizer and runs it: `python tools/native_tests.py address thread`.

Every ISA variant that this machine can run is tested; under ThreadSanitizer only the lowest, because the variants share
who computes what when, and differ in vectors, which AddressSanitizer must see. "none" builds without a sanitizer, for
speed or a debugger.
`python tools/native_tests.py none --cross aarch64-linux-gnu --emulator qemu-aarch64-static` is the same for another
processor, with Debian's cross compiler (g++-aarch64-linux-gnu) and QEMU's user emulation (qemu-user-static).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cmake
import ninja

ROOT = Path(__file__).resolve().parent.parent
CASES = {"none": 1000, "address": 250, "thread": 120}
OPTIONS = {
    "ASAN_OPTIONS": "allocator_may_return_null=1:detect_leaks=1:detect_stack_use_after_return=1:strict_init_order=1",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    "TSAN_OPTIONS": "allocator_may_return_null=1:halt_on_error=1:second_deadlock_stack=1",
}


def build(sanitizer: str, cross: str = "") -> Path:
    folder = ROOT / "build" / f"native-{cross or sanitizer}"
    # Static, so that the emulator needs no libraries of the other machine.
    other = [
        "-DCMAKE_SYSTEM_NAME=Linux", f"-DCMAKE_SYSTEM_PROCESSOR={cross.partition('-')[0]}",
        f"-DCMAKE_CXX_COMPILER={cross}-g++", "-DCMAKE_EXE_LINKER_FLAGS=-static",
    ] if cross else []  # fmt: skip
    isas = ["-DATTNFAST_ISAS=baseline"] if sanitizer == "thread" else []
    program = str(Path(cmake.CMAKE_BIN_DIR) / "cmake")
    subprocess.check_call([
        program, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR) / 'ninja'}",
        f"-DATTNFAST_SANITIZE={'' if sanitizer == 'none' else sanitizer}",
        "-DATTNFAST_BUILD_MODULE=OFF", "-DATTNFAST_BUILD_TESTS=ON", *isas, *other,
    ], stdout=subprocess.DEVNULL)  # fmt: skip
    subprocess.check_call([program, "--build", str(folder), "--parallel", str(os.cpu_count() or 1)])
    return folder / "attnfast_native_test"


def run(binary: Path, arguments: list[str], emulator: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **OPTIONS}
    environment.pop("ATTNFAST_ISA", None)
    command = [*([emulator] if emulator else []), str(binary), *arguments]
    if sys.platform == "linux":
        # ThreadSanitizer of GCC 12 cannot place its shadow memory on kernels with many bits of address randomisation.
        command = ["setarch", "--addr-no-randomize", *command]
    return subprocess.run(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sanitizers", nargs="+", choices=list(CASES))
    parser.add_argument("--cases", type=int, help="random calls per ISA variant")
    parser.add_argument("--first", type=int, default=0, help="number of the first call, to repeat a failure")
    parser.add_argument("--cross", default="", metavar="PREFIX", help="a cross compiler, PREFIX-g++; without sanitizer")
    parser.add_argument("--emulator", default="", metavar="PROGRAM", help="what runs programs for that processor")
    given = parser.parse_args()
    if bool(given.cross) != bool(given.emulator) or (given.cross and given.sanitizers != ["none"]):
        parser.error("--cross and --emulator come together, and with `none`")
    binaries = {}
    for sanitizer in given.sanitizers:
        start = time.perf_counter()
        binaries[sanitizer] = build(sanitizer, given.cross)
        print(f"native tests, sanitizer {sanitizer}: built in {time.perf_counter() - start:.0f} s", flush=True)

    def one(sanitizer: str) -> int:
        start = time.perf_counter()
        cases = given.cases or CASES[sanitizer]
        result = run(binaries[sanitizer], ["--cases", str(cases), "--first", str(given.first)], given.emulator)
        print(f"{result.stdout}native tests, sanitizer {sanitizer}: ran in {time.perf_counter() - start:.0f} s, "
              f"status {result.returncode}", flush=True)  # fmt: skip
        return result.returncode

    # Side by side: a program leaves processors idle where it tests one thread.
    with ThreadPoolExecutor(len(binaries)) as pool:
        return 1 if any(list(pool.map(one, binaries))) else 0


if __name__ == "__main__":
    sys.exit(main())
