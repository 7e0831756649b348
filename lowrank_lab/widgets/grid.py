"""Widgets over a grid of runs: choose the two knobs of the map, and fix the others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from lowrank_lab.analysis import grid
from lowrank_lab.figures.grid import heat_maps, label_of, setting_label, value_label
from lowrank_lab.widgets.panel import panel as controls
from lowrank_lab.widgets.slider import slider


def map_of(
    table: pd.DataFrame, row: str, column: str, fixed: Mapping[str, Any]
) -> tuple[Figure, str]:
    """One map with the other knobs fixed, and a line that names its best cell."""
    cells = grid.cells(table, row, column, fixed)
    top = grid.best(cells)
    at = {row: top[row], column: top[column]}
    half = f" ± {top['half_width']:.2f}" if top["n"] > 1 else ""
    empty = int((cells["n"] == 0).sum())
    line = f"{label_of(row)} × {label_of(column)}" + (f", {setting_label(fixed)}" if fixed else "")
    line += f": best = {top['mean']:.2f}{half} (n = {int(top['n'])}) at {setting_label(at)}"
    line += f"; {empty} of {len(cells)} cells have no run" if empty else ""
    return heat_maps([(fixed, cells)]), line + "."


def explore(folder: Path | str, row: str = "", column: str = "", live: bool = False) -> Any:
    """Maps of test perplexity over two knobs: a slider over all maps, or a live panel.

    Args:
        folder: runs; a live panel ignores unfinished and broken ones.
        row, column: knobs; empty: the first two that vary.
        live: display dropdowns for the two knobs and sliders for the others.

    Returns:
        The slider, which starts at the map with the fewest empty cells; None if live.

    Raises:
        InputError: no runs, or a knob that does not vary.
    """
    table = grid.settings(folder, strict=not live)
    row, column = grid.axes_of(table, row, column)
    if not live:
        maps = {setting_label(fixed): map_of(table, row, column, fixed)
                for fixed, _ in grid.maps(table, row, column)}  # fmt: skip
        return slider(
            {name: figure for name, (figure, _) in maps.items()}, "map",
            start=setting_label(_fullest(table, row, column)), say=lambda name: maps[name][1],
        )  # fmt: skip
    from IPython.display import display

    display(panel(table, row, column))  # type: ignore[no-untyped-call]
    return None


def _fullest(table: pd.DataFrame, row: str, column: str) -> dict[str, Any]:
    """Values of the other knobs for the map with the fewest empty cells."""
    found = grid.maps(table, row, column)
    return min(found, key=lambda pair: int((pair[1]["n"] == 0).sum()))[0]


def panel(table: pd.DataFrame, row: str, column: str) -> Any:
    """The live panel of `explore`."""
    import ipywidgets as ipw

    known = grid.varying(table)
    start = _fullest(table, row, column)
    # A mapping, not a Layout: each widget makes its own, as some are hidden and others are not.
    wide: dict[str, Any] = {"style": {"description_width": "15em"}, "layout": {"width": "30em"}}
    options = [(label_of(name), name) for name in known]
    axes = {
        "row": ipw.Dropdown(options=options, value=row, description="up", **wide),
        "column": ipw.Dropdown(options=options, value=column, description="across", **wide),
    }
    sliders = {
        name: ipw.SelectionSlider(
            options=[(value_label(name, v), v) for v in values], description=label_of(name),
            value=start.get(name, values[0]), continuous_update=False, **wide,
        )
        for name, values in known.items()
    }  # fmt: skip

    def draw(values: dict[str, Any]) -> tuple[Figure, str]:
        up, across = values["row"], values["column"]
        for name, fixing in sliders.items():  # knobs on the axes are not fixed
            fixing.disabled = name in (up, across)
            fixing.layout.display = "none" if fixing.disabled else ""
        fixed = {name: values[name] for name in sliders if name not in (up, across)}
        return map_of(table, up, across, fixed)

    return controls({**axes, **sliders}, draw)
