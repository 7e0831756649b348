"""The plots of the run explorer: each draws the chosen runs, and fills in a view's numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lowrank_lab.analysis.run_groups import Group
from lowrank_lab.figures import CATEGORIES, memory_bars, memory_table
from lowrank_lab.figures.run_groups import (
    WIDTH,
    X_AXES,
    layer_spectra,
    loss_memory,
    metric_curves,
    metric_table,
)
from lowrank_lab.figures.spectrum_maps import spectra_over_training, spectrum_table
from lowrank_lab.runs import series
from lowrank_lab.runs.catalogue import Entry
from lowrank_lab.runs.run import DESCRIBES

PLOTS = {
    "curves": "metric over training", "tradeoff": "loss against memory",
    "spectra": "spectrum of a layer", "heat": "spectra over training",
    "memory": "memory by category",
}  # fmt: skip
LAYERED = ("spectra", "heat")


@dataclass(frozen=True)
class Choice:
    """What the explorer is asked to show.

    Defaults: of each label the rank and rate with the lowest loss, the middle layer, the last
    recorded step.
    """

    folder: str
    runs: tuple[str, ...] = ()
    metric: str = "validation_loss"
    x: str = "tokens_seen"
    layer: str = ""
    step: int = -1
    plot: str = "curves"
    over_seeds: bool = True
    width: float = WIDTH  # inches


@dataclass
class View:
    """A plot with its numbers, and the metrics, layers and steps that can be chosen for it."""

    choice: Choice
    line: str = ""
    trouble: str = ""  # broken and failed runs of the folder; empty without any
    known: list[str] = field(default_factory=list)
    metrics: list[str] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    figure: Figure | None = None
    table: pd.DataFrame = field(default_factory=pd.DataFrame)


@dataclass
class Chosen:
    """The groups to show with their titles, and what could not be read of them."""

    groups: list[Group]
    titles: list[str]
    unread: list[str] = field(default_factory=list)

    def read(self, get: Callable[[Entry], Any]) -> list[tuple[str, Any]]:
        """Title and what `get` returns, for each run of the groups that has any."""
        found = []
        for title, group in zip(self.titles, self.groups, strict=True):
            for entry in group.compared:
                try:
                    part = get(entry)
                except (OSError, ValueError, KeyError, TypeError) as error:
                    self.unread.append(f"{entry.name} can't be read: {in_words(error)}")
                    continue
                if len(part):
                    found.append((title, part))
        return found

    @property
    def entries(self) -> list[Entry]:
        return [entry for group in self.groups for entry in group.compared]


def _curves(view: View, chosen: Chosen) -> None:
    found = chosen.read(series.metrics_of)
    if not found:
        return
    rows, now = pd.concat([table for _, table in found], ignore_index=True), view.choice
    view.metrics = metrics_of(rows)
    if not view.metrics:
        return
    metric = now.metric if now.metric in view.metrics else view.metrics[0]
    view.choice = now = replace(now, metric=metric, x=now.x if now.x in X_AXES else "tokens_seen")
    titles = np.repeat([title for title, _ in found], [len(table) for _, table in found])
    there = rows[metric].notna().to_numpy()  # few rows have an evaluation
    kept = rows.loc[there, list(dict.fromkeys(["step", now.x, metric]))]
    view.table = metric_table(kept.assign(title=titles[there]), metric, now.x)
    view.figure = metric_curves(view.table, now.metric, now.x, now.width)


def _tradeoff(view: View, chosen: Chosen) -> None:
    rows = [
        (title, group.memory, *group.loss)
        for title, group in zip(chosen.titles, chosen.groups, strict=True)
    ]
    table = pd.DataFrame(rows, columns=["title", "memory_mib", "mean", "half_width", "n"])
    view.table = table.dropna(subset=["memory_mib", "mean"])
    if len(view.table):
        view.figure = loss_memory(view.table, view.choice.width)


def _spectra(view: View, chosen: Chosen) -> None:
    found = chosen.read(series.spectra_of)
    view.layers = list(dict.fromkeys(layer for _, layers in found for layer in layers))
    if not view.layers:
        return
    now, middle = view.choice, view.layers[len(view.layers) // 2]
    layer = now.layer if now.layer in view.layers else middle
    table = spectrum_table([(title, at[layer]) for title, at in found if layer in at])
    view.steps = sorted(int(step) for step in set(table["step"]))
    view.choice = now = replace(now, layer=layer, step=_at_most(now.step, view.steps))
    if not len(table):
        return
    if now.plot == "heat":
        view.table = table
        view.figure = spectra_over_training(table, layer, now.width)
        return
    until = table[table["step"] <= now.step]
    view.table = until[until["step"] == until.groupby("title")["step"].transform("max")]
    view.figure = layer_spectra(view.table, f"{layer}, step {now.step}", now.width)


def _memory(view: View, chosen: Chosen) -> None:
    found = [{"label": title, **sizes} for title, sizes in chosen.read(series.memory_of)]
    table = pd.DataFrame(found)
    if len(table) and set(CATEGORIES) <= set(table):
        view.table = memory_table(table)
        view.figure = memory_bars(table, activations=True, width=view.choice.width)


DRAW: Mapping[str, Callable[[View, Chosen], None]] = {
    "curves": _curves, "tradeoff": _tradeoff, "spectra": _spectra, "heat": _spectra,
    "memory": _memory,
}  # fmt: skip


def _at_most(step: int, steps: Sequence[int]) -> int:
    """The last recorded step up to `step`; -1 means the last of all."""
    if not steps:
        return -1
    before = [s for s in steps if s <= step]
    return steps[-1] if step < 0 else (before or steps[:1])[-1]


def metrics_of(table: pd.DataFrame) -> list[str]:
    """Numeric columns of metrics that vary over training, evaluations first."""
    constant = {*DESCRIBES, *X_AXES}
    names = [
        str(name) for name in table.select_dtypes("number")
        if name not in constant and table[name].notna().any()
    ]  # fmt: skip
    first = [name for name in ("validation_loss", "loss") if name in names]
    return [*first, *(name for name in names if name not in first)]


def in_words(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]
