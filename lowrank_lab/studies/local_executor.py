"""Jobs executed by papermill on this machine, several at a time.

Each notebook runs in a process and session of its own, with its own number of threads. It is
written under another name and renamed when it is complete. Success is the exit status;
papermill's metadata also says success after a cell timeout, a dead kernel or Ctrl-C.
"""

from __future__ import annotations

import base64
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path

import yaml

from lowrank_lab.paths import DATA, STARTED_IN, data_folder
from lowrank_lab.runs.files import write_json
from lowrank_lab.studies.job import PARTIAL, Job, plan_states, read_record
from lowrank_lab.training.provenance import training_source

# Linux: the child dies with the runner, even when the runner is killed with SIGKILL.
DIE_WITH_PARENT = (
    "import ctypes, os, sys\n"
    "if sys.platform == 'linux': ctypes.CDLL(None).prctl(1, 9)\n"
    "if os.getppid() == 1: sys.exit(1)\n"
    "os.execvp(sys.argv[1], sys.argv[1:])"
)
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
POLL_SECONDS = 0.2  # between two calls of should_continue
GRACE_SECONDS = 5.0  # between SIGTERM and SIGKILL


def execute(
    todo: list[Job],
    jobs: int | None,
    retry: bool,
    report: Callable[[list[Job]], None],
    time_limit: float | None = None,
    memory: int | None = None,
) -> None:
    """Run all jobs, except those done and, without `retry`, those that failed before.

    Args:
        jobs: how many at a time; by default one per core or CUDA device.
        time_limit: seconds after which a job is stopped and has failed.
        memory: bytes that all running jobs may take together; a job that needs more runs alone.
    """
    waiting, places, stop = plan_states(todo, retry), _places(jobs), threading.Event()
    running: dict[Future[None], tuple[Job, dict[str, str]]] = {}
    over: list[Future[None]] = []
    with ThreadPoolExecutor(len(places)) as pool:
        try:
            while waiting or running:
                used = sum(job.memory for job, _ in running.values())
                job = _next(waiting, used, memory) if places else None
                if job is not None:
                    place = places.pop()
                    future = pool.submit(run_job, job, place, time_limit, lambda: not stop.is_set())
                    running[future] = job, place
                    continue
                report(todo)
                for future in wait(running, 0.5, FIRST_COMPLETED).done:
                    places.append(running.pop(future)[1])
                    over.append(future)
        except BaseException:  # above all Ctrl-C: no process stays behind
            stop.set()
            raise
    for future in over:
        future.result()
    report(todo)


def _next(waiting: list[Job], used: int, memory: int | None) -> Job | None:
    """Take the first job that fits beside the running ones, or the first of all if none runs."""
    for job in waiting:
        if memory is None or not used or used + job.memory <= memory:
            waiting.remove(job)
            return job
    return None


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _places(jobs: int | None) -> list[dict[str, str]]:
    """The environments of jobs that run at the same time: one per core, or per CUDA device."""
    import torch

    devices = torch.cuda.device_count()
    count = jobs or devices or cores()
    places = [dict.fromkeys(THREADS, str(max(1, cores() // count))) for _ in range(count)]
    for index, place in enumerate(places):
        if devices:
            place["CUDA_VISIBLE_DEVICES"] = str(index % devices)
    return places[::-1]  # taken from the end


def run_job(
    job: Job,
    environment: Mapping[str, str],
    time_limit: float | None,
    should_continue: Callable[[], bool],
) -> None:
    """Execute one job: its notebook, and the record that it is done or failed.

    Args:
        environment: variables for the notebook, added to those of this process.
        should_continue: called several times per second; on False, the notebook is stopped.
    """
    if not should_continue():
        return
    job.state, started = "running", time.monotonic()
    _set_aside_if_outdated(job)
    job.folder.mkdir(parents=True, exist_ok=True)
    for name in ("done.json", "failed.json", PARTIAL):
        (job.folder / name).unlink(missing_ok=True)
    partial = job.folder / PARTIAL
    code = _papermill(job, partial, environment, time_limit, should_continue)
    job.seconds = time.monotonic() - started
    if not should_continue():
        return
    if partial.exists():
        partial.replace(job.folder / "notebook.ipynb")
    if code == 0:
        write_json(job.folder / "done.json", {"key": job.key, "seconds": round(job.seconds, 1)})
        job.state = "done"
    else:
        fail(job, too_long(time_limit) if code is None else _error_of(job.folder, code))


def fail(job: Job, error: str) -> None:
    """Record that a job failed, and why."""
    job.state, job.error = "failed", error
    job.folder.mkdir(parents=True, exist_ok=True)
    write_json(job.folder / "failed.json", {"key": job.key, "error": error})


def too_long(time_limit: float | None) -> str:
    return (
        f"it took longer than the time limit of {time_limit:g} s and was stopped; "
        "with --retry and a longer limit it continues from its last checkpoint"
    )


def _papermill(
    job: Job,
    partial: Path,
    environment: Mapping[str, str],
    time_limit: float | None,
    should_continue: Callable[[], bool],
) -> int | None:
    """The exit status of papermill, run in a session of its own; None if it was stopped here."""
    parameters = base64.b64encode(yaml.safe_dump(job.parameters).encode()).decode()
    command = [
        sys.executable, "-c", DIE_WITH_PARENT,
        sys.executable, "-m", "papermill", str(job.notebook), str(partial), "-b", parameters,
        "--kernel", "python3", "--language", "python", "--no-progress-bar",
        "--cwd", str(job.works_in or job.folder),
    ]  # fmt: skip
    variables = {
        **os.environ, "TOKENIZERS_PARALLELISM": "false",
        DATA: str(data_folder().resolve()), STARTED_IN: str(Path.cwd()),
        **environment,
    }  # fmt: skip
    end = time.monotonic() + (float("inf") if time_limit is None else time_limit)
    with (job.folder / "papermill.log").open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            env=variables, start_new_session=True,
        )  # fmt: skip
        while should_continue() and time.monotonic() < end:
            with suppress(subprocess.TimeoutExpired):
                return process.wait(POLL_SECONDS)
        _end(process)
        return None


def _end(process: subprocess.Popen[bytes]) -> None:
    """Stop papermill, its kernel and their children: SIGTERM, then SIGKILL."""
    sessions = [process.pid, *_children(process.pid)]  # a kernel leads a session of its own
    for sign in (signal.SIGTERM, signal.SIGKILL):
        for session in sessions:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(session, sign)
        end = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < end:
            if process.poll() is not None and not any(map(_alive, sessions[1:])):
                return
            time.sleep(0.05)


def _children(pid: int) -> list[int]:
    """The child processes of a process (on Linux; elsewhere a kernel stops without its parent)."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return [int(child) for t in tasks for child in (t / "children").read_text().split()]
    except OSError:
        return []


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _set_aside_if_outdated(job: Job) -> None:
    """Move a run aside that another version of the training code has made."""
    folder = job.folder
    facts = read_record(folder / "config.json")
    if not facts or facts["ran_on"]["training_source"] == training_source():
        return
    if job.any_version and (folder / "result.json").exists():
        return
    aside = folder.parent / ".outdated" / f"{folder.name}-{time.time_ns()}"
    aside.parent.mkdir(exist_ok=True)
    folder.rename(aside)


def _error_of(folder: Path, code: int) -> str:
    """The last line of papermill's log that names an error."""
    lines = (folder / "papermill.log").read_text("utf-8", "replace").splitlines()
    plain = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip() for line in lines]
    errors = [line for line in plain if re.match(r"[\w.]+(Error|Exception|Interrupt)\b", line)]
    return (errors or [line for line in plain if line] or [f"exit status {code}"])[-1][:500]
