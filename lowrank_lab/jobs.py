"""Notebooks as jobs: executed by papermill, several at a time, resumable.

Each notebook runs in a process and session of its own, with its own number of threads. It is
written under another name and renamed when it is whole; `done.json` beside it, written last, says
what it was made from. Exit statuses are believed, papermill's metadata is not.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from lowrank_lab.config import InputError, data_folder, nearest
from lowrank_lab.provenance import source_hash, training_source
from lowrank_lab.runs import read_jsonl, write_json

# Linux: the child dies with the runner, even when the runner is killed with SIGKILL.
DIE_WITH_PARENT = (
    "import ctypes, os, sys\n"
    "if sys.platform == 'linux': ctypes.CDLL(None).prctl(1, 9)\n"
    "if os.getppid() == 1: sys.exit(1)\n"
    "os.execvp(sys.argv[1], sys.argv[1:])"
)

State = Literal["queued", "running", "done", "failed"]


@dataclass
class Job:
    """One notebook to execute, and how far it is."""

    name: str
    folder: Path
    notebook: Path
    parameters: dict[str, Any]
    works_in: Path | None = None  # the notebook's working directory, if it isn't `folder`
    state: State = "queued"
    error: str = ""
    seconds: float = 0.0
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def key(self) -> str:
        """Hash of everything that decides the executed notebook."""
        source = [self.notebook.read_text(), source_hash(), self.parameters]
        return hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()

    @property
    def finished(self) -> bool:
        return read_record(self.folder / "done.json").get("key") == self.key

    @property
    def failed_before(self) -> bool:
        return read_record(self.folder / "failed.json").get("key") == self.key


def parameter_names(notebook: Path) -> set[str]:
    """Names that the notebook's cell tagged `parameters` assigns.

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
    """The parameters, if the notebook knows every one of them; papermill would only warn."""
    names = parameter_names(notebook)
    for name, value in parameters.items():
        if name not in names:
            raise InputError(
                f"{notebook.name}: {name}", value, f"no such parameter; {nearest(name, names)}"
            )
    return parameters


def execute(
    todo: list[Job], jobs: int | None, retry: bool, report: Callable[[list[Job]], None]
) -> None:
    """Run all jobs that are neither done nor, without `retry`, known to fail."""
    places: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
    for place in _places(jobs):
        places.put(place)
    for job in todo:
        known_parameters(job.notebook, job.parameters)
        if job.finished:
            job.state = "done"
        elif job.failed_before and not retry:
            job.state, job.error = "failed", read_record(job.folder / "failed.json")["error"]
    stop = threading.Event()
    with ThreadPoolExecutor(places.qsize()) as pool:
        futures = [pool.submit(_run_one, j, places, stop) for j in todo if j.state == "queued"]
        try:
            while not all(f.done() for f in futures):
                report(todo)
                time.sleep(0.5)
        except BaseException:  # Ctrl-C above all: nothing is left running
            stop.set()
            for job in todo:
                _end(job.process)
            raise
    for future in futures:
        future.result()
    report(todo)


def _places(jobs: int | None) -> list[dict[str, str]]:
    """Environments in which jobs can run at the same time: one a core, or one a CUDA device."""
    import torch

    devices = torch.cuda.device_count()
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    count = jobs or devices or cores
    threads = str(max(1, cores // count))
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
    places = [dict.fromkeys(names, threads) for _ in range(count)]
    for index, place in enumerate(places):
        place["TOKENIZERS_PARALLELISM"] = "false"
        if devices:
            place["CUDA_VISIBLE_DEVICES"] = str(index % devices)
    return places


def _run_one(job: Job, places: queue.SimpleQueue[dict[str, str]], stop: threading.Event) -> None:
    """Execute one notebook: written under another name, renamed, recorded as done or failed."""
    place = places.get()
    try:
        if stop.is_set():
            return
        job.state, started = "running", time.monotonic()
        _set_aside_if_outdated(job.folder)
        job.folder.mkdir(parents=True, exist_ok=True)
        for name in ("done.json", "failed.json"):
            (job.folder / name).unlink(missing_ok=True)
        partial = job.folder / ".partial.ipynb"
        code = _papermill(job, partial, place)
        job.seconds = time.monotonic() - started
        if stop.is_set():
            return
        if code == 0:
            partial.replace(job.folder / "notebook.ipynb")
            write_json(job.folder / "done.json", {"key": job.key, "seconds": round(job.seconds, 1)})
            job.state = "done"
        else:
            if partial.exists():
                partial.replace(job.folder / "notebook.ipynb")
            job.error = _error_of(job.folder, code)
            write_json(job.folder / "failed.json", {"key": job.key, "error": job.error})
            job.state = "failed"
    finally:
        places.put(place)


def _papermill(job: Job, partial: Path, place: dict[str, str]) -> int:
    """Papermill in a process and session of its own; its exit status is what is believed."""
    parameters = base64.b64encode(yaml.safe_dump(job.parameters).encode()).decode()
    command = [
        sys.executable, "-c", DIE_WITH_PARENT,
        sys.executable, "-m", "papermill", str(job.notebook), str(partial), "-b", parameters,
        "--kernel", "python3", "--language", "python", "--no-progress-bar",
        "--cwd", str(job.works_in or job.folder),
    ]  # fmt: skip
    environment = {**os.environ, **place, "LOWRANK_LAB_DATA": str(data_folder().resolve())}
    with (job.folder / "papermill.log").open("wb") as log:
        job.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            env=environment, start_new_session=True,
        )  # fmt: skip
        return job.process.wait()


def _end(process: subprocess.Popen[bytes] | None) -> None:
    """End a papermill process and its kernel: politely, then not."""
    if process is None or process.poll() is not None:
        return
    for sign, patience in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(process.pid, sign)
            process.wait(patience)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
        return


def _set_aside_if_outdated(folder: Path) -> None:
    """Move a run that other training code made out of the way: its numbers are no longer ours."""
    facts = read_record(folder / "config.json")
    if not facts or facts["ran_on"]["training_source"] == training_source():
        return
    aside = folder.parent / ".outdated" / f"{folder.name}-{time.time_ns()}"
    aside.parent.mkdir(exist_ok=True)
    folder.rename(aside)


def _error_of(folder: Path, code: int) -> str:
    """The last line that says what went wrong."""
    lines = (folder / "papermill.log").read_text("utf-8", "replace").splitlines()
    plain = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip() for line in lines]
    errors = [line for line in plain if re.match(r"[\w.]+(Error|Exception|Interrupt)\b", line)]
    return (errors or [line for line in plain if line] or [f"exit status {code}"])[-1][:500]


def read_record(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        return record
    except (OSError, json.JSONDecodeError):
        return {}


def progress_of(job: Job) -> str:
    """What a running job is at, in a few words."""
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
