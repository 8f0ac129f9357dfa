"""Who computes modules: torch's own, with and without its fast path of evaluation, and these with attnfast within."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .cases_modules import ModulesCase
from .registry import OURS, TORCH, Inputs, Peer, Unsupported, Workload, register_peer


class _Module(Peer):
    suites = ("modules",)

    def prepared(self, module: nn.Module) -> nn.Module:
        return module

    def build(self, case: ModulesCase, inputs: Inputs) -> Workload:
        module = self.prepared(case.module().to(inputs["x"].device))
        args, options = case.arguments(inputs)

        def call() -> torch.Tensor:
            out = module(*args, **options)
            return out if isinstance(out, torch.Tensor) else out[0]

        wanted = (inputs["x"], *module.parameters()) if case.training else ()
        return Workload(call, wanted, inputs.grad_out)


class Replaced(_Module):
    name = OURS

    def prepared(self, module: nn.Module) -> nn.Module:
        from attnfast.integrations import replace_modules

        return replace_modules(module)


class Torch(_Module):
    """As it chooses by itself; in evaluation its fast path."""

    name = TORCH


class NoFastPath(_Module):
    name = "sdpa no fast path"

    def build(self, case: ModulesCase, inputs: Inputs) -> Workload:
        if case.training:
            raise Unsupported("")  # training has no fast path: the peer above
        return super().build(case, inputs)

    @contextlib.contextmanager
    def context(self) -> Iterator[Any]:
        before = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(before)


for _peer in (Replaced(), Torch(), NoFastPath()):
    register_peer(_peer)
