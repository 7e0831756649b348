"""Figures of a grid of runs: heat maps over two knobs, and perplexity against memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lowrank_lab.analysis import grid
from lowrank_lab.config import InputError
from lowrank_lab.figures.drawing import PALETTE, STYLE, Drawing
from lowrank_lab.figures.page import AS_IS

WORDS = {
    "reset_every": "reset period (steps)", "refactor_every": "refactorization period (steps)",
    "on_refactor": "moments at a refactorization", "lr": "learning rate",
    "test_perplexity": "test perplexity", "test_loss": "test loss (nats per token)",
}  # fmt: skip
MAP = "cividis"  # monotonic in brightness: readable by the colour-blind and in grey print
MAX_MAPS = 12  # in one figure


def label_of(name: str) -> str:
    """The label of a knob or a result, with its unit."""
    return WORDS.get(name, name.replace("_", " "))


def value_label(name: str, value: Any) -> str:
    """The label of a knob's value."""
    if name.endswith("_every") and value == 0:
        return "never"
    if value in (None, ""):
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def setting_label(fixed: Mapping[str, Any]) -> str:
    """One line for a setting: `knob = value, …`."""
    return ", ".join(
        f"{label_of(name).removesuffix(' (steps)')} = {value_label(name, value)}"
        for name, value in fixed.items()
    )


def heat_maps(
    maps: Sequence[tuple[Mapping[str, Any], pd.DataFrame]], value: str = "test_perplexity"
) -> Figure:
    """One heat map per panel: mean, half width of the 95 % interval and n in each cell.

    All maps share a colour scale. The lowest mean is framed; cells without runs are hatched.

    Args:
        maps: `grid.maps`: values of the other knobs, and `grid.cells`.

    Raises:
        InputError: no maps or too many for one figure, or no cell with a run.
    """
    if not 0 < len(maps) <= MAX_MAPS:
        raise InputError("maps", len(maps), f"one to {MAX_MAPS} maps fit a figure: fix more knobs")
    means = np.concatenate([table["mean"].astype(float) for _, table in maps])
    lowest = float(grid.best(pd.concat([table for _, table in maps], ignore_index=True))["mean"])
    scale = Normalize(np.nanmin(means), max(np.nanmax(means), np.nanmin(means) + 1e-9))
    row, column = maps[0][1].columns[:2]
    columns = _columns(maps)
    lines = -(-len(maps) // columns)
    tall, wide = maps[0][1][row].nunique(dropna=False), maps[0][1][column].nunique(dropna=False)
    with mpl.rc_context(STYLE):
        size = (1.0 + columns * max(2.2, 0.95 * wide), 0.8 + lines * (0.45 + 0.62 * tall))
        figure = Drawing(figsize=size, layout="constrained")
        axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for ax, (fixed, table) in zip(axes.flat, maps, strict=False):
        _heat(ax, table, scale, lowest, _digits(value))
        if fixed:
            ax.set_title(setting_label(fixed).replace(", ", "\n"), fontsize=8.5)
    for ax in axes.flat[len(maps) :]:
        ax.set_visible(False)
    for ax in axes.flat[len(maps) - columns : len(maps)]:  # lowest panel of each column
        ax.tick_params(labelbottom=True)
    figure.supxlabel(label_of(str(column)), fontsize=9.5)
    figure.supylabel(label_of(str(row)), fontsize=9.5)
    colours = mpl.cm.ScalarMappable(scale, MAP)
    figure.colorbar(colours, ax=axes, label=f"{label_of(value)}, lower is better", pad=0.01)
    return figure


def _columns(maps: Sequence[tuple[Mapping[str, Any], pd.DataFrame]]) -> int:
    """Panels per row: the number of values of the last fixed knob, at most four."""
    names = list(maps[0][0])
    across = len({fixed[names[-1]] for fixed, _ in maps}) if names else 1
    return min(4, across)


def _digits(value: str) -> int:
    """Decimal places to print: two for a perplexity, three for a loss."""
    return 2 if value.endswith("perplexity") else 3


def _heat(ax: Axes, table: pd.DataFrame, scale: Normalize, lowest: float, digits: int) -> None:
    """One panel: the first column of `grid.cells` on the y axis, the second on the x axis."""
    row, column = (str(name) for name in table.columns[:2])
    ups, rights = (list(dict.fromkeys(table[name])) for name in (row, column))
    for number, cell in enumerate(table.itertuples(index=False)):
        y, x = divmod(number, len(rights))
        mean, half, n = float(cell.mean), float(cell.half_width), int(cell.n)  # type: ignore[arg-type]
        if n == 0:
            ax.add_patch(Rectangle((x, y), 1, 1, fc="white", ec="0.6", hatch="///", lw=0))
            continue
        colour = mpl.colormaps[MAP](scale(mean))
        ax.add_patch(Rectangle((x, y), 1, 1, fc=colour, ec="white", lw=1, gid=AS_IS))
        ink = "black" if np.dot(colour[:3], (0.299, 0.587, 0.114)) > 0.5 else "white"
        words: dict[str, Any] = {"ha": "center", "va": "center", "color": ink, "gid": AS_IS}
        ax.text(x + 0.5, y + 0.6, f"{mean:.{digits}f}", fontsize=9.5, **words)
        spread = f"± {half:.{digits}f}, n = {n}" if n > 1 else "n = 1"
        ax.text(x + 0.5, y + 0.27, spread, fontsize=6.8, **words)
        if mean == lowest:
            ax.add_patch(Rectangle((x + 0.03, y + 0.03), 0.94, 0.94, fill=False, ec="#D55E00",
                                   lw=2.4, zorder=3, gid=AS_IS))  # fmt: skip
            ax.text(x + 0.5, y + 0.86, "best", fontsize=7.5, weight="bold", **words)
    ax.set(xlim=(0, len(rights)), ylim=(0, len(ups)))
    ax.set_xticks(np.arange(len(rights)) + 0.5, [value_label(column, v) for v in rights])
    ax.set_yticks(np.arange(len(ups)) + 0.5, [value_label(row, v) for v in ups])
    ax.tick_params(length=0)
    ax.grid(visible=False)
    for spine in ax.spines.values():
        spine.set_visible(False)


def grid_tradeoff(costs: pd.DataFrame, by: str = "", value: str = "test_perplexity") -> Figure:
    """Perplexity against weights + optimizer states: a point per setting, coloured by `by`.

    The legend names the best setting of each colour; settings of equal size are drawn side by side.

    Args:
        costs: `grid.costs`.
        by: a knob that varies; empty: the rank, or the first knob if the rank does not vary.

    Raises:
        InputError: a knob that does not vary.
    """
    by = by or ("rank" if "rank" in costs else str(costs.columns[0]))
    if by not in costs:
        raise InputError("by", by, f"what varies is {', '.join(map(str, costs.columns[:-4]))}")
    with mpl.rc_context(STYLE):
        figure = Drawing(figsize=(7.8, 3.9), layout="constrained")
        ax = figure.subplots()
    sizes = sorted(set(costs["weights_and_states_mib"]))
    gap = min((b - a for a, b in pairwise(sizes)), default=0.1 * sizes[0])
    groups = list(costs.groupby(by, sort=True, dropna=False))
    for index, (key, part) in enumerate(groups):
        colour = PALETTE[index % len(PALETTE)]
        part = part.sort_values("mean")
        aside = np.linspace(-0.3, 0.3, len(part)) * gap if len(part) > 1 else np.zeros(1)
        x = part["weights_and_states_mib"].astype(float).to_numpy() + aside
        error = part["half_width"].astype(float).fillna(0.0)
        top = part.iloc[0]
        others = {n: top[n] for n in costs.columns[:-4] if n != by and top[n] != grid.ANY}
        where = setting_label(others).replace(", ", "\n")
        named = f"{setting_label({by: key})}, best {top['mean']:.2f} at\n{where}"
        ax.errorbar(x, part["mean"], yerr=error, fmt="o", ms=4, lw=0.8, color=colour,
                    label=named)  # fmt: skip
    ax.set_xlim(sizes[0] - 0.6 * gap, sizes[-1] + 0.6 * gap)
    # The points set the limits: an interval from two seeds may be as tall as the figure.
    spread = float(costs["mean"].max() - costs["mean"].min()) or 1.0
    ax.set_ylim(costs["mean"].min() - 0.3 * spread, costs["mean"].max() + 0.2 * spread)
    ax.set_xlabel("weights + optimizer states (MiB)")
    ax.set_ylabel(f"{label_of(value)} (lower is better)")
    n = costs["n"].astype(int)
    seeds = f"{n.min()}" if n.min() == n.max() else f"{n.min()}–{n.max()}"
    ax.set_title(f"one point per setting, mean of {seeds} seeds, 95 % interval (clipped)",
                 loc="left", color="0.4", fontsize=8)  # fmt: skip
    figure.legend(loc="outside right upper", frameon=False, fontsize=7.5, labelspacing=1.2)
    return figure


def effect_table(effects: pd.DataFrame, value: str = "test_perplexity") -> pd.DataFrame:
    """`grid.effects` as text: one row per change of one knob, with its interval."""
    digits, rows = _digits(value), []
    for row in effects.to_dict("records"):
        change = f"{value_label(row['knob'], row['from'])} → {value_label(row['knob'], row['to'])}"
        half = f"{row['half_width']:.{digits}f}" if row["n"] > 1 else "–"
        mean = f"{row['mean']:+.{digits}f}"
        rows.append((label_of(row["knob"]), change, mean, half, row["n"], row["pairs"]))
    return pd.DataFrame(rows, columns=["knob", "change", label_of(value), "±", "seeds", "pairs"])
