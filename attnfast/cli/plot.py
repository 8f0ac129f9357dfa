"""``python -m attnfast plot FILE``: the picture of a benchmark result or of a saved alignment."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from attnfast import viz

from . import CommandError, described
from ._benchmarks import load_benchmarks
from .bench import _read

_EXAMPLES = """\
examples:
  python -m attnfast plot bench-results/bench.csv
  python -m attnfast plot alignment.npz --values --title "lecture 3" --out alignment.png
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = described(
        commands,
        "plot",
        help="draw a benchmark result or an alignment",
        description="Draw the ratios of a CSV written by the bench command, or an alignment saved by "
        "attnfast.viz.save_alignment (.npz), as a PNG.",
        examples=_EXAMPLES,
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the CSV or the .npz")
    parser.add_argument("--out", type=Path, metavar="PNG", help="default: FILE with the ending .png")
    parser.add_argument("--title", help="of an alignment")
    parser.add_argument("--values", action="store_true", help="write each weight into its cell of an alignment")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    target = arguments.out or arguments.file.with_suffix(".png")
    alignment = arguments.file.suffix == ".npz"
    for module in ("matplotlib",) if alignment else ("matplotlib", "rich"):
        if importlib.util.find_spec(module) is None:
            raise CommandError(f"needs {module}; run: pip install 'attnfast[{'viz' if alignment else 'bench'}]'")
    if not alignment and (arguments.title is not None or arguments.values):
        raise CommandError("--title and --values are for alignments (.npz)")
    try:
        if alignment:
            _draw_alignment(arguments, target)
        else:
            load_benchmarks("chart").write_chart(_read(arguments.file), target)
    except ValueError as error:
        raise CommandError(str(error)) from None
    except OSError as error:
        raise CommandError(f"cannot write {target}: {error.strerror}") from None
    print(f"Wrote {target}.")
    return 0


def _draw_alignment(arguments: argparse.Namespace, target: Path) -> None:
    try:
        weights, source, words = viz.load_alignment(arguments.file)
    except OSError as error:
        raise CommandError(f"cannot read {arguments.file}: {error.strerror}") from None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    viz.plot_alignment(weights, source, words, title=arguments.title, values=arguments.values)
    try:
        pyplot.savefig(target, dpi=150)
    finally:
        pyplot.close()
