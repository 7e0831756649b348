"""Figures of singular values: over training, between methods, and shares of L in L + S."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from lowrank_lab.analysis.spectra import middle_layers
from lowrank_lab.config import InputError
from lowrank_lab.figures.drawing import (
    STYLE,
    Drawing,
    empty_figure,
    style_of,
)

if TYPE_CHECKING:
    pass


def spectrum_curves(spectra: pd.DataFrame, layers: Sequence[str] | None = None) -> Figure:
    """Singular values by index, one panel per layer, one line per recorded step (light to dark).

    Args:
        spectra: step, layer, index, singular_value (`Run.spectra`).
        layers: by default one of each kind, from the middle of the model.

    Raises:
        InputError: a layer that was not recorded.
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
    """The last recorded spectra of each label, for one layer of each kind.

    Args:
        spectra: label, step, layer, index, singular_value.
    """
    last = spectra.groupby("label")["step"].transform("max")
    middle = spectra["layer"].isin(middle_layers(spectra["layer"]))
    return spectra[(spectra["step"] == last) & middle].reset_index(drop=True)


def compared_spectra(spectra: pd.DataFrame) -> Figure:
    """Singular values by index after training, one panel per kind of layer, one line per label.

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
    if spare and len(labels) <= 8:  # the legend fits into an empty panel
        figure.legend(
            lines, texts, frameon=False, fontsize=7.5, loc="lower right", borderaxespad=1.5
        )
    else:
        columns = 3 if len(labels) > 4 else len(labels)
        lower = max(0, -(-len(labels) // columns) - 2)  # legend rows beyond the two that fit
        figure.set_figheight(figure.get_figheight() + 0.17 * lower)
        figure.legend(lines, texts, frameon=False, fontsize=7.5, loc="outside upper center",
                      ncols=columns)  # fmt: skip
    return figure


def share_curves(shares: pd.DataFrame) -> Figure:
    """Share of L in each singular value of L + S, per layer, at an early and at the last step.

    Args:
        shares: `Run.spectra_of("low_rank_share")`.
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


def _panels(names: Sequence[str]) -> tuple[Figure, Any]:
    """A figure with one small panel per layer and a shared logarithmic y axis."""
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
    """Draw one layer's singular values as a line."""
    values = values.sort_values("index")
    # Values at rounding level are the zeros of a rank-deficient layer.
    shown = values[values["singular_value"] > 1e-7]
    ax.plot(shown["index"] + 1, shown["singular_value"], lw=1.3, **kwargs)


def _label_panels(figure: Figure, axes: Any) -> None:
    low, high = axes.flat[0].get_ylim()
    for ax in axes.flat:
        ax.yaxis.set_major_locator(LogLocator(subs=(1,) if high > 200 * low else (1, 2, 5)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_locator(NullLocator())
        for axis in (ax.xaxis, ax.yaxis):  # no labels: placing them is slow
            axis.set_label_coords(0, 0)
    figure.supxlabel("index", fontsize=9.5)
    figure.supylabel("singular value", fontsize=9.5)
