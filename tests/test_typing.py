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


@pytest.mark.parametrize(("file", "old", "new", "named"), WRONG, ids=[f"{row[0]}: {row[2].strip()}" for row in WRONG])
def test_a_signature_that_changes_is_found(
    file: str, old: str, new: str, named: str, cache: Path, tmp_path: Path
) -> None:
    target = copied(tmp_path) / file
    text = target.read_text()
    assert old in text, f"{file} no longer has {old!r}: change this test with it"
    target.write_text(text.replace(old, new))
    answer = strictly(tmp_path, cache)
    assert answer.returncode == 1 and "user.py" in answer.stdout, answer.stdout + answer.stderr
    assert named in answer.stdout


# ---------------------------------------------------------------------- the stub of the binary


def stubtest(folder: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    config = folder / "stubtest.ini"
    config.write_text(f"[mypy]\ncache_dir = {cache}\n")
    return subprocess.run(
        [sys.executable, "-m", "mypy.stubtest", "--mypy-config-file", str(config), "attnfast._C"],
        cwd=folder, capture_output=True, text=True, timeout=600, env={**os.environ, "PYTHONPATH": str(folder)},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("", "", ""),
        ("def get_isa() -> str", "def get_the_isa() -> str", "attnfast._C.get_the_isa is not present at runtime"),
        ("def cpu_features()", "def _cpu_features()", "attnfast._C.cpu_features is not present in stub"),
    ],
    ids=["as it is", "not in the binary", "not in the stub"],
)
def test_the_stub_is_that_of_the_binary(old: str, new: str, message: str, cache: Path, tmp_path: Path) -> None:
    stub = copied(tmp_path, binary=True) / "_C.pyi"
    assert old in stub.read_text()
    if old:
        stub.write_text(stub.read_text().replace(old, new))
    answer = stubtest(tmp_path, cache)
    assert answer.returncode == (1 if old else 0), answer.stdout + answer.stderr
    assert message in answer.stdout
