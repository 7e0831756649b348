"""How long the notebooks' widgets take to answer: 500 runs in the explorer, and each panel.

A time is that of one callback, on one thread, until its text and picture are set; what the browser
and the line to it add is not in it. A row is the slowest callback of a widget, by its median over
the rounds. First uses, after the explorer has read ahead, have a row of their own, from fresh
processes. `what fits` first shows a line, which is timed, and seconds later a simulated step.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.harness import Row, in_fresh_process, median, threads
from benchmarks.many_runs import write_many
from lowrank_lab.analysis import matrix_toy as toy
from lowrank_lab.config import RunConfig
from lowrank_lab.paths import kept_study
from lowrank_lab.runs.run import find_runs
from lowrank_lab.widgets import grid, matrix_toy, notebook
from lowrank_lab.widgets.run_explorer import Dashboard
from lowrank_lab.widgets.run_plots import Choice

LIMIT = 0.2  # seconds
RUNS, FEW = 500, 3
OPENING, AHEAD = "opening", "reading ahead"
Actions = Iterator[tuple[str, Callable[[], Any]]]


def rows(quick: bool = False) -> list[Row]:
    """The slowest callback of each widget."""
    rounds, fresh, runs = (1, 1, 60) if quick else (7, 3, RUNS)
    with tempfile.TemporaryDirectory() as name:
        folder = str(Path(name) / "many")
        write_many(folder, runs)
        first = [in_fresh_process(first_uses, folder) for _ in range(fresh)]
        seconds, ahead = (median([one.pop(what) for one in first]) for what in (OPENING, AHEAD))
        with threads(1):
            board = opened(folder)
            again = [measured(explorer(board)) for _ in range(rounds)]
            panel = {words: [turned(box, quick) for _ in range(rounds)] for words, box in panels()}
    note = f"reads ahead for {ahead:.1f} s more"
    return [
        Row(f"explorer, {runs} runs: opening", seconds, None, None, "s", seconds, "", note=note),
        slowest(f"explorer, {runs} runs: each control, first use", first),
        slowest(f"explorer, {runs} runs: each control", again),
        *(slowest(f"{words}: each control", found) for words, found in panel.items()),
    ]


def first_uses(folder: str) -> dict[str, float]:
    """Seconds of opening, of what is then read ahead, and of each control for the first time."""
    with threads(1):
        started = time.perf_counter()
        board = opened(folder)
        there = time.perf_counter()
        for thread in threading.enumerate():
            if thread.name == "read ahead":
                thread.join()
        found = {OPENING: there - started, AHEAD: time.perf_counter() - there}
        return found | measured(explorer(board))


def opened(folder: str) -> Dashboard:
    """An explorer that follows nothing."""
    board = Dashboard(Choice(folder))
    board.follow.value = False
    return board


def explorer(board: Dashboard) -> Actions:
    """What is clicked in the explorer, in an order that a person might take."""
    few = [row["id"] for row in board.table.rows][:: max(1, len(board.table.rows) // FEW)]

    def to(widget: Any, value: Any, name: str = "value") -> Callable[[], None]:
        return lambda: setattr(widget, name, value)

    yield "search", to(board.search, "rank=8 galore")
    yield "no search", to(board.search, "")
    yield "field", to(board.fields["label"], "galore")
    yield "no field", to(board.fields["label"], "all")
    yield "sort", to(board.table, ["loss", False], "sort")
    yield "choose a few", to(board.table, few[:FEW], "selected")
    yield "metric", to(board.metric, "loss")
    yield "x axis", to(board.x, "seconds")
    yield "choose all", board.all.click
    for plot in ("tradeoff", "heat", "spectra", "memory", "curves"):
        yield f"{plot} of all", to(board.plot, plot)
    yield "choose none", board.none.click
    yield "single runs", to(board.rows, False)
    yield "choose all single runs", board.all.click
    yield "no single runs", board.none.click
    yield "means", to(board.rows, True)
    yield "choose a few again", to(board.table, few[:FEW], "selected")
    for plot in ("tradeoff", "heat", "spectra", "memory", "curves"):
        yield plot, to(board.plot, plot)
    yield "another metric", to(board.metric, "validation_loss")
    yield "another x axis", to(board.x, "tokens_seen")
    yield "choose none again", board.none.click
    yield "sort back", to(board.table, ["label", False], "sort")
    yield "read the folder again", board.refresh


def panels() -> Iterator[tuple[str, Any]]:
    """Each panel of the notebooks, by what it shows."""
    W = toy.target()
    memory = RunConfig(model="60m", method="galore", rank=128, steps=1000, precision="bf16")
    runs = find_runs(kept_study("spectra"))
    yield "nearest matrix of rank r", shown(matrix_toy.approximate, W, 4, headless=False)
    for method in ("low-rank", "galore", "fira"):
        settings = toy.Settings(method, rank=4)
        yield f"fit by {method}", shown(matrix_toy.explore, W, settings, headless=False)
    yield "rank and reset", shown(grid.explore, kept_study("rank_and_reset"), live=True)
    wanted = runs, "singular_values", "q_proj"
    yield "spectra of kept runs", shown(notebook.choose_spectra, *wanted, headless=False)
    yield "what fits: first line", shown(notebook.what_fits, memory, 24 * 10**9, headless=False)


def shown(widget: Callable[..., Any], *given: Any, **options: Any) -> Any:
    """The box that a notebook's cell displays."""
    boxes: list[Any] = []
    with patch("IPython.display.display", boxes.append):
        widget(*given, **options)
    return boxes[0]


def parts(box: Any) -> Iterator[Any]:
    """The widgets within a box, itself last."""
    for part in getattr(box, "children", ()):
        yield from parts(part)
    yield box


def turned(box: Any, quick: bool) -> dict[str, float]:
    """Seconds until the panel's text first changes, by control: each is moved on, and back."""
    heard: list[float] = []

    def hear(change: Any) -> None:
        if not change["new"].startswith("<img"):
            heard.append(time.perf_counter())

    texts = [part for part in parts(box) if type(part).__name__ == "HTML"]
    for text in texts:
        text.observe(hear, "value")
    found = {}
    knobs = [part for part in parts(box) if not getattr(part, "disabled", True)]
    for knob in knobs[:1] if quick else knobs:
        for words, name, value in moves(knob):
            heard.clear()
            started = time.perf_counter()
            setattr(knob, name, value)
            found[f"{knob.description}, {words}"] = (heard or [time.perf_counter()])[0] - started
    return found


def moves(knob: Any) -> list[tuple[str, str, Any]]:
    """A control's next value and the one that it has: words, trait and value of each."""
    if hasattr(knob, "index"):
        at = knob.index
        return [("on", "index", at + 1 if at == 0 else at - 1), ("back", "index", at)]
    value = knob.value
    other = not value if isinstance(value, bool) else value + (knob.step or 1)
    return [("on", "value", other), ("back", "value", value)]


def measured(actions: Actions) -> dict[str, float]:
    """Seconds of each action, in turn."""
    found = {}
    for name, act in actions:
        started = time.perf_counter()
        act()
        found[name] = time.perf_counter() - started
    return found


def slowest(words: str, found: list[dict[str, float]]) -> Row:
    """The callback with the largest median over the rounds."""
    medians = {name: median([one[name] for one in found]) for name in found[0]}
    name = max(medians, key=medians.__getitem__)
    seconds = medians[name]
    note = f"the slowest of {len(medians)}: {name}"
    return Row(words, seconds, None, None, "s", seconds, f"≤ {LIMIT:g}", note=note)
