"""Compares what the compiler made of every CUDA kernel, on every GPU architecture, with the budget. Runs on no GPU.

    python tools/cuda_budget.py            check against tests/cuda_budget.json
    python tools/cuda_budget.py --every    the same, with every architecture compiled anew
    python tools/cuda_budget.py --write    write what is found now, and docs/roofline.md, which quotes it

The module is built first (tools/cuda_module.py), for one architecture if kernels and compiler are still those that the
budget was written for: then it holds for the others by tests/cuda_budget.sha256. Registers, memory and instructions are
read from it (cuda_sass.py).
How large the blocks are and how much dynamic shared memory they have is decided by the host side of a launch: the
programs of tests/simt note it for every kernel that they run under the emulator. With it NVIDIA's occupancy rules say
how many blocks fit a multiprocessor (cuda_occupancy.cpp).

Whatever the budget says, an access to local memory (a spill) is an error, and so is a kernel that fits no
multiprocessor, that the emulator never ran, or that lacks what its name promises (`required` of cuda_sass.py). More
registers or memory than the budget, or fewer blocks, is an error; what is better is shown, so that the budget can
follow. A count of instructions may differ by a tenth.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import cuda_module
import cuda_sass
import roofline
import simt_tests

ROOT = Path(__file__).resolve().parent.parent
BUDGET = ROOT / "tests" / "cuda_budget.json"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
# Fields of which there may be no more than in the budget, and no less. All others are counts of instructions.
AT_MOST = ("registers", "stack_bytes", "static_shared_bytes", "dynamic_shared_bytes", "threads")
AT_LEAST = ("blocks_per_sm",)
Launches = dict[str, tuple[int, int]]  # kernel -> threads and bytes of dynamic shared memory, the largest of each
Usage = cuda_sass.Usage


def launches_of(symbols: str, notes: str) -> Launches:
    """Join the notes of a program under the emulator (csrc/simt/simt.h, note_launch) with ``nm`` of that program."""
    addresses = {}
    for line in symbols.splitlines():
        words = line.split(maxsplit=2)
        if len(words) == 3 and words[1] in "tTwW":
            addresses[int(words[0], 16)] = words[2]
    (start,) = (at for at, name in addresses.items() if name == "attnfast::simt::set_seed(unsigned int)")
    found: Launches = {}
    for line in notes.splitlines():
        offset, threads, shared = map(int, line.split())
        if name := cuda_sass.kernel_name(addresses[start + offset]):
            before = found.get(name, (0, 0))
            found[name] = max(before[0], threads), max(before[1], shared)
    return found


def emulated_launches() -> Launches:
    """Every kernel that the programs of tests/simt run, building and running them if that has not been done."""
    folder = simt_tests.build("none")
    found: Launches = {}
    for name in simt_tests.PROGRAMS:
        program, notes = folder / f"attnfast_simt_{name}", simt_tests.launch_notes(folder, name)
        if not notes.exists() or notes.stat().st_mtime < program.stat().st_mtime:
            result = simt_tests.run_noting(folder, name)
            if result.returncode != 0:
                sys.exit(f"cuda_budget: {program.name} failed:\n{result.stdout[-4000:]}")
        symbols = subprocess.run(["nm", "-C", str(program)], check=True, capture_output=True, text=True).stdout
        for kernel, size in launches_of(symbols, notes.read_text()).items():
            before = found.get(kernel, (0, 0))
            found[kernel] = max(before[0], size[0]), max(before[1], size[1])
    return found


def occupancy(nvcc: str, questions: list[tuple[str, int, int, int, int]]) -> list[int]:
    """Blocks of each kernel on a multiprocessor; a question is a line of tools/cuda_occupancy.cpp."""
    include = subprocess.run(
        [nvcc, "-E", "-Xcompiler", "-v", "-x", "cu", "/dev/null"], capture_output=True, text=True
    ).stderr
    folders = [Path(line.strip()) for line in include.splitlines() if line.startswith(" /")]
    header = next((folder for folder in folders if (folder / "cuda_occupancy.h").is_file()), None)
    if header is None:
        sys.exit(f"cuda_budget: cuda_occupancy.h is in none of {[str(folder) for folder in folders]}")
    with tempfile.TemporaryDirectory() as temporary:
        program = Path(temporary) / "occupancy"
        source = ROOT / "tools" / "cuda_occupancy.cpp"
        compiler = os.environ.get("CXX") or "c++"
        subprocess.check_call([compiler, "-std=c++20", f"-I{header}", "-o", str(program), str(source)])
        text = "\n".join(" ".join(map(str, question)) for question in questions)
        answer = subprocess.run([str(program)], input=text, check=True, capture_output=True, text=True).stdout
    return [int(word) for word in answer.split()]


def add_launches(nvcc: str, usage: Usage, launches: Launches) -> None:
    """Put the size of its blocks and how many of them fit beside every kernel that the emulator ran."""
    questions, answered = [], []
    for architecture, kernels in usage.items():
        for name, used in kernels.items():
            if name in launches:
                used["threads"], used["dynamic_shared_bytes"] = launches[name]
                questions.append((architecture, used["registers"], *launches[name][:1], used["static_shared_bytes"],
                                  launches[name][1]))  # fmt: skip
                answered.append(used)
    for used, blocks in zip(answered, occupancy(nvcc, questions), strict=True):
        used["blocks_per_sm"] = blocks


def compare(usage: Usage, budget: Usage) -> list[str]:
    """Return what is wrong."""
    problems = []
    for architecture, kernels in usage.items():
        allowed = budget.get(architecture, {})
        for name in sorted(set(kernels) ^ set(allowed)):
            problems.append(f"{architecture} {name}: {'not in the budget' if name in kernels else 'no such kernel'}")
        for name, used in kernels.items():
            where = f"{architecture} {name}"
            problems += [f"{where}: {text}" for text in cuda_sass.required(name, used)]
            if "threads" not in used:
                problems.append(f"{where}: no program of tests/simt runs it, so its shared memory is not known")
            elif used["blocks_per_sm"] == 0:
                problems.append(f"{where}: fits no multiprocessor")
            for field, number in used.items():
                limit = allowed.get(name, {}).get(field, number)
                text = f"{where}: {number} {field}, budget {limit}"
                better = number < limit if field in AT_MOST else number > limit
                if number == limit:
                    continue
                if field not in AT_MOST + AT_LEAST:
                    if abs(number - limit) > max(2, limit // 10):
                        problems.append(text)
                elif better:
                    print(f"better than its budget: {text}")
                else:
                    problems.append(text)
    return problems


def as_text(usage: Usage) -> str:
    """JSON with one line a kernel, so that a diff shows which."""
    parts = []
    for architecture in sorted(usage):
        lines = [f"  {json.dumps(name)}: {json.dumps(used)}" for name, used in sorted(usage[architecture].items())]
        parts.append(f" {json.dumps(architecture)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", action="store_true", help="compile for every architecture, whatever is on record")
    parser.add_argument("--write", action="store_true", help="make what is found now the budget")
    given = parser.parse_args()
    nvcc = cuda_module.find_nvcc()
    if nvcc is None:
        print("cuda_budget: NOT CHECKED, there is no nvcc on this machine")
        return 0
    cuobjdump = cuda_sass.find_cuobjdump(nvcc)
    if cuobjdump is None:
        print("cuda_budget: NOT CHECKED, there is no cuobjdump on this machine (requirements-dev.txt installs it)")
        return 0
    every = given.every or given.write or not cuda_module.known()
    usage = cuda_sass.read_module(cuobjdump, cuda_module.build(every))
    if missing := set(ARCHITECTURES if every else [f"sm_{cuda_module.ONE.removesuffix('-real')}"]) ^ set(usage):
        sys.exit(f"cuda_budget: the module and this check do not agree on {', '.join(sorted(missing))}")
    add_launches(nvcc, usage, emulated_launches())
    if given.write:
        BUDGET.write_text(as_text(usage))
        cuda_module.DIGEST.write_text(cuda_module.digest() + "\n")
        roofline.write()
    problems = compare(usage, json.loads(BUDGET.read_text()))
    count = sum(map(len, usage.values()))
    print("\n".join(problems) or f"cuda_budget: {count} kernels within their budgets, no access to local memory")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
