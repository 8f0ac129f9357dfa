"""The command line, ``python -m attnfast``: info, explain, bench, gradcheck, plot.

Each command is a module with ``add_parser(subparsers)`` and ``run(arguments) -> exit status``. Status 0 is success, 1 a
check that failed, 2 a request that cannot be carried out (argparse's own status for wrong usage).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

__all__ = ["main"]


class CommandError(Exception):
    """A request that cannot be carried out; its text is all the user sees. Exit status 2."""


def build_parser() -> argparse.ArgumentParser:
    from . import bench, explain, gradcheck, info, plot

    parser = argparse.ArgumentParser(
        prog="python -m attnfast",
        description="Look at an installation of attnfast, measure it and check it.",
        epilog="Run a command with --help for its options.",
    )
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for module in (info, explain, bench, gradcheck, plot):
        module.add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    Parameters
    ----------
    arguments : sequence of str, optional
        The command line without the program's name; ``sys.argv[1:]`` by default.
    """
    parsed = build_parser().parse_args(arguments)
    try:
        return int(parsed.run(parsed))
    except CommandError as error:
        print(f"python -m attnfast {parsed.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader (head, less) left
        sys.stderr.close()
        return 141
