"""The documents: every Python example runs, every link leads somewhere, every command and option exists."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

import attnfast
from attnfast.cli import build_parser

ROOT = Path(attnfast.__file__).resolve().parents[1]
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(path: Path, language: str) -> list[tuple[int, str]]:
    """(line number, text) of the fenced blocks of one language."""
    text = path.read_text(encoding="utf-8")
    return [(text[: m.start()].count("\n") + 1, m[2]) for m in _FENCE.finditer(text) if m[1] == language]


def prose(path: Path) -> str:
    return path.read_text(encoding="utf-8")


WITH_PYTHON = [path for path in DOCUMENTS if path.exists() and blocks(path, "python")]


def document_id(path: Path) -> str:
    return path.name


def test_documents_are_there() -> None:
    names = {path.name for path in DOCUMENTS}
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "semantics.md", "adding-a-score.md"} <= names
    assert {"kernels.md", "benchmarks.md"} <= names
    assert all(path.is_file() for path in DOCUMENTS)
    assert {"README.md", "semantics.md", "adding-a-score.md"} <= {path.name for path in WITH_PYTHON}


@pytest.mark.parametrize("path", WITH_PYTHON, ids=document_id)
def test_python_examples_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a document run in order, in one namespace, as a reader would paste them."""
    import torch.nn.functional as F

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(F, "scaled_dot_product_attention", F.scaled_dot_product_attention)  # examples may replace it
    namespace: dict[str, object] = {"__name__": "example"}
    for line, source in blocks(path, "python"):
        # Blank lines in front, so that an error names the line of the document.
        exec(compile("\n" * line + source, str(path), "exec"), namespace)


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
