"""The documents: examples run and show what they say, links lead somewhere, commands and options exist.

doc_blocks.py says how blocks are run. The site itself is checked by `make check-docs`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import unittest.mock
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from doc_blocks import LANGUAGES, NOT_RUN, blocks, run_python, run_shell, shell_lines, unmatched_fences, why_not_run
from helpers import opennmt_attention

import attnfast
from attnfast.cli import build_parser

ROOT = Path(attnfast.__file__).resolve().parents[1]
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").rglob("*.md")
)


def prose(path: Path) -> str:
    return path.read_text(encoding="utf-8")


WITH_PYTHON = [path for path in DOCUMENTS if path.exists() and any(b.language == "python" for b in blocks(path))]
SHELL = [(path, *line) for path in DOCUMENTS if path.exists() for line in shell_lines(blocks(path))]


def document_id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix().removeprefix("docs/")


def test_documents_are_there() -> None:
    names = {path.name for path in DOCUMENTS}
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "semantics.md", "adding-a-score.md"} <= names
    assert {"kernels.md", "benchmarks.md"} <= names
    assert all(path.is_file() for path in DOCUMENTS)
    assert {"README.md", "semantics.md", "adding-a-score.md"} <= {path.name for path in WITH_PYTHON}


@pytest.mark.parametrize("path", DOCUMENTS, ids=document_id)
def test_every_block_is_seen(path: Path) -> None:
    """A block of another language, an indented one or a fence left open would not be run."""
    assert {block.language for block in blocks(path)} <= LANGUAGES
    assert unmatched_fences(path) == 0


@pytest.mark.parametrize("path", WITH_PYTHON, ids=document_id)
def test_python_examples_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What examples change goes back: the function they replace, the environment, generators (Keras draws seeds).
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(F, "scaled_dot_product_attention", F.scaled_dot_product_attention)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    generator = random.getstate()
    peers = opennmt_attention() if path.name == "opennmt.md" else contextlib.nullcontext()
    with unittest.mock.patch.dict(os.environ), torch.random.fork_rng(), peers:
        run_python(path, blocks(path))
    random.setstate(generator)


@pytest.mark.parametrize(
    ("path", "line", "command", "shown"), SHELL, ids=[f"{document_id(p)}:{line}" for p, line, *_ in SHELL]
)
def test_shell_examples_run(
    path: Path, line: int, command: str, shown: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = why_not_run(command)
    if reason is not None:
        assert shown is None, f"{path.name}:{line} shows the output of a command that no test runs"
        pytest.skip(f"{command}: {reason}")
    monkeypatch.chdir(tmp_path)
    run_shell(path, line, command, shown)


def test_no_reason_is_left_over() -> None:
    assert {start for start in NOT_RUN if not any(command.startswith(start) for *_, command, _ in SHELL)} == set()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```python\n1 + 1  # -> 3\n```\n", "page.md:2 shows"),
        ("```python\nprint(1)  # -> 2\n```\n", "page.md:2 shows"),
        ("```python\nprint(1)\n```\n\n```text\n2\n```\n", "the block after it shows"),
        ("```python\nfor i in [1]:\n    print(i)  # -> 1\n    pass\n```\n", "follow no statement"),
        ("```python\nx = 1\n```\n\n```python\nassert x == 2, 'values carry over'\n```\n", "values carry over"),
    ],
    ids=["value", "printed", "text block", "unseen", "one namespace"],
)
def test_a_block_that_fails_is_found(text: str, message: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(AssertionError, match=message):
        run_python(page, blocks(page))


def test_what_blocks_may_show(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\n[1.25, 2]  # -> [1.2..., 2]\nprint('a')\nprint('b c')\n```\n\n```text\na\nb  c\n```\n")
    run_python(page, blocks(page))
    page.write_text("```python\n1 / 0\n```\n")
    with pytest.raises(ZeroDivisionError) as caught:
        run_python(page, blocks(page))
    assert caught.traceback[-1].lineno == 1  # counted from 0: the second line of the page
    page.write_text("    ```python\n    1 / 0\n    ```\n")
    assert unmatched_fences(page) == 2
    with pytest.raises(AssertionError, match="no rule"):
        run_shell(page, 1, "rm important", None)
    with pytest.raises(AssertionError, match="status 2"):
        run_shell(page, 1, "python -m attnfast explain --shape 1,2,4,8 --score nonsense", None)
    with pytest.raises(AssertionError, match=r"page.md:1 shows"):
        run_shell(page, 1, "python -m attnfast info", "nonsense")


@pytest.mark.parametrize("path", DOCUMENTS, ids=document_id)
def test_links_lead_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", prose(path))
    for target in targets:
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=document_id)
def test_named_files_exist(path: Path) -> None:
    for name in re.findall(r"`((?:attnfast|csrc|tests|benchmarks|docs|tools)/[\w./*{},-]+)`", prose(path)):
        if "{" not in name:
            assert list(ROOT.glob(name.rstrip("/"))), f"{path.name} names {name}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=document_id)
def test_commands_exist(path: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", prose(path), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{path.name} names make {target}"
    (commands,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    for line in re.findall(r"python -m attnfast (\S[^`\n]*)", prose(path)):
        command, *rest = line.split()
        if command in ("info", "explain", "bench", "gradcheck", "plot"):
            known = {option for action in commands.choices[command]._actions for option in action.option_strings}
            for word in rest:
                option = word.split("=")[0].strip("[]`.,;)")
                assert not option.startswith("--") or option in known, f"{path.name}: {command} has no {option}"
        else:
            assert command in ("|", "COMMAND"), f"{path.name} names the command {command!r}"


def test_readme_has_one_place_for_the_measured_table() -> None:
    text = prose(ROOT / "README.md")
    assert text.count("<!-- bench:begin -->") == text.count("<!-- bench:end -->") == 1
    assert text.index("<!-- bench:begin -->") < text.index("<!-- bench:end -->")


def test_changelog_names_the_version() -> None:
    assert f"## [{attnfast.__version__}]" in prose(ROOT / "CHANGELOG.md")


@pytest.mark.parametrize(
    "name", ["attention", "scaled_dot_product_attention", "varlen_attention", "explain", "reference"]
)
def test_readme_names_the_public_surface(name: str) -> None:
    assert name in attnfast.__all__
    assert re.search(rf"\b{name}\b", prose(ROOT / "README.md"))
