"""Reads what the compiler made of the CUDA kernels from the built module itself: registers, memory, instructions.

Everything comes from ``cuobjdump`` and the ``nvdisasm`` it calls (CUDA toolkit; packages nvidia-cuda-*), applied to the
very file that is installed, so nothing is compiled a second time. Kernels of libraries (CUB) are left out: only what is
in ``attnfast::cuda`` is ours to answer for.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

Kernels = dict[str, dict[str, int]]  # kernel -> field -> number
Usage = dict[str, Kernels]  # architecture -> kernels

# What is counted, by the first word of an instruction; those of `_counted` besides.
OPCODES = ("HMMA", "LDSM", "LDGSTS", "MUFU", "FFMA", "FFMA2", "DFMA", "BAR", "SHFL", "LDS", "STS", "LDG", "STG", "LDL",
           "STL")  # fmt: skip
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)([.A-Z0-9_]*)")
_FUNCTION = re.compile(r"Function\s*:?\s+(\S+?):?\s*$")
_ARCHITECTURE = re.compile(r"^arch = (sm_\d+)")


def find_cuobjdump(nvcc: str = "") -> str | None:
    """``cuobjdump`` on PATH, beside nvcc, or where pip puts it."""
    packages = Path(sysconfig.get_paths()["purelib"])
    places = [Path(nvcc).resolve().parent / "cuobjdump", *sorted(packages.glob("nvidia/cu*/bin/cuobjdump"))]
    return shutil.which("cuobjdump") or next((str(place) for place in places if place.is_file()), None)


def kernel_name(text: str) -> str | None:
    """``dot_attention_fma_kernel<float, 64>`` from the demangled name; None where it is not ours.

    The name of an unnamed namespace, and how arguments are written, vary from compiler to compiler.
    """
    text = text.removeprefix("void ")
    if not text.startswith("attnfast::cuda::"):
        return None
    text = text.replace("(bool)1", "true").replace("(bool)0", "false")
    text = re.sub(r"\(?anonymous namespace\)?::|_GLOBAL__N__\w+::|attnfast::cuda::|\(int\)(?=\w)", "", text)
    match = re.match(r"(\w+)(<.*?>)?\(", text)
    return match[1] + (match[2] or "") if match else None


def demangle(names: Iterable[str]) -> dict[str, str]:
    names = sorted(set(names))
    result = subprocess.run(["c++filt"], input="\n".join(names), check=True, capture_output=True, text=True)
    return dict(zip(names, result.stdout.splitlines(), strict=True))


def resource_usage(log: Iterable[str]) -> Usage:
    """Read ``cuobjdump --dump-resource-usage``: mangled kernels of each architecture."""
    usage: Usage = {}
    architecture = name = ""
    for line in log:
        if match := _ARCHITECTURE.match(line):
            architecture = match[1]
        elif match := _FUNCTION.search(line):
            name = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, match.groups())
            # From sm_90 on the KiB that CUDA keeps of every block for itself is counted here.
            shared -= 1024 if int(architecture.removeprefix("sm_")) >= 90 else 0
            usage.setdefault(architecture, {})[name] = {
                "registers": registers, "stack_bytes": stack + local, "static_shared_bytes": shared
            }  # fmt: skip
    return usage


def _counted(opcode: str, modifiers: str) -> Iterable[str]:
    yield "instructions"
    if opcode in OPCODES:
        yield opcode
    if opcode in ("LDG", "LDGSTS") and ".128" in modifiers:
        yield f"{opcode}_128"
    # Arithmetic in double: a sixty-fourth of float's speed on most GPUs.
    if opcode in ("DADD", "DMUL", "DFMA", "DSETP") or (opcode in ("F2F", "I2F", "F2I") and ".F64" in modifiers):
        yield "double"


def instruction_counts(listing: Iterable[str]) -> Usage:
    """Read ``cuobjdump --dump-sass``: how often each instruction stands in a kernel (not how often it runs)."""
    usage: dict[str, dict[str, Counter[str]]] = {}
    architecture, count = "", Counter[str]()
    for line in listing:
        if match := _INSTRUCTION.match(line):
            count.update(_counted(match[1], match[2]))
        elif match := _ARCHITECTURE.match(line):
            architecture = match[1]
        elif "Function" in line and (match := _FUNCTION.search(line)):
            count = usage.setdefault(architecture, {}).setdefault(match[1], Counter())
    names = ("instructions", *OPCODES, "LDG_128", "LDGSTS_128", "double")
    return {
        architecture: {kernel: {name: count[name] for name in names} for kernel, count in kernels.items()}
        for architecture, kernels in usage.items()
    }


def read_module(cuobjdump: str, module: Path) -> Usage:
    """Registers, memory and instruction counts of every kernel of ours, on every architecture in the module."""

    # cuobjdump calls nvdisasm, which stands beside it and need not be on PATH.
    env = {**os.environ, "PATH": f"{Path(cuobjdump).parent}{os.pathsep}{os.environ.get('PATH', '')}"}

    def run(option: str) -> Iterable[str]:
        with subprocess.Popen([cuobjdump, option, str(module)], stdout=subprocess.PIPE, text=True, env=env) as process:
            assert process.stdout is not None
            yield from process.stdout
        if process.returncode != 0:
            raise RuntimeError(f"cuobjdump {option} {module} ended with {process.returncode}")

    used, counted = resource_usage(run("--dump-resource-usage")), instruction_counts(run("--dump-sass"))
    readable = demangle(name for kernels in used.values() for name in kernels)
    usage: Usage = {}
    for architecture, kernels in used.items():
        for mangled, fields in kernels.items():
            if name := kernel_name(readable[mangled]):
                both = {**fields, **counted[architecture][mangled]}
                if name in usage.setdefault(architecture, {}):
                    raise RuntimeError(f"{architecture}: two kernels are called {name}")
                usage[architecture][name] = both
    return usage


def required(name: str, used: dict[str, int]) -> list[str]:
    """What a kernel of this name must and must not hold, whatever the budget says; returns what is wrong."""
    words = name.partition("<")[0].split("_")
    problems = [f"{used[x]} {x}: local memory is read or written" for x in ("LDL", "STL") if used[x]]
    if "mma" in words:
        problems += [f"no {x}" for x in ("HMMA", "LDSM", "LDGSTS_128") if not used[x]]
    if "fma" in words:
        wanted = ("DFMA",) if "<double" in name else ("FFMA", "FFMA2")
        if not any(used[x] for x in wanted):
            problems.append(f"no {' or '.join(wanted)}")
        if used["HMMA"]:
            problems.append(f"{used['HMMA']} HMMA in a kernel without tensor cores")
    return problems
