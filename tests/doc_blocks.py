"""Fenced blocks of the documents: finding them, running them, comparing what they print with what the page shows.

Python blocks of one page run in order in one namespace, as a reader would paste them. What a block shows is compared:

- ``x + 1  # -> 3`` at the end of a statement: the value of an expression, or what the statement printed;
- a fence ``text`` right after a block (nothing but blank lines between): everything that the block printed.

``...`` in what is shown stands for anything, and runs of blanks are equal, as in doctest. Of shell blocks each line
that starts ``python -m attnfast`` runs in this process; other lines need a reason in `NOT_RUN`.
"""

from __future__ import annotations

import ast
import contextlib
import doctest
import io
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from attnfast.cli import main

_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# math: a formula; toml, yaml, cpp: to read. Anything else would be a block that nobody runs by mistake.
LANGUAGES = {"python", "sh", "text", "math", "toml", "yaml", "cpp"}
_OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
_SHOWN = "# ->"

# Shell lines that no test runs: the start of the line, and why.
NOT_RUN = {
    "make ": "sets up, builds, measures or formats; test_commands_exist looks the target up",
    "pip install": "changes the environment; tools/check_package.py installs the package",
    "ATTNFAST_CUDA=": "builds the package; tools/check_package.py does",
    "python -m attnfast bench": "takes minutes; its options are checked, tests/test_bench.py runs the quick suites",
    "python -m attnfast plot": "needs a result of the benchmark; tests/test_cli.py makes one",
}


class Block(NamedTuple):
    line: int  # of the opening fence
    language: str
    source: str
    shown: str | None  # the text block that follows it


def blocks(path: Path) -> list[Block]:
    text = path.read_text(encoding="utf-8")
    matches = list(_FENCE.finditer(text))
    found = []
    for i, match in enumerate(matches):
        after = matches[i + 1] if i + 1 < len(matches) else None
        shown = after[2] if after and after[1] == "text" and not text[match.end() : after.start()].strip() else None
        found.append(Block(text[: match.start()].count("\n") + 1, match[1], match[2], shown))
    return found


def unmatched_fences(path: Path) -> int:
    """Fences, indented ones too, that `blocks` does not see."""
    text = path.read_text(encoding="utf-8")
    return len(re.findall(r"^\s*(?:```|~~~)", text, re.MULTILINE)) - 2 * len(list(_FENCE.finditer(text)))


def compare(shown: str, got: str, where: str) -> None:
    if not doctest.OutputChecker().check_output(shown.strip() + "\n", got.strip() + "\n", _OPTIONS):
        raise AssertionError(f"{where} shows\n{shown.strip()}\nand got\n{got.strip()}")


def run_python(path: Path, found: list[Block]) -> None:
    """Run the Python blocks of a page in one namespace and compare what they show."""
    example = ModuleType("example")  # torch looks a function that it traces up in its module
    sys.modules["example"] = example
    try:
        _run_in(example.__dict__, path, found)
    finally:
        del sys.modules["example"]


def _run_in(namespace: dict[str, object], path: Path, found: list[Block]) -> None:
    for block in found:
        if block.language != "python":
            continue
        # Blank lines in front: errors, and torch where it reads the source of a function, find the line in the file.
        padded, name = "\n" * block.line + block.source, str(path)
        lines = padded.splitlines()
        compared, printed = 0, ""
        for statement in ast.parse(padded, name).body:
            last = lines[(statement.end_lineno or 1) - 1]
            shown = last.split(_SHOWN, 1)[1] if _SHOWN in last else None
            with contextlib.redirect_stdout(io.StringIO()) as out:
                value = None
                if shown is not None and isinstance(statement, ast.Expr):
                    value = eval(compile(ast.Expression(statement.value), name, "eval"), namespace)
                else:
                    exec(compile(ast.Module([statement], []), name, "exec"), namespace)
            printed += out.getvalue()
            if shown is not None:
                compared += 1
                got = out.getvalue() + ("" if value is None else repr(value))
                compare(shown, got, f"{path.name}:{statement.end_lineno}")
        written = block.source.count(_SHOWN)
        assert compared == written, f"{path.name}:{block.line}: {written - compared} of {_SHOWN} follow no statement"
        if block.shown is not None:
            compare(block.shown, printed, f"{path.name}:{block.line}, the block after it")


def shell_lines(found: list[Block]) -> list[tuple[int, str, str | None]]:
    """(line number, command, what is shown) of the shell blocks. Only a block of one command shows something."""
    lines = []
    for block in found:
        if block.language == "sh":
            commands = [(block.line + 1 + i, x.strip()) for i, x in enumerate(block.source.splitlines())]
            commands = [(i, x) for i, x in commands if x and not x.startswith("#")]
            assert block.shown is None or len(commands) == 1, f"line {block.line}: what shows which output?"
            lines += [(i, x, block.shown) for i, x in commands]
    return lines


def why_not_run(command: str) -> str | None:
    return next((reason for start, reason in NOT_RUN.items() if command.startswith(start)), None)


def run_shell(path: Path, line: int, command: str, shown: str | None) -> None:
    words = shlex.split(command, comments=True)
    assert words[:3] == ["python", "-m", "attnfast"], f"{path.name}:{line}: no rule for {command!r}"
    with contextlib.redirect_stdout(io.StringIO()) as out:
        status = main(words[3:])
    assert status == 0, f"{path.name}:{line}: {command} ended with status {status}"
    assert out.getvalue().strip(), f"{path.name}:{line}: {command} printed nothing"
    if shown is not None:
        compare(shown, out.getvalue(), f"{path.name}:{line}")
