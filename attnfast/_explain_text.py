"""Sentences of :mod:`attnfast.explain` that all functions share: routes, arithmetic, instruction sets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnfast import reference
from attnfast._ext import _C

ROUTES = {
    "kernel": "the kernel is called directly (no gradient wanted)",
    "function": "the kernel runs inside an autograd.Function; the backward kernel gives the gradients",
    "operator": "the same kernels run through torch.ops.attnfast, for torch.compile, export, dispatch modes, tensor "
    "subclasses, vmap or torch.func.grad",
    "reference": "plain PyTorch (attnfast.reference), {memory}: forward-mode AD or a functorch transform of second "
    "order is active, and the kernels have no forward-mode derivative; first- and second-order reverse mode "
    "(torch.autograd.grad) use the kernels",
}


def route_line(route: str, memory: str) -> str:
    """`memory`: what the way through plain PyTorch takes."""
    return f"route: {route}, {ROUTES[route].format(memory=memory)}"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def arithmetic(dtype: torch.dtype) -> str:
    name, real = dtype_name(dtype), dtype_name(reference.real_dtype(dtype))
    return f"{name} widened to {real}" if name != real else f"{real} arithmetic"


def isa_lines() -> list[str]:
    """Which better instruction sets a kernel does not use, and why."""
    isas = _C.available_isas()
    faster = isas[isas.index(_C.get_isa()) + 1 :]
    missing = [isa for isa in _C.compiled_isas() if isa not in isas]
    lines = []
    if faster:
        lines.append(f"not ISA {', '.join(faster)}: a lower one was chosen (ATTNFAST_ISA or set_isa)")
    if missing:
        absent = ", ".join(name for name, present in _C.cpu_features().items() if not present)
        lines.append(f"not ISA {', '.join(missing)}: this machine lacks {absent}")
    return lines


def isa() -> str:
    name: str = _C.get_isa()
    return name


def shapes(**tensors: Any) -> str:
    return ", ".join(f"{name} {list(x.shape)}" for name, x in tensors.items())


def is_readable(x: Tensor | None) -> bool:
    """Whether the binary can look at this tensor: not fake, not a functorch wrapper, no subclass."""
    return x is None or (type(x) in (Tensor, torch.nn.Parameter) and torch.func.debug_unwrap(x) is x)
