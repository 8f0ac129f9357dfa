"""The command line, ``python -m attnfast``: info, explain, bench, gradcheck, plot.

Each command is a module with ``add_parser(subparsers)`` and ``run(arguments) -> exit status``. Status 0 is success, 1 a
check that failed or a regression that was found, 2 a request that cannot be carried out, wrong usage included: one line
on stderr says why. 130 is Ctrl-C, 141 a reader of the output that left. With ``--json`` stdout holds one JSON object
and nothing else.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from typing import Any, NoReturn

__all__ = ["main"]

_USAGE = 2


class CommandError(Exception):
    """A request that cannot be carried out; its text is all the user sees. Exit status 2."""


class Parser(argparse.ArgumentParser):
    """One line for wrong usage, where argparse prints the whole usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(_USAGE, f"{self.prog}: {message} ({self.prog} --help)\n")


def described(
    commands: argparse._SubParsersAction[Any],
    name: str,
    *,
    help: str,
    description: str,
    examples: str,
    failure: str = "",
) -> Parser:
    """The parser of a command, whose help ends with examples and with what its exit status means.

    Parameters
    ----------
    commands
        What ``add_subparsers`` returned.
    name, help, description : str
        As for ``add_parser``; the description is wrapped.
    examples : str
        Printed as it stands.
    failure : str
        What status 1 means; without it the command has none.
    """
    statuses = {0: "success", 1: failure, 2: "wrong usage, or a request that cannot be carried out"}
    lines = "".join(f"  {status}  {meaning}\n" for status, meaning in statuses.items() if meaning)
    epilog = f"{examples.rstrip()}\n\nexit status:\n{lines}"
    parser: Parser = commands.add_parser(
        name,
        help=help,
        description=textwrap.fill(description, 78),
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def build_parser() -> argparse.ArgumentParser:
    from . import bench, explain, gradcheck, info, plot

    parser = Parser(
        prog="python -m attnfast",
        description="Look at an installation of attnfast, measure it and check it.",
        epilog="Run a command with --help for its options, examples and exit status.",
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
        message = " ".join(str(error).split())
        print(f"python -m attnfast {parsed.command}: {message}", file=sys.stderr)
        return _USAGE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader (head, less) left
        sys.stderr.close()
        return 141
