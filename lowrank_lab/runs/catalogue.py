"""The runs of a folder at a glance: configuration, state, last loss and memory.

A run that cannot be read is an entry too, with the state *broken* and the reason; the others are
listed as usual. Entries are cached until the files of their run change.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from lowrank_lab.config import InputError
from lowrank_lab.paths import data_folder, kept_folders
from lowrank_lab.runs.files import lock_holder
from lowrank_lab.runs.kept import RUNS, open_study
from lowrank_lab.runs.run import Run, runs_folder

STATES = ("finished", "training", "stopped", "failed", "broken")
FILES = ("config.json", "metrics.jsonl", "spectra.jsonl", "memory.json", "result.json",
         "failed.json", ".lock")  # fmt: skip
SILENT = 600.0  # seconds without a new step after which a run on another machine counts as stopped
TAIL = 1 << 16  # bytes at the end of metrics.jsonl that are searched for the last evaluation

Stamp = tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class Entry:
    """One run: what a table of runs shows, and the stamp of its files."""

    name: str
    folder: Path
    state: str = "finished"
    reason: str = ""  # the error of a failed or broken run
    label: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    step: int = 0
    loss: float = math.nan  # last validation loss, nats per token
    memory: float = math.nan  # weights and optimizer states, bytes
    stamp: Stamp = ()

    @property
    def seed(self) -> int | None:
        return self.config.get("seed")

    @cached_property
    def without_seed(self) -> str:
        """Label and configuration as JSON: equal for runs that differ in their seed alone."""
        config = {name: value for name, value in self.config.items() if name != "seed"}
        return json.dumps([self.label, config], sort_keys=True, default=str)


def read_catalogue(folder: str) -> list[Entry]:
    """Entries of all runs at or below a folder, sorted by path; hidden folders are skipped.

    Args:
        folder: a folder of run folders or kept studies, looked up as in `load_runs`.

    Raises:
        InputError: there is no such folder, or it has no runs.
    """
    place = runs_folder(folder)
    if not place.is_dir():
        if (place.parent / RUNS).is_file():
            return [entry for entry in [_entry_of(place, place.name)] if entry is not None]
        raise InputError("folder", folder, f"there is no such folder, here or in {data_folder()}")
    closed: list[OSError] = []
    found = _found(place, closed.append)
    entries = [entry for name, path in found if (entry := _entry_of(path, name)) is not None]
    for error in closed:
        path = Path(error.filename)
        entries.append(Entry(path.name, path, "broken", str(error.strerror), path.name))
    if not entries:
        raise InputError("folder", folder, "it holds no runs")
    return sorted(entries, key=lambda entry: entry.folder)


def folders_with_runs() -> list[str]:
    """Folders to choose from: those in data/runs and data/study, and in the working directory."""
    own = data_folder()
    places = {"runs": own / "runs", **{f"study{i}": p for i, p in enumerate(kept_folders())}}
    found: dict[str, None] = {}
    for place in [*places.values(), Path.cwd()]:
        inside = place.name if place in places.values() else ""
        for path in sorted(place.iterdir()) if place.is_dir() else ():
            if not path.name.startswith(".") and path.is_dir() and _holds_runs(path):
                found[f"{inside}/{path.name}" if inside else path.name] = None
    return list(found)


def _holds_runs(folder: Path) -> bool:
    """Whether a folder is a kept study, or has a run folder directly inside."""
    if (folder / RUNS).is_file():
        return True
    return next(folder.glob("*/config.json"), None) is not None


def _found(place: Path, report: Callable[[OSError], None]) -> Iterator[tuple[str, Path]]:
    """Name and path of each run at or below a folder, in run folders and kept studies.

    Args:
        report: called for each folder that cannot be listed.
    """
    for root, folders, files in os.walk(place, onerror=report):
        folders[:] = [name for name in folders if not name.startswith(".")]
        here = Path(root)
        inside = here.relative_to(place).as_posix()
        if "config.json" in files:
            yield (place.resolve().name if inside == "." else inside), here
        if RUNS in files:
            prefix = "" if inside == "." else f"{inside}/"
            try:
                names = list(open_study(here).runs)
            except InputError:
                yield f"{prefix}{RUNS}", here / RUNS  # listed as broken
                continue
            yield from ((f"{prefix}{name}", here / name) for name in names)


def _entry_of(folder: Path, name: str) -> Entry | None:
    """The entry of a run; None for an export, which has a config.json too."""
    if (folder / "generation_config.json").exists():
        return None
    training = _is_training(folder)
    stamp = (*_stamp(folder), ("training", int(training), 0))
    return _read(folder, name, stamp, training)


def _stamp(folder: Path) -> Stamp:
    """Name, time and size of each file of a run; of its study's file for a kept run."""
    found = []
    paths = [folder / name for name in FILES] if folder.is_dir() else [folder.parent / RUNS]
    for path in paths:
        try:
            stat = path.stat()
        except OSError:
            continue
        found.append((path.name, stat.st_mtime_ns, stat.st_size))
    return tuple(found)


@lru_cache(maxsize=8192)
def _read(folder: Path, name: str, stamp: Stamp, training: bool) -> Entry:
    """Read an entry; what cannot be read is broken, for whatever reason."""
    try:
        run = Run(folder)
        config, label = run.facts["config"], run.label
        result, memory = run.records.result, run.records.memory
        step, loss = _last(folder) if result is None else _final(result)
        size = _held(memory) if memory else _held_at_end(result)
    except (InputError, OSError, ValueError, KeyError, TypeError) as error:
        reason = error.allowed if isinstance(error, InputError) else _in_words(error)
        return Entry(name, folder, "broken", reason, name, stamp=stamp)
    state, reason = "finished" if result is not None else "training" if training else "stopped", ""
    if state == "stopped" and (folder / "failed.json").exists():
        state, reason = "failed", _error_of(folder / "failed.json")
    return Entry(name, folder, state, reason, label, config, step, loss, size, stamp)


def _in_words(error: Exception) -> str:
    return f"it can't be read: {type(error).__name__}: {' '.join(str(error).split())[:120]}"


def _error_of(path: Path) -> str:
    try:
        return str(json.loads(path.read_text())["error"]).strip().splitlines()[-1]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return "its failed.json is damaged"


def _final(result: Mapping[str, Any]) -> tuple[int, float]:
    loss = result.get("validation_loss", result.get("test_loss"))
    return int(result.get("steps") or 0), math.nan if loss is None else float(loss)


def _last(folder: Path) -> tuple[int, float]:
    """The last step of a run in progress, and its last validation loss (NaN before the first)."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return 0, math.nan
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        lines = file.read().decode(errors="replace").splitlines()
    step = 0
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except ValueError:  # the first or last line, which is not complete
            continue
        step = max(step, row["step"])
        if row.get("validation_loss") is not None:
            return step, float(row["validation_loss"])
    return step, math.nan


def _held(memory: Mapping[str, int]) -> float:
    return float(memory["weights"] + memory["optimizer_states"])


def _held_at_end(result: Mapping[str, Any] | None) -> float:
    if result is None:
        return math.nan
    parts = (result.get(name) for name in ("weight_bytes", "optimizer_state_bytes"))
    return float(sum(math.nan if part is None else part for part in parts))


def _is_training(folder: Path) -> bool:
    """Whether a process trains in a run folder, by the file that locks it (`files.locked`).

    On another machine: whether it has written a step within SILENT seconds.
    """
    try:
        pid, node = lock_holder(folder)
        if node == platform.node():
            os.kill(pid, 0)
            return True
        return time.time() - (folder / "metrics.jsonl").stat().st_mtime < SILENT
    except PermissionError:  # a process of another user
        return True
    except (OSError, ValueError, OverflowError):  # no lock, or its process has ended
        return False
