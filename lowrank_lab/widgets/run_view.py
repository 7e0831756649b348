"""What the run explorer shows of a folder: a plot of the chosen runs, its numbers, and one line.

Nothing here raises on what a folder lacks: the view's lines say it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lowrank_lab.analysis.run_groups import best_of_each, groups_of, titles_of
from lowrank_lab.config import InputError
from lowrank_lab.figures import png, svg
from lowrank_lab.figures.run_groups import X_AXES
from lowrank_lab.runs.catalogue import Entry, read_catalogue
from lowrank_lab.widgets.run_plots import DRAW, LAYERED, PLOTS, Choice, Chosen, View, in_words

FIRST = 6  # rows shown before any is chosen
MAX_ROWS = 12  # rows that a figure can name
MAX_MAPS = 6  # heat maps beside each other
NAMED = 3  # broken and failed runs that the line names
MISSING = {
    "curves": "no step trained yet", "tradeoff": "no loss or memory yet",
    "spectra": "no spectra yet", "heat": "no spectra yet", "memory": "no memory measured yet",
}  # fmt: skip
FILE_TYPES = {"png": "image/png", "svg": "image/svg+xml", "csv": "text/csv"}


def load_view(choice: Choice, entries: Sequence[Entry] | None = None) -> View:
    """Draw the plot of a choice; missing parts of the choice get their defaults.

    Args:
        entries: the folder's catalogue, if it has been read.

    Returns:
        The view. `View.line` says what is shown and what is missing: nothing is raised on a
        folder's contents.
    """
    try:
        known = read_catalogue(choice.folder) if entries is None else list(entries)
        return _view(choice, known)
    except InputError as error:
        return View(choice, str(error))
    except (OSError, ValueError, KeyError) as error:  # half written, moved or damaged
        return View(choice, f"{choice.folder} can't be read: {in_words(error)}")


def _view(choice: Choice, known: list[Entry]) -> View:
    chosen, wanted = _choose(choice, known)
    now = replace(choice, runs=tuple(e.name for g in chosen.groups for e in g.entries))
    view = View(now, trouble=_trouble(known), known=[e.name for e in known])
    if chosen.groups:
        DRAW[now.plot](view, chosen)
    view.line = _line(choice, view, chosen, wanted)
    return view


def _choose(choice: Choice, known: list[Entry]) -> tuple[Chosen, int]:
    """The chosen groups, or the first ones; and the number of those that were wanted."""
    names = set(choice.runs)
    readable = [entry for entry in known if entry.state != "broken"]
    groups = groups_of([e for e in readable if e.name in names], choice.over_seeds)
    if not groups:
        groups = best_of_each(groups_of(readable, choice.over_seeds), FIRST)
    shown = groups[: MAX_MAPS if choice.plot == "heat" else MAX_ROWS]
    return Chosen(shown, titles_of(shown)), len(groups)


def _line(choice: Choice, view: View, chosen: Chosen, wanted: int) -> str:
    """One line: what the view shows, and what is missing."""
    now, shown = view.choice, len(chosen.groups)
    of = f" of {wanted} chosen" if wanted > shown else ""
    what = "configuration" if now.over_seeds else "run"
    count = f"{shown}{of} {what}{'s' if max(shown, wanted) != 1 else ''}"
    parts = [f"{count} ({_runs(len(chosen.entries))})" if now.over_seeds else count]
    if view.figure is None:
        parts.append(MISSING[now.plot])
    elif now.plot == "curves":
        parts.append(f"{now.metric} against {X_AXES[now.x]}")
        parts += [f"no {choice.metric} yet"] if now.metric != choice.metric else []
    elif now.plot in LAYERED:
        at = f"step = {now.step}" if now.plot == "spectra" else f"{len(view.steps)} steps"
        parts += [f"layer {now.layer}", at]
    else:
        parts.append(PLOTS[now.plot])
    unfinished = [e for e in chosen.entries if e.state != "finished"]
    parts += [f"{e.name} {e.state} at step {e.step}" for e in unfinished[:NAMED]]
    parts += [f"{len(unfinished) - NAMED} more unfinished"] if len(unfinished) > NAMED else []
    return ", ".join([*parts, *chosen.unread[:NAMED]])


def _runs(count: int) -> str:
    return f"{count} run{'' if count == 1 else 's'}"


def _trouble(entries: Sequence[Entry]) -> str:
    """Broken and failed runs, counted and named."""
    parts = []
    for state in ("broken", "failed"):
        found = [entry for entry in entries if entry.state == state]
        if found:
            named = [f"{entry.name} ({entry.reason})" for entry in found[:NAMED]]
            rest = [f"{len(found) - NAMED} more"] if len(found) > NAMED else []
            parts.append(f"{len(found)} of {len(entries)} {state}: {', '.join(named + rest)}")
    return "; ".join(parts)


def file_of(view: View, kind: str) -> tuple[str, bytes]:
    """A name and the contents of a file with a view's picture (png, svg) or its numbers (csv)."""
    now = view.choice
    parts = [Path(now.folder).name or "runs", now.plot]
    parts += [now.metric] if now.plot == "curves" else [now.layer] if now.plot in LAYERED else []
    name = f"{'-'.join(parts)}.{kind}"
    if kind == "csv" or view.figure is None:
        return name, view.table.to_csv(index=False).encode()
    return name, png(view.figure) if kind == "png" else svg(view.figure)
