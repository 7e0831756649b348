"""A panel over a grid of runs: which two knobs span the map, and where the others stand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from lowrank_lab.analysis import grid
from lowrank_lab.figures import image
from lowrank_lab.figures.grid import heat_maps, label_of, setting_label, value_label
from lowrank_lab.widgets.panel import panel as controls
from lowrank_lab.widgets.slider import slider


def map_of(
    table: pd.DataFrame, row: str, column: str, fixed: Mapping[str, Any]
) -> tuple[Figure, str]:
    """One map with the other knobs fixed, and what it shows in words."""
    cells = grid.cells(table, row, column, fixed)
    top = grid.best(cells)
    at = {row: top[row], column: top[column]}
    half = f" ± {top['half_width']:.2f}" if top["n"] > 1 else ""
    empty = int((cells["n"] == 0).sum())
    said = f"{label_of(row)} × {label_of(column)}" + (f", {setting_label(fixed)}" if fixed else "")
    said += f": best = {top['mean']:.2f}{half} (n = {int(top['n'])}) at {setting_label(at)}"
    said += f"; {empty} of {len(cells)} cells have no run" if empty else ""
    return heat_maps([(fixed, cells)]), said + "."


def explore(folder: Path | str, row: str = "", column: str = "", live: bool = False) -> Any:
    """Maps of test perplexity over two knobs; live: dropdowns for the two, sliders for the others.

    Not live, a slider goes through the maps, which were drawn beforehand.

    Args:
        folder: of runs; in live use unfinished ones are left out.
        row, column: knobs; empty: the first that vary.

    Returns:
        The slider, at the fullest of the maps; live: None, and the panel is displayed.

    Raises:
        InputError: nothing to show, or a knob that doesn't vary.
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
    """The values of the other knobs at which the fewest cells are empty."""
    found = grid.maps(table, row, column)
    return min(found, key=lambda pair: int((pair[1]["n"] == 0).sum()))[0]


def panel(table: pd.DataFrame, row: str, column: str) -> Any:
    """The live panel of `explore`: a box whose callbacks write a text and a picture."""
    import ipywidgets as ipw

    known = grid.varying(table)
    start = _fullest(table, row, column)
    # a mapping, from which each widget makes a layout of its own: some are hidden, others not
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

    def draw(values: dict[str, Any]) -> tuple[str, str]:
        up, across = values["row"], values["column"]
        for name, fixing in sliders.items():  # a knob that spans the map has nothing to fix
            fixing.disabled = name in (up, across)
            fixing.layout.display = "none" if fixing.disabled else ""
        fixed = {name: values[name] for name in sliders if name not in (up, across)}
        figure, said = map_of(table, up, across, fixed)
        return image(figure), said

    return controls({**axes, **sliders}, draw)
