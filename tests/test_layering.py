"""The include and import rules of the architecture, read from the sources."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)
STANDARD = re.compile(r"[a-z0-9_]+")  # <cstdint>, <vector>: no folder, no suffix
# Kernel files are compiled per ISA: only headers that define no functions the linker could share.
KERNEL_STANDARD = {"cstddef", "cstdint", "type_traits", "utility"}
INTRINSICS = re.compile(r"\b_mm\d*_\w+|\b__m(128|256|512)[id]?\b|__builtin_ia32_|immintrin|arm_neon|\bvld1q_")
DISPATCH = {"isa.h", "isa.cpp", "parallel.cpp"}  # compiled once, for every machine


def sources(folder: str) -> list[Path]:
    found = sorted(path for path in (CSRC / folder).rglob("*") if path.suffix in {".h", ".cpp", ".cu", ".cuh"})
    assert found, f"no sources in csrc/{folder}"
    return found


def includes(path: Path) -> list[tuple[bool, str]]:
    """Return (is a project header, name) of every include, project headers by their path under csrc."""
    found = []
    for bracket, name in INCLUDE.findall(path.read_text()):
        if bracket == "<":
            found.append((False, name))
            continue
        beside = path.parent / name
        target = (beside if beside.exists() else CSRC / name).resolve()
        assert target.exists(), f"{path.name} includes {name}, which does not exist"
        found.append((True, target.relative_to(CSRC).as_posix()))
    return found


def test_core_includes_only_itself_and_the_standard_library() -> None:
    for path in sources("core"):
        for ours, name in includes(path):
            good = name.startswith("core/") if ours else STANDARD.fullmatch(name)
            assert good, f"core/{path.name} includes {name}"


def test_cpu_includes_only_core_and_cpu() -> None:
    for path in sources("cpu"):
        for ours, name in includes(path):
            if ours:
                assert name.startswith(("core/", "cpu/")), f"cpu/{path.name} includes {name}"


def test_kernels_include_no_heavy_standard_header() -> None:
    for path in sources("cpu"):
        if path.name in DISPATCH:
            continue
        for ours, name in includes(path):
            if ours:
                assert name.split("/")[-1] not in DISPATCH, f"kernel file {path.name} includes {name}"
            elif path.name != "simd.h" or name not in {"immintrin.h", "arm_neon.h"}:
                assert name in KERNEL_STANDARD, f"kernel file {path.name} includes <{name}>"


def test_intrinsics_are_in_simd_h_only() -> None:
    assert INTRINSICS.search((CSRC / "cpu" / "simd.h").read_text())
    for path in sources("."):
        if path.name == "simd.h":
            continue
        match = INTRINSICS.search(path.read_text())
        assert match is None, f"{path.relative_to(CSRC)} uses {match[0]}"


def test_cuda_kernels_include_only_core_and_cuda() -> None:
    for path in sources("cuda"):
        for ours, name in includes(path):
            if ours and (path.name, name) != ("ptx.cuh", "simt/ptx.h"):
                assert name.startswith(("core/", "cuda/")), f"cuda/{path.name} includes {name}"
            if not ours:
                assert STANDARD.fullmatch(name), f"cuda/{path.name} includes <{name}>"
    for path in sources("cuda/device"):
        for _, name in includes(path):
            assert name.startswith(("core/", "cuda/device/")) or name == "cuda/ptx.cuh", f"{path.name} includes {name}"


def test_inline_ptx_and_launches_are_in_ptx_cuh_only() -> None:
    """What the emulator cannot run has one place, where it has the same names."""
    there = re.compile(r"\basm\b|<<<|__cvta|\b__shared__\b|\bextern\b")
    assert there.search((CSRC / "cuda" / "ptx.cuh").read_text())
    for path in sources("cuda"):
        text = re.sub(r"//.*", "", path.read_text())
        assert path.name == "ptx.cuh" or not there.search(text), f"{path.name} uses {there.search(text)}"
    functions = re.compile(r"(?:ATTNFAST_DEVICE|inline) \w+ (\w+)\(")
    real = set(functions.findall((CSRC / "cuda" / "ptx.cuh").read_text())) - {"shared_address"}
    assert real == set(functions.findall((CSRC / "simt" / "ptx.h").read_text())) and len(real) > 15


def test_the_emulator_is_of_no_product() -> None:
    for folder in ("core", "cpu", "bindings", "cuda"):
        for path in sources(folder):
            names = [name for _, name in includes(path) if name.startswith("simt/")]
            assert not names or path.name in {"ptx.cuh", "cuda_module.cpp"}, f"{path.name} includes {names}"


def test_the_binary_never_sees_torch() -> None:
    for path in sources("."):
        for _, name in includes(path):
            assert not name.startswith(("torch/", "ATen/", "c10/", "caffe2/")), f"{path.name} includes {name}"
    cmake = (ROOT / "CMakeLists.txt").read_text()
    commands = re.findall(r"^[^#\n]*", cmake, re.MULTILINE)
    assert not any("torch" in command.lower() for command in commands)


def test_only_the_bindings_know_python() -> None:
    for path in sources("."):
        known = [name for _, name in includes(path) if name.startswith(("pybind11/", "Python.h", "bindings/"))]
        assert not known or path.parent.name == "bindings", f"{path.name} includes {known}"


# ---- Python -----------------------------------------------------------------------------------------------------

# A module imports from its own layer and the layers before it. Modules of one layer are one unit split for readers.
LAYERS = {
    "_ext": 0,
    "reference": 0,
    "_reference_core": 0,
    "_reference_normalizers": 0,
    "_reference_gather": 0,
    "_reference_memory": 0,
    "_reference_memory_read": 0,
    "_options": 0,
    "_cuda_ops": 0,
    "ops": 1,
    "_additive_ops": 1,
    "_gather_ops": 1,
    "_memory_ops": 1,
    "autograd": 2,
    "_additive_autograd": 2,
    "_gather_autograd": 2,
    "_memory_autograd": 2,
    "_operator_autograd": 2,
    "_second_order": 2,
    "_vmap": 2,
    "functional": 3,
    "_additive": 3,
    "_gather": 3,
    "_local": 3,
    "_memory": 3,
    "_memory_hops": 3,
    "_memory_read": 3,
    "_normalized": 3,
    "_row_blocks": 3,
    "_prepare": 3,
    "_scores": 3,
    "_validate": 3,
    "_explain_cuda": 4,
    "_explain_memory": 4,
    "_explain_text": 4,
    "explain": 4,
    "nn": 5,
    "viz": 5,
    "memory": 5,
    "distributed": 5,
    "integrations": 6,
    "__init__": 7,
    "benchmarks": 8,
    "cli": 8,
    "__main__": 9,
}
# The specification stands alone; the binary is reached by ops, and by what reports on it or chooses its variant.
REFERENCE = {
    "reference",
    "_reference_core",
    "_reference_normalizers",
    "_reference_gather",
    "_reference_memory",
    "_reference_memory_read",
    "_options",
}
MAY_USE_BINARY = {
    "ops",
    "_cuda_ops",
    "_additive_ops",
    "_gather_ops",
    "_memory_ops",
    "_explain_cuda",
    "_explain_text",
    "explain",
    "__init__",
    "cli",
    "benchmarks",
}


def python_files() -> dict[str, list[Path]]:
    package = ROOT / "attnfast"
    units: dict[str, list[Path]] = {}
    for path in sorted(package.rglob("*.py")):
        units.setdefault(path.relative_to(package).parts[0].removesuffix(".py"), []).append(path)
    units["benchmarks"] = sorted((ROOT / "benchmarks").rglob("*.py"))
    return units


def imported_units(path: Path, inside: str) -> Iterator[str]:
    """Yield the attnfast modules that a file imports, at its top or within functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            # Relative: within a package this is its own unit; at the top level it names a sibling.
            top_level = path.parent == ROOT / "attnfast"
            names = [
                f"attnfast.{node.module or alias.name}" if top_level else f"attnfast.{inside}" for alias in node.names
            ]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "attnfast":
                known = len(parts) > 1 and (parts[1] in LAYERS or parts[1] == "_C")
                yield parts[1] if known else "__init__"


@pytest.mark.parametrize("unit", sorted(python_files()))
def test_python_imports_go_one_way(unit: str) -> None:
    assert unit in LAYERS, f"attnfast/{unit} has no place in LAYERS; add it where it belongs"
    for path in python_files()[unit]:
        for imported in imported_units(path, unit):
            where = f"{path.relative_to(ROOT)} imports attnfast.{imported}"
            if imported in {"_ext", "_C"}:
                assert unit in MAY_USE_BINARY or unit == "_ext", where
            elif imported != unit:
                assert LAYERS[imported] <= LAYERS[unit], where
            if unit in REFERENCE:
                assert imported in REFERENCE, where


def test_reference_works_without_the_binary() -> None:
    """Not only by its imports: nothing in it names the binary or the registered ops."""
    for name in sorted(REFERENCE):
        text = (ROOT / "attnfast" / f"{name}.py").read_text()
        assert "torch.ops.attnfast" not in text
        assert "_C." not in text
