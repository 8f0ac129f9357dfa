"""``python -m attnfast info``: what is built, what this machine runs, and why not more."""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

import attnfast
from attnfast._ext import _C, cuda_binary, has_cuda

from . import described

# From the lowest to the best, with what each needs; a build holds some of them.
_ISAS = {
    "baseline": "any processor",
    "avx2": "AVX2, FMA and F16C",
    "avx512": "AVX-512 F, BW, VL and DQ",
    "avx512_bf16": "those and AVX512_BF16",
}

_EXAMPLES = """\
examples:
  python -m attnfast info
  python -m attnfast info --json                what a bug report needs
  ATTNFAST_ISA=avx2 python -m attnfast info     hold this process to AVX2

JSON: {"attnfast", "location", "binary", "build" (what the compiler was), "python", "torch": {"version", "cuda",
"location"}, "threads": {"torch", "cores"}, "isa": {"used", "available", "compiled", "forced", "status",
"cpu_features"}, "devices": {"cpu", "cuda"}}.
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = described(
        commands,
        "info",
        help="what is built and in use",
        description="Show version, build, instruction sets (in use, available, and why others are not), torch, "
        "threads.",
        examples=_EXAMPLES,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def isa_status(name: str, compiled: list[str], available: list[str], used: str, features: dict[str, bool]) -> str:
    """What is to be said about one variant: "in use", "available", or why it cannot be used."""
    if name == used:
        return "in use"
    if name in available:
        return "available, not in use: " + _why_not_used(name, available, used)
    if name not in compiled:
        return "not built (this architecture or compiler has no such instructions)"
    missing = [feature for feature, present in features.items() if not present]
    above = {"avx2": "avx512", "avx512": "avx512_bf16"}.get(name)
    if above is not None:
        missing = [feature for feature in missing if not feature.startswith(above)]
    return f"built, but this processor lacks {', '.join(missing)}"


def _why_not_used(name: str, available: list[str], used: str) -> str:
    if available.index(name) < available.index(used):
        return f"{used} is faster"
    forced = os.environ.get("ATTNFAST_ISA")
    return f"ATTNFAST_ISA={forced} asks for another" if forced else "another was chosen at run time"


def cuda_status() -> str:
    """Whether the CUDA kernels are built, and for which GPUs."""
    if not has_cuda():
        return "not built (the build found no nvcc or no GPU; ATTNFAST_CUDA=ON builds it where nvcc is)"
    built = cuda_binary().build_info()
    return f"built for sm {built['architectures']} and later (docs/cuda.md)"


def collect() -> dict[str, Any]:
    """Everything ``info`` shows, as plain data."""
    compiled, available, used = _C.compiled_isas(), _C.available_isas(), _C.get_isa()
    features = dict(_C.cpu_features())
    return {
        "attnfast": attnfast.__version__,
        "location": str(Path(attnfast.__file__).parent),
        "binary": str(_C.__file__),
        "build": dict(_C.build_info()),
        "python": platform.python_version(),
        "torch": {
            "version": str(torch.__version__),
            "cuda": torch.version.cuda,
            "location": str(Path(torch.__file__).parent),
        },
        "threads": {"torch": torch.get_num_threads(), "cores": os.cpu_count()},
        "isa": {
            "used": used,
            "available": list(available),
            "compiled": list(compiled),
            "forced": os.environ.get("ATTNFAST_ISA") or None,
            "status": {name: isa_status(name, compiled, available, used, features) for name in _ISAS},
            "cpu_features": features,
        },
        "devices": {"cpu": "built", "cuda": cuda_status()},
    }


def run(arguments: argparse.Namespace) -> int:
    data = collect()
    if arguments.json:
        print(json.dumps(data, indent=2, default=str))
        return 0
    isa, found, build = data["isa"], data["torch"], data["build"]
    cuda = f"CUDA {found['cuda']}" if found["cuda"] else "CPU build"
    threads = data["threads"]
    lines = [
        ("attnfast", f"{data['attnfast']} in {data['location']}"),
        ("binary", f"{data['binary']}, built by {build.get('compiler', 'an unknown compiler')}"),
        ("torch", f"{found['version']} ({cuda}) in {found['location']}"),
        ("python", data["python"]),
        ("threads", f"{threads['torch']} of torch's pool (torch.set_num_threads), {threads['cores']} cores"),
        ("devices", "cpu; " + f"cuda {data['devices']['cuda']}"),
        ("ISA in use", isa["used"] + (f" (asked for by ATTNFAST_ISA={isa['forced']})" if isa["forced"] else "")),
    ]
    for name, needs in _ISAS.items():
        lines.append((f"  {name}", f"{isa['status'][name]} (needs {needs})"))
    features = isa["cpu_features"]
    if features:
        shown = ", ".join(f"{name} {'yes' if present else 'no'}" for name, present in features.items())
        lines.append(("CPU features", shown))
    width = max(len(label) for label, _ in lines) + 2
    for label, text in lines:
        print(f"{label:<{width}}{text}")
    return 0
