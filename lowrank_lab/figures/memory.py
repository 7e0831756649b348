"""Figures of memory: by category, within one step, and over a run."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lowrank_lab.figures.drawing import canvas, label_ends, style_of, unit_of
from lowrank_lab.memory.breakdown import PERSISTENT
from lowrank_lab.memory.formulas import GB, MIB

CATEGORIES = {
    "weights": "#4D4D4D", "gradients": "#999999", "optimizer_states": "#0072B2",
    "projections": "#56B4E9", "activations": "#E69F00",
}  # fmt: skip
STEP_CATEGORIES = CATEGORIES | {
    "logits": "#CC79A7", "temporaries": "#009E73", "workspaces": "#F0E442",
}  # fmt: skip


def memory_table(memory: pd.DataFrame) -> pd.DataFrame:
    """Bytes by category → one row per label and category, in MiB; projections separately."""
    table = memory.copy()
    table["optimizer_states"] = table["optimizer_states"] - table["projections"]
    mean = table.groupby("label", sort=False)[list(CATEGORIES)].mean() / MIB
    return mean.reset_index().melt("label", var_name="category", value_name="mib")


def memory_bars(memory: pd.DataFrame, activations: bool = False, width: float = 6.4) -> Figure:
    """Weights, gradients, optimizer states (and activations), one stacked bar per label.

    Args:
        width: in inches.
    """
    table = memory_table(memory)
    labels = list(dict.fromkeys(table["label"]))
    figure, ax = canvas(width, 0.7 + 0.42 * len(labels) + (0.0 if width > 5 else 0.35))
    left = np.zeros(len(labels))
    for category, colour in CATEGORIES.items():
        if category == "activations" and not activations:
            continue
        widths = table[table["category"] == category].set_index("label")["mib"].loc[labels]
        widths = widths.fillna(0.0)  # not measured
        if widths.sum() > 0:
            name = category.replace("_", " ").replace("projections", "stored projections")
            ax.barh(labels, widths, left=left, color=colour, label=name, height=0.65)
        left += widths.to_numpy()
    for y, total in enumerate(left):
        ax.text(total, y, f" {total:.2f}", va="center", fontsize=8.5)
    ax.invert_yaxis()
    ax.margins(x=0.12)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("MiB (measured)")
    columns = 5 if width > 5 else 2
    figure.legend(ncols=columns, frameon=False, loc="outside upper center", fontsize=8.5)
    return figure


def memory_timeline(table: pd.DataFrame, title: str = "") -> Figure:
    """Bytes during one step, stacked by category, with its phases and its peak.

    Args:
        table: `memory.trace.Trace.table`.
    """
    table = table.copy()
    table["optimizer_states"] = table["optimizer_states"] - table["projections"]
    names = [name for name in STEP_CATEGORIES if table[name].any()]
    total = table[names].sum(axis=1)
    size, unit = unit_of(total.max())
    figure, ax = canvas(7.4, 3.4)
    ax.stackplot(
        table["event"], *(table[name] / size for name in names),
        colors=[STEP_CATEGORIES[name] for name in names], step="post", lw=0,
        labels=[name.replace("_", " ").replace("projections", "stored projections")
                for name in names],
    )  # fmt: skip
    starts = table.groupby((table["phase"] != table["phase"].shift()).cumsum()).first()
    width = table["event"].max()
    ends = [*starts["event"].iloc[1:], width]
    labelled, low = -width, False
    for event, phase, end in zip(starts["event"], starts["phase"], ends, strict=True):
        if phase in ("start", "between") or end - event < 0.01 * width:
            continue
        low = event - labelled < 0.11 * width and not low  # too close to the last one: a line lower
        labelled = event
        ax.axvline(event, color="0.35", lw=0.6, ls=":")
        ax.annotate(phase, (event, 1), xycoords=("data", "axes fraction"), va="top", fontsize=7.5,
                    xytext=(3, -14 if low else -3), textcoords="offset points")  # fmt: skip
    peak_event = table["event"].iloc[int(total.to_numpy().argmax())]
    ax.plot(peak_event, total.max() / size, "v", color="black", ms=4)
    ax.annotate(f"peak {total.max() / size:.2f} {unit}", (peak_event, total.max() / size),
                xytext=(0, 4), textcoords="offset points", ha="center", fontsize=8)  # fmt: skip
    ax.set_xlim(0, table["event"].max())
    ax.set_ylim(0, 1.25 * total.max() / size)
    ax.set_xlabel("allocations and releases, in order")
    ax.set_ylabel(unit)
    if title:
        ax.set_title(title)
    handles, texts = ax.get_legend_handles_labels()
    figure.legend(handles[::-1], texts[::-1], frameon=False, fontsize=8, loc="outside right upper")
    return figure


def memory_course_table(runs: pd.DataFrame) -> pd.DataFrame:
    """Peak and persistent memory (weights + states) per step in bytes, first run of each label."""
    first: pd.DataFrame = runs[runs["run"].isin(runs.drop_duplicates("label")["run"])]
    persistent = first["weight_bytes"] + first["optimizer_state_bytes"]
    table = first[["label", "step", "peak_memory_bytes"]].assign(persistent=persistent)
    return table.rename(columns={"peak_memory_bytes": "peak"})


def memory_course(runs: pd.DataFrame) -> Figure:
    """Peak memory of each step, above the persistent memory (dotted).

    Args:
        runs: `load_runs`; the first run of each label is drawn.
    """
    table = memory_course_table(runs).dropna(subset="peak")
    labels = list(dict.fromkeys(table["label"]))
    size, unit = unit_of(table["peak"].max() if len(table) else 0)
    figure, ax = canvas(6.4, 3.4)
    ends = []
    for label, run in table.groupby("label", sort=False):
        colour, line, _ = style_of(str(label), labels)
        ax.plot(run["step"], run["peak"] / size, color=colour, ls=line, lw=1.2,
                drawstyle="steps-mid")  # fmt: skip
        ax.plot(run["step"], run["persistent"] / size, color=colour, ls=":", lw=1)
        ends.append((run["peak"].iloc[-1] / size, str(label), colour))
    ax.set_ylim(0)
    ax.set_xlabel("step")
    ax.set_ylabel(f"peak memory ({unit})")
    ax.set_title(
        "dotted: weights and optimizer states, which persist between steps", fontsize=8, loc="left"
    )
    label_ends(ax, ends)
    return figure


def compared_memory(accounts: pd.DataFrame) -> Figure:
    """Memory at the peak of a step, one bar per method, stacked by category.

    Args:
        accounts: label, and bytes by category at the peak.
    """
    table = accounts.set_index("label")
    table["optimizer_states"] = table["optimizer_states"] - table["projections"]
    size, unit = unit_of(table[list(STEP_CATEGORIES)].sum(axis=1).max())
    figure, ax = canvas(6.8, 0.9 + 0.27 * len(table))
    left = np.zeros(len(table))
    for name, colour in STEP_CATEGORIES.items():
        text = name.replace("_", " ").replace("projections", "stored projections")
        ax.barh(table.index, table[name] / size, left=left, color=colour, label=text, height=0.7)
        left += table[name].to_numpy() / size
    for y, total in enumerate(left):
        ax.text(total, y, f" {total:.2f}", va="center", fontsize=8)
    ax.invert_yaxis()
    ax.margins(x=0.1)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel(f"peak memory of a step ({unit})")
    figure.legend(ncols=4, frameon=False, loc="outside upper center", fontsize=8)
    return figure


def memory_over_sizes(sizes: pd.DataFrame, cards: Mapping[str, float] | None = None) -> Figure:
    """GB of weights, gradients and states against parameters, one line per method.

    Args:
        sizes: `planning.sizes.over_sizes`.
        cards: bytes by name, drawn as horizontal lines.
    """
    table = sizes.assign(gb=sizes[PERSISTENT].sum(axis=1) / GB)
    methods = list(dict.fromkeys(table["method"]))
    figure, ax = canvas(7.2, 3.8)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ends = []
    for method, line in table.groupby("method", sort=False):
        colour, style, marker = style_of(str(method), methods)
        ax.plot(line["parameters"], line["gb"], marker + style, color=colour, ms=4.5, lw=1.3)
        ends.append((line["gb"].iloc[-1], str(method), colour))
    for name, size in (cards or {}).items():
        ax.axhline(size / GB, color="0.45", lw=0.9, ls=":")
        ax.annotate(name, (0.01, size / GB), xycoords=("axes fraction", "data"), va="bottom",
                    color="0.35", fontsize=8)  # fmt: skip
    named = table.drop_duplicates("model")
    ax.set_xticks(named["parameters"], named["model"])
    ax.minorticks_off()
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set_xlabel("size (parameters at full rank, logarithmic)")
    ax.set_ylabel("weights + gradients + states (GB)")
    label_ends(ax, ends, digits=1)
    return figure
