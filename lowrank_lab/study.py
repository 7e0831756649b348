"""A study file → runs by papermill, in parallel, resumable → table, figures and report.

A study file is YAML:

    description: what is asked
    base: {model: micro, tokens: 4000000}          # fields of RunConfig, for all runs
    variants:                                      # named changes to the base
      full rank: {method: full-rank, lr: 1.0e-2}
      low rank: {method: low-rank}
    grid: {rank: [8, 16]}                          # every combination, with every variant
    seeds: [0, 1, 2]

Each run is a notebook executed in a process of its own, in the run's folder
`data/runs/<study>/<run id>/`. What is done is not done again; what was killed goes on from its
checkpoint.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lowrank_lab.config import InputError, RunConfig, data_folder, nearest
from lowrank_lab.jobs import Job, execute, known_parameters, parameter_names, read_record
from lowrank_lab.train import check

KEYS = {"description", "notebook", "compare", "base", "variants", "grid", "seeds"}


@dataclass(frozen=True)
class Study:
    """A study file, read and checked."""

    name: str
    description: str
    notebook: Path
    compare: Path
    runs: dict[str, tuple[str, RunConfig]]  # run id → label, resolved configuration


def load_study(path: Path | str, seeds: list[int] | None = None) -> Study:
    """Read a study file and check every run in it, before anything starts.

    Args:
        seeds: instead of those in the file.

    Raises:
        InputError: one line that names the file, the key or field, and what is allowed.
    """
    path = Path(path)
    content = _read_yaml(path) | ({} if seeds is None else {"seeds": seeds})
    for name in content:
        if name not in KEYS:
            raise InputError(
                f"{path.name}: {name}", content[name], f"no such key; {nearest(name, KEYS)}"
            )
    kinds: dict[str, type] = {
        "base": dict, "variants": dict, "grid": dict, "seeds": list, "description": str,
        "notebook": str, "compare": str,
    }  # fmt: skip
    for name, kind in kinds.items():
        if name in content and not isinstance(content[name], kind):
            words = {"dict": "a mapping", "list": "a list", "str": "text"}[kind.__name__]
            raise InputError(f"{path.name}: {name}", content[name], f"must be {words}")
    runs: dict[str, tuple[str, RunConfig]] = {}
    for label, fields in _combinations(content, path):
        try:
            config, _ = check(RunConfig(**fields))
        except InputError as error:
            raise InputError(
                f"{path.name}: {label}: {error.field}", error.value, error.allowed
            ) from None
        runs.setdefault(config.run_id, (label, config))
    notebooks = [
        _notebook(path, content.get(key, default))
        for key, default in (("notebook", "02_run"), ("compare", "03_compare"))
    ]
    return Study(path.stem, content.get("description", ""), notebooks[0], notebooks[1], runs)


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError("study", str(path), "there is no such file")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", path.stem):
        raise InputError("study", path.name, "its name may hold letters, digits, _ and -")
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError("study", str(path), f"not YAML: {error}") from None
    if not isinstance(content, dict):
        raise InputError(
            "study", str(path), "it must hold a mapping with base, variants, grid, seeds"
        )
    return {str(key): value for key, value in content.items()}


def _combinations(content: dict[str, Any], path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Label and fields of every run: variants × grid × seeds."""
    base, grid = content.get("base", {}), content.get("grid", {})
    variants = content.get("variants", {"": {}})
    seeds = content.get("seeds", [0])
    for name, values in [*grid.items(), ("seeds", seeds)]:
        if not isinstance(values, list) or not values:
            raise InputError(f"{path.name}: {name}", values, "must be a list with something in it")
    if not variants:
        raise InputError(
            f"{path.name}: variants", variants, "must name at least one, or be left out"
        )
    for label, changes in variants.items():
        if not isinstance(changes, dict):
            raise InputError(
                f"{path.name}: variants: {label}", changes, "must be a mapping of fields"
            )
        for values in itertools.product(*grid.values()):
            point = dict(zip(grid, values, strict=True))
            fields = {**base, **changes, **point}
            words = [str(label or fields.get("method", "full-rank"))]
            words += [f"{name.replace('_', ' ')} {value}" for name, value in point.items()]
            for seed in seeds:
                yield ", ".join(words), {**fields, "seed": seed}


def _notebook(study: Path, name: str) -> Path:
    """A notebook named in a study file: a file of the folder above the studies."""
    folder = study.resolve().parent.parent
    path = (folder / f"{name}.ipynb").resolve()
    if not path.is_file() or not path.is_relative_to(folder):
        known = [p.stem for p in folder.glob("*.ipynb")]
        raise InputError(f"{study.name}: notebook", name, nearest(name, known))
    return path


def run_study(
    path: Path | str,
    *,
    out: Path | None = None,
    jobs: int | None = None,
    retry: bool = False,
    seeds: list[int] | None = None,
    report: Callable[[list[Job]], None] = lambda jobs: None,
) -> tuple[list[Job], Path | None]:
    """Execute what a study file asks for and isn't done yet, then the comparison and the report.

    Args:
        out: the study's folder; by default data/runs/<name of the file>.
        jobs: notebooks at a time; by default one a CPU core (each has one thread) or CUDA device.
        retry: execute again what failed before.
        seeds: instead of those in the file.
        report: called about twice a second with all jobs.

    Returns:
        The jobs, and the path of report.html (None if a run failed).
    """
    study = load_study(path, seeds)
    folder = out if out is not None else data_folder() / "runs" / study.name
    folder.mkdir(parents=True, exist_ok=True)
    todo = [
        _run_job(study.notebook, folder / run_id, label, config)
        for run_id, (label, config) in study.runs.items()
    ]
    execute(todo, jobs, retry, report)
    if any(job.state != "done" for job in todo):
        return todo, None
    results = {job.folder.name: read_record(job.folder / "result.json") for job in todo}
    parameters = {
        "folder": str(folder),
        "title": study.name,
        "description": study.description,
        "out": str(folder),
    }
    parameters["results"] = hashlib.sha256(json.dumps(results).encode()).hexdigest()[:16]
    comparison = Job(
        "comparison",
        folder / "comparison",
        study.compare,
        known_parameters(study.compare, parameters),
    )
    execute([comparison], 1, True, lambda jobs: report([*todo, *jobs]))
    page = folder / "report.html"
    return [*todo, comparison], page if page.exists() else None


def _run_job(notebook: Path, folder: Path, label: str, config: RunConfig) -> Job:
    """The job of one run: fields that the notebook doesn't take by name go into `more`."""
    fields = {k: v for k, v in config.model_dump().items() if v is not None}
    given = {"folder": str(folder), "label": label, "headless": True}
    names = parameter_names(notebook)
    direct = {name: value for name, value in fields.items() if name in names}
    more = {name: value for name, value in fields.items() if name not in names}
    return Job(f"{label}, seed {config.seed}", folder, notebook, {**given, **direct, "more": more})
