"""The widgets of the run explorer and their places in the page; what they do is run_explorer's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lowrank_lab.analysis.run_groups import COLUMNS, FIELDS
from lowrank_lab.figures.run_groups import X_AXES
from lowrank_lab.widgets.run_plots import PLOTS, Choice
from lowrank_lab.widgets.run_view import FILE_TYPES
from lowrank_lab.widgets.theme import Theme

if TYPE_CHECKING:
    from lowrank_lab.widgets.run_table import RunTable

ALL = "all"  # of a field that filters nothing
# Each column of the page, and each control in it, is as wide as fits, and wraps below that.
COLUMN = {"flex": "1 1 30em", "min_width": "0", "max_width": "100%", "padding": "0 4px"}
FLEXIBLE: dict[str, Any] = {
    "style": {"description_width": "4em"},
    "layout": {"flex": "1 1 13em", "width": "auto", "max_width": "26em"},
}


class Controls:
    """The widgets, in `box`: choice of runs on the left or above, plot on the right or below."""

    def __init__(self, choice: Choice) -> None:
        import ipywidgets as ipw

        above = self._make_filters(ipw, choice)
        below = self._make_plot(ipw, choice)
        columns = [ipw.VBox(part, layout=COLUMN) for part in (above, below)]
        self.box = ipw.HBox(columns, layout={"flex_flow": "row wrap", "max_width": "100%"})

    def _make_filters(self, ipw: Any, choice: Choice) -> list[Any]:
        """Folder, filters and the table of runs."""
        from lowrank_lab.widgets.run_table import RunTable

        self.folder = _dropdown(ipw, "folder")
        self.path = ipw.Text(description="or path", continuous_update=False,
                             placeholder="type a folder, press Enter", **FLEXIBLE)  # fmt: skip
        self.search = ipw.Text(description="search", placeholder="galore rank=8 loss<2.5",
                               **FLEXIBLE)  # fmt: skip
        kinds = [("mean over seeds", True), ("single runs", False)]
        self.rows = _dropdown(ipw, "rows", kinds, value=choice.over_seeds)
        self.fields = {name: _dropdown(ipw, COLUMNS[name], [ALL]) for name in FIELDS}
        self.table: RunTable = RunTable()
        self.all = ipw.Button(description="choose all rows")
        self.none = ipw.Button(description="choose none")
        self.count, self.trouble = ipw.HTML(), ipw.HTML()
        self.trouble.add_class("runs-line")
        return [
            _row(ipw, self.folder, self.path), _row(ipw, self.search, self.rows),
            _row(ipw, *self.fields.values()), self.table,
            _row(ipw, self.all, self.none, self.count), self.trouble,
        ]  # fmt: skip

    def _make_plot(self, ipw: Any, choice: Choice) -> list[Any]:
        """The kind of plot and its settings, the picture, and its files."""
        self.plot = ipw.ToggleButtons(
            options=[(words, name) for name, words in PLOTS.items()], value=choice.plot,
            style={"button_width": "auto"},
        )  # fmt: skip
        self.metric, self.layer = _dropdown(ipw, "metric"), _dropdown(ipw, "layer")
        axes = [(words, name) for name, words in X_AXES.items()]
        x = choice.x if choice.x in X_AXES else "tokens_seen"
        self.x = _dropdown(ipw, "x axis", axes, value=x)
        self.step = ipw.SelectionSlider(
            options=["–"], description="step", continuous_update=False, **FLEXIBLE
        )
        self.text, self.picture = ipw.HTML(), ipw.HTML(layout={"max_width": "100%"})
        self.theme = Theme()
        self.text.add_class("runs-line")
        self.files = {
            kind: ipw.Button(description=kind.upper(), tooltip=f"download as {kind.upper()}",
                             layout={"width": "5em"})
            for kind in FILE_TYPES
        }  # fmt: skip
        self.follow = ipw.ToggleButton(
            description="follow", tooltip="read the folder again every two seconds",
            layout={"width": "6em"},
        )  # fmt: skip
        return [
            self.plot, _row(ipw, self.metric, self.x, self.layer, self.step), self.text,
            self.picture, _row(ipw, *self.files.values(), self.follow), self.theme,
        ]  # fmt: skip


def _dropdown(ipw: Any, name: str, options: Sequence[Any] = (), **more: Any) -> Any:
    return ipw.Dropdown(description=name, options=options, **FLEXIBLE, **more)


def _row(ipw: Any, *widgets: Any) -> Any:
    return ipw.HBox(list(widgets), layout={"flex_flow": "row wrap", "align_items": "center"})
