"""Figures of the one-matrix problem: approximations, spectra, and the error over training.

A slider redraws them within 0.2 s. So they have fixed margins and few artists (an automatic layout
alone takes as long), and `onto` draws over an earlier figure: making axes and ticks takes most of
the time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from torch import Tensor

from lowrank_lab.analysis import matrix_toy
from lowrank_lab.analysis.matrix_toy import Fit
from lowrank_lab.analysis.spectra import singular_values
from lowrank_lab.figures.drawing import PALETTE, STYLE, Drawing, label_ends, style_of

LOWEST = 1e-4  # lower end of the error axes
KEPT, CUT, FLOOR = PALETTE[0], "0.75", "0.45"


def approximation(W: Tensor, rank: int, onto: Figure | None = None) -> Figure:
    """W, its best rank-r approximation, the difference, and the spectrum that was cut.

    Args:
        onto: an earlier figure of this kind, to draw over.
    """
    best = matrix_toy.best_approximation(W, rank)
    values = matrix_toy.spectrum_table(W)["singular_value"].to_numpy()
    limit = float(W.abs().max())
    titles = "the matrix", f"best of rank {rank}", "the difference"
    margins: Any = {"left": 0.01, "right": 0.99, "bottom": 0.2, "wspace": 0.15}
    with _drawing(9.2, 2.4, 4, onto=onto, **margins) as (figure, axes):
        for ax, X, title in zip(axes[:3], (W, best, W - best), titles, strict=True):
            ax.imshow(X.numpy(), vmin=-limit, vmax=limit, cmap="RdBu_r", interpolation="nearest")
            ax.set_title(title)
            ax.set_axis_off()
        ax = axes[3]  # stairs: two artists instead of a bar per value
        edges = [i + 0.5 for i in range(len(values) + 1)]
        ax.stairs(values[:rank], edges[: rank + 1], fill=True, color=KEPT)
        ax.stairs(values[rank:], edges[rank:], fill=True, color=CUT)
        ax.set(title="singular values", xlabel="index (blue: kept)")
    return figure


def spectrum_and_tail(table: pd.DataFrame) -> Figure:
    """Singular values, and the error of the best approximation at each rank.

    Args:
        table: `matrix_toy.spectrum_table`.
    """
    with _drawing(7.4, 2.8, 2, left=0.08, right=0.98, bottom=0.18, wspace=0.3) as (figure, axes):
        axes[0].plot(table["index"], table["singular_value"], "o-", ms=3, lw=1.2, color=KEPT)
        axes[0].set(xlabel="index", ylabel="singular value", ylim=(0, None))
        axes[1].plot(table["index"], table["tail"], "o-", ms=3, lw=1.2, color=FLOOR)
        axes[1].set(xlabel="rank kept", ylabel="share of energy lost", ylim=(0, 1))
    return figure


def errors_over_rank(grid: pd.DataFrame) -> Figure:
    """Error after training, and the lowest possible error, over ranks.

    Args:
        grid: `matrix_toy.grid_table` over `rank`.
    """
    with _drawing(5.6, 3.0, 1, left=0.12, right=0.97, bottom=0.17) as (figure, (ax,)):
        best = grid["best_of_rank"]
        ax.plot(grid["rank"], best, "-", color=FLOOR, lw=1.4, label="tail: best possible")
        ax.plot(grid["rank"], grid["error"], "o", color=KEPT, ms=6, label="B·A, trained")
        ax.set(xlabel="rank", ylabel="share of energy missing", ylim=(0, None))
        ax.legend(frameon=False, fontsize=8.5)
    return figure


def factor_spectra(table: pd.DataFrame) -> Figure:
    """Singular values of B, A and B·A before and after refactorization.

    Args:
        table: `matrix_toy.factors_table`.
    """
    styles: dict[str, Any] = {
        "before": {"ls": "--", "marker": "s", "color": "0.45", "ms": 5},
        "after": {"ls": "-", "marker": "o", "color": KEPT, "ms": 5},
    }
    margins: Any = {"left": 0.08, "right": 0.99, "bottom": 0.18, "wspace": 0.08}
    with _drawing(8.0, 2.7, 3, sharey=True, **margins) as (figure, axes):
        for ax, (name, part) in zip(axes, table.groupby("factor", sort=False), strict=True):
            for when, style in styles.items():
                rows = part[part["when"] == when]
                ax.plot(rows["index"], rows["singular_value"], label=when, **style)
            ax.set(title=str(name), xlabel="index", yscale="log")
            ax.set_xticks(sorted(part["index"].unique()))
        axes[0].set_ylabel("singular value")
        axes[0].legend(frameon=False, fontsize=8.5)
    return figure


def error_curves(
    table: pd.DataFrame, lines: Mapping[str, float] | None = None, events: Sequence[int] = ()
) -> Figure:
    """Error against step, one line per label, with the final error beside it.

    Args:
        table: `matrix_toy.curves_table`.
        lines: name → reference error, drawn as a dotted horizontal line.
        events: steps to mark.
    """
    with _drawing(7.8, 3.4, 1, left=0.1, right=0.66, bottom=0.16) as (figure, (ax,)):
        _error_curves(ax, table, lines or {}, events)
    return figure


def _error_curves(
    ax: Axes, table: pd.DataFrame, lines: Mapping[str, float], events: Sequence[int]
) -> None:
    labels = list(dict.fromkeys(table["label"]))
    ends: list[tuple[Any, ...]] = []
    styles = {label: style_of(label, labels) for label in labels}
    alike = len({colour for colour, *_ in styles.values()}) < len(labels)
    if ax.get_yscale() != "log":
        ax.set_yscale("log")
    for label in labels:
        error = table.loc[table["label"] == label, "error"].to_numpy()
        colour, line, _ = styles[label]
        ax.plot(error.clip(LOWEST), line, color=colour, lw=1.6)
        ends.append((float(error[-1]), label, colour, *([line] if alike else [])))
    for name, value in lines.items():
        ax.axhline(max(value, LOWEST), color=FLOOR, lw=1, ls=(0, (1, 2)))
        ends.append((value, name, FLOOR))
    if events:
        ax.vlines(events, 0, 1, transform=ax.get_xaxis_transform(), color="0.85", lw=0.8, zorder=0)
    low = max(LOWEST, 0.7 * min(value for value, *_ in ends))
    high = 1.3 * max(1.0, table["error"].max())
    ax.set(xlim=(0, table["step"].max()), ylim=(low, high))
    ax.set(xlabel="step", ylabel="share of energy missing")
    near = high < 60 * low
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if near else (1,)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_locator(NullLocator())  # minor ticks take as long to draw as the rest
    label_ends(ax, ends, digits=4, gap=0.08)


def fit_result(target: Tensor, done: Fit, reference: Fit, onto: Figure | None = None) -> Figure:
    """Error of one fit over training, and the spectrum of its final layer.

    Args:
        reference: full-rank training with the same noise and without events.
        onto: an earlier figure of this kind, to draw over.
    """
    asked = done.settings
    plain = asked.method == "full-rank"
    fits = {asked.method: done} if plain else {asked.method: done, "full-rank": reference}
    best = matrix_toy.tail(target, asked.rank)
    lines = {} if plain else {f"best of rank {asked.rank}": best}
    truth = matrix_toy.spectrum_table(target)
    trained = singular_values(done.layer).tolist()
    colour = style_of(asked.method, [asked.method])[0]
    margins: Any = {"left": 0.07, "right": 0.985, "bottom": 0.16, "wspace": 0.62}
    with _drawing(9.2, 3.0, 2, onto=onto, **margins) as (figure, (course, spectrum)):
        _error_curves(course, matrix_toy.curves_table(fits), lines, asked.events())
        spectrum.plot(truth["index"], truth["singular_value"], color=FLOOR, label="W*")
        spectrum.plot(
            range(1, len(trained) + 1), trained, "o", ms=3.5, color=colour, label="trained"
        )
        spectrum.set(xlabel="index", ylabel="singular value", ylim=(0, None))
        spectrum.legend(frameon=False, fontsize=8.5)
    return figure


@contextmanager
def _drawing(
    width: float,
    height: float,
    columns: int,
    *,
    sharey: bool = False,
    onto: Figure | None = None,
    **margins: float,
) -> Iterator[tuple[Figure, list[Axes]]]:
    """Panels side by side with fixed margins (size in inches), to draw inside this block."""
    with mpl.rc_context(STYLE):
        if onto is not None:
            for ax in onto.axes:
                for artist in (*ax.lines, *ax.collections, *ax.patches, *ax.images, *ax.texts):
                    artist.remove()
                ax.relim()
                ax.autoscale(True)
            yield onto, onto.axes
            return
        figure = Drawing(figsize=(width, height))
        axes = figure.subplots(1, columns, squeeze=False, sharey=sharey)[0]
        figure.subplots_adjust(**{"top": 0.9} | margins)
        yield figure, list(axes)
