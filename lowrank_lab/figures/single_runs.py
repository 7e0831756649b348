"""Figures of single runs, a line each: any recorded metric, and the spectrum of one layer."""

from __future__ import annotations

import math

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

from lowrank_lab.figures.drawing import STYLE, Drawing, label_ends, style_of
from lowrank_lab.memory.formulas import MIB

X_AXES = {
    "tokens_seen": "training tokens", "step": "step", "seconds": "training time (s)",
}  # fmt: skip
UNITS = {
    "validation_loss": "validation loss (nats per token)",
    "loss": "training loss (nats per token)",
    "lr_now": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens per second",
}


def metric_curves(table: pd.DataFrame, metric: str, x: str, titles: dict[str, str]) -> Figure:
    """A recorded metric over training, one line per run.

    Args:
        table: `load_runs`.
        metric: a column of the table; `…_bytes` are drawn in MiB.
        x: a key of X_AXES.
        titles: run → its name in the figure.
    """
    figure, ax = _figure()
    byte, ends = metric.endswith("_bytes"), []
    for name, title in titles.items():
        part = table[table["run"] == name] if len(titles) > 1 else table
        part = part.dropna(subset=[metric])
        colour, line, marker = style_of(title, list(titles.values()))
        values = part[metric] / MIB if byte else part[metric]
        dots = marker if len(part) <= 12 else ""
        ax.plot(part[x], values, line, marker=dots, ms=3, lw=1.2, color=colour)
        if len(values):
            ends.append((float(values.iloc[-1]), title, colour))
    ax.set_xlabel(X_AXES[x])
    other = metric.replace("_", " ")
    ax.set_ylabel(f"{other.removesuffix(' bytes')} (MiB)" if byte else UNITS.get(metric, other))
    if x == "tokens_seen":
        ax.xaxis.set_major_formatter(EngFormatter(sep=" "))
    largest = max((abs(value) for value, *_ in ends), default=1.0)
    label_ends(ax, ends, digits=max(0, 3 - math.floor(math.log10(largest or 1.0))))
    return figure


def layer_spectrum(table: pd.DataFrame, layer: str, step: int, titles: dict[str, str]) -> Figure:
    """Singular values of one layer, one line per run, from the last record up to `step`.

    Args:
        table: step, layer, index, singular_value, run.
        titles: run → its name in the figure.
    """
    figure, ax = _figure()
    lines: list[tuple[float, Line2D]] = []
    part = table[(table["layer"] == layer) & (table["step"] <= step)]
    for name, title in titles.items():
        values = part[part["run"] == name]
        values = values[values["step"] == values["step"].max()].sort_values("index")
        values = values[values["singular_value"] > 1e-7]  # below: rounding errors
        if len(values):
            colour, line, _ = style_of(title, list(titles.values()))
            (drawn,) = ax.plot(
                values["index"] + 1, values["singular_value"], line, lw=1.2, color=colour,
                label=title,
            )  # fmt: skip
            lines.append((float(values["singular_value"].iloc[0]), drawn))
    ax.set_yscale("log")
    ax.set_xlabel("index")
    ax.set_ylabel("singular value")
    ax.set_title(f"{layer}, step {step}", loc="left", fontsize=9)
    lines.sort(key=lambda pair: -pair[0])  # the legend follows the largest singular values
    if lines:
        figure.legend(
            handles=[line for _, line in lines], loc="outside right upper", frameon=False,
            fontsize=7.5,
        )  # fmt: skip
    return figure


def _figure() -> tuple[Figure, Axes]:
    with mpl.rc_context(STYLE):
        figure = Drawing(figsize=(7.6, 3.1), layout="constrained")
        return figure, figure.subplots()
