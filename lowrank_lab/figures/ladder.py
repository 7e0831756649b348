"""The gap to full rank over the size of the model."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lowrank_lab.analysis.ladder import extrapolated, gap_table
from lowrank_lab.figures.drawing import canvas, label_ends, style_of


def gap_over_size(gaps: pd.DataFrame, to: float = 60e6) -> Figure:
    """Gap to full rank against parameters: mean, 95 % interval and seeds of each label.

    From three sizes on, with the line through them up to `to` parameters and its 95 % prediction
    band. Labels at one size alone are left out if others are at several.

    Args:
        gaps: `analysis.ladder.gaps_of`.
        to: parameters up to which the line is drawn.
    """
    sizes_of = gaps.groupby("label")["parameters"].transform("nunique")
    gaps = gaps[sizes_of >= min(2, sizes_of.max())]
    table = gap_table(gaps)
    labels = list(dict.fromkeys(table["label"]))
    first, last = table["parameters"].min(), table["parameters"].max()
    line = extrapolated(gaps, np.geomspace(first, max(to, last), 60).tolist())
    figure, ax = canvas(7.2, 3.8)
    ax.set_xscale("log")
    ax.axhline(0, color="0.4", lw=1)
    ends = []
    for index, (label, points) in enumerate(table.groupby("label", sort=True)):
        colour, style, marker = style_of(str(label), labels)
        aside = 1 + 0.012 * (index - len(labels) / 2)  # intervals don't hide each other
        seeds = gaps[gaps["label"] == label]
        ax.plot(seeds["parameters"] * aside, seeds["gap"], ".", color=colour, ms=3.5, alpha=0.6)
        width = points["±"].fillna(0)
        ax.errorbar(points["parameters"] * aside, points["gap"], yerr=width, fmt=marker,
                    color=colour, ms=5.5, capsize=2.5, lw=1.2)  # fmt: skip
        own = line[line["label"] == label]
        ax.plot(own["parameters"], own["gap"], ls=style, color=colour, lw=1.1)
        ax.fill_between(own["parameters"].astype(float), own["low"].astype(float),
                        own["high"].astype(float), color=colour, alpha=0.1, lw=0)  # fmt: skip
        end = own["gap"].iloc[-1] if len(own) else points["gap"].iloc[-1]
        ends.append((end, str(label), colour))
    sizes = sorted(table["parameters"].unique())
    ticks = [*sizes, *([to] if len(line) and to > last else [])]
    ax.set_xticks(ticks, [f"{size / 1e6:.3g} M" for size in ticks])
    ax.minorticks_off()
    ax.set_xlabel("parameters at full rank (logarithmic)")
    ax.set_ylabel("gap to full rank (nats per token)")
    what = "line with its 95 % prediction band" if len(line) else "fewer than three sizes: no line"
    ax.set_title(f"mean, 95 % interval and seeds; {what}", loc="left", color="0.4", fontsize=8)
    label_ends(ax, ends)
    return figure
