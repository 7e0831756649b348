"""Figures of predictions: means with intervals over a setting, and one value against another."""

from __future__ import annotations

import math
from collections.abc import Mapping

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from lowrank_lab.figures.drawing import PALETTE, STYLE, Drawing, canvas, label_ends

LINE = "0.45"


def interval_lines(
    table: pd.DataFrame,
    x: str,
    ylabel: str,
    lines: Mapping[str, float] | None = None,
    *,
    logy: bool = False,
) -> Figure:
    """Means over a setting on a logarithmic axis, one line per label, with 95 % intervals as bars.

    Args:
        table: `tables.intervals` by `label` and `x`.
        x: the column of the setting, above 0.
        ylabel: what the means are.
        lines: name → predicted value, drawn as a dotted horizontal line.
        logy: a logarithmic y axis.
    """
    figure, ax = canvas(6.8, 3.2)
    if logy:
        ax.set_yscale("log")
    ends = []
    for i, (label, part) in enumerate(table.groupby("label", sort=False)):
        part = part.sort_values(x)
        colour, marker = PALETTE[i % len(PALETTE)], "os^Dv"[i % 5]
        ax.errorbar(
            part[x], part["mean"], part["±"], fmt=marker + "-", color=colour,
            ms=5, lw=1.5, capsize=3, elinewidth=1,
        )  # fmt: skip
        ends.append((float(part["mean"].iloc[-1]), str(label), colour))
    for name, value in (lines or {}).items():
        ax.axhline(value, color=LINE, lw=1, ls=(0, (1, 2)))
        ends.append((value, name, LINE))
    ax.set(xscale="log", xlabel=x, ylabel=ylabel)
    ax.set_xticks(sorted(table[x].unique()))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    smallest = min(abs(value) for value, *_ in ends) if logy else 1.0
    label_ends(ax, ends, digits=2 + max(0, -math.floor(math.log10(smallest)) - 1), gap=0.08)
    ax.set_title(f"mean and 95 % interval, n = {table['n'].min()}", loc="right", fontsize=8)
    return figure


def against(table: pd.DataFrame, x: str, y: str, by: str) -> Figure:
    """One value against another on logarithmic axes, one panel per group; equal on the line.

    Args:
        table: columns x and y, both above 0, and `by`.
    """
    groups = list(table.groupby(by, sort=False))
    both = table[[x, y]]
    wide = both.max().max() > 200 * both.min().min()
    limits = 0.7 * float(both.min().min()), 1.4 * float(both.max().max())
    with mpl.rc_context(STYLE):
        size = 3.1 if len(groups) < 3 else 2.4
        figure = Drawing(figsize=(size * len(groups) + 0.4, size + 0.2), layout="constrained")
        axes = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
        for i, (ax, (name, part)) in enumerate(zip(axes, groups, strict=True)):
            ax.plot(limits, limits, color=LINE, lw=1, ls=(0, (1, 2)))
            ax.plot(part[x], part[y], "o", ms=4, alpha=0.6, color=PALETTE[i % len(PALETTE)])
            ax.set(xscale="log", yscale="log", xlim=limits, ylim=limits, aspect="equal")
            ax.set(title=str(name), xlabel=x)
            for axis in (ax.xaxis, ax.yaxis):
                axis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
                axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                axis.set_minor_formatter(NullFormatter())
        axes[0].set_ylabel(y)
    return figure
