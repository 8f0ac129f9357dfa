"""Builds tests/simt once per sanitizer and runs it: `python tools/simt_tests.py none address thread`.

Programs under the SIMT emulator, none of which needs a GPU or CUDA: its own tests, the kernels of csrc/cuda against
their definition, one program an op, and kernels with one bug each. For these the program itself lists which checks must
find which bug; a bug that one of those misses is a failure, and so is a report about the same kernel without its bug.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

import cmake
import ninja
import pybind11

Item = TypeVar("Item")
Result = TypeVar("Result")

ROOT = Path(__file__).resolve().parent.parent
# What a run found, as in tests/simt/bugs.cpp. The sanitizers end a process with statuses chosen here.
WRONG, REPORT, ADDRESS, THREAD = 1, 2, 4, 8
FOUND = {WRONG: "wrong result", REPORT: "emulator", ADDRESS: "AddressSanitizer or UBSan", THREAD: "ThreadSanitizer"}
STATUS = {ADDRESS: 90, THREAD: 91}
# Programs that must find nothing: the emulator itself, and the random calls of each op.
PROGRAMS = ("primitives", "dot_attention", "dot_attention_bwd", "additive_attention", "memory")
BUILDS = {"none": WRONG | REPORT, "address": ADDRESS, "thread": THREAD}
# Leaks: a kernel that failed leaves its stacks as they are. Use after return: fibers share the scheduler's fake stack.
OPTIONS = {
    "ASAN_OPTIONS": f"detect_leaks=0:exitcode={STATUS[ADDRESS]}:abort_on_error=0",
    "UBSAN_OPTIONS": f"print_stacktrace=1:halt_on_error=1:exitcode={STATUS[ADDRESS]}",
    "TSAN_OPTIONS": f"halt_on_error=1:exitcode={STATUS[THREAD]}",
}


def run_cmake(folder: Path, target: str, *options: str) -> None:
    program = str(Path(cmake.CMAKE_BIN_DIR) / "cmake")
    subprocess.check_call([
        program, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR) / 'ninja'}",
        "-DATTNFAST_BUILD_MODULE=OFF", "-DATTNFAST_CUDA=OFF", *options,
    ], stdout=subprocess.DEVNULL)  # fmt: skip
    jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 1)
    subprocess.check_call([program, "--build", str(folder), "--parallel", jobs, "--target", target])


def build(sanitizer: str, target: str = "attnfast_simt_tests") -> Path:
    """All programs of tests/simt, or one of them; returns their folder."""
    folder = ROOT / "build" / f"simt-{sanitizer}"
    folder.mkdir(parents=True, exist_ok=True)
    kind = "" if sanitizer == "none" else sanitizer
    with open(folder / ".lock", "w") as lock:  # as in build_module
        fcntl.flock(lock, fcntl.LOCK_EX)
        run_cmake(folder, target, "-DATTNFAST_BUILD_SIMT_TESTS=ON", f"-DATTNFAST_SANITIZE={kind}")
    return folder


def build_module() -> Path:
    """The tests' Python module ``_simt`` for this Python, in a folder that holds nothing else to import."""
    folder = ROOT / "build" / "simt-module"
    modules = folder / "python"
    modules.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:  # test processes build it at the same time
        fcntl.flock(lock, fcntl.LOCK_EX)
        run_cmake(
            folder, "_simt", "-DATTNFAST_BUILD_SIMT_MODULE=ON", f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={modules}",
        )  # fmt: skip
    return modules


def run(program: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(program), *arguments]
    if sys.platform == "linux":
        # ThreadSanitizer of GCC 12 cannot place its shadow memory on kernels with many bits of address randomisation.
        command = ["setarch", "--addr-no-randomize", *command]
    variables = {**os.environ, **OPTIONS, **environment}
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=600)


def launch_notes(folder: Path, name: str) -> Path:
    """Where a program of PROGRAMS leaves what it launched (csrc/simt/simt.h, note_launch)."""
    return folder / f"{name}.launches"


def run_noting(folder: Path, name: str) -> subprocess.CompletedProcess[str]:
    """Run one of PROGRAMS and keep the list of its launches if it finds nothing."""
    notes = launch_notes(folder, name)
    result = run(folder / f"attnfast_simt_{name}", ATTNFAST_SIMT_LAUNCHES=str(notes))
    if result.returncode != 0:
        notes.unlink(missing_ok=True)
    return result


def show(result: subprocess.CompletedProcess[str]) -> None:
    print(result.stdout[-6000:], result.stderr[-6000:], sep="\n")


def found_in(status: int) -> int:
    """The checks that a run's exit status speaks of."""
    for check, code in STATUS.items():
        if status == code:
            return check
    return status if 0 <= status <= WRONG | REPORT else 0


def allowed(sanitizer: str) -> int:
    """What a run of this build may be said to have found: its sanitizer's own finds, and what any run finds."""
    return BUILDS[sanitizer] | WRONG | REPORT


def side_by_side(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Results in order; as many at once as there are processors. Each item runs one program, which uses one."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(work, items))


def check_bugs(folders: dict[str, Path]) -> int:
    """Run every bug under every build and compare with the program's table."""
    failures = 0
    programs = {sanitizer: folder / "attnfast_simt_bugs" for sanitizer, folder in folders.items()}
    sound = side_by_side(lambda program: run(program, "sound"), programs.values())
    for sanitizer, result in zip(programs, sound, strict=True):
        if result.returncode != 0:
            print(f"FAILED: kernels without bugs, sanitizer {sanitizer}, status {result.returncode}")
            show(result)
            failures += 1
    listed = run(next(iter(programs.values())), "list").stdout.split()
    covered = 0
    for sanitizer in programs:
        covered |= BUILDS[sanitizer]
    names = listed[::2]
    width = max(len(name) for name in names)

    def finds(name: str) -> int:
        statuses = {sanitizer: run(program, name).returncode for sanitizer, program in programs.items()}
        return sum({check for s, code in statuses.items() for check in FOUND if found_in(code) & check & allowed(s)})

    for name, wanted, found in zip(names, map(int, listed[1::2]), side_by_side(finds, names), strict=True):
        missing = wanted & covered & ~found
        if missing or (not found and covered & wanted):
            print(f"FAILED: {name} was not found by {', '.join(FOUND[c] for c in FOUND if missing & c)}")
            failures += 1
        print(f"  {name:<{width}}  found by {', '.join(FOUND[c] for c in FOUND if found & c) or 'nothing'}")
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sanitizers", nargs="+", choices=list(BUILDS))
    given = parser.parse_args()
    failures, folders = 0, {}
    for sanitizer in given.sanitizers:
        start = time.perf_counter()
        folders[sanitizer] = folder = build(sanitizer)
        built = time.perf_counter()
        for name, result in zip(PROGRAMS, side_by_side(partial(run_noting, folder), PROGRAMS), strict=True):
            print(f"{name}, sanitizer {sanitizer}: {result.stdout.strip().splitlines()[-1:]}")
            if result.returncode != 0:
                print(f"FAILED: status {result.returncode}")
                show(result)
                failures += 1
        print(f"simt tests, sanitizer {sanitizer}: built in {built - start:.0f} s, ran in "
              f"{time.perf_counter() - built:.0f} s", flush=True)  # fmt: skip
    start = time.perf_counter()
    failures += check_bugs(folders)
    print(f"simt tests: bugs in {time.perf_counter() - start:.0f} s, {failures} failures")
    return 0 if failures == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
