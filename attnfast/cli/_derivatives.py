"""How far a derivative is from finite differences: the Jacobian by backward passes and that by central differences.

`torch.autograd.gradcheck` gives the verdict; it does not say by how much a derivative that it accepts is off, which
this does. Each number of the point is moved, so functions and points are small.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

_STEP = 1e-6  # gradcheck's own


@dataclass(frozen=True)
class Check:
    """A function of differentiable float64 tensors, and the point to check its derivatives at."""

    function: Callable[..., Any]
    point: tuple[Tensor, ...]
    parameters: int = field(default=0)  # how many of the point's last tensors are a module's parameters


class Difference(NamedTuple):
    """The largest difference of two Jacobians, and the same over the largest number in the numerical one."""

    absolute: float
    relative: float


def draw(*shape: int) -> Tensor:
    """A float64 leaf that wants a gradient, of random numbers."""
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def outputs(function: Callable[..., Any], point: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The results that can have a derivative."""
    found = function(*point)
    results = found if isinstance(found, tuple) else (found,)
    return tuple(x for x in results if isinstance(x, Tensor) and x.is_floating_point())


def first_order(check: Check) -> Difference:
    """Of the first derivative."""
    return _difference(check.function, check.point)


def second_order(check: Check) -> Difference:
    """Of the derivative of a product of random numbers with the first derivative, as gradgradcheck has it."""
    results = [x for x in outputs(check.function, check.point) if x.requires_grad]
    weights = tuple(torch.randn_like(x).requires_grad_() for x in results)
    count = len(check.point)

    def gradient(*both: Tensor) -> tuple[Tensor, ...]:
        given, factors = both[:count], both[count:]
        results = [x for x in outputs(check.function, given) if x.requires_grad]
        return torch.autograd.grad(results, given, factors, create_graph=True, materialize_grads=True)

    return _difference(gradient, (*check.point, *weights))


def _difference(function: Callable[..., Any], point: tuple[Tensor, ...]) -> Difference:
    analytical, numerical = _by_backward(function, point), _by_steps(function, point)
    if analytical.shape != numerical.shape or numerical.numel() == 0:
        return Difference(math.nan, math.nan)
    absolute = float((analytical - numerical).abs().max())
    largest = float(numerical.abs().max())
    return Difference(absolute, absolute / largest if largest else absolute)


def _by_backward(function: Callable[..., Any], point: tuple[Tensor, ...]) -> Tensor:
    """[elements of all results, elements of the point]."""
    rows = []
    for result in outputs(function, point):
        for element in result.reshape(-1):
            if element.requires_grad:
                grads = torch.autograd.grad(element, point, retain_graph=True, materialize_grads=True)
            else:
                grads = tuple(torch.zeros_like(x) for x in point)
            rows.append(torch.cat([x.detach().reshape(-1) for x in grads]))
    return torch.stack(rows) if rows else torch.empty(0)


def _by_steps(function: Callable[..., Any], point: tuple[Tensor, ...]) -> Tensor:
    """The same, each column from two evaluations beside the point."""

    def evaluate(which: int, at: int, step: float) -> Tensor:
        moved = point[which].detach().clone(memory_format=torch.contiguous_format)
        moved.view(-1)[at] += step
        leaves = [x.detach() for x in point]
        leaves[which] = moved
        leaves = [x.requires_grad_() for x in leaves]  # some functions differentiate inside
        return torch.cat([x.detach().reshape(-1) for x in outputs(function, tuple(leaves))])

    columns = [
        (evaluate(which, at, _STEP) - evaluate(which, at, -_STEP)) / (2 * _STEP)
        for which, x in enumerate(point)
        for at in range(x.numel())
    ]
    return torch.stack(columns, 1) if columns else torch.empty(0)
