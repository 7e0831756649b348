"""Figures of final losses: differences by seed, and over ranks."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lowrank_lab.analysis.stats import mean_interval
from lowrank_lab.analysis.tables import paired
from lowrank_lab.config import InputError
from lowrank_lab.figures.drawing import STYLE, Drawing, canvas, rows_of, style_of
from lowrank_lab.memory.formulas import MIB

RANK = re.compile(r", rank [^,]+")
WIDTH = re.compile(r", width ([0-9]+)")  # of dense models beside low ranks
BELOW, ABOVE, UNDECIDED = "#0072B2", "#D55E00", "#8C8C8C"  # verdicts on a difference


def claim_table(finals: pd.DataFrame, pairs: Iterable[tuple[str, str]]) -> pd.DataFrame:
    """Test loss of A minus test loss of B at the same seed, one row per pair (A, B).

    Columns: A, B, difference (mean), half_width (95 %, Student's t), n, and one column per seed. A
    pair without a common seed has no row; see `tables.paired`.

    Args:
        finals: `runs.final_table`, one run per label and seed.
    """
    pairs = list(pairs)
    by_seed = paired(finals, pairs)
    rows = []
    for pair, own in zip(pairs, by_seed.to_numpy(), strict=True):
        there = own[~np.isnan(own)].tolist()
        if there:
            rows.append((*pair, *mean_interval(there), *own))
    seeds = [f"seed {seed}" for seed in by_seed]
    return pd.DataFrame(rows, columns=["A", "B", "difference", "half_width", "n", *seeds])


def claims(finals: pd.DataFrame, pairs: Iterable[tuple[str, str]]) -> Figure:
    """Difference in test loss of each pair: one row with every seed, the mean and its interval."""
    table = claim_table(finals, pairs)
    figure, ax = canvas(8.2, 0.9 + 0.26 * len(table))
    for y, row in enumerate(rows_of(table)):
        separated = abs(row.difference) > row.half_width
        colour = (BELOW if row.difference < 0 else ABOVE) if separated else UNDECIDED
        width = "" if math.isnan(row.half_width) else f" ± {row.half_width:.3f}"
        _difference(ax, y, table.iloc[y], colour, f"{row.difference:+.3f}{width}  n {row.n}")
    ax.set_xlim(_reach(table))
    ax.locator_params(axis="x", nbins=6)
    against_zero(ax, [f"{a} − {b}" for a, b in zip(table["A"], table["B"], strict=True)])
    ax.set_xlabel("difference in test loss, same seed (nats per token)")
    ax.set_title(
        "mean and 95 % interval; blue: the first is better, orange: worse, grey: not separated",
        loc="right", color="0.4", fontsize=8,
    )  # fmt: skip
    return figure


def difference_table(finals: pd.DataFrame, reference: str) -> pd.DataFrame:
    """`claim_table` of each label (column `label`) against one reference; best first.

    Raises:
        InputError: the reference is not one of the labels.
    """
    labels = list(dict.fromkeys(finals["label"]))
    if reference not in labels:
        raise InputError("reference", reference, f"one of {', '.join(labels)}")
    table = claim_table(finals, [(label, reference) for label in labels])
    table = table.drop(columns="B").rename(columns={"A": "label"})
    return table.sort_values("difference", ignore_index=True)


def differences(finals: pd.DataFrame, reference: str) -> Figure:
    """Test loss minus the reference's: one row per label with every seed, mean and interval."""
    table = difference_table(finals, reference)
    labels = table["label"].tolist()
    figure, ax = canvas(6.6, 0.9 + 0.26 * len(table))
    for y, row in enumerate(rows_of(table)):
        colour, *_ = style_of(row.label, labels)
        words = f"{row.difference:+.3f}" if row.label != reference else "0"
        _difference(ax, y, table.iloc[y], colour, words)
    against_zero(ax, labels)
    ax.set_xlabel(f"test loss − that of {reference}, same seed (nats per token)")
    low, high = int(table["n"].min()), int(table["n"].max())
    count = f"{high}" if low == high else f"{low} to {high}"
    ax.set_title(f"{count} seeds, mean and 95 % interval", loc="right", color="0.4", fontsize=8)
    return figure


def _difference(ax: Axes, y: int, row: pd.Series[Any], colour: str, words: str) -> None:
    """One row: each seed's difference as a small dot above the mean and its interval."""
    own = [value for name, value in row.items() if str(name).startswith("seed ")]
    ax.plot(own, [y + 0.24] * len(own), "o", color=colour, ms=3, alpha=0.6, mew=0)
    width = None if math.isnan(row["half_width"]) else row["half_width"]
    ax.errorbar(row["difference"], y, xerr=width, fmt="o", ms=6, color=colour, capsize=3)
    ax.annotate(
        words.replace("-", "−"), (1.01, y), xycoords=("axes fraction", "data"), color=colour,
        va="center", fontsize=8.5,
    )  # fmt: skip


def against_zero(ax: Axes, names: Sequence[str]) -> None:
    """Name the rows from the top down, and draw a line at 0."""
    ax.axvline(0, color="0.4", lw=1)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)


def _reach(table: pd.DataFrame) -> tuple[float, float]:
    """Limits of the axis: they include 0, every seed, and the intervals of three or more seeds.

    The interval of two seeds is a dozen times as wide as their difference and would hide the
    others; it runs off the axis.
    """
    wide = table["half_width"].where(table["n"] > 2, 0)
    seeds = table[[name for name in table if str(name).startswith("seed ")]]
    low = min(0, (table["difference"] - wide).min(), seeds.min(axis=None))
    high = max(0, (table["difference"] + wide).max(), seeds.max(axis=None))
    return low - 0.05 * (high - low), high + 0.05 * (high - low)


def rank_table(finals: pd.DataFrame) -> pd.DataFrame:
    """Test loss over ranks: variant, rank, width, MiB, mean, half_width, n.

    A variant is a label without its rank, or without ", width N" where it has no rank: narrower
    dense models are a line, too.

    Args:
        finals: `runs.final_table`; its column `peak_bytes`, if present, becomes `peak_mib`.
    """
    ranks = [math.nan if rank is None else float(rank) for rank in finals["rank"]]
    widths = [
        float(found[1]) if math.isnan(rank) and (found := WIDTH.search(label)) else math.nan
        for label, rank in zip(finals["label"], ranks, strict=True)
    ]
    names = finals["label"].str.replace(RANK, "", regex=True)
    table = finals.assign(
        variant=names.where(np.isnan(widths), names.str.replace(WIDTH, "", regex=True)),
        rank=ranks,
        width=widths,
        weights_and_states_mib=(finals["weight_bytes"] + finals["optimizer_state_bytes"]) / MIB,
    )
    sizes = ["weights_and_states_mib"]
    if "peak_bytes" in finals:
        table["peak_mib"] = finals["peak_bytes"] / MIB
        sizes.append("peak_mib")
    rows = []
    by = ["variant", "rank", "width"]
    for place, group in table.groupby(by, sort=False, dropna=False):
        loss = mean_interval(group["test_loss"].tolist())
        rows.append((*place, *(group[size].mean() for size in sizes), *loss))
    return pd.DataFrame(rows, columns=[*by, *sizes, "mean", "half_width", "n"])


def over_ranks(finals: pd.DataFrame) -> Figure:
    """Test loss against memory, one line per variant through its ranks: the best at equal memory.

    Where more rank or width needs less memory, there is no line. Points of equal rank and memory
    share a number.

    Args:
        finals: as for `rank_table`; peaks get a panel of their own.
    """
    table = rank_table(finals)
    variants = list(dict.fromkeys(table["variant"]))
    titles = {
        "weights_and_states_mib": "weights + optimizer states (MiB)",
        "peak_mib": "peak memory of a step (MiB)",
    }
    panels = [name for name in titles if name in table]
    with mpl.rc_context(STYLE):
        figure = Drawing(figsize=(4.6 * len(panels) + 1.2, 3.8), layout="constrained")
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for ax, size in zip(axes, panels, strict=True):
        for variant, line in table.groupby("variant", sort=False):
            line = line.sort_values(["rank", "width"])
            colour, style, marker = style_of(str(variant), variants)
            ax.errorbar(
                line[size], line["mean"], yerr=line["half_width"].fillna(0), color=colour, ms=5,
                fmt=marker + (style if line[size].is_monotonic_increasing else ""), lw=1.2,
                capsize=2.5, label=variant,
            )  # fmt: skip
        number = table["rank"].fillna(table["width"])
        once = table.assign(number=number).dropna(subset="number").drop_duplicates(["number", size])
        for point in rows_of(once):
            ax.annotate(
                f"{point.number:g}", (getattr(point, size), point.mean), xytext=(4, 5),
                textcoords="offset points", color=style_of(str(point.variant), variants)[0],
                fontsize=7.5,
            )  # fmt: skip
        ax.set_xlabel(titles[size])
    axes[0].set_ylabel("test loss (nats per token)")
    low, high = int(table["n"].min()), int(table["n"].max())
    count = f"{high}" if low == high else f"{low} to {high}"
    dense = ", of dense models widths" if table["width"].notna().any() else ""
    axes[0].set_title(
        f"numbers are ranks{dense}; {count} seeds, mean and 95 % interval",
        loc="left", color="0.4", fontsize=8,
    )  # fmt: skip
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure
