"""A dashboard over any folder of runs: curves, spectra and memory of those that are chosen.

Nothing here raises on what a folder lacks: it is said in one line instead.
"""

from __future__ import annotations

import html
import math
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

from lowrank_lab.config import InputError
from lowrank_lab.figures import CATEGORIES, STYLE, Drawing, image, label_ends, memory_bars, style_of
from lowrank_lab.memory.formulas import MIB
from lowrank_lab.runs.run import DESCRIBES, Run, complete_runs, table_of
from lowrank_lab.widgets.panel import UNSQUEEZED
from lowrank_lab.widgets.slider import slider

FIRST_RUNS = 6  # runs that are chosen at first
MAX_RUNS = 12  # runs that a figure can name
PERIOD = 2.0  # seconds between two looks at a folder that is followed
X_AXES = {
    "tokens_seen": "training tokens", "step": "step", "seconds": "training time (s)",
}  # fmt: skip
UNITS = {
    "validation_loss": "validation loss (nats a token)", "loss": "training loss (nats a token)",
    "lr_now": "learning rate", "grad_norm": "gradient norm", "tokens_per_second": "tokens a second",
}  # fmt: skip
PLOTS = ("curves", "spectra", "memory")


@dataclass(frozen=True)
class Choice:
    """What the dashboard shows. Empty: a run of each label, the middle layer, the last step."""

    folder: str
    runs: tuple[str, ...] = ()
    metric: str = "validation_loss"
    x: str = "tokens_seen"
    layer: str = ""
    step: int = -1


@dataclass
class View:
    """What a folder holds, and what of it is shown: everything that the widgets offer."""

    choice: Choice
    line: str = ""
    known: list[str] = field(default_factory=list)
    metrics: list[str] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    figures: dict[str, Figure] = field(default_factory=dict)


def load_view(choice: Choice) -> View:
    """Read the folder and draw what was chosen, filling in what was left open or isn't there.

    Never raises on what the folder holds or lacks: `line` says it.
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
    view.figures["curves"] = curves(table, now.metric, now.x, titles)
    if layers:
        view.figures["spectra"] = spectrum(spectra, now.layer, now.step, titles)
    memory = _memory(chosen, titles)
    if len(memory):
        view.figures["memory"] = memory_bars(memory, activations=True)
    view.line = _line(choice, view, chosen, len(wanted))
    return view


def _first(runs: dict[str, Run]) -> list[str]:
    """The first run of each label, of as many labels as are seen at a glance."""
    first: dict[str, str] = {}
    for name, run in runs.items():
        first.setdefault(run.label, name)
    return list(first.values())[:FIRST_RUNS]


def _name(run: Run, folder: str) -> str:
    inside = run.folder.relative_to(folder).as_posix()
    return run.folder.resolve().name if inside == "." else inside


def _at_most(step: int, steps: Sequence[int]) -> int:
    """The last recorded step up to the one asked for; -1 asks for the last of all."""
    if not steps:
        return -1
    before = [s for s in steps if s <= step]
    return steps[-1] if step < 0 else (before or steps[:1])[-1]


def _titles(runs: dict[str, Run]) -> dict[str, str]:
    """What figures call each run: its label, with the seed or its name where that is not enough."""
    labels = [run.label for run in runs.values()]
    titles: dict[str, str] = {}
    for name, run in runs.items():
        title = run.label
        if labels.count(title) > 1:
            title += f" (seed {run.config.seed})"
        titles[name] = title if title not in titles.values() else f"{title} {name[-10:]}"
    return titles


def metrics_of(table: pd.DataFrame) -> list[str]:
    """Columns of `load_runs` that are numbers recorded over training, evaluations first."""
    constant = {*DESCRIBES, *X_AXES}
    names = [
        str(name) for name in table.select_dtypes("number")
        if name not in constant and not str(name).startswith("final_") and table[name].notna().any()
    ]  # fmt: skip
    first = [name for name in ("validation_loss", "loss") if name in names]
    return [*first, *(name for name in names if name not in first)]


def _recorded(runs: dict[str, Run]) -> pd.DataFrame:
    """The spectra of all runs that have any, with their names."""
    tables = [run.spectra.assign(run=name) for name, run in runs.items()]
    kept = [table for table in tables if len(table)]
    columns = ["step", "layer", "index", "singular_value", "run"]
    return pd.concat(kept, ignore_index=True) if kept else pd.DataFrame(columns=columns)


def _memory(runs: dict[str, Run], titles: dict[str, str]) -> pd.DataFrame:
    found = [name for name, run in runs.items() if (run.folder / "memory.json").exists()]
    table = pd.DataFrame([{"label": titles[name], **runs[name].memory} for name in found])
    return table if set(CATEGORIES) <= set(table) else table.head(0)


def _line(choice: Choice, view: View, chosen: dict[str, Run], wanted: int) -> str:
    """One line that says what is shown, and what is missing."""
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


def curves(table: pd.DataFrame, metric: str, x: str, titles: dict[str, str]) -> Figure:
    """A recorded number over training, a line a run.

    Args:
        table: of `load_runs`.
        titles: run → its name in the figure.
    """
    figure, ax = _figure()
    byte, ends = metric.endswith("_bytes"), []
    for name, title in titles.items():
        part = table[table["run"] == name] if len(titles) > 1 else table
        part = part.dropna(subset=[metric])
        colour, line, marker = style_of(title, list(titles.values()))
        values = part[metric] / MIB if byte else part[metric]
        dots = marker if len(part) <= 12 else ""
        ax.plot(part[x], values, line, marker=dots, ms=3, lw=1.2, color=colour)
        if len(values):
            ends.append((float(values.iloc[-1]), title, colour))
    ax.set_xlabel(X_AXES[x])
    other = metric.replace("_", " ")
    ax.set_ylabel(f"{other.removesuffix(' bytes')} (MiB)" if byte else UNITS.get(metric, other))
    if x == "tokens_seen":
        ax.xaxis.set_major_formatter(EngFormatter(sep=" "))
    largest = max((abs(value) for value, *_ in ends), default=1.0)
    label_ends(ax, ends, digits=max(0, 3 - math.floor(math.log10(largest or 1.0))))
    return figure


def spectrum(table: pd.DataFrame, layer: str, step: int, titles: dict[str, str]) -> Figure:
    """Singular values of a layer, a line a run, each at its last record up to a step."""
    figure, ax = _figure()
    lines: list[tuple[float, Line2D]] = []
    part = table[(table["layer"] == layer) & (table["step"] <= step)]
    for name, title in titles.items():
        values = part[part["run"] == name]
        values = values[values["step"] == values["step"].max()].sort_values("index")
        values = values[values["singular_value"] > 1e-7]  # the rest is rounding
        if len(values):
            colour, line, _ = style_of(title, list(titles.values()))
            (drawn,) = ax.plot(
                values["index"] + 1, values["singular_value"], line, lw=1.2, color=colour,
                label=title,
            )  # fmt: skip
            lines.append((float(values["singular_value"].iloc[0]), drawn))
    ax.set_yscale("log")
    ax.set_xlabel("index")
    ax.set_ylabel("singular value")
    ax.set_title(f"{layer}, step {step}", loc="left", fontsize=9)
    lines.sort(key=lambda pair: -pair[0])  # named in the order in which they begin
    if lines:
        figure.legend(
            handles=[line for _, line in lines], loc="outside right upper", frameon=False,
            fontsize=7.5,
        )  # fmt: skip
    return figure


def _figure() -> tuple[Figure, Axes]:
    with mpl.rc_context(STYLE):
        figure = Drawing(figsize=(7.6, 3.1), layout="constrained")
        return figure, figure.subplots()


def select(folder: str, pattern: str) -> tuple[str, ...]:
    """Names of the runs in a folder that a regular expression matches; all open where it is empty.

    Raises:
        InputError: not a regular expression.
    """
    if not pattern:
        return ()
    try:
        matcher = re.compile(pattern)
    except re.error as error:
        raise InputError("runs", pattern, f"not a regular expression: {error}") from None
    return tuple(n for n in load_view(Choice(folder)).known if matcher.search(n))


def dashboard(choice: Choice, live: bool = False) -> None:
    """Display the dashboard: a line and figures, or with `live` a panel of widgets.

    Not live, a slider goes through at most MAX_RUNS recorded steps of the spectra.
    """
    from IPython.display import Markdown, display

    if live:
        display(Dashboard(choice).box)  # type: ignore[no-untyped-call]
        return
    view = load_view(choice)
    shown: dict[str, Any] = dict(view.figures)
    if "spectra" in shown:
        steps = view.steps[:: -(-len(view.steps) // MAX_RUNS)]
        at = {s: load_view(replace(view.choice, step=s)).figures["spectra"] for s in steps}
        at[view.choice.step] = shown["spectra"]
        shown["spectra"] = slider(dict(sorted(at.items())), "step", start=view.choice.step)
    display(Markdown(html.escape(view.line)), *shown.values())  # type: ignore[no-untyped-call]


class Dashboard:
    """The widgets of the dashboard: `box` holds them, `text` and `pictures` what they show."""

    def __init__(self, choice: Choice) -> None:
        import ipywidgets as ipw

        wide: dict[str, Any] = {
            "style": {"description_width": "5em"}, "layout": {"width": "24em"}
        }  # fmt: skip
        self.folder = ipw.Text(
            value=choice.folder, description="folder", continuous_update=False, **wide
        )
        self.runs = ipw.SelectMultiple(description="runs", rows=10, **wide)
        self.metric = ipw.Dropdown(description="metric", **wide)
        self.x = ipw.Dropdown(
            options=[(words, name) for name, words in X_AXES.items()], description="x axis",
            value=choice.x if choice.x in X_AXES else "tokens_seen", **wide,
        )  # fmt: skip
        self.layer = ipw.Dropdown(description="layer", **wide)
        self.step = ipw.SelectionSlider(
            options=["–"], description="step", continuous_update=False, **wide
        )
        self.follow = ipw.ToggleButton(description="follow", tooltip="read again every two seconds")
        self.text = ipw.HTML()
        self.pictures = {name: ipw.HTML() for name in PLOTS}
        self._lock = threading.RLock()  # widgets and the follower call from their own threads
        self._filling = False
        self._stop = threading.Event()
        self._show(choice)
        for knob in self._knobs:
            knob.observe(self._changed, "value")
        self.follow.observe(self._follow, "value")
        left = ipw.VBox([self.folder, *self._knobs[1:], self.follow], layout=UNSQUEEZED)
        self.box = ipw.HBox([left, ipw.VBox([self.text, *self.pictures.values()])])

    @property
    def _knobs(self) -> list[Any]:
        return [self.folder, self.runs, self.metric, self.x, self.layer, self.step]

    def _changed(self, change: Any) -> None:
        if not self._filling:
            self.refresh(moved=change["owner"] is self.folder)

    def refresh(self, moved: bool = False) -> None:
        """Read the folder again and draw; `moved`: it is another folder."""
        with self._lock:
            metric, x = self.metric.value or self._metric, self.x.value
            if moved:
                self._show(Choice(self.folder.value, metric=metric, x=x))
                return
            step = self.step.value
            last = not isinstance(step, int) or step == self.step.options[-1]
            asked = Choice(
                self.folder.value, self.runs.value, metric, x, self.layer.value or "",
                -1 if last else step,
            )  # fmt: skip
            self._show(asked)

    def _show(self, choice: Choice) -> None:
        view = load_view(choice)
        self._metric = choice.metric  # outlives a folder that has nothing to choose from
        self._filling = True
        try:
            now = view.choice
            _offer(self.runs, view.known, now.runs if view.known else ())
            _offer(self.metric, view.metrics, now.metric or None)
            _offer(self.layer, view.layers, now.layer or None)
            steps: list[Any] = [*view.steps] or ["–"]
            _offer(self.step, steps, now.step if view.steps else "–")
        finally:
            self._filling = False
        for name, picture in self.pictures.items():
            figure = view.figures.get(name)
            picture.value = image(figure) if figure is not None else ""
            picture.layout.display = "" if figure is not None else "none"
        self.text.value = html.escape(view.line)

    def _follow(self, change: Any) -> None:
        """Start or stop the thread that reads again; it ends with the kernel."""
        self._stop.set()
        if change["new"]:
            self._stop = threading.Event()
            threading.Thread(
                target=_repeat, args=(self.refresh, self._stop, PERIOD), name="follow", daemon=True
            ).start()


def _offer(widget: Any, options: Sequence[Any], value: Any) -> None:
    """Give a selection its options, if they are others, and its value."""
    if tuple(widget.options) != tuple(options):
        widget.options = tuple(options)
    if options and widget.value != value:
        widget.value = value


def _repeat(action: Callable[[], None], stop: threading.Event, period: float) -> None:
    while not stop.wait(period):
        action()
