"""Check the built book without a network: links, anchors and files inside it exist.

Usage: python docs/links.py build/docs
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {("img", "src"), ("script", "src"), ("source", "src"), ("iframe", "src")}


class Page(HTMLParser):
    """The addresses that a page links to or loads, its anchors, and its pictures without words."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.wordless: list[str] = []
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "img" and not given.get("alt", "").strip():
            self.wordless.append(given.get("src", "")[:60])
        for name, value in given.items():
            if (tag, name) in LOADED or (tag == "link" and name == "href"):
                self.loads.append(value)
            elif tag == "a" and name == "href":
                self.links.append(value)


def problems(book: Path) -> Iterator[str]:
    """One line per link that leads nowhere, per file from elsewhere, and per silent picture."""
    pages = {
        path.resolve(): Page(path)
        for path in sorted(book.rglob("*.html"))
        if "_static" not in path.parts
    }
    for path, page in pages.items():
        where = path.relative_to(book.resolve())
        for address in page.wordless:
            yield f"{where}: a picture without alt text: {address}"
        for address in page.loads:
            if urlsplit(address).scheme not in ("", "data"):
                yield f"{where}: loaded from elsewhere: {address}"
        for address in [*page.links, *page.loads]:
            split = urlsplit(address)
            if split.scheme or split.netloc:
                continue
            target = (path.parent / unquote(split.path)).resolve() if split.path else path
            if not target.exists():
                yield f"{where}: no such file: {address}"
            elif (
                split.fragment
                and target in pages
                and unquote(split.fragment) not in pages[target].anchors
            ):
                yield f"{where}: no such anchor: {address}"


def main(book: str) -> int:
    """Write every problem to stderr; the exit status."""
    found = list(dict.fromkeys(problems(Path(book))))
    sys.stderr.writelines(f"{line}\n" for line in found)
    return 1 if found or not (Path(book) / "index.html").exists() else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
