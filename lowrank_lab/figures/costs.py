"""Losses over bytes and FLOPs, beside those of dense models."""

from __future__ import annotations

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from lowrank_lab.analysis.costs import COSTS
from lowrank_lab.analysis.ladder import REFERENCE
from lowrank_lab.analysis.tables import intervals
from lowrank_lab.figures.drawing import STYLE, Drawing, label_ends, style_of
from lowrank_lab.memory.formulas import MIB

AXES = {"bytes": "weights + optimizer states (MiB)", "flops": "training FLOPs (10¹²)"}
UNITS = {"bytes": MIB, "flops": 1e12}


def loss_over_costs(costs: pd.DataFrame, reference: str = REFERENCE) -> Figure:
    """Test loss against bytes and against FLOPs: a line through the sizes of each label.

    The reference's line is the control: a label below it beats the reference at the same cost.
    Labels at fewer sizes than others are left out.

    Args:
        costs: `analysis.costs.costs_of`.
    """
    sizes = costs.groupby("label")["parameters"].transform("nunique")
    shown = costs[sizes == sizes.max()]
    labels = list(dict.fromkeys(shown["label"]))
    with mpl.rc_context(STYLE):
        figure = Drawing(figsize=(9.2, 3.8), layout="constrained")
        axes = figure.subplots(1, len(COSTS), sharey=True)
    by = ["label", "parameters"]
    means = intervals(shown, by, "loss")
    for ax, cost in zip(axes, COSTS, strict=True):
        at = shown.groupby(by, sort=False)[cost].mean().div(UNITS[cost]).reset_index()
        for label, line in means.merge(at, on=by).groupby("label", sort=False):
            colour, style, marker = style_of(str(label), labels)
            control = label == reference
            ax.errorbar(
                line[cost], line["mean"], yerr=line["±"].fillna(0), fmt=marker + style,
                color=colour, ms=5, lw=2.2 if control else 1, capsize=2.5,
            )  # fmt: skip
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set_xlabel(f"{AXES[cost]} (logarithmic)")
    axes[0].set_ylabel("test loss (nats per token)")
    axes[0].set_title(
        f"thick: {reference}; mean of seeds, 95 % interval", loc="left", color="0.4", fontsize=8
    )
    last = means.drop_duplicates("label", keep="last")
    ends = [(row["mean"], row["label"], *style_of(str(row["label"]), labels)[::2])
            for _, row in last.iterrows()]  # fmt: skip
    label_ends(axes[-1], ends)
    return figure
