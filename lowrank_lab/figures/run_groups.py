"""Figures of chosen runs, or of means over their seeds: what the explorer shows.

Each figure has a table of the same numbers. The legend stands above the axes and margins are fixed:
finding a layout takes longer than drawing, and a picture has to answer a click.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

from lowrank_lab.analysis.stats import mean_intervals
from lowrank_lab.figures.drawing import STYLE, Drawing, rows_of, style_of
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
WIDTH = 7.6  # inches, where the page says nothing else
SMALLEST = 1e-7  # singular values at rounding level are the zeros of a rank-deficient layer


def metric_table(metrics: pd.DataFrame, metric: str, x: str) -> pd.DataFrame:
    """Mean of a metric over the runs of each title, at each step that has it.

    Args:
        metrics: title, step, the metric and x, in one row per run and step.

    Returns:
        title, step, x, mean, half_width (of a 95 % Student-t interval), n.
    """
    kept = metrics.dropna(subset=[metric])
    table = mean_intervals(kept, ["title", "step"], metric)
    if x != "step":
        table.insert(2, x, kept.groupby(["title", "step"], sort=False)[x].mean().to_numpy())
    return table


def metric_curves(table: pd.DataFrame, metric: str, x: str, width: float = WIDTH) -> Figure:
    """A metric over training, one line per title, with 95 % intervals over seeds.

    Args:
        table: `metric_table`; `…_bytes` are drawn in MiB.
        width: in inches.
    """
    titles = list(dict.fromkeys(table["title"]))
    styles = _styles(titles)
    figure, ax = _figure(len(titles), width)
    scale = MIB if metric.endswith("_bytes") else 1.0
    ends: list[tuple[float, str, Line2D]] = []
    for title, part in table.groupby("title", sort=False):
        colour, line, marker = styles[str(title)]
        mean, half = part["mean"] / scale, part["half_width"] / scale
        dots = marker if len(part) <= 12 else ""
        (drawn,) = ax.plot(part[x], mean, line, marker=dots, ms=3, lw=1.3, color=colour)
        ax.fill_between(part[x], mean - half, mean + half, color=colour, alpha=0.15, lw=0)
        last, error, n = mean.iloc[-1], half.iloc[-1], part["n"].iloc[-1]
        ends.append((float(last), f"{title}: {_interval(last, error, n)}", drawn))
    ax.set_xlabel(X_AXES[x])
    other = metric.replace("_", " ")
    ax.set_ylabel(
        f"{other.removesuffix(' bytes')} (MiB)" if scale > 1 else UNITS.get(metric, other)
    )
    if x == "tokens_seen":
        ax.xaxis.set_major_formatter(EngFormatter(sep=" "))
    _legend(figure, ends)
    return figure


def loss_memory(table: pd.DataFrame, width: float = WIDTH) -> Figure:
    """Validation loss against weights and optimizer states, one marker per title.

    Args:
        table: title, memory_mib, mean, half_width, n.
    """
    titles = table["title"].tolist()
    styles = _styles(titles)
    figure, ax = _figure(len(titles), width)
    marks: list[tuple[float, str, Line2D]] = []
    for row in rows_of(table):
        colour, _, marker = styles[row.title]
        error = row.half_width if row.n > 1 else None
        bar = ax.errorbar(row.memory_mib, row.mean, yerr=error, fmt=marker, ms=7, color=colour,
                          capsize=3)  # fmt: skip
        text = f"{row.title}: {_interval(row.mean, row.half_width, row.n)}"
        marks.append((row.mean, text, bar.lines[0]))
    ax.margins(0.1)
    ax.set_xlabel("weights + optimizer states (MiB)")
    ax.set_ylabel(UNITS["validation_loss"])
    _legend(figure, marks)
    return figure


def layer_spectra(table: pd.DataFrame, heading: str, width: float = WIDTH) -> Figure:
    """Singular values of one layer at one step, one line per title.

    Args:
        table: title, index (from 1), singular_value, n.
        heading: the layer and step.
    """
    titles = list(dict.fromkeys(table["title"]))
    styles = _styles(titles)
    figure, ax = _figure(len(titles) + 1, width)
    lines: list[tuple[float, str, Line2D]] = []
    for title, part in table[table["singular_value"] > SMALLEST].groupby("title", sort=False):
        colour, line, _ = styles[str(title)]
        (drawn,) = ax.plot(part["index"], part["singular_value"], line, lw=1.3, color=colour)
        n = int(part["n"].iloc[0])
        text = f"{title} (n = {n})" if n > 1 else str(title)
        lines.append((float(part["singular_value"].iloc[0]), text, drawn))
    ax.set_yscale("log")
    ax.set_xlabel("index")
    ax.set_ylabel("singular value")
    ax.set_title(heading, loc="left", fontsize=8.5, y=1.0)
    _legend(figure, lines)
    return figure


def _figure(entries: int, width: float) -> tuple[Figure, Axes]:
    """A figure with room above its axes for the entries of a legend, one below the other."""
    above = 0.12 + 0.165 * entries
    height = above + max(2.4, min(3.1, 0.55 * width))
    with mpl.rc_context(STYLE):
        figure = Drawing(figsize=(width, height))
        ax = figure.subplots()
    bottom, top = 0.48 / height, 1 - above / height
    figure.subplots_adjust(0.72 / width, bottom, 1 - 0.15 / width, top)
    # Places that matplotlib finds by measuring every tick label, twice.
    ax.xaxis.set_label_coords(0.5, -0.29 / (height * (top - bottom)))
    ax.yaxis.set_label_coords(-0.5 / (width - 0.87), 0.5)
    return figure, ax


def _legend(figure: Figure, entries: Sequence[tuple[float, str, Any]]) -> None:
    """A legend above the axes: value, text and handle of each entry, largest value first."""
    ordered = sorted(entries, key=lambda entry: -entry[0])
    texts, handles = [text for _, text, _ in ordered], [handle for *_, handle in ordered]
    width, height = figure.get_size_inches()
    fits = 8.0 * (width - 0.6) / (0.062 * max(map(len, texts), default=1) + 0.1)
    figure.legend(
        handles, texts, loc="upper left", bbox_to_anchor=(0.2 / width, 1 - 0.02 / height),
        frameon=False, fontsize=max(5.0, min(8.0, fits)), borderaxespad=0, borderpad=0,
        labelspacing=0.25,
    )  # fmt: skip


def _styles(titles: Sequence[str]) -> dict[str, tuple[str, str, str]]:
    """Colour, line style and marker of each title, no two alike."""
    styles = [style_of(title, titles) for title in titles]
    if len(set(styles)) < len(titles):  # more variants of a method than there are line styles
        colours = sns.color_palette("husl", len(titles)).as_hex()
        styles = [(c, line, m) for c, (_, line, m) in zip(colours, styles, strict=True)]
    return dict(zip(titles, styles, strict=True))


def _interval(mean: float, half_width: float, n: int) -> str:
    return f"{mean:.4g}" if n < 2 else f"{mean:.4g} ± {half_width:.2g} (n = {n})"
