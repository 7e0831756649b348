"""Summaries of spectra over training: ranks and condition numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle
from typing import TYPE_CHECKING

import matplotlib as mpl
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from lowrank_lab.analysis.spectra import effective_rank, stable_rank
from lowrank_lab.config import InputError
from lowrank_lab.figures.drawing import (
    PALETTE,
    STYLE,
    Drawing,
    canvas,
    label_ends,
    style_of,
)

if TYPE_CHECKING:
    from lowrank_lab.runs.run import Run

FACTS = {
    "largest": "largest singular value σ₁",
    "effective_rank": "effective rank",
    "stable_rank": "stable rank",
    "update_rank": "effective rank of W − W₀",
    "captured_energy": "gradient energy in the projection",
    "overlap": "overlap with the next subspace",
    "condition": "condition number of the factors",
    "imbalance": "imbalance of the factors",
}


def effective_rank_table(spectra: pd.DataFrame) -> pd.DataFrame:
    """Effective rank of each layer at each recorded step: step, layer, kind, effective_rank."""
    rows = []
    for (step, layer), part in spectra.groupby(["step", "layer"], sort=False):
        values = torch.tensor(part.sort_values("index")["singular_value"].to_numpy())
        kind = str(layer).rsplit(".", 1)[-1]
        rows.append((step, layer, kind, float(effective_rank(values))))
    return pd.DataFrame(rows, columns=["step", "layer", "kind", "effective_rank"])


def effective_rank_curves(spectra: pd.DataFrame) -> Figure:
    """Effective rank over training, one line per kind of layer (mean over recorded layers)."""
    mean = (
        effective_rank_table(spectra).groupby(["kind", "step"], sort=False)["effective_rank"].mean()
    )
    figure, ax = canvas(6.4, 3.4)
    ends = []
    for colour, (kind, part) in zip(
        cycle(PALETTE), mean.groupby(level=0, sort=False), strict=False
    ):
        steps = part.index.get_level_values("step")
        ax.plot(steps, part.to_numpy(), "o-", ms=3, lw=1.4, color=colour)
        ends.append((float(part.iloc[-1]), str(kind), colour))
    ax.set_xlabel("step")
    ax.set_ylabel("effective rank")
    ax.set_ylim(bottom=0)
    label_ends(ax, ends, digits=1)
    return figure


def layer_facts(runs: Sequence[Run]) -> pd.DataFrame:
    """Summaries of the recorded spectra: label, step, layer and the columns in `FACTS`.

    Args:
        runs: one per label.
    """
    tables = []
    for run in runs:
        facts = run.layer_facts.set_index(["step", "layer"])
        facts["condition"] = facts[["condition_B", "condition_A"]].max(axis=1)
        for what, column, summary in (
            ("singular_values", "largest", torch.max),
            ("singular_values", "effective_rank", effective_rank),
            ("singular_values", "stable_rank", stable_rank),
            ("update", "update_rank", effective_rank),
        ):
            values = run.spectra_of(what).groupby(["step", "layer"], sort=False)["singular_value"]
            facts[column] = values.agg(partial(_summarised, summary))
        tables.append(facts.reset_index().assign(label=run.label))
    names = ["label", "step", "layer", *FACTS]
    return pd.concat(tables, ignore_index=True)[names] if tables else pd.DataFrame(columns=names)


def _summarised(summary: Callable[[torch.Tensor], torch.Tensor], values: pd.Series[float]) -> float:
    return float(summary(torch.tensor(values.to_numpy())))


def fact_curves(facts: pd.DataFrame, names: Sequence[str] | None = None) -> Figure:
    """Summaries over training, averaged over layers: one panel per summary, one line per label.

    Args:
        facts: `layer_facts`.
        names: keys of `FACTS`; by default all that were recorded.

    Raises:
        InputError: none of them was recorded.
    """
    shown = [n for n in names or FACTS if facts[n].notna().any()]
    if not shown:
        raise InputError("facts", list(names or FACTS), "none of these was recorded")
    labels = list(dict.fromkeys(facts["label"]))
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    with mpl.rc_context(STYLE):
        figure = Drawing(figsize=(2.75 * columns, 2.2 * rows + 0.5), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
    for ax, name in zip(axes.flat, shown, strict=False):
        means = facts.dropna(subset=name).groupby(["label", "step"], sort=False)[name].mean()
        for label, line in means.groupby("label", sort=False):
            colour, style, marker = style_of(str(label), labels)
            steps = line.index.get_level_values("step")
            ax.plot(steps, line.to_numpy(), color=colour, ls=style, marker=marker, ms=3, lw=1.3,
                    label=label)  # fmt: skip
        ax.set_title(FACTS[name], fontsize=8.5)
        ax.set_xlabel("step", fontsize=8.5)
        if name == "condition":
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            ax.yaxis.set_minor_locator(NullLocator())
        else:
            ax.set_ylim(bottom=0)
    for ax in axes.flat[len(shown) :]:
        ax.set_visible(False)
    if rows == 1:
        last = axes.flat[len(shown) - 1]
        label_ends(last, [
            (line.get_ydata()[-1], line.get_label(), line.get_color(), line.get_marker())
            for line in last.get_lines()
        ], digits=1, gap=0.09)  # fmt: skip
        return figure
    lines = {
        text: line
        for ax in axes.flat
        for line, text in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    figure.legend(lines.values(), lines.keys(), frameon=False, fontsize=8, ncols=3,
                  loc="outside upper center")  # fmt: skip
    return figure
