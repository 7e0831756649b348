"""Notebooks as jobs: what to execute, with which parameters, and the state it is in.

`done.json` in a job's folder, written last, has the hash of what its notebook was made from;
`failed.json` has that hash and the error.
"""

from __future__ import annotations

import ast
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lowrank_lab.config import InputError, nearest
from lowrank_lab.runs.files import read_jsonl
from lowrank_lab.training.provenance import source_hash

PARTIAL = ".partial.ipynb"  # the notebook while it is being executed
State = Literal["queued", "running", "done", "failed"]


@dataclass
class Job:
    """One notebook to execute, and its state."""

    name: str
    folder: Path
    notebook: Path
    parameters: dict[str, Any]
    works_in: Path | None = None  # the notebook's working directory, if it isn't `folder`
    memory: int = 0  # estimated peak, in bytes
    device_memory: int = 0  # the same of a CUDA device
    any_version: bool = False  # accept a finished run of another version of the training code
    source: Path | None = None  # a finished run of another study, to copy
    state: State = "queued"
    error: str = ""
    seconds: float = 0.0

    @property
    def key(self) -> str:
        """Hash of everything that decides the executed notebook; its folder is no part of it."""
        place = str(self.folder)
        values = {name: value for name, value in self.parameters.items() if value != place}
        source = [self.notebook.read_text(), source_hash(), values]
        return hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()

    @property
    def finished(self) -> bool:
        return read_record(self.folder / "done.json").get("key") == self.key

    @property
    def trained(self) -> bool:
        """Whether the training is finished, so that only the notebook is left to execute."""
        there = self.any_version and (self.folder / "result.json").exists()
        return there or self.source is not None

    @property
    def failed_before(self) -> bool:
        return read_record(self.folder / "failed.json").get("key") == self.key


def parameter_names(notebook: Path) -> set[str]:
    """The names assigned in the notebook's cell tagged `parameters`.

    Raises:
        InputError: the notebook has no such cell.
    """
    cells = json.loads(notebook.read_text())["cells"]
    tagged = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
    if not tagged:
        raise InputError("notebook", notebook.name, "it has no cell tagged parameters")
    tree = ast.parse("".join(tagged[0]["source"]))
    targets = [
        target
        for node in tree.body
        for target in (
            node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        )
    ]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def known_parameters(notebook: Path, parameters: dict[str, Any]) -> dict[str, Any]:
    """The parameters, unless the notebook lacks one of them; papermill would only warn."""
    names = parameter_names(notebook)
    for name, value in parameters.items():
        if name not in names:
            raise InputError(
                f"{notebook.name}: {name}", value, f"no such parameter; {nearest(name, names)}"
            )
    return parameters


def plan_states(todo: list[Job], retry: bool) -> list[Job]:
    """Set each job's state from its records, and return the jobs to execute.

    Args:
        retry: execute again what failed before.

    Raises:
        InputError: a parameter that a notebook lacks.
    """
    for job in todo:
        known_parameters(job.notebook, job.parameters)
        job.state, job.error = "queued", ""
        if job.finished:
            job.state = "done"
        elif job.failed_before and not retry:
            job.state, job.error = "failed", read_record(job.folder / "failed.json")["error"]
    return [job for job in todo if job.state == "queued"]


def read_record(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        return record
    except (OSError, json.JSONDecodeError):
        return {}


def progress_of(job: Job) -> str:
    """The progress of a running job or the error of a failed one, in a few words."""
    if job.state != "running":
        return job.error if job.state == "failed" else ""
    progress = read_record(job.folder / "progress.json")
    if not progress:
        last = read_jsonl(job.folder / "metrics.jsonl")[-1:]
        return f"step {last[0]['step']}, evaluating" if last else "starting"
    minutes, seconds = divmod(round(progress["seconds_left"]), 60)
    return (
        f"step {progress['step']}/{progress['total_steps']}  loss {progress['loss']:.3f}  "
        f"{progress['tokens_per_second']:,.0f} tokens/s  {minutes}:{seconds:02d} left"
    )
