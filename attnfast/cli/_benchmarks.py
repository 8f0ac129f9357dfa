"""Finds the benchmark package: installed as attnfast.benchmarks, or the folder benchmarks/ beside this package."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

_NAME = "attnfast.benchmarks"


def load_benchmarks(module: str = "") -> ModuleType:
    """Import ``attnfast.benchmarks`` or one of its modules, from a wheel as from a checkout.

    Parameters
    ----------
    module : str
        Name of a module inside the package; the package itself when empty.

    Raises
    ------
    ModuleNotFoundError
        The benchmarks are in neither place.
    """
    if _NAME not in sys.modules and importlib.util.find_spec(_NAME) is None:
        folder = Path(__file__).resolve().parents[2] / "benchmarks"
        spec = importlib.util.spec_from_file_location(
            _NAME, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        if spec is None or spec.loader is None or not (folder / "__init__.py").exists():
            raise ModuleNotFoundError(
                f"the benchmarks are neither installed as {_NAME} nor found in {folder}; reinstall attnfast"
            )
        package = importlib.util.module_from_spec(spec)
        sys.modules[_NAME] = package
        spec.loader.exec_module(package)
    return importlib.import_module(f"{_NAME}.{module}" if module else _NAME)


def run_in_child(*args: Any) -> None:
    """Target of a forked measuring process; named here because this module can always be imported by name."""
    load_benchmarks("memory").child_main(*args)


def run_in_rank(*args: Any) -> None:
    """The same of one process of several, which belong to a group."""
    load_benchmarks("processes").child_main(*args)
