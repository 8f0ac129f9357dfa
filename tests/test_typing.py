"""What a type checker says of attnfast: to a user who is strict, and of the stub of the compiled module.

The checks themselves are tested: a public signature that changes wrongly, or a stub that differs from the binary, must
be found.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy")

import attnfast

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(attnfast.__file__).resolve().parent
USER = ROOT / "tests" / "typing" / "user.py"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all runs: torch is read once."""
    return tmp_path_factory.mktemp("mypy")


def strictly(folder: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    """mypy on the user's program, with the package in `folder`."""
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--config-file=",
        "--cache-dir",
        str(cache),
        "--no-error-summary",
    ]
    return subprocess.run(
        [*command, "--follow-imports=silent", str(USER)], cwd=folder, capture_output=True, text=True, timeout=600,
        env={**os.environ, "MYPYPATH": str(folder)},
    )  # fmt: skip


def copied(folder: Path, *, binary: bool = False) -> Path:
    """The package, to be changed. Links would be followed by mypy to where they lead."""
    unwanted = ["__pycache__", *([] if binary else ["*.so"])]
    shutil.copytree(PACKAGE, folder / "attnfast", ignore=shutil.ignore_patterns(*unwanted))
    return folder / "attnfast"


def test_a_strict_user_has_no_complaints(cache: Path) -> None:
    answer = strictly(PACKAGE.parent, cache)
    assert answer.returncode == 0, answer.stdout + answer.stderr


WRONG = [
    (
        "functional.py",
        "    dropout_p: float = 0.0,\n    is_causal",
        "    dropout: float = 0.0,\n    is_causal",
        "dropout_p",
    ),
    ("functional.py", "    return_lse: bool = False,", "    return_lse: str = '',", "return_lse"),
    ("_additive.py", "    score_bias: Tensor | None = None,", "    score_bias: float = 0.0,", "score_bias"),
    ("_memory.py", "-> tuple[Tensor, Tensor]", "-> Tensor", "assert-type"),
    ("_gather.py", "None = None, sparse_grad: bool = False\n)", "None = None, sparse: bool = False\n)", "sparse_grad"),
    ("nn/_additive.py", "query_size: int, memory_size: int, units: int", "query_size: int, units: int", "memory_size"),
    ("nn/__init__.py", "import ProductKeyMemory\n", "import ProductKeyMemory as Other\n", "ProductKeyMemory"),
    ("_C.pyi", "def get_isa() -> str", "def get_isa() -> bytes", "assert-type"),
]


def test_signatures_that_change_are_found(cache: Path, tmp_path: Path) -> None:
    """All of them in one copy, which mypy reads once: each must have its own complaint."""
    package = copied(tmp_path)
    for file, old, new, _ in WRONG:
        text = (package / file).read_text()
        assert old in text, f"{file} no longer has {old!r}: change this test with it"
        (package / file).write_text(text.replace(old, new))
    answer = strictly(tmp_path, cache)
    complaints = [line for line in answer.stdout.splitlines() if "user.py" in line and "error:" in line]
    assert answer.returncode == 1 and len(complaints) >= len(WRONG), answer.stdout + answer.stderr
    for file, _, new, named in WRONG:
        assert any(named in line for line in complaints), f"{file}: nobody complains of {new!r}"


# ---------------------------------------------------------------------- the stub of the binary


def stubtest(folder: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    config = folder / "stubtest.ini"
    config.write_text(f"[mypy]\ncache_dir = {cache}\n")
    return subprocess.run(
        [sys.executable, "-m", "mypy.stubtest", "--mypy-config-file", str(config), "attnfast._C"],
        cwd=folder, capture_output=True, text=True, timeout=600, env={**os.environ, "PYTHONPATH": str(folder)},
    )  # fmt: skip


DIFFERENT = (  # in the stub, what becomes of it, and what stubtest says
    ("def get_isa() -> str", "def get_the_isa() -> str", "attnfast._C.get_the_isa is not present at runtime"),
    ("def cpu_features()", "def _cpu_features()", "attnfast._C.cpu_features is not present in stub"),
)


@pytest.mark.parametrize("changed", [False, True], ids=["as it is", "changed"])
def test_the_stub_is_that_of_the_binary(changed: bool, cache: Path, tmp_path: Path) -> None:
    stub = copied(tmp_path, binary=True) / "_C.pyi"
    if changed:
        text = stub.read_text()
        assert all(old in text for old, _, _ in DIFFERENT)
        for old, new, _ in DIFFERENT:
            text = text.replace(old, new)
        stub.write_text(text)
    answer = stubtest(tmp_path, cache)
    assert answer.returncode == int(changed), answer.stdout + answer.stderr
    for _, _, message in DIFFERENT:
        assert (message in answer.stdout) == changed
