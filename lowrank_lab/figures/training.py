"""Figures of training: loss against tokens and time, and perplexity against memory."""

from __future__ import annotations

from typing import Any, cast

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from matplotlib.transforms import offset_copy

from lowrank_lab.analysis.stats import mean_interval
from lowrank_lab.config import InputError
from lowrank_lab.figures.drawing import (
    STYLE,
    Drawing,
    canvas,
    label_ends,
    rows_of,
    style_of,
)
from lowrank_lab.memory.formulas import MIB


def curve_table(
    runs: pd.DataFrame, x: str = "tokens_seen", y: str = "validation_loss"
) -> pd.DataFrame:
    """Mean of y over the seeds of each label at each step: label, step, x, mean, half_width, n.

    Raises:
        InputError: a missing column, or seeds that were not recorded at the same steps.
    """
    for name, column in (("x", x), ("y", y)):
        if column not in runs:
            raise InputError(name, column, f"the table has {', '.join(map(str, runs.columns))}")
    recorded = runs.dropna(subset=[y])
    seeds = runs.groupby("label")["run"].nunique()
    grouped = recorded.groupby(["label", "step"], sort=False)
    middles = grouped[x].mean().tolist()
    rows = []
    for (key, values), middle in zip(grouped[y], middles, strict=True):
        label, step = cast(tuple[str, int], key)
        if len(values) != seeds[label]:
            raise InputError(
                "runs", label, f"at step {step} {len(values)} of {seeds[label]} seeds are there"
            )
        rows.append((label, step, middle, *mean_interval(values.tolist())))
    return pd.DataFrame(rows, columns=["label", "step", x, "mean", "half_width", "n"])


def loss_curves(runs: pd.DataFrame, x: str = "tokens_seen", y: str = "validation_loss") -> Figure:
    """Loss against tokens or seconds, one line per label, with 95 % intervals over seeds."""
    table = curve_table(runs, x, y)
    labels = list(dict.fromkeys(table["label"]))
    figure, ax = canvas(6.4, _height(labels))
    ends: list[tuple[Any, ...]] = []
    styles = {label: style_of(label, labels) for label in labels}
    alike = len({colour for colour, *_ in styles.values()}) < len(labels)
    for label in labels:
        part = table[table["label"] == label].sort_values("step")
        colour, line, _ = styles[label]
        ax.plot(part[x], part["mean"], line, color=colour, lw=1.6)
        low, high = part["mean"] - part["half_width"], part["mean"] + part["half_width"]
        ax.fill_between(part[x], low, high, color=colour, alpha=0.15, lw=0)
        name, sample = label if len(labels) > 1 else "", [line] if alike else []
        ends.append((float(part["mean"].iloc[-1]), name, colour, *sample))
    if len(labels) > 1:
        # The ends of the curves are compared: leave out the first, steep part.
        last = table.groupby("label")["mean"].last()
        spread = max(last.max() - last.min(), 0.05)
        ax.set_ylim(last.min() - 0.15 * spread, min(table["mean"].max(), last.max() + 3 * spread))
    else:
        ax.set_title(labels[0], loc="left")
    ax.set_xlabel("training tokens" if x == "tokens_seen" else "training time (s)")
    ax.set_ylabel(f"{y.replace('_', ' ')} (nats per token)")
    if x == "tokens_seen":
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _count(value)))
    ax.set_title(_seeds(table["n"]), loc="right", color="0.4", fontsize=8)
    label_ends(ax, ends, gap=_gap(labels))
    return figure


def _height(labels: list[str]) -> float:
    """Height of a figure (inches) beside which all labels fit in one column."""
    return max(3.9, 0.27 * len(labels))


def _gap(labels: list[str]) -> float:
    """Minimum distance between two labels, as a share of the axis."""
    return 0.062 * 3.9 / _height(labels)


def training_table(runs: pd.DataFrame, points: int = 400) -> pd.DataFrame:
    """Training loss and learning rate of each run at about `points` steps."""
    columns = ["label", "run", "step", "tokens_seen", "loss", "lr_now"]
    table = runs[columns]
    every = max(1, int(table["step"].max()) // points)
    return table[(table["step"] % every == 0) | (table["step"] == 1)]


def training_curves(runs: pd.DataFrame) -> Figure:
    """Training loss of every recorded batch above the learning rate, one line per run."""
    table = training_table(runs)
    labels = list(dict.fromkeys(table["label"]))
    with mpl.rc_context(STYLE):
        figure = Drawing(figsize=(6.4, 4.4), layout="constrained")
        loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    ends = []
    for (label, _), part in table.groupby(["label", "run"], sort=False):
        colour, line, _ = style_of(str(label), labels)
        loss.plot(part["step"], part["loss"], line, color=colour, lw=0.8)
        rate.plot(part["step"], part["lr_now"], line, color=colour, lw=1.2)
        ends.append((float(part["loss"].tail(10).mean()), str(label), colour))
    loss.set_ylabel("training loss (nats per token)")
    rate.set_ylabel("learning rate")
    rate.set_xlabel("step")
    label_ends(loss, ends)
    return figure


def tradeoff_table(finals: pd.DataFrame, peak: bool = False) -> pd.DataFrame:
    """Memory and test perplexity over seeds, one row per label.

    Args:
        finals: `runs.final_table`; `peak` needs a column `peak_bytes`.
        peak: peak memory of a step instead of weights and optimizer states.
    """
    rows = []
    for label, group in finals.groupby("label", sort=False):
        persistent = group["weight_bytes"] + group["optimizer_state_bytes"]
        size = group["peak_bytes"] if peak else persistent
        perplexity = mean_interval(group["test_perplexity"].tolist())
        rows.append((label, float(size.mean()) / MIB, *perplexity))
    size_name = "peak_mib" if peak else "weights_and_states_mib"
    return pd.DataFrame(rows, columns=["label", size_name, "mean", "half_width", "n"])


def tradeoff(finals: pd.DataFrame, peak: bool = False) -> Figure:
    """Test perplexity against memory, as in the paper's main figure; see `tradeoff_table`."""
    table = tradeoff_table(finals, peak)
    labels = table["label"].tolist()
    figure, ax = canvas(6.4, _height(labels))
    sizes = table.iloc[:, 1]
    ends = []
    errors = table["half_width"].where(table["n"] > 1, 0.0)
    shifts = _dodged(sizes.tolist(), table["mean"].tolist(), errors.tolist())
    for row, size, error, shift in zip(rows_of(table), sizes, errors, shifts, strict=True):
        colour, _, marker = style_of(row.label, labels)
        aside = offset_copy(ax.transData, figure, x=shift, units="points")
        ax.errorbar(
            size, row.mean, yerr=error or None, fmt=marker, ms=7, color=colour, capsize=3,
            transform=aside,
        )  # fmt: skip
        ax.update_datalim([(size, row.mean + s * error) for s in (-1, 1)])
        ends.append((row.mean, row.label, colour, marker))
    margin = 0.1 * max(sizes.max() - sizes.min(), 0.1 * sizes.max())
    ax.set_xlim(sizes.min() - margin, sizes.max() + margin)
    ax.autoscale_view(scalex=False)
    ax.margins(y=0.12)
    label_ends(ax, ends, digits=2, gap=_gap(labels))
    measure = "peak memory of a step" if peak else "weights + optimizer states"
    ax.set_xlabel(f"{measure} (MiB)")
    ax.set_ylabel("test perplexity (lower is better)")
    ax.set_title(_seeds(table["n"]), loc="right", color="0.4", fontsize=8)
    return figure


def _dodged(sizes: list[float], means: list[float], errors: list[float]) -> list[float]:
    """Horizontal shifts (points) that separate markers of nearly equal size and loss."""
    marker = 0.04 * (max(means) - min(means))
    places: list[int] = []
    for i, (size, mean, error) in enumerate(zip(sizes, means, errors, strict=True)):
        taken = {
            places[j]
            for j in range(i)
            if abs(sizes[j] - size) <= 0.01 * size
            and abs(means[j] - mean) <= errors[j] + error + marker
        }
        near = sorted(range(-i, i + 1), key=abs)
        places.append(next(place for place in near if place not in taken))
    points = min(7.0, 16.0 / max(1, *map(abs, places)))
    return [points * place for place in places]


def _count(value: float) -> str:
    return f"{value / 1e6:g} M" if value >= 1e5 else f"{value / 1e3:g} k" if value else "0"


def _seeds(n: pd.Series) -> str:
    low, high = int(n.min()), int(n.max())
    if high == 1:
        return "one seed each"
    return f"mean of {low if low == high else f'{low}–{high}'} seeds, 95 % interval"
