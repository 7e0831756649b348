"""An executed notebook → HTML that needs nothing beside itself: no kernel, no network, no CDN."""

from __future__ import annotations

import ast
import html
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import latex2mathml.converter
import mistune
from mistune.plugins.math import math
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

from lowrank_lab.figures import data_uri

NEEDS_KERNEL = "needs a running kernel: make lab"
WIDGET = "application/vnd.jupyter.widget-view+json"
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
LONGEST_ALT = 400  # characters; what is longer is cut at the end of a sentence


class _Markdown(mistune.HTMLRenderer):
    """Formulas as MathML, notebooks' names as links to their pages, pictures inside the page."""

    def __init__(self, links: Mapping[str, str], folder: Path) -> None:
        super().__init__(escape=False)
        self.links, self.folder = links, folder

    def inline_html(self, html: str) -> str:
        return mistune.escape(html)  # none of ours holds any: it came from a study or a label

    def block_html(self, html: str) -> str:
        return f"<p>{mistune.escape(html)}</p>\n"

    def inline_math(self, text: str) -> str:
        return mathml(text, "inline")

    def block_math(self, text: str) -> str:
        return mathml(text, "block")

    def codespan(self, text: str) -> str:
        code = super().codespan(text)
        return (
            f'<a href="{html.escape(self.links[text])}">{code}</a>' if text in self.links else code
        )

    def link(self, text: str, url: str, title: str | None = None) -> str:
        return super().link(text, self.links.get(url, url), title)

    def image(self, text: str, url: str, title: str | None = None) -> str:
        path = self.folder / url
        if not url.startswith("data:"):
            inside = path.resolve().is_relative_to(self.folder.resolve().parent)
            if "://" in url or not path.is_file() or not inside:
                return f"<em>(picture: {html.escape(text or url)})</em>"
            kind = "image/svg+xml" if path.suffix == ".svg" else f"image/{path.suffix[1:]}"
            url = data_uri(path.read_bytes(), kind)
        return f'<img alt="{html.escape(text or title or path.stem)}" src="{html.escape(url)}">'

    def block_code(self, code: str, info: str | None = None) -> str:
        return coloured(code, info or "text")


def markdown_of(links: Mapping[str, str], folder: Path) -> Callable[[str], str]:
    """A function from Markdown to HTML.

    Args:
        links: names of files (`02_run.ipynb`) → addresses of their pages.
        folder: where relative paths of pictures start.
    """
    renderer = _Markdown(links, folder)
    convert = mistune.create_markdown(renderer=renderer, plugins=[math, "table", "strikethrough"])
    return lambda text: str(convert(text))


def mathml(latex: str, display: str) -> str:
    """A formula as MathML; as it was written, in italics, where it can't be read."""
    try:
        # its letters would stand apart, as if each were a variable
        text = re.sub(r"\\(?:mathrm|operatorname)\{(\w+)\}", r"\\text{\1}", latex)
        return str(latex2mathml.converter.convert(text, display=display))
    except Exception:  # of many kinds, from a parser that isn't ours
        return f'<i class="math">{html.escape(latex)}</i>'


def coloured(code: str, language: str) -> str:
    """Code with its colours."""
    try:
        lexer = get_lexer_by_name(language)
    except ClassNotFound:
        lexer = get_lexer_by_name("text")
    inner = highlight(code, lexer, HtmlFormatter(nowrap=True))
    return f'<pre class="code" tabindex="0">{inner}</pre>'


@dataclass
class NotebookPage:
    """What a notebook's cells become."""

    title: str
    summary: str  # HTML of the first paragraph
    body: str
    failed: str = ""  # the error that it stopped at


@dataclass
class _Reader:
    """Goes through the cells and remembers what was said last, for the pictures' alt texts."""

    markdown: Callable[[str], str]
    heading: str = ""
    said: str = ""
    caption: str = ""  # Markdown that an output wrote above a picture
    failed: str = ""
    parts: list[str] = field(default_factory=list)

    def cell(self, cell: Mapping[str, Any]) -> None:
        source, tags = _text(cell["source"]), cell["metadata"].get("tags", [])
        if "papermill-error-cell-tag" in tags:  # the page says itself what failed
            return
        if cell["cell_type"] == "markdown":
            self.listen(source)
            self.parts.append(self.markdown(source))
        elif cell["cell_type"] == "code" and source.strip():
            if "injected-parameters" in tags:
                source = re.sub(r"^(# Parameters|headless = True)\n?", "", source, flags=re.M)
                if not source.strip():
                    return
                self.parts.append('<p class="note">Executed for this page with:</p>')
            self.parts.append(coloured(source, "ipython3"))
            self.caption = ""
            outputs = list(self.outputs(cell["outputs"]))
            self.parts += outputs
            if is_live(source):
                more = "more controls" if 'class="slider"' in "".join(outputs) else "controls"
                self.parts.append(_note(f"Live, this picture has {more}"))

    def listen(self, source: str) -> None:
        headings = re.findall(r"^#+ +(.+)$", source, re.M)
        self.heading = plain(headings[-1]) if headings else self.heading
        paragraphs = [
            p for p in source.split("\n\n") if p.strip() and not p.startswith(("#", "    "))
        ]
        expecting = [p for p in paragraphs if "**Expect**" in p or "**expect**" in p]
        chosen = expecting or paragraphs[-1:]
        if chosen:
            text = plain(chosen[-1])
            start = text.lower().find("expect") if expecting else 0
            self.said = text[start:]
        elif headings:
            self.said = ""

    def outputs(self, outputs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
        for output in outputs:
            kind = output["output_type"]
            if kind == "stream":
                yield preformatted(_text(output["text"]))
            elif kind == "error":
                self.failed = f"{output['ename']}: {output['evalue']}"
                yield preformatted("\n".join(output["traceback"]), "error")
            else:
                yield self.bundle(output["data"], output.get("metadata", {}))

    def bundle(self, data: Mapping[str, Any], metadata: Mapping[str, Any]) -> str:
        """The richest thing in an output that a page without a kernel can show."""
        if WIDGET in data:
            return _note("A widget stands here")
        for kind in ("image/svg+xml", "image/png", "image/jpeg"):
            if kind in data:
                return self.picture(kind, data[kind], metadata.get(kind, {}))
        if "text/html" in data:
            return f'<div class="output scroll" tabindex="0">{_text(data["text/html"])}</div>'
        if "text/markdown" in data:
            text = _text(data["text/markdown"])
            self.caption = plain(text)
            return self.markdown(text)
        if "text/latex" in data:
            return f"<p>{mathml(_text(data['text/latex']).strip().strip('$'), 'block')}</p>"
        return preformatted(_text(data.get("text/plain", "")))

    def picture(self, kind: str, content: Any, facts: Mapping[str, Any]) -> str:
        text = _text(content)
        if kind == "image/svg+xml":
            uri = data_uri(text.encode(), kind)
        else:
            uri = f"data:{kind};base64,{''.join(text.split())}"
        alt = html.escape(self.alt(facts.get("alt", "")))
        return f'<figure><img alt="{alt}" src="{uri}"></figure>'

    def alt(self, own: str) -> str:
        """Its caption and own words, else the sentence before it that says what to expect."""
        text = " ".join(filter(None, (self.caption, own))) or self.said or self.heading or "Figure"
        if len(text) > LONGEST_ALT:
            end = max(text.rfind(mark, 0, LONGEST_ALT) for mark in (". ", ", ", " "))
            text = text[:end].rstrip(" ,.") + " …"
        return f"{self.heading}: {text}" if self.heading and text != self.heading else text


def read_notebook(path: Path, links: Mapping[str, str], folder: Path) -> NotebookPage:
    """The page of an executed notebook.

    Args:
        links: names of notebooks → addresses of their pages.
        folder: where the notebook's own relative paths start.
    """
    cells = json.loads(path.read_text())["cells"]
    reader = _Reader(markdown_of(links, folder))
    for cell in cells:
        reader.cell(cell)
    words = "\n\n".join(_text(c["source"]) for c in cells if c["cell_type"] == "markdown")
    title = re.search(r"^# +(.+)$", words, re.M)
    first = next((p for p in words.split("\n\n") if p.strip() and not p.startswith("#")), "")
    return NotebookPage(
        title=plain(title[1]) if title else path.stem,
        summary=reader.markdown(re.sub(r"(?<=\.)[^.]*:$", "", first.strip())),
        body="\n".join(reader.parts),
        failed=reader.failed,
    )


def is_live(source: str) -> bool:
    """Whether a cell would show controls with `headless = False`; a progress bar isn't one."""
    try:
        tree = ast.parse(source)
    except SyntaxError:  # a magic
        return False
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return any(
        isinstance(argument, ast.Name) and argument.id in ("headless", "live")
        for call in calls
        if getattr(call.func, "attr", getattr(call.func, "id", "")) not in ("progress", "is_live")
        for argument in [*call.args, *(keyword.value for keyword in call.keywords)]
    )


def plain(markdown: str) -> str:
    """Markdown without its marks, on one line."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", markdown)
    return " ".join(re.sub(r"[*`$#]|\\[,;]", "", text).split())


def preformatted(text: str, kind: str = "text") -> str:
    """Text of a terminal: no colours, and of a line that was written over only its last state."""
    lines = [line.rstrip("\r").rsplit("\r", 1)[-1] for line in ANSI.sub("", text).split("\n")]
    shown = html.escape("\n".join(lines).strip("\n"))
    return f'<pre class="{kind}" tabindex="0">{shown}</pre>' if shown else ""


def _note(what: str) -> str:
    return f'<p class="note">{what}: {NEEDS_KERNEL}</p>'


def _text(value: str | list[str]) -> str:
    return value if isinstance(value, str) else "".join(value)
