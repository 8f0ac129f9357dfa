"""Checks the built documentation site: what a browser would follow or load, not what the sources say.

mkdocs itself checks links and anchors of the pages' sources. Here every address in the HTML is followed: those of the
generated API pages, of pictures, styles and scripts too. Nothing may be loaded from elsewhere, every page must be
reachable from the first, and every public name must have its place.

    python tools/check_site.py [build/site]
"""

from __future__ import annotations

import argparse
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = tuple(f"attnfast{part}" for part in ("", ".nn", ".memory", ".integrations", ".distributed", ".viz"))
# What the theme's script can ask for, and the class that a page would have to hold for it to do so. The last is asked
# for by browsers without ResizeObserver alone (Safari before 13.1).
THEME_REQUESTS = {
    "https://unpkg.com/mermaid@11/dist/mermaid.min.js": "mermaid",
    "https://api.github.com/": "md-source",
    "https://gitlab.com/": "md-source",
    "https://unpkg.com/resize-observer-polyfill": "",
}
_ADDRESS = re.compile(r"""["'`(](https?://[^"'`()\s$]+)""")


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.classes: set[str] = set()
        self.links: list[str] = []  # to follow
        self.loads: list[str] = []  # to load

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attributes}
        self.ids |= {found[name] for name in ("id", "name") if name in found}
        self.classes |= set(found.get("class", "").split())
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        elif tag == "link" and found.get("rel") not in ("prev", "next", "canonical"):
            self.loads.append(found.get("href", ""))
        elif tag == "link":
            self.links.append(found.get("href", ""))
        self.loads += [found[name] for name in ("src", "srcset", "poster", "data") if name in found]
        self.loads += re.findall(r"url\(['\"]?([^'\")]+)", found.get("style", ""))


def read_site(site: Path) -> dict[Path, Page]:
    pages = {}
    for path in sorted(site.rglob("*.html")):
        pages[path] = Page()
        pages[path].feed(path.read_text(encoding="utf-8"))
    return pages


def is_elsewhere(address: str) -> bool:
    parts = urlsplit(address)
    return bool(parts.netloc) or parts.scheme not in ("", "data")


def check_page(path: Path, pages: dict[Path, Page], site: Path) -> tuple[list[str], set[Path]]:
    """Return what is wrong with the addresses of a page, and the pages that it leads to."""
    page, problems, reached = pages[path], [], set()
    name = path.relative_to(site)
    for address in page.loads:
        if is_elsewhere(address):
            problems.append(f"{name}: loads {address}")
    for address in [*page.links, *page.loads]:
        if is_elsewhere(address) or address.startswith("data:"):
            continue
        parts = urlsplit(address)
        target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
        if target.is_dir():
            target /= "index.html"
        if not target.is_file() or not target.is_relative_to(site):
            problems.append(f"{name}: {address} leads nowhere")
        elif target in pages:
            reached.add(target)
            if parts.fragment and unquote(parts.fragment) not in pages[target].ids | {"__top", ""}:
                problems.append(f"{name}: {address} has no such anchor")
    return problems, reached


def check_requests(site: Path, classes: set[str]) -> list[str]:
    """What styles and scripts would load from elsewhere."""
    problems = []
    for path in sorted(site.rglob("*.css")):
        text = path.read_text(encoding="utf-8")
        for address in re.findall(r"(?:@import\s+(?:url\()?|url\()['\"]?([^'\")\s;]+)", text):
            if is_elsewhere(address):
                problems.append(f"{path.relative_to(site)}: loads {address}")
    for path in sorted(site.rglob("*.js")):
        if "lunr" in path.parts or path.name == "search_index.js":
            continue
        for address in set(_ADDRESS.findall(path.read_text(encoding="utf-8"))) - {"http://www.w3.org/2000/svg"}:
            known = [needs for start, needs in THEME_REQUESTS.items() if address.startswith(start)]
            if not known:
                problems.append(f"{path.relative_to(site)}: knows the address {address}")
            elif known[0] and known[0] in classes:
                problems.append(f"a page has the class {known[0]}, for which the theme loads {address}")
    return problems


def check_names(pages: dict[Path, Page], site: Path) -> list[str]:
    """Public names without a place on the pages of the API."""
    import importlib

    ids = set().union(*(page.ids for path, page in pages.items() if path.is_relative_to(site / "api")))
    problems = []
    for package in PACKAGES:
        for name in importlib.import_module(package).__all__:
            if name.startswith("__") or f"{package}.{name}" in PACKAGES or f"{package}.{name}" in ids:
                continue
            if not any(anchor.startswith(f"{package}.{name}.") for anchor in ids):  # a module: its functions
                problems.append(f"{package}.{name} is not on the pages of the API")
    return problems


def check(site: Path) -> list[str]:
    site = site.resolve()
    pages = read_site(site)
    start = site / "index.html"
    if start not in pages:
        return [f"{site} has no index.html: make docs builds it"]
    problems, seen, waiting = [], {start}, [start]
    while waiting:
        found, reached = check_page(waiting.pop(), pages, site)
        problems += found
        waiting += sorted(reached - seen)
        seen |= reached
    problems += [
        f"{path.relative_to(site)}: no page leads here" for path in pages if path not in seen | {site / "404.html"}
    ]
    problems += check_requests(site, set().union(*(page.classes for page in pages.values())))
    return problems + check_names(pages, site)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site", type=Path, nargs="?", default=ROOT / "build" / "site")
    site = parser.parse_args().site
    problems = check(site)
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"check_site: {'FAILED' if problems else 'good'}, {len(list(site.rglob('*.html')))} pages")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
