"""Hooks of mkdocs.yml: formulas, the pages of the API, and the table of measurements.

Formulas become MathML when the site is built, so that no script has to be loaded to show them. A block is fenced as
``math``, which GitHub shows as well; docstrings come here through docs_griffe.py.

In a page, ``<!-- every name of PACKAGE -->`` stands for all names that ``PACKAGE.__all__`` has and the page does not
list yet, so that a new public name cannot be left out. tools/check_site.py looks for each of them in what was built.
``<!-- the table of README.md -->`` stands for what the benchmark writes there.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from pathlib import Path
from types import ModuleType
from typing import Any

from latex2mathml.converter import convert


def block(source: str, language: str, css_class: str, options: Any, md: Any, **rest: Any) -> str:
    """A formula on lines of its own; with ``&`` or ``\\\\`` its rows are aligned."""
    if "&" in source or r"\\" in source:
        source = rf"\begin{{align*}}{source}\end{{align*}}"
    return f'<div class="formula">{convert(source, display="block")}</div>'


def inline(source: str, language: str, css_class: str, md: Any) -> str:
    return convert(source)


def on_config(config: Any) -> Any:
    extensions = config["mdx_configs"]
    extensions.setdefault("pymdownx.superfences", {})["custom_fences"] = [
        {"name": "math", "class": "formula", "format": block}
    ]
    extensions.setdefault("pymdownx.inlinehilite", {})["custom_inline"] = [
        {"name": "math", "class": "formula", "format": inline}
    ]
    return config


def public_names(package: str) -> list[str]:
    """Dotted names of what a package offers. The parts of the package itself have pages of their own; those of others
    (``attnfast.integrations.torch_sdpa``) stand on the page of theirs."""
    module = importlib.import_module(package)
    found = []
    for name in module.__all__:
        if name.startswith("__") or isinstance(getattr(module, name), ModuleType):
            continue
        found.append(f"{package}.{name}")
    if package == "attnfast" or not hasattr(module, "__path__"):
        return found
    for part in pkgutil.iter_modules(module.__path__, f"{package}."):
        inside = importlib.import_module(part.name)
        if (
            not part.name.rpartition(".")[2].startswith("_")
            and part.name.count(".") == 2
            and hasattr(inside, "__all__")
        ):
            objects = [getattr(module, name) for name in module.__all__]
            found += [f"{part.name}.{name}" for name in inside.__all__ if getattr(inside, name) not in objects]
    return found


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    def names(match: re.Match[str]) -> str:
        listed = set(re.findall(r"^::: (\S+)", markdown, re.MULTILINE))
        return "\n\n".join(f"::: {name}" for name in public_names(match[1]) if name not in listed)

    if "<!-- the table of README.md -->" in markdown:
        readme = (Path(config["config_file_path"]).parent / "README.md").read_text(encoding="utf-8")
        table = readme.split("<!-- bench:begin -->")[1].split("<!-- bench:end -->")[0]
        markdown = markdown.replace("<!-- the table of README.md -->", table)
    return re.sub(r"^<!-- every name of (\S+) -->$", names, markdown, flags=re.MULTILINE)
