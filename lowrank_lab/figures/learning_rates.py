"""Loss against learning rate: a panel per variant, a line per setting."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter

from lowrank_lab.analysis.rates import rate_table
from lowrank_lab.figures.drawing import PALETTE
from lowrank_lab.figures.panels import MOST_IN_A_ROW, panels

MANY_SETTINGS = 3  # at one rate: they would fill a panel's legend
MANY_PANELS = 12  # more are smaller, so that the figure is readable on half a page
SHOWN = 0.6  # nats above the best: lines end there, below the names of their settings
NAME_AND_VALUE = re.compile(r"(.+) ([\d.e+-]+)")  # of a setting, as `momentum 0.9`


def rates(finals: pd.DataFrame) -> Figure:
    """Validation loss against learning rate: one panel per variant, one line per setting.

    Lines are cut SHOWN nats above the best of their panel. Many settings with one rate only are
    grey dots beside the lines.
    """
    table = rate_table(finals)
    variants = list(dict.fromkeys(table["variant"]))
    many = len(variants) > MANY_PANELS
    width, height = (1.5, 1.45) if many else (2.3, 1.75)
    figure, axes = panels(
        len(variants),
        lambda columns, rows: (width * columns, 2.5 if rows == 1 else height * rows),
        in_a_row=6 if many else MOST_IN_A_ROW,
    )
    for ax, variant in zip(axes, variants, strict=True):
        _panel(ax, str(variant), table[table["variant"] == variant], width)
    _ticks(axes[0], sorted(table["lr"].unique()))
    figure.supxlabel("peak learning rate", fontsize=9.5)
    figure.supylabel("validation loss (nats per token)", fontsize=9.5)
    return figure


def _ticks(ax: Axes, tried: Sequence[float]) -> None:
    """A small tick for each rate; up to four have their numbers, of more those of decades do."""
    ax.set_xlim(tried[0] / 1.3, tried[-1] * 1.3)
    few = len(tried) <= 4
    ax.xaxis.set_major_locator(FixedLocator(tried) if few else LogLocator(10, (1.0,)))
    ax.xaxis.set_minor_locator(FixedLocator([] if few else tried))
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.xaxis.set_minor_formatter(NullFormatter())


def _panel(ax: Axes, variant: str, part: pd.DataFrame, width: float) -> None:
    """The panel of a variant, so many inches wide; above its lines is room for their names."""
    lines = {
        str(label).partition(", ")[2]: line.sort_values("lr")
        for label, line in part.groupby("label", sort=False)
    }
    at_one_rate = [name for name, line in lines.items() if len(line) == 1]
    if MANY_SETTINGS <= len(at_one_rate) < len(lines):
        dots = pd.concat([lines.pop(name) for name in at_one_rate])
        ax.plot(dots["lr"], dots["mean"], "o", color="0.6", ms=3.5, label="others, at one rate")
    title, names = _names(list(lines))
    best = part.iloc[int(part["mean"].argmin())]
    top = best["mean"] + SHOWN
    for colour, setting in zip(PALETTE, sorted(lines, key=names.__getitem__), strict=False):
        line = lines[setting]
        shown = f"{names[setting]:g}" if title else setting
        (drawn,) = ax.plot(
            line["lr"], line["mean"], "o-", color=colour, ms=3.5, lw=1.2, label=shown
        )
        drawn.set_clip_path(Rectangle((0, 0), 1e3, top, transform=ax.transData))
    ax.plot(best["lr"], best["mean"], "o", ms=9, mfc="none", color="0.2")
    ax.set_xscale("log", base=2)
    ax.set_title(textwrap.fill(variant, int(12 * width)), loc="left", fontsize=8.5)
    named = part["label"].nunique() > 1
    columns = 2 if title else 1
    rows = math.ceil(len(ax.get_legend_handles_labels()[1]) / columns) + bool(title)
    ax.set_ylim(best["mean"] - 0.05, top + named * 0.3 / width * rows)
    ax.locator_params(axis="y", nbins=4)
    if named:
        ax.legend(title=title, ncols=columns, fontsize=7, title_fontsize=7, frameon=False,
                  loc="upper left", alignment="left", columnspacing=1.0, handlelength=1.4,
                  labelspacing=0.25, borderpad=0.1)  # fmt: skip


def _names(settings: Sequence[str]) -> tuple[str, dict[str, float]]:
    """The name that settings share and their values; else no name, and their places."""
    found = [NAME_AND_VALUE.fullmatch(setting) for setting in settings]
    names = {match[1] for match in found if match}
    if all(found) and len(names) == 1 < len(settings):
        values = [float(match[2]) for match in found if match]
        return names.pop(), dict(zip(settings, values, strict=True))
    return "", {setting: float(i) for i, setting in enumerate(settings)}
