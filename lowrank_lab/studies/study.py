"""A study file → runs by papermill, in parallel, resumable → table, figures and report.

A study file is YAML:

    description: what is asked
    base: {model: micro, tokens: 4000000}          # fields of RunConfig, for all runs
    variants:                                      # named changes to the base; grid and seeds too
      full rank: {method: full-rank, lr: 1.0e-2}
      low rank: {method: low-rank, grid: {lr: [0.005, 0.01]}, seeds: [0]}
    grid: {rank: [8, 16]}                          # every combination, with every variant
    seeds: [0, 1, 2]
    pairs: [[low rank, full rank]]                 # is the first below the second? for the report
    select: {from: tune, by: method, best: lr}     # what an earlier study chooses (selection.py)
    time_limit: 30m                                # a run that takes longer is ended, and failed

Each run is a notebook executed in a process of its own, in the run's folder
`data/runs/<study>/<run id>/`. What is done is not done again; what was killed goes on from its
checkpoint.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from lowrank_lab.config import InputError, ResolvedConfig, RunConfig, nearest
from lowrank_lab.memory.formulas import GB
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.paths import data_folder
from lowrank_lab.planning.resources import Need, device_memory, free_disk, machine_memory, needs_of
from lowrank_lab.runs.collect import copy_run, finished_run
from lowrank_lab.studies.dask_executor import connect, execute_on, worker_memory
from lowrank_lab.studies.job import Job, known_parameters, parameter_names, read_record, settle
from lowrank_lab.studies.local_executor import execute
from lowrank_lab.studies.select import read_selection
from lowrank_lab.training.trainer import check

KEYS = {
    "description", "notebook", "compare", "base", "variants", "grid", "select", "seeds",
    "pairs", "time_limit",
}  # fmt: skip
OF_A_VARIANT = ("grid", "select", "seeds")  # its keys that are not fields of its runs
LONGEST_LABEL = 80


@dataclass(frozen=True)
class Study:
    """A study file, read and checked."""

    name: str
    description: str
    notebook: Path
    compare: Path
    runs: dict[str, tuple[str, ResolvedConfig]]  # run id → label, configuration
    time_limit: float | None = None  # seconds that a run may take
    pairs: tuple[tuple[str, str], ...] = ()  # labels (A, B): is A below B?


def load_study(
    path: Path | str,
    seeds: list[int] | None = None,
    only: Sequence[str] = (),
    *,
    corpora: bool = True,
) -> Study:
    """Read a study file and check every run in it, before anything starts.

    Args:
        seeds: instead of those in the file.
        only: the variants that are wanted; all of them if none is named.
        corpora: prepare them and check that they are long enough; without, they need not be there.

    Raises:
        InputError: one line that names the file, the key or field, and what is allowed.
    """
    path = Path(path)
    content = _read_yaml(path)
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
    limit = content.get("time_limit")
    limit = None if limit is None else seconds_of(limit, f"{path.name}: time_limit")
    runs: dict[str, tuple[str, ResolvedConfig]] = {}
    content["variants"] = _variants(content.get("variants", {"": {}}), only, path.name)
    for label, fields in _combinations(content, path, seeds):
        try:
            given = RunConfig(**fields)
            config = check(given)[0] if corpora else resolve(given)
        except InputError as error:
            raise InputError(
                f"{path.name}: {label}: {error.field}", error.value, error.allowed
            ) from None
        runs.setdefault(config.run_id, (label, config))
    notebooks = [
        _notebook(path, key, content.get(key, default))
        for key, default in (("notebook", "02_run"), ("compare", "03_compare"))
    ]
    labels = {label for label, _ in runs.values()}
    pairs = _pairs(content.get("pairs", []), labels, partly=bool(only), place=f"{path.name}: pairs")
    return Study(
        path.stem, content.get("description", ""), notebooks[0], notebooks[1], runs, limit, pairs,
    )  # fmt: skip


def _pairs(content: Any, labels: set[str], partly: bool, place: str) -> tuple[tuple[str, str], ...]:
    """The pairs of labels that a study asks about; of a part of its variants those that are there.

    Raises:
        InputError: not a list of two labels each, or a label that no run has.
    """
    if not isinstance(content, list):
        raise InputError(place, content, "must be a list of pairs of labels")
    found = []
    for pair in content:
        if not isinstance(pair, list) or len(pair) != 2 or pair[0] == pair[1]:
            raise InputError(place, pair, "must be two labels: is the first below the second?")
        missing = [label for label in pair if label not in labels]
        if missing and not partly:
            raise InputError(place, missing[0], f"no such label; {nearest(missing[0], labels)}")
        if not missing:
            found.append((str(pair[0]), str(pair[1])))
    return tuple(found)


def seconds_of(text: str | float, field: str = "time_limit") -> float:
    """`90s`, `30m`, `1h30m` or a number of seconds → seconds.

    Raises:
        InputError: it is none of these, or not above 0.
    """
    match = re.fullmatch(r"(?:([\d.]+)h)?(?:([\d.]+)m)?(?:([\d.]+)s?)?", str(text).strip())
    try:
        parts = [float(part or 0) for part in match.groups()] if match else [0.0]
    except ValueError:
        parts = [0.0]
    seconds = sum(part * unit for part, unit in zip(parts, (3600, 60, 1), strict=False))
    if not 0 < seconds < float("inf"):
        raise InputError(field, text, "a time above 0, like 90s, 30m or 1h30m")
    return seconds


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


def _combinations(
    content: dict[str, Any], path: Path, only_seeds: list[int] | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Label and fields of every run: variants × grids × seeds."""
    base, seeds = content.get("base", {}), content.get("seeds", [0])
    _check_lists({"seeds": seeds if only_seeds is None else only_seeds}, path.name)
    select = content.get("select")
    selection = None if select is None else read_selection(select, f"{path.name}: select")
    for label, changes in content["variants"].items():
        _check_variant(path.name, label, changes)
        grid = content.get("grid", {}) | changes.get("grid", {})
        _check_lists(grid, f"{path.name}: variants: {label}" if "grid" in changes else path.name)
        given = base | {n: v for n, v in changes.items() if n not in OF_A_VARIANT}
        own_seeds = changes.get("seeds", seeds) if only_seeds is None else only_seeds
        for point in _points(grid):
            fields = with_fields(given, point)
            like = changes.get("select", {})
            found = {} if selection is None else selection.choose(str(label), fields, like)
            found = {n: v for n, v in found.items() if n not in point and not has(changes, n)}
            for chosen in _points(found):
                several = {n: v for n, v in chosen.items() if len(found[n]) > 1}
                words = [f"{_word(n)} {v}" for n, v in (point | several).items()]
                name = str(label or fields.get("method", "full-rank"))
                for seed in own_seeds:
                    yield ", ".join([name, *words]), with_fields(fields, {**chosen, "seed": seed})


def _variants(variants: dict[Any, Any], only: Sequence[str], study: str) -> dict[Any, Any]:
    """Those of a study's variants that are wanted, in the file's order."""
    if not variants:
        raise InputError(f"{study}: variants", variants, "must name at least one, or be left out")
    known = [str(label) for label in variants]
    for label in only:
        if label not in known:
            raise InputError("only", label, f"no such variant in {study}; {nearest(label, known)}")
    return {k: changes for k, changes in variants.items() if not only or str(k) in only}


def _check_variant(study: str, label: Any, changes: Any) -> None:
    if len(str(label)) > LONGEST_LABEL or not str(label).isprintable():
        allowed = f"a label is one line of at most {LONGEST_LABEL} printable characters"
        raise InputError(f"{study}: variants", label, allowed)
    place = f"{study}: variants: {label}"
    if not isinstance(changes, dict):
        raise InputError(place, changes, "must be a mapping of fields")
    for name in ("grid", "select"):
        if not isinstance(changes.get(name, {}), dict):
            raise InputError(f"{place}: {name}", changes[name], "must be a mapping of fields")
    if "seeds" in changes:
        _check_lists({"seeds": changes["seeds"]}, place)


def _points(grid: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    """Every combination of the values of a grid's fields."""
    for values in itertools.product(*grid.values()):
        yield dict(zip(map(str, grid), values, strict=True))


def _word(field: str) -> str:
    """What labels call a field."""
    return field.rpartition(".")[2].replace("_", " ")


def _check_lists(lists: dict[str, Any], place: str) -> None:
    for name, values in lists.items():
        if not isinstance(values, list) or not values:
            raise InputError(f"{place}: {name}", values, "must be a list with something in it")


def has(fields: dict[str, Any], name: str) -> bool:
    """Whether a field, or `method_options.NAME`, is among these."""
    outer, _, inner = name.partition(".")
    held = fields.get(outer)
    return inner in held if inner and isinstance(held, dict) else name in fields


def with_fields(fields: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Fields of a run with some set; `method_options.scale` sets one of its mapping."""
    changed = dict(fields)
    for name, value in changes.items():
        outer, _, inner = name.partition(".")
        held = changed.get(outer, {})
        if inner and isinstance(held, dict):
            changed[outer] = {**held, inner: value}
        else:
            changed[name] = value
    return changed


def _notebook(study: Path, key: str, name: str) -> Path:
    """A notebook named in a study file: a file of the folder above the studies."""
    folder = study.resolve().parent.parent
    path = (folder / f"{name.replace(chr(0), '')}.ipynb").resolve()
    if not path.is_file() or not path.is_relative_to(folder):
        known = [p.stem for p in folder.glob("*.ipynb")]
        raise InputError(f"{study.name}: {key}", name, nearest(name, known))
    return path


@dataclass(frozen=True)
class Plan:
    """What a study would do: its jobs in the state they are in, and what each needs."""

    study: Study
    folder: Path
    jobs: list[Job]
    needs: list[Need]


def plan_study(
    path: Path | str,
    *,
    out: Path | None = None,
    retry: bool = False,
    seeds: list[int] | None = None,
    only: Sequence[str] = (),
    reuse: bool = False,
    elsewhere: bool = False,
) -> Plan:
    """The jobs of a study, and what they need; nothing is executed or written.

    Args:
        only: the variants that are wanted; all of them if none is named.
        reuse: what other training code or other studies have finished counts, too.
        elsewhere: say what they need on a CUDA device; neither that nor a corpus has to be here.

    Raises:
        InputError: what is wrong in the file, or a run's folder that leads out of the study's.
    """
    study = load_study(path, seeds, only, corpora=not elsewhere)
    folder = (out if out is not None else data_folder() / "runs" / study.name).resolve()
    configs = (config for _, config in study.runs.values())
    needs = list(needs_of(configs, cuda=True if elsewhere else None))
    places = data_folder() / "runs", data_folder() / "study"
    todo = []
    for (run_id, (label, config)), need in zip(study.runs.items(), needs, strict=True):
        place = folder / run_id
        if place.parent != folder or place.resolve() != place:
            raise InputError("out", str(place), "it leads out of the study's folder")
        job = _run_job(study.notebook, place, label, config)
        found = finished_run(run_id, places) if reuse and not place.exists() else None
        todo.append(replace(job, memory=need.memory, any_version=reuse, source=found))
    settle(todo, retry)
    return Plan(study, folder, todo, needs)


def run_study(
    path: Path | str,
    *,
    out: Path | None = None,
    jobs: int | None = None,
    retry: bool = False,
    seeds: list[int] | None = None,
    only: Sequence[str] = (),
    reuse: bool = False,
    time_limit: float | None = None,
    dask: str | None = None,
    report: Callable[[list[Job]], None] = lambda jobs: None,
) -> tuple[list[Job], Path | None]:
    """Execute what a study file asks for and isn't done yet, then the comparison and the report.

    Args:
        out: the study's folder; by default data/runs/<name of the file>.
        jobs: notebooks at a time; by default one a CPU core (each has one thread) or CUDA device,
            and never more than the machine's memory holds.
        retry: execute again what failed before.
        seeds: instead of those in the file.
        only: the variants that are wanted; all of them if none is named.
        reuse: take over finished runs of these configurations from other studies and from the
            kept records, whatever version of the training code made them.
        time_limit: seconds after which a run is ended and counts as failed, instead of the file's.
        dask: address of a Dask scheduler that executes the runs, on machines that share the files.
        report: called about twice a second with all jobs.

    Returns:
        The jobs, and the path of report.html (None if a run failed).

    Raises:
        InputError: see `load_study`; also a run that fits neither memory nor disk.
    """
    planned = plan_study(path, out=out, retry=retry, seeds=seeds, only=only, reuse=reuse)
    study, folder, todo = planned.study, planned.folder, planned.jobs
    limit = study.time_limit if time_limit is None else time_limit
    for job in todo:
        if job.source is not None:
            copy_run(job.source, job.folder, job.parameters["label"])
    if dask is not None:
        with connect(dask) as client:
            check_fits(planned, worker_memory(client))
            folder.mkdir(parents=True, exist_ok=True)
            execute_on(client, todo, retry, report, limit)
    else:
        memory = machine_memory()
        check_fits(planned, memory, device_memory())
        folder.mkdir(parents=True, exist_ok=True)
        execute(todo, jobs, retry, report, limit, memory)
    if any(job.state != "done" for job in todo):
        return todo, None
    comparison = _comparison(study, folder, todo)
    execute([comparison], 1, True, lambda jobs: report([*todo, *jobs]))
    page = folder / "report.html"
    return [*todo, comparison], page if page.exists() else None


def check_fits(planned: Plan, memory: int | None, device: int | None = None) -> None:
    """Refuse a study one of whose runs can't fit by itself, or whose results can't all be kept.

    Args:
        memory: bytes that the machine has for a run; None if that isn't known.
        device: bytes of a CUDA device.
    """
    free, kept, working = free_disk(planned.folder), 0, 0
    for job, need in zip(planned.jobs, planned.needs, strict=True):
        if job.state != "queued":
            continue
        there = sum(p.stat().st_size for p in job.folder.rglob("*") if p.is_file())
        kept += max(0, need.kept - there)
        working = max(working, need.disk - max(need.kept, there))
        _check_need(planned, job.name, "memory", need.memory, memory)
        _check_need(planned, job.name, "memory of the CUDA device", need.device, device)
        _check_need(planned, job.name, "disk", need.disk - there, free)
    _check_need(planned, "all runs", "disk", kept + working, free)


def _check_need(planned: Plan, of: str, what: str, needed: int, has: int | None) -> None:
    if has is not None and needed > has:
        field, value = f"{planned.study.name}: {of}", f"{needed / GB:.2f} GB of {what}"
        raise InputError(field, value, f"there are {has / GB:.2f} GB")


def _comparison(study: Study, folder: Path, todo: list[Job]) -> Job:
    """The job that compares the runs, once they are done."""
    results = {job.folder.name: read_record(job.folder / "result.json") for job in todo}
    parameters: dict[str, Any] = {
        "folder": str(folder),
        "title": study.name,
        "description": study.description,
        "out": str(folder),
        "results": hashlib.sha256(json.dumps(results).encode()).hexdigest()[:16],
    }
    if study.pairs:
        parameters["pairs"] = [list(pair) for pair in study.pairs]
    known_parameters(study.compare, parameters)
    return Job("comparison", folder / "comparison", study.compare, parameters)


def _run_job(notebook: Path, folder: Path, label: str, config: ResolvedConfig) -> Job:
    """The job of one run: fields that the notebook doesn't take by name go into `more`."""
    fields = {k: v for k, v in config.model_dump().items() if v is not None}
    given = {"folder": str(folder), "label": label, "headless": True}
    names = parameter_names(notebook)
    direct = {name: value for name, value in fields.items() if name in names}
    more = {name: value for name, value in fields.items() if name not in names}
    return Job(f"{label}, seed {config.seed}", folder, notebook, {**given, **direct, "more": more})
