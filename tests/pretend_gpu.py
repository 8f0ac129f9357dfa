"""Tensors of another device than the CPU, and kernels for them: what device code in Python does, without a GPU.

A `Pretend` has device "meta" (of "cuda" a torch without CUDA makes no tensor that autograd takes) and its numbers in an
ordinary tensor, which only `PretendGpu` sees. It refuses what a GPU
refuses: operations on tensors of two devices. And what a GPU does without a word but at a cost: indices that lie on the
host. Kernels are those of csrc/cuda under the emulator, and take nothing but such tensors. `to_host` counts the copies
back, numbers taken by ``item()`` and the like among them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from attnfast import (
    _additive_ops,
    _cuda_ops,
    _explain_cuda,
    _explain_text,
    _gather_ops,
    _memory_ops,
    _validate,
    autograd,
    ops,
)  # fmt: skip

GPU = torch.device("meta")
OPERATORS = {
    "dot_attention_fwd": ops._fwd_op, "dot_attention_bwd": ops._bwd_op,
    "additive_attention_fwd": _additive_ops._fwd_op, "additive_attention_bwd": _additive_ops._bwd_op,
    "topk_scores_fwd": _memory_ops.topk_scores_fwd, "topk_scores_bwd": _memory_ops.topk_scores_bwd,
    "weighted_gather_fwd": _gather_ops.weighted_gather_fwd, "weighted_gather_bwd": _gather_ops.weighted_gather_bwd,
    "product_keys": _gather_ops.product_keys,
}  # fmt: skip
COPIES = ("aten::_to_copy", "aten::copy_")


class Pretend(Tensor):
    """A tensor of the GPU that is not there."""

    data_of: Tensor

    @staticmethod
    def __new__(cls, data: Tensor) -> Pretend:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined,no-any-return]
            cls, data.shape, strides=data.stride(), storage_offset=data.storage_offset(), dtype=data.dtype, device=GPU
        )

    def __init__(self, data: Tensor) -> None:
        self.data_of = data

    def data_ptr(self) -> int:
        return self.data_of.data_ptr()

    def tolist(self) -> Any:
        return self.to("cpu").tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of PretendGpu")


class PretendGpu(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.to_host = 0
        self.skipped = False  # a call for which there is no kernel

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func.namespace == "attnfast":
            with self:
                return OPERATORS[func._schema.name.removeprefix("attnfast::")](*args, **kwargs)
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        ours = [x for x in tensors if isinstance(x, Pretend)]
        name = func._schema.name
        if ours and name not in COPIES:
            others = [tuple(x.shape) for x in tensors if not isinstance(x, Pretend) and x.dim() > 0]
            assert not others, f"{name} mixes tensors of the GPU with some of the host: {others}"
        on_gpu = bool(ours)
        device = kwargs.get("device")
        if device is not None:
            on_gpu = torch.device(device) == GPU
            kwargs["device"] = torch.device("cpu")
        if name == "aten::copy_":
            on_gpu = isinstance(args[0], Pretend)
        self.to_host += bool(ours) and (name == "aten::_local_scalar_dense" or not on_gpu)
        bare = lambda x: x.data_of if isinstance(x, Pretend) else x  # noqa: E731
        result = func(*pytree.tree_map(bare, args), **pytree.tree_map(bare, kwargs))
        known = {id(x.data_of): x for x in ours}

        def dress(x: Any) -> Any:
            if not isinstance(x, Tensor) or not on_gpu:
                return x
            return known[id(x)] if id(x) in known else Pretend(x)

        return pytree.tree_map(dress, result)


class _Binary:
    """The emulated kernels, for tensors of the pretended GPU alone."""

    def __init__(self, simt: ModuleType) -> None:
        self._simt = simt

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._simt, name)

        def call(*args: Any) -> Any:
            for x in args:
                assert not isinstance(x, Tensor) or isinstance(x, Pretend), f"{name} got a tensor of the host"
            return function(*(x.data_of if isinstance(x, Pretend) else x for x in args))

        return call


@contextlib.contextmanager
def pretend_gpu(simt: ModuleType) -> Iterator[PretendGpu]:
    """`GPU` is a device with kernels, for what runs on this thread."""
    binary, gpu = _Binary(simt), PretendGpu()
    with pytest.MonkeyPatch.context() as patch:
        for module in (_additive_ops, _cuda_ops, _gather_ops, _memory_ops):
            patch.setattr(module, "cuda_binary", lambda: binary)
        real = _validate.tensor
        patch.setattr(_validate, "tensor", lambda name, x: None if isinstance(x, Pretend) else real(name, x))
        readable = _explain_text.is_readable
        patch.setattr(_explain_text, "is_readable", lambda x: isinstance(x, Pretend) or readable(x))
        patch.setattr(_explain_cuda, "cuda_binary", lambda: binary)
        autocast = torch.autocast
        patch.setattr(torch, "autocast", lambda kind, **k: autocast("cpu" if kind == GPU.type else kind, **k))
        # The routes are those of a GPU's ordinary tensors.
        patch.setattr(autograd, "_PLAIN_TYPES", frozenset((*autograd._PLAIN_TYPES, Pretend)))
        patch.setattr(autograd, "_dispatch_modes", lambda: 0)
        with gpu:
            yield gpu


def to_gpu(x: Any) -> Any:
    """Copies of the tensors in `x` on the pretended GPU, within `pretend_gpu`; leaves stay leaves."""

    def move(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.detach().to(GPU).requires_grad_(x.requires_grad)

    return pytree.tree_map(move, x)


def to_host(x: Any) -> Any:
    return pytree.tree_map(lambda x: x.data_of if isinstance(x, Pretend) else x, x)
