"""Griffe extension of mkdocs.yml: docstrings are written for Sphinx's roles, the site is Markdown.

``.. math::`` and ``:math:`` become what docs_hooks.py turns into MathML; ``:func:`` and its like become code. The
functions of the binary that ``attnfast/__init__.py`` gives names to by assignment are found in its stub.
"""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

_MATH = re.compile(r"^( *)\.\. math::(.*)\n((?:\1 +\S.*\n|[ \t]*\n)*)", re.MULTILINE)
_INLINE_MATH = re.compile(r":math:`([^`]+)`")
_ROLE = re.compile(r":(?:func|class|meth|mod|data):`([^`]+)`")


def _block(match: re.Match[str]) -> str:
    indent, first, rest = match.groups()
    formula = (first.strip() + "\n" + textwrap.dedent(rest)).strip()
    return textwrap.indent(f"```math\n{formula}\n```\n\n", indent)


def to_markdown(docstring: str) -> str:
    text = _MATH.sub(_block, docstring + "\n")
    text = _INLINE_MATH.sub(lambda match: f"`#!math {match[1]}`", text)
    return _ROLE.sub(lambda match: f"`{match[1].lstrip('~')}`", text).rstrip()


class Attnfast(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        if pkg.path == "attnfast":
            for name in ("available_isas", "get_isa", "set_isa"):
                pkg.set_member(name, griffe.Alias(name, pkg["_C"][name], parent=pkg))
