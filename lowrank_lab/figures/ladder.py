"""The gap to full rank over the size of the model."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from lowrank_lab.analysis.ladder import extrapolated, gap_table
from lowrank_lab.figures.comparison import against_zero
from lowrank_lab.figures.drawing import canvas, style_of
from lowrank_lab.figures.panels import panels

MILLION = 1e6
MARKERS = "osD^"  # of sizes, from the smallest on


def gap_over_size(gaps: pd.DataFrame, to: float = 60e6) -> Figure:
    """Gap to full rank against parameters, one panel per label: mean, 95 % interval, seeds.

    From three sizes on, with the mean of one straight line per seed up to `to` parameters, its
    value there, and its 95 % band. Labels at fewer sizes than others are left out.

    Args:
        gaps: `analysis.ladder.gaps_of`.
        to: parameters up to which the line is drawn.
    """
    sizes_of = gaps.groupby("label")["parameters"].transform("nunique")
    gaps = gaps[sizes_of == sizes_of.max()]
    table = gap_table(gaps)
    labels = list(dict.fromkeys(table["label"]))
    first, last = table["parameters"].min(), table["parameters"].max()
    line = extrapolated(gaps, np.geomspace(first, max(to, last), 60).tolist())
    figure, axes = panels(
        len(labels), lambda columns, rows: (2.3 * columns + 0.4, 2.1 * rows + 0.5), sharey=True
    )
    for ax, label in zip(axes, labels, strict=True):
        points, seeds, own = (part[part["label"] == label] for part in (table, gaps, line))
        _panel(ax, str(label), style_of(str(label), labels), points, seeds, own)
    sizes = sorted(table["parameters"].unique())
    _axis(axes[0], [*sizes, *([to] if len(line) and to > last else [])])
    what = (
        "mean line of the seeds with its 95 % band"
        if len(line)
        else "no seed at three sizes: no line"
    )
    figure.suptitle(f"mean, 95 % interval and seeds; {what}", color="0.4", fontsize=8, x=0.01,
                    ha="left")  # fmt: skip
    figure.supxlabel("million parameters at full rank (logarithmic)", fontsize=9.5)
    figure.supylabel("gap to full rank (nats per token)", fontsize=9.5)
    return figure


def gaps_by_row(gaps: pd.DataFrame) -> Figure:
    """Gap to full rank, a line per label and a marker per size: mean, 95 % interval, seeds.

    Labels are sorted by their gap at the smallest size that each has.

    Args:
        gaps: `analysis.ladder.gaps_of`.
    """
    table = gap_table(gaps).sort_values("parameters")
    labels = table.drop_duplicates("label").sort_values("gap")["label"].tolist()
    sizes = sorted(table["parameters"].unique())
    markers = dict(zip(sizes, itertools.cycle(MARKERS), strict=False))
    figure, ax = canvas(6.6, 0.9 + 0.21 * len(labels))
    apart = 0.72 / len(sizes)
    for (label, size), points in table.groupby(["label", "parameters"]):
        y = labels.index(label) + apart * (sizes.index(size) - (len(sizes) - 1) / 2)
        colour, *_ = style_of(str(label), labels)
        own = gaps[(gaps["label"] == label) & (gaps["parameters"] == size)]["gap"]
        ax.plot(own, [y] * len(own), ".", color="0.45", ms=3, alpha=0.7)
        ax.errorbar(points["gap"], [y], xerr=points["±"].fillna(0), fmt=markers[size], color=colour,
                    ms=4, capsize=2, lw=1)  # fmt: skip
    against_zero(ax, labels)
    ax.tick_params(axis="y", labelsize=8)
    marks = [
        Line2D([], [], ls="", color="0.3", ms=4, marker=marker, label=f"{size / MILLION:.2g} M")
        for size, marker in markers.items()
    ]
    ax.legend(handles=marks, title="parameters at full rank", fontsize=8, title_fontsize=8)
    ax.set_xlabel("gap to full rank (nats per token)")
    ax.set_title("mean, 95 % interval and seeds", loc="right", color="0.4", fontsize=8)
    return figure


def _panel(
    ax: Axes,
    label: str,
    style: tuple[str, str, str],
    points: pd.DataFrame,
    seeds: pd.DataFrame,
    line: pd.DataFrame,
) -> None:
    """The measured gaps of a label, and its line."""
    colour, _, marker = style
    ax.axhline(0, color="0.4", lw=1)
    ax.plot(seeds["parameters"], seeds["gap"], ".", color="0.45", ms=3, alpha=0.7)
    ax.errorbar(points["parameters"], points["gap"], yerr=points["±"].fillna(0), fmt=marker,
                color=colour, ms=5, capsize=2.5, lw=1.2)  # fmt: skip
    if len(line):
        ax.plot(line["parameters"], line["gap"], color=colour, lw=1.1)
        low, high = line["gap"] - line["±"], line["gap"] + line["±"]
        ax.fill_between(line["parameters"], low, high, color=colour, alpha=0.15, lw=0)
        end = line.iloc[-1]
        where = f"at {end['parameters'] / MILLION:.2g} M: "
        width = "" if math.isnan(end["±"]) else f" ± {end['±']:.2f}"
        words = f"{where}{round(end['gap'], 2) + 0.0:+.2f}{width}".replace("-", "−")
        ax.annotate(words, (0.03, 0.98), xycoords="axes fraction", fontsize=7.5, color=colour,
                    va="top")  # fmt: skip
    ax.set_title(label, loc="left", fontsize=8.5 * min(1, 30 / len(label)))


def _axis(ax: Axes, sizes: list[float]) -> None:
    """A logarithmic axis of sizes; of those that are too near to each other, one has a number."""
    ax.set_xscale("log")
    span = math.log(sizes[-1] / sizes[0])
    shown: list[float] = []
    for size in [sizes[-1], *sizes[:-1]]:
        if all(abs(math.log(size / other)) > 0.16 * span for other in shown):
            shown.append(size)
    names = [f"{size / MILLION:.2g}" if size in shown else "" for size in sizes]
    ax.set_xticks(sizes, names)
    ax.xaxis.set_minor_locator(NullLocator())
