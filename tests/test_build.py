"""The package's metadata and build files: what users and the build tools rely on."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import attnfast
from attnfast._ext import _C

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
FWD_ARGUMENTS, BWD_ARGUMENTS = 27, 38


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def requirement_names(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=!~ \[;]", text, maxsplit=1)[0].lower() for text in requirements}


def test_build_requirements_do_not_include_torch(pyproject: dict[str, Any]) -> None:
    assert requirement_names(pyproject["build-system"]["requires"]) == {"setuptools", "cmake", "ninja", "pybind11"}


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_cibuildwheel_builds_every_python(machine: str, pyproject: dict[str, Any]) -> None:
    pytest.importorskip("cibuildwheel")
    command = [sys.executable, "-m", "cibuildwheel", "--print-build-identifiers", "--platform", "linux"]
    answer = subprocess.run([*command, "--archs", machine, str(ROOT)], capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.split() == [f"cp3{minor}-manylinux_{machine}" for minor in range(10, 15)]
    settings = pyproject["tool"]["cibuildwheel"]
    script = settings["test-command"].removeprefix("python {project}/")
    assert (ROOT / script).is_file(), "the smoke test"
    assert settings["environment"]["ATTNFAST_CUDA"] == "OFF"


def test_metadata(pyproject: dict[str, Any]) -> None:
    project = pyproject["project"]
    assert project["dependencies"] == ["torch>=2.10"]
    assert project["requires-python"] == ">=3.10"
    assert project["license"] == "BSD-3-Clause"
    text = (ROOT / "LICENSE").read_text()
    assert "BSD 3-Clause License" in text and "attnfast contributors" in text


def test_one_version(pyproject: dict[str, Any]) -> None:
    version = pyproject["project"]["version"]
    assert attnfast.__version__ == version
    assert _C.build_info()["version"] == version


def test_every_package_is_listed(pyproject: dict[str, Any]) -> None:
    listed = set(pyproject["tool"]["setuptools"]["packages"])
    there = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "attnfast").rglob("__init__.py")
    } | {
        ".".join(("attnfast", *path.parent.relative_to(ROOT).parts))
        for path in (ROOT / "benchmarks").rglob("__init__.py")
    }  # fmt: skip
    assert listed == there


def test_setup_py_is_thin() -> None:
    assert len((ROOT / "setup.py").read_text().splitlines()) < 60


def test_build_info() -> None:
    info = _C.build_info()
    assert info["cplusplus"] >= 202002
    assert info["isas"] == _C.compiled_isas()
    assert not info["debug"] and info["sanitizer"] == ""
    assert info["python"].split(".")[:2] == [str(part) for part in sys.version_info[:2]]


def test_development_requirements_are_pinned() -> None:
    files = [(ROOT / name).read_text().splitlines() for name in ("requirements-dev.txt", "requirements-no-deps.txt")]
    lines, alone = ([line for line in file if line and line[0] != "#"] for file in files)
    assert alone == ["nvidia-cutlass==4.2.0.0", "OpenNMT-py==3.5.1", "timm==1.0.31"]
    assert "--no-deps -r requirements-no-deps.txt" in (ROOT / "Makefile").read_text()
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[^ ;]+", line) for line in lines)
    assert "torch==2.13.0" in lines
    names = requirement_names(lines)
    wanted = {"setuptools", "cmake", "ninja", "pybind11", "build", "pytest", "pytest-xdist", "hypothesis", "onnx",
              "ruff", "mypy", "clang-format", "rich", "matplotlib", "scikit-learn"}  # fmt: skip
    assert wanted <= names


def test_ci_calls_test_then_check() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK) and os.access(ROOT / "tools" / "make_venv.sh", os.X_OK)
    lines = [line for line in script.read_text().splitlines() if line.startswith("make ")]
    assert lines == ["make test", "make check"]


@pytest.mark.parametrize("target", ["setup", "test", "bench", "check"])
def test_make_targets_exist(target: str) -> None:
    result = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


def stub_functions() -> dict[str, ast.FunctionDef]:
    tree = ast.parse((ROOT / "attnfast" / "_C.pyi").read_text())
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_stubs_name_what_the_binary_has() -> None:
    public = {name for name in dir(_C) if not name.startswith("_")}
    assert set(stub_functions()) == public
    for name, node in stub_functions().items():
        assert ast.get_docstring(node), f"_C.{name} is not documented"


@pytest.mark.parametrize(
    ("name", "count"), [("dot_attention_fwd", FWD_ARGUMENTS), ("dot_attention_bwd", BWD_ARGUMENTS)]
)
def test_stub_signatures_are_the_binary_s(name: str, count: int) -> None:
    arguments = [argument.arg for argument in stub_functions()[name].args.posonlyargs]
    assert len(arguments) == count
    function = getattr(_C, name)
    for wrong in (0, count - 1, count + 1):
        with pytest.raises(TypeError, match=f"{name} takes {count} positional arguments, got {wrong}$"):
            function(*[None] * wrong)
    # Each argument of a wrong type is reported under the stub's name for its place, for as far as reading comes.
    values: list[Any] = []
    for argument, annotation in zip(arguments, stub_functions()[name].args.posonlyargs):
        with pytest.raises(TypeError, match=f"^{argument}: expected "):
            function(*values, "wrong", *[None] * (count - len(values) - 1))
        kind = ast.unparse(annotation.annotation) if annotation.annotation else ""
        values.append(
            torch.zeros(1, 1, 1, 1) if kind == "Tensor" else None if "None" in kind else 0 if kind == "int" else 0.0
        )
