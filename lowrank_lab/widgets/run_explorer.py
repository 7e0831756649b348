"""A dashboard over any folder of runs: curves, spectra and memory of the chosen ones."""

from __future__ import annotations

import html
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from lowrank_lab.config import InputError
from lowrank_lab.figures import image
from lowrank_lab.figures.single_runs import X_AXES
from lowrank_lab.widgets.panel import UNSQUEEZED
from lowrank_lab.widgets.run_view import MAX_RUNS, Choice, load_view
from lowrank_lab.widgets.slider import slider

PERIOD = 2.0  # seconds between two reads of a followed folder
PLOTS = ("curves", "spectra", "memory")


def select(folder: str, pattern: str) -> tuple[str, ...]:
    """Names of the runs in a folder that a regular expression matches; none for an empty pattern.

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
    """Display one line and the figures; live, a panel of widgets.

    Unless live, a slider shows the spectra at up to MAX_RUNS recorded steps.
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
    """The widgets of the dashboard: `box` contains them, `text` and `pictures` show the view."""

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
        self._lock = threading.RLock()  # widgets and the follower run in their own threads
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
        """Read the folder again and redraw; `moved`: the folder itself has changed."""
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
        self._metric = choice.metric  # remembered across a folder without runs
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
        """Start or stop the thread that reads the folder again; it ends with the kernel."""
        self._stop.set()
        if change["new"]:
            self._stop = threading.Event()
            threading.Thread(
                target=_repeat, args=(self.refresh, self._stop, PERIOD), name="follow", daemon=True
            ).start()


def _offer(widget: Any, options: Sequence[Any], value: Any) -> None:
    """Set a selection's options, if they changed, and its value."""
    if tuple(widget.options) != tuple(options):
        widget.options = tuple(options)
    if options and widget.value != value:
        widget.value = value


def _repeat(action: Callable[[], None], stop: threading.Event, period: float) -> None:
    while not stop.wait(period):
        action()
