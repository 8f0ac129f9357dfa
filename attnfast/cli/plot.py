"""``python -m attnfast plot FILE``: the picture of a benchmark result."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from . import CommandError
from ._benchmarks import load_benchmarks
from .bench import _read


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "plot",
        help="draw a benchmark result",
        description="Draw the ratios of a CSV written by the bench command as a PNG.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the CSV")
    parser.add_argument("--out", type=Path, metavar="PNG", help="default: FILE with the ending .png")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    for module in ("matplotlib", "rich"):
        if importlib.util.find_spec(module) is None:
            raise CommandError(f"needs {module}; run: pip install 'attnfast[bench]'")
    target = arguments.out or arguments.file.with_suffix(".png")
    try:
        load_benchmarks("chart").write_chart(_read(arguments.file), target)
    except ValueError as error:
        raise CommandError(str(error)) from None
    except OSError as error:
        raise CommandError(f"cannot write {target}: {error.strerror}") from None
    print(f"Wrote {target}.")
    return 0
