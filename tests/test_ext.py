"""Loading the binary: every way in which it fails ends in one ImportError that says what to do."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from attnfast._ext import _C, MINIMUM_TORCH

PACKAGE = Path(__file__).resolve().parent.parent / "attnfast"
SITE = sysconfig.get_paths()["purelib"]
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


def fail_to_import(folder: Path, before: str = "") -> str:
    """Import attnfast from `folder` after running `before`; return the error message.

    -S, because the import hook of an editable install would find this checkout's binary.
    """
    code = f"import sys; sys.path[:0] = [{str(folder)!r}, {SITE!r}]\n{before}\nimport attnfast"
    result = subprocess.run([sys.executable, "-S", "-c", code], cwd=folder, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1, result.stderr
    lines = result.stderr.splitlines()
    start = max(i for i, line in enumerate(lines) if line.startswith("ImportError: "))
    message = "\n".join(lines[start:])
    # Every message says what was built, what was found, and what to do.
    assert message.startswith("ImportError: attnfast cannot be used: ")
    for part in ("\n  built: ", f"\n  found: Python {sys.version_info[0]}.", sys.executable, "\n  what to do: "):
        assert part in message, message
    return message


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package without its binary."""
    shutil.copytree(PACKAGE, tmp_path / "attnfast", ignore=shutil.ignore_patterns("_C*.so", "__pycache__"))
    return tmp_path


@pytest.fixture
def whole_copy(copy: Path) -> Path:
    shutil.copy2(_C.__file__, copy / "attnfast")
    return copy


def test_a_whole_copy_works(whole_copy: Path) -> None:
    """The other tests fail for the reason they name, not because a copy cannot be imported."""
    code = f"import sys; sys.path[:0] = [{str(whole_copy)!r}, {SITE!r}]; import attnfast; print(attnfast.__file__)"
    result = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stdout.startswith(str(whole_copy)), result.stderr


def test_binary_missing(copy: Path) -> None:
    message = fail_to_import(copy)
    assert "attnfast._C, is missing" in message
    assert f"built: no binary in {copy / 'attnfast'} (this Python loads _C{SUFFIX})" in message
    assert "make setup" in message


def test_binary_of_another_python(copy: Path) -> None:
    other = "_C.cpython-399-x86_64-linux-gnu.so"
    shutil.copy2(_C.__file__, copy / "attnfast" / other)
    message = fail_to_import(copy)
    assert "attnfast._C, is missing" in message
    assert f"built: {other} in" in message


def test_binary_that_does_not_load(copy: Path) -> None:
    (copy / "attnfast" / f"_C{SUFFIX}").write_bytes(b"not a library")
    message = fail_to_import(copy)
    assert "attnfast._C, does not load: " in message
    assert f"built: _C{SUFFIX} in" in message
    assert "build it again" in message


def test_torch_too_old(whole_copy: Path) -> None:
    message = fail_to_import(whole_copy, "import torch; torch.__version__ = '2.9.1'")
    assert "torch >= 2.10 is needed" in message
    assert "torch 2.9.1" in message
    assert "pip install" in message


def test_torch_without_the_exchange_table(whole_copy: Path) -> None:
    before = "import torch; del torch._C.TensorBase.__dlpack_c_exchange_api__"
    if "__dlpack_c_exchange_api__" in vars(torch.Tensor):
        before = "import torch; del torch.Tensor.__dlpack_c_exchange_api__"
    message = fail_to_import(whole_copy, before)
    assert "torch.Tensor.__dlpack_c_exchange_api__ (which this torch lacks)" in message


def test_torch_without_its_thread_pool(whole_copy: Path) -> None:
    before = "import torch, ctypes, types; ctypes.CDLL = lambda name: types.SimpleNamespace()"
    message = fail_to_import(whole_copy, before)
    assert "torch_parallel_for was not found" in message


def test_an_exchange_table_of_another_kind(whole_copy: Path) -> None:
    before = "import torch; torch.Tensor.__dlpack_c_exchange_api__ = 3"
    code = f"import sys; sys.path[:0] = [{str(whole_copy)!r}, {SITE!r}]\n{before}\nimport attnfast"
    result = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 1  # an exception, not a crash
    assert "dlpack_exchange_api" in result.stderr or "PyCapsule" in result.stderr


def test_minimum_agrees_with_the_metadata() -> None:
    text = (PACKAGE.parent / "pyproject.toml").read_text()
    assert f'"torch>={MINIMUM_TORCH[0]}.{MINIMUM_TORCH[1]}"' in text


def test_uninitialised_binary_refuses_to_work() -> None:
    """Importing the binary alone must not lead to a call through a null table."""
    code = (
        "import sys, importlib.util as u\n"
        f"spec = u.spec_from_file_location('attnfast._C', {_C.__file__!r}); m = u.module_from_spec(spec)\n"
        "spec.loader.exec_module(m)\n"
        "try: m.dot_attention_fwd(*[None] * 24)\n"
        "except RuntimeError as error: print(error)\n"
    )
    result = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, timeout=60)
    assert "not initialised" in result.stdout, result.stderr


def test_init_wants_a_capsule_and_an_address() -> None:
    with pytest.raises((TypeError, ValueError)):
        _C.init(object(), 1, ())
    with pytest.raises(ValueError, match="parallel_for_address"):
        _C.init(torch.Tensor.__dlpack_c_exchange_api__, 0, ())
