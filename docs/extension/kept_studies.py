"""Sphinx directives that write the tables of kept studies (`kept_tables`, `cost_tables`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import ClassVar

import cost_tables
import kept_tables
from hypotheses import KEPT, LADDER, ROOT
from markdown_directive import MarkdownDirective
from sphinx.application import Sphinx


class KeptTable(MarkdownDirective):
    """A table of the kept studies that the arguments name."""

    optional_arguments = 4
    table: ClassVar[Callable[..., list[str]]]

    def lines(self) -> list[str]:
        return type(self).table(*self.arguments)

    def sources(self) -> Iterable[Path]:
        names = self.arguments or [folder.name for folder in LADDER]
        found = [path for name in names if (KEPT / name).is_dir() for path in records_of(name)]
        timed = type(self).table is cost_tables.equal_costs
        return [*found, cost_tables.BENCHMARKS] if timed else found


def records_of(name: str) -> list[Path]:
    """The files of a kept study, and its study file."""
    found = [*KEPT.glob(f"{name}/**/*"), *KEPT.glob(f"{name}[._-]*")]
    return [*(p for p in found if p.is_file()), ROOT / "notebooks" / "studies" / f"{name}.yaml"]


TABLES = {
    "kept-study": kept_tables.study,
    "kept-rates": kept_tables.rates,
    "kept-robustness": kept_tables.robust,
    "kept-gaps": kept_tables.gaps,
    "kept-trends": kept_tables.trends,
    "kept-costs": cost_tables.equal_costs,
    "kept-equal-bytes": cost_tables.equal_bytes,
    "kept-hypotheses": kept_tables.registered,
    "kept-extrapolation": kept_tables.extrapolation,
}


def add_directives(app: Sphinx) -> None:
    """Register one directive per table."""
    for name, table in TABLES.items():
        classes = ["kept"] if table is kept_tables.study else MarkdownDirective.classes
        made = {"table": staticmethod(table), "classes": classes, "__doc__": table.__doc__}
        app.add_directive(name, type(name, (KeptTable,), made))
