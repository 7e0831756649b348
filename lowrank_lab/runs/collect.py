"""Merge finished runs from several folders or machines into one folder."""

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

# The files that are copied; other files in a run folder are not.
FILES = sorted(
    RUNNER_FILES
    | {"config.json", "metrics.jsonl", "spectra.jsonl", "memory.json", "model.safetensors"}
)
LAST = "result.json"  # marks a finished run; copied last
NOT_OF_THE_RESULT = {"seconds"}


@dataclass
class Merged:
    """The outcome of a merge: run ids, and folders of unfinished runs."""

    copied: list[str] = field(default_factory=list)
    there: list[str] = field(default_factory=list)  # already in `out`, with the same results
    unfinished: list[Path] = field(default_factory=list)


def merge(out: Path | str, folders: Sequence[Path | str]) -> Merged:
    """Copy the finished runs at or below `folders` into `out`, each under its run id.

    Copies keep `ran_on`, the machine and versions of the run. A run found several times with the
    same results (times excluded) is copied once. Unfinished runs are skipped.

    Raises:
        InputError: there are no runs; a run has different results in two places; or a run id is
            not a valid folder name. Nothing is copied then.
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
    """The first finished run with this id in any study below `places`, as STUDY/RUN, or None.

    A study is a folder of run folders or a kept study.
    """
    paths = (s / run_id for place in places for s in sorted(place.glob("*")) if s.is_dir())
    runs = (Run(p) for p in paths if (p / "config.json").exists() or kept_run(p) is not None)
    finished = (run for run in runs if run.finished and _is_own(run))
    return next((run.folder for run in finished if run.config.run_id == run_id), None)


def run_id_of(run: Run) -> str:
    """The run's id, checked to be safe as a folder name.

    Raises:
        InputError: the id has characters that are not allowed in a folder name.
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
    """Copy a run's files atomically; links are not followed.

    Args:
        source: the run folder, or STUDY/RUN in a kept study; its records are written as files.
        target: a folder that does not exist yet.
        label: label of the copy; by default the run's own.
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
    """Whether the records are in a kept study, or in files that are not links."""
    plain = (_is_plain(run.folder / name) for name in ("config.json", LAST))
    return isinstance(run.records, KeptRecords) or all(plain)


def _is_plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()
