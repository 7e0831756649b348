"""Planning a study: its jobs, the state of each, and whether they fit on the machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lowrank_lab.config import InputError, ResolvedConfig
from lowrank_lab.memory.formulas import GB
from lowrank_lab.paths import data_folder, kept_folders
from lowrank_lab.planning.resources import Resources, free_disk, resources_of_each
from lowrank_lab.runs.collect import finished_run
from lowrank_lab.studies.job import Job, known_parameters, parameter_names, plan_states, read_record
from lowrank_lab.studies.study_file import Study, load_study


@dataclass(frozen=True)
class Plan:
    """The jobs of a study, each in its present state, and what each needs."""

    study: Study
    folder: Path
    jobs: list[Job]
    needs: list[Resources]


def plan_study(
    study: Path | str,
    *,
    out: Path | None = None,
    retry: bool = False,
    seeds: list[int] | None = None,
    only: Sequence[str] = (),
    reuse: bool = False,
    elsewhere: bool = False,
) -> Plan:
    """The jobs of a study and what they need; no notebook is executed, no run folder written.

    Args:
        study: a path, or the name of one of the library's own studies.
        only: variants to take; all of them if empty.
        reuse: finished runs of other studies or of other training code count as trained.
        elsewhere: estimate for a CUDA device; neither the device nor a corpus has to be here.

    Raises:
        InputError: an error in the file, or a run folder that leads out of the study's folder.
    """
    read = load_study(study, seeds, only, corpora=not elsewhere)
    folder = (out if out is not None else data_folder() / "runs" / read.name).resolve()
    configs = (config for _, config in read.runs.values())
    needs = list(resources_of_each(configs, cuda=True if elsewhere else None))
    places = data_folder() / "runs", *kept_folders()
    todo = []
    for (run_id, (label, config)), need in zip(read.runs.items(), needs, strict=True):
        place = folder / run_id
        if place.parent != folder or place.resolve() != place:
            raise InputError("out", str(place), "it leads out of the study's folder")
        job = _run_job(read.notebook, place, label, config)
        found = finished_run(run_id, places) if reuse and not place.exists() else None
        job = replace(job, memory=need.memory, device_memory=need.device)
        todo.append(replace(job, any_version=reuse, source=found))
    plan_states(todo, retry)
    comparison_job(read, folder, todo)  # refuses a notebook that lacks a parameter
    return Plan(read, folder, todo, needs)


def _run_job(notebook: Path, folder: Path, label: str, config: ResolvedConfig) -> Job:
    """The job of one run; fields that the notebook has no parameter for go into `more`."""
    fields = {k: v for k, v in config.model_dump().items() if v is not None}
    given = {"folder": str(folder), "label": label, "headless": True}
    names = parameter_names(notebook)
    direct = {name: value for name, value in fields.items() if name in names}
    more = {name: value for name, value in fields.items() if name not in names}
    return Job(f"{label}, seed {config.seed}", folder, notebook, {**given, **direct, "more": more})


def comparison_job(study: Study, folder: Path, todo: list[Job]) -> Job:
    """The job that compares the runs, once they are done.

    Raises:
        InputError: its notebook lacks one of the parameters.
    """
    results = {job.folder.name: read_record(job.folder / "result.json") for job in todo}
    parameters: dict[str, Any] = {
        "folder": str(folder),
        "title": study.name,
        "description": study.description,
        "out": str(folder),
        "results": hashlib.sha256(json.dumps(results).encode()).hexdigest()[:16],
    }
    if study.pairs or "pairs" in parameter_names(study.compare):  # whose own value isn't meant
        parameters["pairs"] = [list(pair) for pair in study.pairs]
    known_parameters(study.compare, parameters)
    return Job("comparison", folder / "comparison", study.compare, parameters)


def check_fits(plan: Plan, memory: int | None, device: int | None = None) -> None:
    """Refuse a study if one of its runs alone doesn't fit, or if the disk can't keep all results.

    Args:
        memory: bytes that the machine has for a run; None if that isn't known.
        device: bytes of a CUDA device.
    """
    free, kept, working = free_disk(plan.folder), 0, 0
    for job, need in zip(plan.jobs, plan.needs, strict=True):
        if job.state != "queued":
            continue
        there = sum(p.stat().st_size for p in job.folder.rglob("*") if p.is_file())
        kept += max(0, need.kept - there)
        working = max(working, need.disk - max(need.kept, there))
        run = f"{plan.study.name}: {job.name}"
        _check_need(run, "memory", need.memory, memory)
        _check_need(run, "memory of the CUDA device", need.device, device)
        _check_need(run, "disk", need.disk - there, free)
    _check_need(f"{plan.study.name}: all runs", "disk", kept + working, free)


def _check_need(run: str, what: str, needed: int, available: int | None) -> None:
    if available is not None and needed > available:
        value = f"{needed / GB:.2f} GB of {what}"
        raise InputError(run, value, f"there are {available / GB:.2f} GB")
