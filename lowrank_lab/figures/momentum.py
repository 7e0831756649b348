"""Figures of what events do to the momentum, and of what that does to the loss."""

from __future__ import annotations

import math
from collections.abc import Iterable

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from lowrank_lab.figures.comparison import claim_table
from lowrank_lab.figures.drawing import (
    STYLE,
    Drawing,
    canvas,
    empty_figure,
    rows_of,
    style_of,
)


def momentum_bars(momentum: pd.DataFrame) -> Figure:
    """Cosine between momentum before and after each kind of event, one row per label and event.

    Args:
        momentum: label and the columns of `Run.momentum`.
    """
    if momentum.empty:
        return empty_figure("no event changed the moments in these runs")
    means = momentum.groupby(["label", "event"], sort=False)["momentum_cosine"]
    table = means.agg(["mean", "min", "max"]).reset_index()
    labels = list(dict.fromkeys(table["label"]))
    figure, ax = canvas(6.4, 0.9 + 0.32 * len(table))
    for y, (label, low, mean, high) in enumerate(
        zip(table["label"], table["min"], table["mean"], table["max"], strict=True)
    ):
        colour = style_of(str(label), labels)[0]
        ax.plot([float(low), float(high)], [y, y], color=colour, lw=3, alpha=0.35)
        ax.plot([float(mean)], [y], "o", color=colour, ms=6)
    names = [f"{label}: {event}" for label, event in zip(table["label"], table["event"],
                                                        strict=True)]  # fmt: skip
    ax.set_yticks(range(len(table)), names)
    ax.set_ylim(len(table) - 0.5, -0.5)
    ax.set_xlim(-1.05, 1.05)
    ax.set_xlabel("cosine of momentum before and after (mean and range over layers and events)")
    return figure


def cosine_table(
    finals: pd.DataFrame, momentum: pd.DataFrame, pairs: Iterable[tuple[str, str]]
) -> pd.DataFrame:
    """`claim_table` with the mean cosines of A's and B's momentum across their events.

    Pairs (A, B) of one method alone, with events in A; the cosine of B is NaN where it has none.

    Args:
        finals: `runs.final_table`, one run per label and seed.
        momentum: label and the columns of `Run.momentum`.
    """
    if momentum.empty:
        return pd.DataFrame()
    cosines = momentum.groupby("label")["momentum_cosine"].mean()
    methods = finals.drop_duplicates("label").set_index("label")["method"]
    alike = [(a, b) for a, b in pairs if a in cosines.index and methods.get(a) == methods.get(b)]
    table = claim_table(finals, alike)
    for name, label in (("cosine", "A"), ("cosine of B", "B")):
        table[name] = table[label].map(cosines).astype(float)
    return table.sort_values("cosine", ignore_index=True)


def cosine_beside_gain(table: pd.DataFrame) -> Figure:
    """The cosine of A's momentum across its events, beside its difference in test loss to B.

    A hollow marker is the cosine of B's, where it has events.

    Args:
        table: `cosine_table`, one row each.
    """
    if table.empty:
        return empty_figure("no event changed the moments in these runs")
    labels = list(dict.fromkeys(table["A"]))
    names = [f"{a} − {b}" for a, b in zip(table["A"], table["B"], strict=True)]
    with mpl.rc_context(STYLE):
        width = 4.6 + 0.065 * max(map(len, names))
        figure = Drawing(figsize=(width, 1.0 + 0.24 * len(table)), layout="constrained")
        cosine, loss = figure.subplots(1, 2, sharey=True)
    for y, (row, of_b) in enumerate(zip(rows_of(table), table["cosine of B"], strict=True)):
        colour = style_of(row.A, labels)[0]
        if not math.isnan(of_b):
            cosine.plot(of_b, y, "o", color=colour, ms=6, mfc="white")
        half = None if math.isnan(row.half_width) else row.half_width
        cosine.plot([0, row.cosine], [y, y], color=colour, lw=2.5, alpha=0.4)
        cosine.plot(row.cosine, y, "o", color=colour, ms=6)
        loss.errorbar(row.difference, y, xerr=half, fmt="o", ms=6, color=colour, capsize=3)
    for ax in (cosine, loss):
        ax.axvline(0, color="0.4", lw=1)
        ax.grid(axis="y", visible=False)
    cosine.set_yticks(range(len(table)), names)
    cosine.set_ylim(len(table) - 0.5, -0.5)
    cosine.set_xlim(-0.3, 1.05)
    cosine.set_xlabel("cosine of the momentum before and\nafter an event: A filled, B hollow")
    loss.set_xlabel("difference in test loss\n(nats, 95 % over seeds)")
    return figure
