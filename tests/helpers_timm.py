"""timm, whether or not a torchvision is there that fits this torch.

timm takes its image transforms and datasets from torchvision, and one class of a layer. Wheels of torchvision are built
for one build of torch, and import with no other (the CUDA ones of PyPI not with a CPU torch). None of that has a
part in attention, so that without torchvision its names are classes of no content while timm is imported.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence
from typing import Any

import pytest
from torch import nn

NAME = "torchvision"


class _Names(type):
    """A class whose attributes are their own names: members of enumerations that timm makes tables of."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("_"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


class _Module(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return _Names(name, (nn.Module,), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] != NAME:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def import_timm() -> Any:
    """timm, or a skip of the module that asks."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError, OSError):
        pass
    else:
        return pytest.importorskip("timm")

    def forget() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == NAME]:
            del sys.modules[name]

    forget()  # what a failed import has left
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        return pytest.importorskip("timm")
    finally:  # others ask whether torchvision is there, and must hear the truth
        sys.meta_path.remove(finder)
        forget()
