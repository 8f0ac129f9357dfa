"""Compiles every CUDA kernel for every GPU architecture and compares registers and memory with the budget.

    python tools/cuda_budget.py            check against tests/cuda_budget.json
    python tools/cuda_budget.py --write    write what the compiler reports now

A spill is an error whatever the budget says. More registers or memory than the budget is an error; fewer are shown, so
that the budget can follow. Dynamic shared memory is decided at launch and not known to the compiler; docs/cuda.md lists
it. Nothing runs on a GPU here.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUDGET = ROOT / "tests" / "cuda_budget.json"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
FIELDS = ("registers", "spill_bytes", "stack_bytes", "static_shared_bytes")
Usage = dict[str, dict[str, dict[str, int]]]  # architecture -> kernel -> field -> number


def kernel_name(mangled: str) -> str:
    """``dot_attention_fma_kernel<float, 64>`` from its mangled form; the anonymous namespace's name varies."""
    text = subprocess.run(["c++filt", mangled], check=True, capture_output=True, text=True).stdout
    match = re.search(r"(\w+_kernel)(<.*?>)?\(", text)
    if match is None:
        return mangled
    noise = r"\(?anonymous namespace\)?::|attnfast::cuda::|_GLOBAL__N__\w+::|\((?:int|bool)\)"
    arguments = re.sub(noise, "", match[2] or "")
    return match[1] + arguments.replace("()", "")


def usage_of(log: str) -> dict[str, dict[str, int]]:
    """Read what ``ptxas -v`` prints."""
    kernels: dict[str, dict[str, int]] = {}
    current: dict[str, int] = {}
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            current = kernels[kernel_name(match[1])] = dict.fromkeys(FIELDS, 0)
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            current["stack_bytes"] = int(match[1])
            current["spill_bytes"] = int(match[2]) + int(match[3])
        elif match := re.search(r"Used (\d+) registers", line):
            current["registers"] = int(match[1])
            if shared := re.search(r"(\d+) bytes smem", line):
                current["static_shared_bytes"] = int(shared[1])
    return kernels


def compile_all(nvcc: str) -> Usage:
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))

    def compile_one(job: tuple[str, Path]) -> tuple[str, dict[str, dict[str, int]]]:
        architecture, source = job
        with tempfile.TemporaryDirectory() as folder:
            command = [nvcc, "-std=c++20", f"-I{ROOT / 'csrc'}", f"-arch={architecture}", "-cubin", "-Xptxas", "-v",
                       "-o", f"{folder}/kernel.cubin", str(source)]  # fmt: skip
            result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            sys.exit(f"{source.name} for {architecture}: {result.stderr}")
        return architecture, usage_of(result.stdout + result.stderr)

    usage: Usage = {architecture: {} for architecture in ARCHITECTURES}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for architecture, kernels in pool.map(compile_one, [(a, s) for a in ARCHITECTURES for s in sources]):
            usage[architecture].update(kernels)
    return usage


def compare(usage: Usage, budget: Usage) -> list[str]:
    """Return what is wrong."""
    problems = []
    for architecture, kernels in usage.items():
        allowed = budget.get(architecture, {})
        for name in sorted(set(kernels) ^ set(allowed)):
            problems.append(f"{architecture} {name}: {'not in the budget' if name in kernels else 'no such kernel'}")
        for name, used in kernels.items():
            if used["spill_bytes"]:
                problems.append(f"{architecture} {name}: {used['spill_bytes']} bytes of spills")
            for field in FIELDS:
                limit = allowed.get(name, {}).get(field, used[field])
                if used[field] > limit:
                    problems.append(f"{architecture} {name}: {used[field]} {field}, budget {limit}")
                elif used[field] < limit:
                    print(f"below its budget: {architecture} {name}: {used[field]} {field}, budget {limit}")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        print("cuda_budget: NOT CHECKED, there is no nvcc on this machine")
        return 0
    usage = compile_all(nvcc)
    if given.write:
        BUDGET.write_text(json.dumps(usage, indent=1, sort_keys=True) + "\n")
    problems = compare(usage, json.loads(BUDGET.read_text()))
    count = sum(map(len, usage.values()))
    print("\n".join(problems) or f"cuda_budget: {count} kernels within their budgets, no spills")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
