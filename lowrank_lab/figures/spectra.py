"""Figures of spectra: singular values, and what they come to over training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from lowrank_lab.analysis.spectra import effective_rank, middle_layers, stable_rank
from lowrank_lab.config import InputError
from lowrank_lab.figures.drawing import (
    PALETTE,
    STYLE,
    Drawing,
    canvas,
    empty_figure,
    label_ends,
    style_of,
)

if TYPE_CHECKING:
    from lowrank_lab.runs.run import Run


def effective_rank_table(spectra: pd.DataFrame) -> pd.DataFrame:
    """Effective rank of each layer at each recorded step: step, layer, kind, effective_rank."""
    rows = []
    for (step, layer), part in spectra.groupby(["step", "layer"], sort=False):
        values = torch.tensor(part.sort_values("index")["singular_value"].to_numpy())
        kind = str(layer).rsplit(".", 1)[-1]
        rows.append((step, layer, kind, float(effective_rank(values))))
    return pd.DataFrame(rows, columns=["step", "layer", "kind", "effective_rank"])


def effective_rank_curves(spectra: pd.DataFrame) -> Figure:
    """Effective rank over training, a line a kind of layer (mean over the recorded layers)."""
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


def spectrum_curves(spectra: pd.DataFrame, layers: Sequence[str] | None = None) -> Figure:
    """Singular values by index, a panel a layer, a line a recorded step from light to dark.

    Args:
        spectra: step, layer, index, singular_value (`Run.spectra`).
        layers: which; by default one of each projection, from the middle of the model.
    """
    names = list(layers) if layers is not None else middle_layers(spectra["layer"])
    missing = set(names) - set(spectra["layer"])
    if missing or not names:
        raise InputError(
            "layers", sorted(missing), f"recorded: {', '.join(spectra['layer'].unique())}"
        )
    figure, axes = _panels(names)
    steps = np.sort(spectra["step"].unique())
    palette = sns.color_palette("crest", len(steps))
    for ax, name in zip(axes.flat, names, strict=False):
        part = spectra[spectra["layer"] == name]
        for colour, step in zip(palette, steps, strict=True):
            _spectrum(ax, part[part["step"] == step], color=colour)
    _label_panels(figure, axes)
    norm = mpl.colors.Normalize(steps.min(), max(steps.max(), 1))
    shades = mpl.cm.ScalarMappable(norm, sns.color_palette("crest", as_cmap=True))
    figure.colorbar(shades, ax=axes, label="step", pad=0.01)
    return figure


def last_spectra(spectra: pd.DataFrame) -> pd.DataFrame:
    """The last recorded spectra of each label, of one layer of each kind: what is compared.

    Args:
        spectra: label, step, layer, index, singular_value.
    """
    last = spectra.groupby("label")["step"].transform("max")
    middle = spectra["layer"].isin(middle_layers(spectra["layer"]))
    return spectra[(spectra["step"] == last) & middle].reset_index(drop=True)


def compared_spectra(spectra: pd.DataFrame) -> Figure:
    """Singular values by index at the end of training, a panel a kind of layer, a line a label.

    Args:
        spectra: `last_spectra`.
    """
    names, labels = middle_layers(spectra["layer"]), list(dict.fromkeys(spectra["label"]))
    figure, axes = _panels(names)
    for ax, name in zip(axes.flat, names, strict=False):
        for label, part in spectra[spectra["layer"] == name].groupby("label", sort=False):
            colour, line, _ = style_of(str(label), labels)
            _spectrum(ax, part, color=colour, ls=line, label=label)
    _label_panels(figure, axes)
    lines, texts = axes.flat[0].get_legend_handles_labels()
    spare = len(axes.flat) - len(names)
    if spare and len(labels) <= 8:  # there is an empty panel for it
        figure.legend(
            lines, texts, frameon=False, fontsize=7.5, loc="lower right", borderaxespad=1.5
        )
    else:
        columns = 3 if len(labels) > 4 else len(labels)
        lower = max(0, -(-len(labels) // columns) - 2)  # lines of the legend that have no room
        figure.set_figheight(figure.get_figheight() + 0.17 * lower)
        figure.legend(lines, texts, frameon=False, fontsize=7.5, loc="outside upper center",
                      ncols=columns)  # fmt: skip
    return figure


FACTS = {
    "effective_rank": "effective rank",
    "stable_rank": "stable rank",
    "update_rank": "effective rank of W − W₀",
    "captured_energy": "gradient energy in the projection",
    "overlap": "overlap with the next subspace",
    "condition": "condition number of the factors",
    "imbalance": "imbalance of the factors",
}


def layer_facts(runs: Sequence[Run]) -> pd.DataFrame:
    """label, step, layer and the summaries in `FACTS`: what the recorded spectra come to.

    Args:
        runs: one of each label.
    """
    tables = []
    for run in runs:
        facts = run.layer_facts.set_index(["step", "layer"])
        facts["condition"] = facts[["condition_B", "condition_A"]].max(axis=1)
        for what, column, summary in (
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
    """Summaries of spectra over training, mean of the layers: a panel a summary, a line a label.

    Args:
        facts: `layer_facts`.
        names: of `FACTS`; by default all that were recorded.
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
    lines = {
        text: line
        for ax in axes.flat
        for line, text in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    figure.legend(lines.values(), lines.keys(), frameon=False, fontsize=8, ncols=3,
                  loc="outside upper center")  # fmt: skip
    return figure


def share_curves(shares: pd.DataFrame) -> Figure:
    """The share of L in each singular value of L + S, a panel a layer, early (light) and last.

    Args:
        shares: `Run.spectra_of("low_rank_share")`, or of several runs with labels.
    """
    if shares.empty:
        return empty_figure("no run has a sparse part")
    steps = sorted(shares["step"].unique())
    figure = spectrum_curves(
        shares[shares["step"].isin([steps[min(1, len(steps) - 1)], steps[-1]])]
    )
    for ax in figure.axes[:-1]:
        ax.set_yscale("linear")
        ax.set_ylim(-0.1, 1.15)
        ax.yaxis.set_major_locator(FixedLocator([0, 0.5, 1]))
    figure.supylabel("share of the low-rank part", fontsize=9.5)
    return figure


def momentum_bars(momentum: pd.DataFrame) -> Figure:
    """How much of the direction of momentum is left after each kind of event, by label.

    Args:
        momentum: label and the columns of `Run.momentum`.
    """
    if momentum.empty:
        return empty_figure("nothing happened to the moments in these runs")
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


def _panels(names: Sequence[str]) -> tuple[Figure, Any]:
    """A figure with a small panel a layer, whose y axes are shared and logarithmic."""
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    with mpl.rc_context(STYLE):
        size = (4.2, 3.0) if len(names) == 1 else (2.15 * columns + 0.6, 1.95 * rows + 0.5)
        figure = Drawing(figsize=size, layout="constrained")
        axes = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for ax, name in zip(axes.flat, names, strict=False):
        ax.set_title(name.removeprefix("model."), fontsize=8, y=1)
        ax.set_yscale("log")
    for ax in axes.flat[len(names) :]:
        ax.set_visible(False)
    return figure, axes


def _spectrum(ax: Axes, values: pd.DataFrame, **kwargs: Any) -> None:
    """A line of one layer's singular values."""
    values = values.sort_values("index")
    # Values at rounding level are zeros of a rank-deficient layer: nothing to see there.
    shown = values[values["singular_value"] > 1e-7]
    ax.plot(shown["index"] + 1, shown["singular_value"], lw=1.3, **kwargs)


def _label_panels(figure: Figure, axes: Any) -> None:
    low, high = axes.flat[0].get_ylim()
    for ax in axes.flat:
        ax.yaxis.set_major_locator(LogLocator(subs=(1,) if high > 200 * low else (1, 2, 5)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_locator(NullLocator())
        for axis in (ax.xaxis, ax.yaxis):  # without labels: to seek room for them takes long
            axis.set_label_coords(0, 0)
    figure.supxlabel("index", fontsize=9.5)
    figure.supylabel("singular value", fontsize=9.5)
