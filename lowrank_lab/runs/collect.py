"""Finished runs of several folders, of several machines perhaps, in one folder."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowrank_lab.config import InputError
from lowrank_lab.runs.files import write_json
from lowrank_lab.runs.kept import KeptRecords, kept_run
from lowrank_lab.runs.records import write_folder
from lowrank_lab.runs.run import RUNNER_FILES, Run, find_runs

# What is copied; whatever else lies in a run's folder stays where it is.
FILES = sorted(
    RUNNER_FILES
    | {"config.json", "metrics.jsonl", "spectra.jsonl", "memory.json", "model.safetensors"}
)
LAST = "result.json"  # says that the run has finished
NOT_OF_THE_RESULT = {"seconds"}


@dataclass
class Merged:
    """What became of the runs that were found, by run id."""

    copied: list[str] = field(default_factory=list)
    there: list[str] = field(default_factory=list)  # the same run with the same results
    unfinished: list[Path] = field(default_factory=list)


def merge(out: Path | str, folders: Sequence[Path | str]) -> Merged:
    """Copy the finished runs at or below some folders into `out`, each under its run id.

    Each keeps what it ran on. A run that is in several folders with the same results (times
    left out) is kept once; runs that have not finished are left out.

    Raises:
        InputError: no runs; a run with different results in two places; or a run's configuration
            that no folder can be named after. Nothing is copied then.
    """
    out = Path(out)
    found, merged = _by_id(find_runs(out)) if out.is_dir() else {}, Merged()
    todo: dict[str, Run] = {}
    for folder in folders:
        runs = find_runs(folder)
        if not runs:
            raise InputError("folder", str(folder), "it holds no runs")
        for run in runs:
            if not run.finished:
                merged.unfinished.append(run.folder)
                continue
            if not _is_own(run):
                raise InputError("run", str(run.folder), "its records are links to elsewhere")
            name = run_id_of(run)
            if name in found:
                _check_same(found[name], run)
                merged.there.append(name)
                continue
            if (out / name).exists():
                raise InputError("out", str(out / name), "it is there, and is no finished run")
            found[name] = todo[name] = run
    for name, run in todo.items():
        copy_run(run.folder, out / name)
        merged.copied.append(name)
    return merged


def finished_run(run_id: str, places: Sequence[Path]) -> Path | None:
    """A finished run, STUDY/RUN, of a study in one of these places; the first of several.

    The study is a folder of run folders or a kept study.
    """
    paths = (s / run_id for place in places for s in sorted(place.glob("*")) if s.is_dir())
    runs = (Run(p) for p in paths if (p / "config.json").exists() or kept_run(p) is not None)
    finished = (run for run in runs if run.finished and _is_own(run))
    return next((run.folder for run in finished if run.config.run_id == run_id), None)


def run_id_of(run: Run) -> str:
    """The run's id, which is safe as a folder's name.

    Raises:
        InputError: its configuration holds signs that would lead elsewhere.
    """
    name = run.config.run_id
    if not re.fullmatch(r"[\w.+-]+", name) or name.startswith("."):
        raise InputError("run", str(run.folder), f"no folder can be named after {name!r}")
    return name


def _by_id(runs: Sequence[Run]) -> dict[str, Run]:
    return {run_id_of(run): run for run in runs if run.finished}


def _check_same(one: Run, other: Run) -> None:
    if one.folder.resolve() == other.folder.resolve():
        return
    ours, theirs = _result(one), _result(other)
    differing = sorted(k for k in ours | theirs if ours.get(k) != theirs.get(k))
    if differing:
        raise InputError(
            "run", str(other.folder),
            f"it is the same run as {one.folder}, with another {', '.join(differing)}",
        )  # fmt: skip


def _result(run: Run) -> dict[str, Any]:
    return {k: v for k, v in run.result.items() if k not in NOT_OF_THE_RESULT}


def copy_run(source: Path, target: Path, label: str | None = None) -> None:
    """Copy a run's files so that its folder is there whole or not at all; links aren't followed.

    Args:
        source: its folder, or STUDY/RUN of a kept study, whose records become such files.
        target: a folder that isn't there.
        label: what the copy is called, instead of the run's own label.
    """
    partial = target.with_name(f".partial-{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if not source.exists() and (kept := kept_run(source)) is not None:
        write_folder(kept, partial)
    for name in (name for name in [*FILES, LAST] if _is_plain(source / name)):
        shutil.copy2(source / name, partial / name)
    if label is not None:
        facts = json.loads((partial / "config.json").read_text())
        write_json(partial / "config.json", facts | {"label": label})
    partial.rename(target)


def _is_own(run: Run) -> bool:
    """Whether its records are its own: in a kept study, or in files that are no links."""
    plain = (_is_plain(run.folder / name) for name in ("config.json", LAST))
    return isinstance(run.records, KeptRecords) or all(plain)


def _is_plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()
