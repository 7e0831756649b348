"""What the run explorer shows of a folder: its runs, the chosen ones, and their figures.

Nothing here raises on what a folder lacks: the view's line says it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pandas as pd
from matplotlib.figure import Figure

from lowrank_lab.config import InputError
from lowrank_lab.figures import CATEGORIES, memory_bars
from lowrank_lab.figures.single_runs import X_AXES, layer_spectrum, metric_curves
from lowrank_lab.runs.run import DESCRIBES, Run, complete_runs, runs_folder, table_of

FIRST_RUNS = 6  # runs shown before any is chosen
MAX_RUNS = 12  # runs that a figure can name


@dataclass(frozen=True)
class Choice:
    """What the dashboard is asked to show.

    Defaults: the first run of each label, the middle layer, the last recorded step.
    """

    folder: str
    runs: tuple[str, ...] = ()
    metric: str = "validation_loss"
    x: str = "tokens_seen"
    layer: str = ""
    step: int = -1


@dataclass
class View:
    """Runs, metrics, layers and steps that a folder offers, and figures of the chosen ones."""

    choice: Choice
    line: str = ""
    known: list[str] = field(default_factory=list)
    metrics: list[str] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    figures: dict[str, Figure] = field(default_factory=dict)


def load_view(choice: Choice) -> View:
    """Read the folder and draw the choice; missing parts of the choice get their defaults.

    Never raises on the folder's contents: `View.line` reports what is wrong.
    """
    try:
        return _load_view(choice)
    except InputError as error:
        return View(choice, str(error))
    except (OSError, ValueError, KeyError) as error:  # half written, moved or damaged
        words = " ".join(f"{type(error).__name__}: {error}".split())
        return View(choice, f"{choice.folder} cannot be read: {words[:160]}")


def _load_view(choice: Choice) -> View:
    runs = {_name(r, choice.folder): r for r in complete_runs(choice.folder, strict=False)}
    wanted = [name for name in choice.runs if name in runs] or _first(runs)
    chosen = {name: runs[name] for name in wanted[:MAX_RUNS]}
    table = table_of(list(chosen.values()), choice.folder)
    titles = _titles(chosen)
    spectra = _recorded(chosen)
    layers = list(dict.fromkeys(spectra["layer"]))
    steps = sorted(int(s) for s in set(spectra["step"]))
    metrics = metrics_of(table)
    now = replace(
        choice,
        runs=tuple(chosen),
        metric=choice.metric if choice.metric in metrics else (metrics or [""])[0],
        x=choice.x if choice.x in X_AXES else "tokens_seen",
        layer=choice.layer if choice.layer in layers else (layers or [""])[len(layers) // 2],
        step=_at_most(choice.step, steps),
    )
    view = View(now, "", list(runs), metrics, layers, steps)
    view.figures["curves"] = metric_curves(table, now.metric, now.x, titles)
    if layers:
        view.figures["spectra"] = layer_spectrum(spectra, now.layer, now.step, titles)
    memory = _memory(chosen, titles)
    if len(memory):
        view.figures["memory"] = memory_bars(memory, activations=True)
    view.line = _line(choice, view, chosen, len(wanted))
    return view


def _first(runs: dict[str, Run]) -> list[str]:
    """The first run of each label, for at most FIRST_RUNS labels."""
    first: dict[str, str] = {}
    for name, run in runs.items():
        first.setdefault(run.label, name)
    return list(first.values())[:FIRST_RUNS]


def _name(run: Run, folder: str) -> str:
    inside = run.folder.relative_to(runs_folder(folder)).as_posix()
    return run.folder.resolve().name if inside == "." else inside


def _at_most(step: int, steps: Sequence[int]) -> int:
    """The last recorded step up to `step`; -1 means the last of all."""
    if not steps:
        return -1
    before = [s for s in steps if s <= step]
    return steps[-1] if step < 0 else (before or steps[:1])[-1]


def _titles(runs: dict[str, Run]) -> dict[str, str]:
    """Run → its label, followed by the seed or the run's name where labels repeat."""
    labels = [run.label for run in runs.values()]
    titles: dict[str, str] = {}
    for name, run in runs.items():
        title = run.label
        if labels.count(title) > 1:
            title += f" (seed {run.config.seed})"
        titles[name] = title if title not in titles.values() else f"{title} {name[-10:]}"
    return titles


def metrics_of(table: pd.DataFrame) -> list[str]:
    """Numeric columns of `load_runs` that vary over training, evaluations first."""
    constant = {*DESCRIBES, *X_AXES}
    names = [
        str(name) for name in table.select_dtypes("number")
        if name not in constant and not str(name).startswith("final_") and table[name].notna().any()
    ]  # fmt: skip
    first = [name for name in ("validation_loss", "loss") if name in names]
    return [*first, *(name for name in names if name not in first)]


def _recorded(runs: dict[str, Run]) -> pd.DataFrame:
    """Spectra of all runs that recorded any, with a column `run`."""
    tables = [run.spectra.assign(run=name) for name, run in runs.items()]
    kept = [table for table in tables if len(table)]
    columns = ["step", "layer", "index", "singular_value", "run"]
    return pd.concat(kept, ignore_index=True) if kept else pd.DataFrame(columns=columns)


def _memory(runs: dict[str, Run], titles: dict[str, str]) -> pd.DataFrame:
    found = [name for name, run in runs.items() if run.has_memory]
    table = pd.DataFrame([{"label": titles[name], **runs[name].memory} for name in found])
    return table if set(CATEGORIES) <= set(table) else table.head(0)


def _line(choice: Choice, view: View, chosen: dict[str, Run], wanted: int) -> str:
    """One line: what the view shows, and what is missing."""
    now = view.choice
    count = f"{len(chosen)} run{'s' if len(chosen) > 1 else ''}"
    parts = [count + (f" of {wanted} chosen" if wanted > len(chosen) else ""), now.metric]
    parts += [f"layer {now.layer}", f"step = {now.step}"] if view.layers else ["no spectra yet"]
    parts += [] if "memory" in view.figures else ["no memory measured yet"]
    parts += [f"no {choice.metric} yet"] if now.metric != choice.metric else []
    running = [f"{name} in progress" for name, run in chosen.items() if not run.finished]
    rows = [run.metrics["step"].iloc[-1] for run in chosen.values() if not run.finished]
    parts += [f"{a} at step {b}" for a, b in zip(running, rows, strict=True)]
    return ", ".join(parts)
