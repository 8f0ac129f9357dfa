"""Loads the binary ``attnfast._C`` and connects it to torch, or raises one clear ImportError.

The binary was compiled without torch. Two things cross here, once: the C table through which tensors are read
(``torch.Tensor.__dlpack_c_exchange_api__``) and the address of torch's thread pool (``torch_parallel_for`` in
libtorch_cpu).
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import platform
import re
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch.autograd import forward_ad

if TYPE_CHECKING:
    from attnfast import _C

MINIMUM_TORCH = (2, 10)
_PACKAGE = Path(__file__).resolve().parent


def _fail(problem: str, remedy: str, cause: BaseException | None = None) -> NoReturn:
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    binaries = sorted(path.name for path in _PACKAGE.glob("_C*") if path.suffix in (".so", ".pyd", ".dylib"))
    raise ImportError(
        f"attnfast cannot be used: {problem}\n"
        f"  built: {', '.join(binaries) or 'no binary'} in {_PACKAGE} (this Python loads _C{suffix})\n"
        f"  found: Python {platform.python_version()} at {sys.executable}, torch {torch.__version__}\n"
        f"  what to do: {remedy}"
    ) from cause


def _torch_version() -> tuple[int, int]:
    match = re.match(r"(\d+)\.(\d+)", str(torch.__version__))
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _exchange_api() -> Any:
    capsule = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if _torch_version() < MINIMUM_TORCH or capsule is None:
        wanted = ".".join(map(str, MINIMUM_TORCH))
        _fail(
            f"torch >= {wanted} is needed, for torch.Tensor.__dlpack_c_exchange_api__"
            + (" (which this torch lacks)" if capsule is None else ""),
            f'upgrade torch: {sys.executable} -m pip install "torch>={wanted}"',
        )
    return capsule


def _parallel_for_address() -> int:
    """Address of torch's exported C function ``torch_parallel_for``."""
    folder = Path(torch.__file__).resolve().parent / "lib"
    errors = []
    # libtorch_cpu is loaded already, this only takes a handle to it. None is the program itself, for a torch that is
    # linked in statically.
    for name in (folder / "libtorch_cpu.so", folder / "libtorch_cpu.dylib", None):
        if name is not None and not name.exists():
            continue
        try:
            function = ctypes.CDLL(None if name is None else str(name)).torch_parallel_for
        except (OSError, AttributeError) as error:
            errors.append(str(error))
            continue
        return ctypes.cast(function, ctypes.c_void_p).value or 0
    _fail(
        f"torch's C function torch_parallel_for was not found in {folder} ({'; '.join(errors)})",
        "install an official build of torch, or report this with the output of `python -m torch.utils.collect_env`",
    )


def _load_binary() -> ModuleType:
    try:
        return importlib.import_module("attnfast._C")
    except ModuleNotFoundError as error:
        if error.name != "attnfast._C":
            raise
        _fail(
            "its compiled part, attnfast._C, is missing",
            "in a source checkout run `make setup` (or `pip install -e .`) with this Python; otherwise reinstall "
            "with `pip install --force-reinstall --no-deps attnfast`",
            error,
        )
    except ImportError as error:
        _fail(
            f"its compiled part, attnfast._C, does not load: {error}",
            "build it again on this machine with this Python: `make setup` in a checkout, or "
            "`pip install --force-reinstall --no-deps --no-binary attnfast attnfast`",
            error,
        )


def _initialise() -> ModuleType:
    capsule = _exchange_api()
    address = _parallel_for_address()
    binary = _load_binary()
    # What the binary asks torch about a call, see ordinary_call in _C.pyi.
    probes = (
        torch.Tensor,
        torch.nn.Parameter,
        torch.Tensor.is_neg,
        torch._C._len_torch_dispatch_stack,
        torch._C._are_functorch_transforms_active,
        torch.is_autocast_enabled,
        torch.is_grad_enabled,
        forward_ad,
    )
    try:
        binary.init(capsule, address, probes)
    except RuntimeError as error:
        _fail(str(error), "unset or correct what the message names, or reinstall attnfast and torch", error)
    return binary


if not TYPE_CHECKING:
    _C = _initialise()


@functools.cache
def has_cuda() -> bool:
    """Whether ``attnfast._cuda`` was built. It is not loaded for that."""
    return importlib.util.find_spec("attnfast._cuda") is not None


@functools.cache
def cuda_binary() -> Any:
    """``attnfast._cuda``, loaded at the first call: when a CUDA tensor arrives, or to be reported on."""
    try:
        binary = importlib.import_module("attnfast._cuda")
    except ImportError as error:
        raise ImportError(
            f"attnfast's CUDA kernels cannot be used: {error}\n"
            f"  what to do: build them with `ATTNFAST_CUDA=ON pip install .` (needs nvcc), see docs/cuda.md"
        ) from error
    binary.init(_exchange_api())
    return binary


__all__ = ["MINIMUM_TORCH", "_C", "cuda_binary", "has_cuda"]
