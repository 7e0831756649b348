"""An explorer of any folder of runs: a table to search, sort and choose from, and plots to keep."""

from __future__ import annotations

import html
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from lowrank_lab.analysis.run_groups import Group, choices_of, groups_of, matching, sorted_by
from lowrank_lab.config import InputError
from lowrank_lab.figures import live_image
from lowrank_lab.figures.page import DPI
from lowrank_lab.figures.run_groups import WIDTH
from lowrank_lab.runs.catalogue import Entry, folders_with_runs, read_catalogue
from lowrank_lab.widgets.background import read_ahead, repeat
from lowrank_lab.widgets.explorer_controls import ALL, Controls
from lowrank_lab.widgets.run_plots import PLOTS, Choice, View, in_words
from lowrank_lab.widgets.run_view import FILE_TYPES, MAX_ROWS, file_of, load_view
from lowrank_lab.widgets.slider import slider
from lowrank_lab.widgets.theme import uninterrupted

PERIOD = 2.0  # seconds between two reads of a followed folder
NARROWEST = 3.4  # inches; on narrower pages the picture is scaled


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
    """Display the explorer; unless live, all plots of the choice.

    Unless live, a slider shows the spectrum at up to MAX_ROWS recorded steps.
    """
    from IPython.display import Markdown, display

    if live:
        display(Dashboard(choice).box)  # type: ignore[no-untyped-call]
        return
    views = {plot: load_view(replace(choice, plot=plot)) for plot in PLOTS}
    shown: dict[str, Any] = {plot: v.figure for plot, v in views.items() if v.figure is not None}
    if "spectra" in shown:
        view = views["spectra"]
        steps = view.steps[:: -(-len(view.steps) // MAX_ROWS)]
        at = {s: load_view(replace(view.choice, step=s)).figure for s in steps}
        at[view.choice.step] = shown["spectra"]
        there = {s: figure for s, figure in sorted(at.items()) if figure is not None}
        shown["spectra"] = slider(there, "step", start=view.choice.step)
    first = views[choice.plot]
    lines = [html.escape(line) for line in (first.line, first.trouble) if line]
    display(Markdown("\n\n".join(lines)), *shown.values())  # type: ignore[no-untyped-call]


class Dashboard(Controls):
    """The widgets of the explorer, and what they do: `box` contains them."""

    def __init__(self, choice: Choice) -> None:
        super().__init__(choice)
        self._choice = choice
        self._entries: list[Entry] = []
        self._groups: list[Group] = []
        self._view = View(choice)
        self._matched = ""
        self._opened: dict[str, None] = {}
        self._lock = threading.RLock()  # widgets and the follower run in their own threads
        self._filling = False
        self._stop, self._ahead = threading.Event(), threading.Event()
        self._open(choice.folder)
        self._observe()

    def _observe(self) -> None:
        for knob in (self.metric, self.x, self.layer, self.step, self.plot):
            knob.observe(self._changed(self._draw), "value")
        for knob in (self.search, *self.fields.values()):
            knob.observe(self._changed(self._fill_table), "value")
        self.rows.observe(self._changed(self._regroup), "value")
        self.table.observe(self._changed(self._fill_table), "sort")
        self.table.observe(self._changed(self._choose), "selected")
        self.table.observe(self._changed(self._draw), "width")
        self.theme.observe(self._changed(self._show), "dark")
        self.folder.observe(self._changed(lambda: self._open(self.folder.value)), "value")
        self.path.observe(self._changed(lambda: self._open(self.path.value.strip())), "value")
        self.all.on_click(lambda _: self.table.choose(self.table.rows))
        self.none.on_click(lambda _: self.table.choose([]))
        for kind, button in self.files.items():
            button.on_click(lambda _, kind=kind: self._download(kind))
        self.follow.observe(self._follow, "value")
        self._follow({"new": self.follow.value})

    def _changed(self, act: Callable[[], None]) -> Callable[[Any], None]:
        """An observer that acts, unless the change is our own."""

        def observer(change: Any) -> None:
            with self._lock, uninterrupted():
                if not self._filling:
                    act()

        return observer

    def _open(self, folder: str) -> None:
        """Show another folder; one that cannot be read is a line, and the choice stays possible."""
        if not folder:
            return
        same = folder == self._choice.folder
        self._choice = replace(self._choice, folder=folder, runs=self._choice.runs if same else ())
        self._opened |= {folder: None}
        known = dict.fromkeys([*folders_with_runs(), *self._opened])
        self._set(lambda: _offer(self.folder, list(known), folder))
        self._read()
        training = any(entry.state == "training" for entry in self._entries)
        self._set(lambda: setattr(self.follow, "value", training))
        self._regroup()
        self._ahead.set()
        self._ahead = read_ahead(entry for group in self._groups for entry in group.entries)

    def _read(self) -> None:
        try:
            self._entries = read_catalogue(self._choice.folder)
        except (InputError, OSError) as error:
            self._entries, self._view = [], View(self._choice, str(error))

    def _regroup(self) -> None:
        self._groups = groups_of(self._entries, self.rows.value)
        choices = choices_of(self._groups)

        def fill() -> None:
            for name, field in self.fields.items():
                offered = [ALL, *choices.get(name, [])]
                _offer(field, offered, field.value if field.value in offered else ALL)
                field.layout.display = "" if len(offered) > 1 else "none"
            chosen = set(self._choice.runs)
            self.table.selected = [g.names[0] for g in self._groups if chosen & {*g.names}]

        self._set(fill)
        self._fill_table()
        self._draw()

    def _fill_table(self) -> None:
        """Filter and sort the rows."""
        asked = {n: "" if f.value in (ALL, None) else f.value for n, f in self.fields.items()}
        try:
            found = matching(self._groups, self.search.value, asked)
            words = f"{len(found)} of {len(self._groups)} rows"
        except InputError as error:
            found, words = self._groups, str(error)
        rows = sorted_by(found, *self.table.sort)
        self._set(lambda: self.table.show(rows))
        self._matched = words
        self._count()

    def _count(self) -> None:
        self.count.value = html.escape(f"{self._matched}, {len(self.table.selected)} chosen")

    def _choose(self) -> None:
        self._note_chosen()
        self._count()
        self._draw()

    def _note_chosen(self) -> None:
        chosen = set(self.table.selected)
        runs = [n for group in self._groups if group.names[0] in chosen for n in group.names]
        self._choice = replace(self._choice, runs=tuple(runs))

    def _draw(self) -> None:
        """Draw the plot of the choice, and offer what can be chosen for it."""
        step, steps = self.step.value, self.step.options
        last = not isinstance(step, int) or step == steps[-1]
        width = self.table.width / DPI if self.table.width else WIDTH
        self._choice = choice = replace(
            self._choice, metric=self.metric.value or self._choice.metric, x=self.x.value,
            layer=self.layer.value or self._choice.layer, step=-1 if last else step,
            plot=self.plot.value, over_seeds=self.rows.value,
            width=min(max(width, NARROWEST), WIDTH),
        )  # fmt: skip
        view = load_view(choice, self._entries) if self._entries else View(choice, self._view.line)
        self._view = view
        self._set(lambda: self._offer_parts(view))
        self._show()
        for button in self.files.values():
            button.disabled = view.figure is None
        self.trouble.value = html.escape(view.trouble)
        self.text.value = html.escape(view.line)  # last: the picture is there, too

    def _show(self) -> None:
        shown = self._view.figure
        self.picture.value = live_image(shown, self.theme.dark) if shown is not None else ""

    def _offer_parts(self, view: View) -> None:
        now = view.choice
        if view.metrics:
            _offer(self.metric, view.metrics, now.metric)
        if view.layers:
            _offer(self.layer, view.layers, now.layer)
            _offer(self.step, [*view.steps] or ["–"], now.step if view.steps else "–")
        shown = {
            "curves": (self.metric, self.x), "spectra": (self.layer, self.step),
            "heat": (self.layer,),
        }  # fmt: skip
        for knob in (self.metric, self.x, self.layer, self.step):
            knob.layout.display = "" if knob in shown.get(now.plot, ()) else "none"

    def _download(self, kind: str) -> None:
        with self._lock:
            name, content = file_of(self._view, kind)
        self.table.download(name, content, FILE_TYPES[kind])

    def refresh(self) -> None:
        """Read the folder again; redraw what has changed. What can't be read is a line."""
        with self._lock:
            before = {entry.name: entry.stamp for entry in self._entries}
            try:
                self._read()
                if before != {entry.name: entry.stamp for entry in self._entries}:
                    self._note_chosen()  # perhaps while this thread had the lock
                    self._regroup()
            except Exception as error:  # whatever a half written folder leads to, follow on
                line = f"{self._choice.folder} can't be read: {in_words(error)}"
                self.text.value = html.escape(line)

    def _set(self, change: Callable[[], None]) -> None:
        """Change widgets without acting on their changes."""
        before, self._filling = self._filling, True
        try:
            change()
        finally:
            self._filling = before

    def _follow(self, change: Any) -> None:
        """Start or stop the thread that reads the folder again; it ends with the kernel."""
        self._stop.set()
        if change["new"]:
            self._stop = repeat(self.refresh, PERIOD)


def _offer(widget: Any, options: Sequence[Any], value: Any) -> None:
    """Set a selection's options, if they changed, and its value."""
    if tuple(widget.options) != tuple(options):
        widget.options = tuple(options)
    if options and widget.value != value:
        widget.value = value
