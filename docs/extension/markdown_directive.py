"""A Sphinx directive whose content is Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).resolve().parent.parent.parent


class MarkdownDirective(SphinxDirective):
    """A directive whose content is Markdown that `lines` makes."""

    has_content = False
    classes: ClassVar[list[str]] = ["generated"]

    def lines(self) -> list[str]:
        raise NotImplementedError

    def sources(self) -> Iterable[Path]:
        """Files from which the lines are made: the page is read again when they change."""
        return [
            ROOT / "lowrank_lab" / "config.py",
            *(ROOT / "lowrank_lab" / "methods").glob("*.py"),
        ]

    def run(self) -> list[nodes.Node]:
        for path in self.sources():
            self.env.note_dependency(str(path))
        holder = nodes.container(classes=self.classes)
        source = self.get_source_info()[0]
        self.state.nested_parse(StringList(self.lines(), source), self.content_offset, holder)
        return [holder]
