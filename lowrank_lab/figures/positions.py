"""Figures of the loss by position in the window."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from lowrank_lab.figures.drawing import empty_figure
from lowrank_lab.figures.panels import MOST_IN_A_ROW, panels

MOST_PANELS = 20
MANY_PANELS = 8  # more are smaller, so that the figure is readable on half a page


def position_curves(positions: pd.DataFrame) -> Figure:
    """Validation loss by position, one panel per label, one line per evaluation (light to dark).

    Where late positions gain on early ones, the model has begun to use what came before.

    Args:
        positions: label, step, position, loss (`runs.positions_of`); means over seeds are drawn,
            of the first MOST_PANELS labels.
    """
    if positions.empty:
        return empty_figure("no run recorded its loss by position")
    labels = list(dict.fromkeys(positions["label"]))[:MOST_PANELS]
    means = positions.groupby(["label", "step", "position"], sort=True)["loss"].mean()
    many = len(labels) > MANY_PANELS
    width, height = (1.5, 1.45) if many else (2.2, 2.0)
    figure, axes = panels(
        len(labels),
        lambda columns, rows: (width * columns + 1.0, height * rows + 0.5),
        in_a_row=6 if many else MOST_IN_A_ROW,
        sharey=True,
    )
    last = int(positions["step"].max())
    shades = sns.color_palette("crest", as_cmap=True)
    for ax, label in zip(axes, labels, strict=True):
        for step, line in means[label].groupby(level="step"):
            values = line.droplevel("step")
            ax.plot(values.index, values, color=shades(float(step) / last), lw=1.3)
        ax.set_title(label, loc="left", fontsize=8.5 * min(1, 13 * width / len(str(label))))
    ticks = np.sort(positions["position"].unique())[::2]
    axes[0].set_xscale("log", base=2)
    axes[0].set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    mappable = mpl.cm.ScalarMappable(mpl.colors.Normalize(0, last), shades)
    figure.colorbar(mappable, ax=axes, label="step", pad=0.01)
    figure.supxlabel("position in the window (first of 1, 2–3, 4–7, …)", fontsize=9.5)
    figure.supylabel("validation loss (nats per token)", fontsize=9.5)
    return figure
