"""Panels of equal size in rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lowrank_lab.figures.drawing import STYLE, Drawing

MOST_IN_A_ROW = 4


def panels(
    count: int,
    size: Callable[[int, int], tuple[float, float]],
    in_a_row: int = MOST_IN_A_ROW,
    **options: Any,
) -> tuple[Figure, list[Axes]]:
    """A figure and `count` axes in rows, which share the x axis; the lowest have its numbers.

    Args:
        size: columns and rows → width and height of the figure in inches.
        in_a_row: the most columns.
        options: of `Figure.subplots`, such as `sharey`.
    """
    rows = math.ceil(count / in_a_row)
    columns = math.ceil(count / rows)
    with mpl.rc_context(STYLE):
        figure = Drawing(figsize=size(columns, rows), layout="constrained")
        axes = figure.subplots(rows, columns, sharex=True, squeeze=False, **options).ravel()
    for ax in axes[count:]:
        ax.set_visible(False)
    for ax in axes[count - columns : count]:
        ax.tick_params(labelbottom=True)
    return figure, list(axes[:count])
