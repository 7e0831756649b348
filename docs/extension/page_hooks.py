"""What is done to pages while Sphinx reads them: alt texts, tables that scroll, docstrings."""

from __future__ import annotations

import hashlib
import json
import re
from base64 import b64decode
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx


def alt_texts(notebook: Path) -> dict[str, str]:
    """SHA-256 of each picture in a notebook's outputs → the text that its output's metadata has."""
    found = {}
    for cell in json.loads(notebook.read_text())["cells"]:
        for output in cell.get("outputs", ()):
            png = output.get("data", {}).get("image/png")
            if png:
                alt = output.get("metadata", {}).get("image/png", {}).get("alt", "")
                found[hashlib.sha256(b64decode("".join(png))).hexdigest()] = alt
    return found


def set_alt_texts(app: Sphinx, doctree: nodes.document) -> None:
    """Give the pictures of a chapter their words; MyST-NB names a picture's file by its hash."""
    source = Path(app.env.doc2path(app.env.docname))
    if source.suffix != ".ipynb":
        return
    texts = alt_texts(source)
    for image in doctree.findall(nodes.image):
        image["alt"] = texts.get(Path(image["uri"]).stem, image.get("alt", ""))


NUMBER = re.compile(r"[−+-]?\d[\d.,]*( ± [\d.]+)?( MiB)?( \([\d.,]+\))?")
WIDE = 5  # columns from which on the first one keeps to one line


def scrolling(app: Sphinx, doctree: nodes.document) -> None:
    """Put each table into a box that scrolls by itself; numbers and names of rows don't wrap."""
    for table in list(doctree.findall(nodes.table)):
        for row in table.findall(nodes.row):
            for index, cell in enumerate(row.findall(nodes.entry)):
                if NUMBER.fullmatch(cell.astext()):
                    cell["classes"].append("number")
                elif index == 0 and len(row) >= WIDE:
                    cell["classes"].append("row-name")
        box = nodes.container(classes=["scroll"])
        table.replace_self(box)
        box += table


def plain_properties(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Let napoleon read the first line of a property's docstring as text, not as `type: text`."""
    if what in ("property", "attribute") and ": " in lines[0]:
        lines.insert(0, "\\ ")  # nothing, in reStructuredText


def escape_bars(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Keep the bars of |g| outside of code from becoming substitutions."""
    for i, line in enumerate(lines):
        parts = line.split("`")
        lines[i] = "`".join(
            [*(p.replace("|", "\\|") if j % 2 == 0 else p for j, p in enumerate(parts))]
        )
