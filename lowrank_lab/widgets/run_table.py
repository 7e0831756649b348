"""A table of runs: rows are chosen and sorted by mouse or keyboard, without leaving the page.

Rows are HTML, on anywidget: ipydatagrid draws on a canvas, which screen readers can't read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from lowrank_lab.analysis.run_groups import COLUMNS, NUMBERS, Group

HERE = Path(__file__).parent
OPTIONAL = ("model", "other", "half_width")  # columns that are shown if they tell rows apart


class RunTable(anywidget.AnyWidget):
    """The table; `selected`, `sort` and `width` change with what a reader does.

    It also hands files to the browser, which downloads them (`download`).
    """

    _esm = HERE / "run_table.js"
    _css = HERE / "run_table.css"

    name = traitlets.Unicode("runs").tag(sync=True)  # for screen readers
    columns: Any = traitlets.List().tag(sync=True)  # key, name, and whether it has numbers
    rows: Any = traitlets.List().tag(sync=True)  # id, cells, title, and whether a run is in trouble
    selected = traitlets.List(traitlets.Unicode()).tag(sync=True)  # ids
    sort: Any = traitlets.List(["label", False]).tag(sync=True)  # column, and whether it descends
    width = traitlets.Int(0).tag(sync=True)  # of the table in the page, in pixels

    def show(self, groups: Sequence[Group]) -> None:
        """Show these groups in this order; rows that stay keep their choice and the focus."""
        columns = columns_of(groups)
        rows = [
            {"id": id_of(g), "cells": [g.cells[name] for name in columns],
             "title": ", ".join(g.names[:3]) + (", …" if len(g.names) > 3 else ""),
             "trouble": g.in_trouble} for g in groups
        ]  # fmt: skip
        headings = [{"key": n, "name": COLUMNS[n], "number": n in NUMBERS} for n in columns]
        with self.hold_sync():
            self.columns, self.rows = headings, rows

    def choose(self, rows: Sequence[dict[str, Any]]) -> None:
        """Choose these rows, and no others."""
        self.selected = [row["id"] for row in rows]

    def download(self, name: str, content: bytes, kind: str) -> None:
        """Hand a file to the browser.

        Args:
            kind: its MIME type.
        """
        self.send({"name": name, "type": kind}, [content])


def id_of(group: Group) -> str:
    """The row of a group: the name of its first run."""
    return group.names[0]


def columns_of(groups: Iterable[Group]) -> list[str]:
    """The columns of COLUMNS that a table of these groups has."""
    groups = list(groups)

    def tells(name: str) -> bool:
        values = {group.cells[name] for group in groups if group.state != "broken"}
        return len(values) > 1 or (name == "half_width" and values > {""})

    found: list[Any] = [name for name in COLUMNS if name not in OPTIONAL or tells(name)]
    return found
