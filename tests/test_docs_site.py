"""What makes and checks the documentation site: tools/check_site.py finds what is broken, docstrings become Markdown.

The site itself is built and checked by `make check-docs`.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from helpers import load_tool

import attnfast

ROOT = Path(attnfast.__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    return load_tool("docs_hooks")


@pytest.fixture(scope="module")
def checker() -> ModuleType:
    return load_tool("check_site")


@pytest.fixture
def site(tmp_path: Path, hooks: ModuleType, checker: ModuleType) -> Path:
    """The smallest site without a fault."""
    names = [name for package in checker.PACKAGES for name in hooks.public_names(package)]
    names.append("attnfast.reference.attention")  # of a module: one of its functions
    pages = {
        "index.html": '<link rel="stylesheet" href="site.css"><a href="api/index.html#attnfast.attention">API</a>'
        '<a href="https://example.org">elsewhere</a><img src="data:image/png;base64,AA">',
        "api/index.html": '<a href="../index.html">start</a>'
        + "".join(f'<h2 id="{name}">{name}</h2>' for name in names),
        "404.html": '<a href="index.html">start</a>',
        "site.css": "p { background: url(paper.svg) }",
        "theme.js": 'load("https://unpkg.com/mermaid@11/dist/mermaid.min.js")',
    }
    (tmp_path / "api").mkdir()
    for name, text in pages.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def test_a_good_site_is_good(checker: ModuleType, site: Path) -> None:
    assert checker.check(site) == []


@pytest.mark.parametrize(
    ("page", "text", "problem"),
    [
        ("index.html", '<a href="gone.html">x</a>', "gone.html leads nowhere"),
        ("index.html", '<a href="api/index.html#gone">x</a>', "#gone has no such anchor"),
        ("index.html", '<a href="#gone">x</a>', "#gone has no such anchor"),
        ("index.html", '<a href="../outside.html">x</a>', "outside.html leads nowhere"),
        ("index.html", '<img src="figures/gone.svg">', "gone.svg leads nowhere"),
        ("index.html", '<script src="https://cdn.example.org/x.js"></script>', "loads https://cdn.example.org/x.js"),
        ("index.html", '<link rel="stylesheet" href="//fonts.example.org/x">', "loads //fonts.example.org/x"),
        ("index.html", '<p style="background: url(https://example.org/x)">', "loads https://example.org/x"),
        ("index.html", '<div class="mermaid">', "the class mermaid"),
        ("site.css", "@import url(https://fonts.example.org/css);", "loads https://fonts.example.org/css"),
        ("theme.js", 'fetch("https://example.org/count")', "knows the address https://example.org/count"),
        ("lonely.html", "<p>", "lonely.html: no page leads here"),
    ],
)
def test_a_fault_is_found(checker: ModuleType, site: Path, page: str, text: str, problem: str) -> None:
    path = site / page
    path.write_text((path.read_text() if path.exists() else "") + text)
    (found,) = checker.check(site)
    assert problem in found


@pytest.mark.parametrize("name", ["attnfast.topk_scores", "attnfast.nn.Attention", "attnfast.memory.MemoryStore"])
def test_a_missing_name_is_found(checker: ModuleType, site: Path, name: str) -> None:
    page = site / "api" / "index.html"
    page.write_text(page.read_text().replace(f'id="{name}"', ""))
    assert checker.check(site) == [f"{name} is not on the pages of the API"]


FAULTS = {
    "": "",
    "link": "[x](gone.md)",
    "anchor": "[x](index.md#gone)",
    "page outside of the navigation": "",
    "reference": "[x][attnfast.gone]",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_make_docs_is_strict(fault: str, tmp_path: Path) -> None:
    """The command of the Makefile, with the settings of mkdocs.yml, on a site of one page."""
    (command,) = re.findall(r"^\t.*\$\(PYTHON\) (-m mkdocs build.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"# Start\n\n{FAULTS[fault]}\n")
    if fault.startswith("page"):
        (tmp_path / "docs" / "orphan.md").write_text("# Orphan\n")
    config = tmp_path / "mkdocs.yml"
    config.write_text(
        f"INHERIT: {ROOT / 'mkdocs.yml'}\ndocs_dir: docs\nsite_dir: site\nhooks: []\nnav: [index.md]\nextra_css: []\n"
    )
    words = [sys.executable, *shlex.split(command), "--config-file", str(config)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode == 0) == (not fault), done.stderr
    # At the start of a line: the theme prints a notice of its own, which is none.
    assert bool(re.search(r"^WARNING", done.stderr, re.MULTILINE)) == bool(fault), done.stderr


def test_pages_of_the_api_list_every_name(hooks: ModuleType, checker: ModuleType) -> None:
    listed = []
    for path in sorted((ROOT / "docs" / "api").glob("*.md")):
        text = hooks.on_page_markdown(path.read_text(encoding="utf-8"), None, None, None)
        assert "<!--" not in text
        listed += re.findall(r"^::: (\S+)$", text, re.MULTILINE)
    assert len(listed) == len(set(listed))
    assert {name for package in checker.PACKAGES for name in hooks.public_names(package)} <= set(listed)
    assert "attnfast.integrations.torch_sdpa.override" in listed


def test_the_table_of_the_readme_is_taken(hooks: ModuleType) -> None:
    page = (ROOT / "docs" / "measured.md").read_text(encoding="utf-8")
    config = {"config_file_path": str(ROOT / "mkdocs.yml")}
    text = hooks.on_page_markdown(page, None, config, None)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| .*", text, re.MULTILINE)
    assert len(rows) > 50 and all(row in readme for row in rows)


def test_docstrings_become_markdown() -> None:
    to_markdown = load_tool("docs_griffe").to_markdown
    text = to_markdown("As :func:`~torch.topk` with :math:`a_b`.\n\n.. math::\n    x &= 1 \\\\\n    y &= 2\n\nAfter.\n")
    assert text == "As `torch.topk` with `#!math a_b`.\n\n```math\nx &= 1 \\\\\ny &= 2\n```\n\nAfter."
    assert to_markdown("One.\n\n.. math:: x = 1\n\nTwo.") == "One.\n\n```math\nx = 1\n```\n\nTwo."


def test_formulas_become_mathml(hooks: ModuleType) -> None:
    rows = hooks.block(r"x &= \frac{1}{2} \\ y &= 2", "math", "", {}, None)
    assert rows.startswith('<div class="formula"><math') and rows.count("<mtr>") == 2 and "&=" not in rows
    assert "<mfrac>" in rows and "<mtable" not in hooks.block("x = 1", "math", "", {}, None)
    assert hooks.inline("x^2", "math", "", None).startswith("<math")


def test_navigation_has_every_page() -> None:
    """mkdocs says so too; this needs no build."""
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:")[1]
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert set(re.findall(r"^\s*- (\S+\.md)$", navigation, re.MULTILINE)) == pages
