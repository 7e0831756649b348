"""Figures over model sizes."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lowrank_lab.analysis.ladder import extrapolated, gap_table
from lowrank_lab.figures.drawing import canvas, label_ends, style_of

POINTS = 60  # of a band


def gap_by_size(gaps: pd.DataFrame, to: float | None = None) -> Figure:
    """Gap against parameters: each label's mean with its 95 % interval and its seeds.

    Labels at one size alone are left out if others are at several.

    Args:
        gaps: `ladder.ladder`.
        to: parameters up to which lines and their 95 % prediction bands are drawn, for labels at
            three or more sizes. By default nothing is extrapolated.
    """
    sizes_of = gaps.groupby("label")["parameters"].transform("nunique")
    gaps = gaps[sizes_of >= min(2, sizes_of.max())]
    table = gap_table(gaps).sort_values(["label", "parameters"])
    labels = list(dict.fromkeys(table["label"]))
    figure, ax = canvas(7.0, 4.2)
    ends = {str(label): part["gap"].iloc[-1] for label, part in table.groupby("label", sort=False)}
    smallest = table["parameters"].min()
    bands = extrapolated(gaps, np.geomspace(smallest, to, POINTS).tolist()) if to else {}
    for label, band in bands.items():
        colour, *_ = style_of(label, labels)
        ax.plot(band.parameters, band.mean, ":", color=colour, lw=1)
        ax.fill_between(band.parameters, band.low, band.high, color=colour, alpha=0.08, lw=0)
        ends[label] = band.mean[-1]
    for label in labels:
        colour, style, marker = style_of(label, labels)
        line = table[table["label"] == label]
        ax.errorbar(
            line["parameters"], line["gap"], yerr=line["±"].fillna(0), fmt=marker + style,
            color=colour, ms=5, lw=1.4, capsize=2.5,
        )  # fmt: skip
        own = gaps[gaps["label"] == label]
        ax.plot(own["parameters"], own["gap"], ".", color=colour, ms=3, alpha=0.5)
    ax.axhline(0, color="0.4", lw=1)
    ax.set_xscale("log")
    ax.minorticks_off()
    ticks = [*table["parameters"].unique(), *([to] if to and bands else [])]
    ax.set_xticks(ticks, [_short(tick) for tick in ticks])
    ax.set_xlabel("parameters at full rank")
    ax.set_ylabel("gap in test loss (nats per token)")
    words = "mean and 95 % interval over seeds"
    if bands:
        words += "; dotted: a line through them, with its 95 % prediction band"
    ax.set_title(words, loc="left", color="0.4", fontsize=8)
    names = [(float(end), label, style_of(label, labels)[0]) for label, end in ends.items()]
    label_ends(ax, names)
    return figure


def _short(parameters: float) -> str:
    """267 k, 1.3 M, 60 M."""
    value, unit = (parameters / 1e6, "M") if parameters >= 1e6 else (parameters / 1e3, "k")
    return f"{value:.{0 if value >= 10 else 1}f} {unit}"
