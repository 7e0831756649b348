"""Heat maps of a layer's singular values over training, of runs or of means over their seeds."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from lowrank_lab.figures.drawing import STYLE, Drawing
from lowrank_lab.figures.run_groups import SMALLEST, WIDTH

if TYPE_CHECKING:
    from lowrank_lab.runs.series import Spectra

DARKEST = 300.0  # a few values near 0 would take most of the colours from the others
NARROW = 5.0  # inches; narrower figures have two panels beside each other, wider ones three


def spectrum_table(layers: Sequence[tuple[str, Spectra]]) -> pd.DataFrame:
    """Mean singular values over the runs of each title, at the steps that all of them recorded.

    Args:
        layers: title and `series.Spectra` of each run.

    Returns:
        title, step, index (from 1), singular_value, n.
    """
    tables = []
    for title in dict.fromkeys(title for title, _ in layers):
        runs = [spectra for other, spectra in layers if other == title]
        steps = [step for step in runs[0].steps if all(step in run.steps for run in runs)]
        values = np.mean([run.values[np.isin(run.steps, steps)] for run in runs], axis=0)
        count = values.shape[1] if len(steps) else 0
        tables.append(pd.DataFrame({
            "title": title, "step": np.repeat(steps, count),
            "index": np.tile(np.arange(1, count + 1), len(steps)),
            "singular_value": values.ravel(), "n": len(runs),
        }))  # fmt: skip
    columns = ["title", "step", "index", "singular_value", "n"]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=columns)


def spectra_over_training(table: pd.DataFrame, layer: str, width: float = WIDTH) -> Figure:
    """Heat maps of a layer's singular values over steps, one panel per title, one colour scale.

    Values below the largest / DARKEST have the darkest colour.

    Args:
        table: `spectrum_table`.
        width: in inches.
    """
    titles = list(dict.fromkeys(table["title"]))
    columns = min(len(titles), 3 if width > NARROW else 2)
    rows = -(-len(titles) // columns)
    height = 1.05 + 1.9 * rows
    with mpl.rc_context(STYLE):
        figure = Drawing(figsize=(width, height))
        axes = figure.subplots(rows, columns, squeeze=False)
    figure.subplots_adjust(0.6 / width, 0.5 / height, 1 - 0.95 / width, 1 - 0.55 / height,
                           wspace=0.08, hspace=0.25)  # fmt: skip
    table = table.assign(value=table["singular_value"].clip(lower=SMALLEST))
    above = table.loc[table["value"] > SMALLEST, "value"]
    low, high = (float(above.min()), float(above.max())) if len(above) else (SMALLEST, 1.0)
    low = max(low, high / DARKEST)
    for place, (ax, title) in enumerate(zip(axes.flat, titles, strict=False)):
        shown = _panel(ax, table, title, LogNorm(low, max(high, 1.001 * low)))
        ax.set_title(_wrapped(title, (width - 1.5) / columns), loc="left", fontsize=8, pad=3, y=1.0)
        if place % columns:  # shared axes would take longer to draw
            ax.yaxis.set_major_locator(NullLocator())
        if place + columns < len(titles):
            ax.xaxis.set_major_locator(NullLocator())
    for ax in axes.flat[len(titles) :]:
        ax.remove()
    where = figure.add_axes((1 - 0.8 / width, 0.5 / height, 0.12 / width, 1.8 / height))
    ticks = [low, (low * high) ** 0.5, high]
    bar = figure.colorbar(shown, cax=where, label="singular value", ticks=ticks, format="%.2g")
    bar.ax.minorticks_off()
    figure.supxlabel("step", fontsize=9, y=0.08 / height)
    figure.supylabel("index", fontsize=9, x=0.06 / width)
    figure.suptitle(layer, fontsize=8.5, x=0.6 / width, ha="left", y=1 - 0.05 / height)
    return figure


def _panel(ax: Axes, table: pd.DataFrame, title: str, norm: LogNorm) -> Any:
    """Draw the singular values of one title; those at rounding level are left white."""
    part = table[table["title"] == title]
    grid = part.pivot(index="index", columns="step", values="value")
    shown = ax.pcolormesh(grid.columns, grid.index, grid.where(grid > SMALLEST), norm=norm,
                          cmap="viridis", shading="auto", rasterized=True)  # fmt: skip
    ax.grid(visible=False)
    first, last = table["step"].min(), table["step"].max()
    ax.set_xlim(first, max(first + 1, last))
    ax.set_ylim(0.5, table["index"].max() + 0.5)
    ax.xaxis.set_major_locator(MaxNLocator(3, integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    return shown


def _wrapped(text: str, width: float) -> str:
    """A title in lines that fit into a panel of that width (inches)."""
    return "\n".join(textwrap.wrap(text, max(10, int(width / 0.068))))
