"""What the compiled files may define and export, and that the check itself finds what it looks for."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
from helpers import load_tool

from attnfast._ext import _C

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(
    shutil.which("nm") is None or shutil.which("g++") is None, reason="needs binutils and g++"
)


@pytest.fixture(scope="module")
def checker() -> ModuleType:
    return load_tool("check_symbols")


def compile_object(folder: Path, code: str) -> Path:
    source, target = folder / "kernel.cpp", folder / "kernel.o"
    source.write_text(code)
    subprocess.check_call(
        ["g++", "-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-c", str(source), "-o", str(target)]
    )
    return target


def test_objects_of_the_build_leak_nothing(checker: ModuleType) -> None:
    objects = next(iter(checker.find_objects(folder) for folder in (ROOT / "build").glob("temp.*")), None)
    if objects is None or not objects["baseline"]:
        pytest.skip("built elsewhere: the objects are not here")
    # Every variant is there, each from the same files; the last is the code of the one below it.
    own = [isa for isa in _C.compiled_isas() if isa != "avx512_bf16"]
    names = {isa: {path.name for path in objects[isa]} for isa in own}
    assert all(files == names["baseline"] and files for files in names.values())
    assert checker.check(objects, []) == []


def test_module_exports_its_init_function_only(checker: ModuleType) -> None:
    path = Path(_C.__file__)
    assert any(symbol.name == "PyInit__C" for symbol in checker.symbols(path, "-D", "--defined-only"))
    assert checker.check_module(path) == []


def test_check_accepts_a_clean_object(checker: ModuleType, tmp_path: Path) -> None:
    code = """
        namespace attnfast { void parallel_tasks(long, bool, void (*)(void*, long), void*); }
        namespace attnfast::avx2 {
        static inline int twice(int x) { return 2 * x; }
        void kernel(int* x) { *x = twice(*x); attnfast::parallel_tasks(1, true, nullptr, x); }
        }"""
    assert checker.check_object(compile_object(tmp_path, code), "avx2") == []


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        (
            "inline int __attribute__((noinline)) shared(int x) { return 3 * x; }"
            "namespace attnfast::avx2 { int kernel(int x) { return shared(x); } }",
            "weak or unique symbol shared(int)",
        ),
        (
            "template <class T> struct Shared { static inline T value = 3; };"
            "namespace attnfast::avx2 { int& kernel() { return Shared<int>::value; } }",
            "weak or unique symbol Shared<int>::value",
        ),
        (
            "#include <map>\nnamespace attnfast::avx2 { void kernel(std::map<int, int>& x) { x[3] = 4; } }",
            "weak",
        ),
        ("namespace attnfast { int kernel(int x) { return x; } }", "global symbol attnfast::kernel(int) (T) outside"),
        (
            "namespace attnfast::avx512 { int f(); } namespace attnfast::avx2 { int kernel() { return avx512::f(); } }",
            "uses",
        ),
    ],
    ids=["inline function", "static member of a template", "standard container", "no ISA namespace", "another ISA"],
)
def test_check_finds_a_leak(checker: ModuleType, tmp_path: Path, code: str, problem: str) -> None:
    problems = checker.check_object(compile_object(tmp_path, code), "avx2")
    assert any(problem in found for found in problems), problems


def test_check_finds_exports(checker: ModuleType, tmp_path: Path) -> None:
    source = tmp_path / "module.cpp"
    source.write_text('extern "C" void PyInit__C() {} void leaked() {}')
    module = tmp_path / "_C.so"
    subprocess.check_call(["g++", "-shared", "-fPIC", str(source), "-o", str(module)])
    assert checker.check_module(module) == ["_C.so: exports leaked()"]
