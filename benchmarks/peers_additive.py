"""KeOps as a peer of additive attention: scores, softmax and weighted sum as one reduction of symbolic matrices.

KeOps writes C++ for a formula, compiles it with g++ at the first call (half a minute for a case with its gradients;
kept in its cache folder) and never forms the matrix of scores either. It has no hyperbolic tangent, so the formula is
``tanh x = 1 - 2 / (1 + exp 2x)``; its gradient is NaN where ``exp 2x`` is infinite (x > 44), which no case reaches.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from .cases_additive import AdditiveCase
from .registry import Inputs, Peer, Unsupported, Workload, register_peer


def keops_additive(lazy: Callable[[torch.Tensor], Any]) -> Callable[..., torch.Tensor]:
    """Bahdanau's formula on query ``[B, T_q, D]``, key, value and weight ``[D]``, with KeOps's LazyTensor as `lazy`."""

    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        hidden = lazy(query.unsqueeze(-2)) + lazy(key.unsqueeze(-3))
        scores = ((1 - 2 / (1 + (2 * hidden).exp())) * lazy(weight)).sum(-1)
        out: torch.Tensor = scores.sumsoftmaxweight(lazy(value.unsqueeze(-3)), dim=2)
        return out

    return call


class KeOps(Peer):
    """``pykeops.torch.LazyTensor`` on the CPU."""

    name = "keops"
    compiled = True
    suites = ("additive",)

    def build(self, case: AdditiveCase, inputs: Inputs) -> Workload:
        if importlib.util.find_spec("pykeops") is None:
            raise Unsupported("pykeops is not installed; it comes with attnfast[bench]")
        import pykeops

        pykeops.set_verbose(False)
        from pykeops.torch import LazyTensor

        tensors = tuple(inputs[name] for name in ("query", "key", "value", "weight"))
        return Workload(functools.partial(keops_additive(LazyTensor), *tensors), tensors, inputs.grad_out)

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """The OpenMP library that g++ links need not be the one torch brings, whose number of threads the run sets."""
        from threadpoolctl import threadpool_limits

        limits: contextlib.AbstractContextManager[Any] = threadpool_limits(torch.get_num_threads(), user_api="openmp")
        return limits


register_peer(KeOps())
