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
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
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
    device_memory: int | None = None,
) -> None:
    """Run all jobs, except those done and, without `retry`, those that failed before.

    Args:
        jobs: how many at a time; by default one per core or CUDA device.
        time_limit: seconds after which a job is stopped and has failed.
        memory: bytes that all running jobs may take together; a job that needs more runs alone.
        device_memory: bytes that the running jobs of one CUDA device may take together.
    """
    waiting, places, stop = plan_states(todo, retry), _places(jobs), threading.Event()
    running: dict[Future[None], tuple[Job, Place]] = {}
    over: list[Future[None]] = []
    with ThreadPoolExecutor(len(places)) as pool:
        try:
            while waiting or running:
                found = _next(waiting, places, list(running.values()), memory, device_memory)
                if found is not None:
                    job, place = found
                    future = pool.submit(
                        run_job, job, place.environment, time_limit, lambda: not stop.is_set()
                    )
                    running[future] = found
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


@dataclass(frozen=True)
class Place:
    """Where one job at a time runs."""

    environment: Mapping[str, str]
    device: str = ""  # of CUDA, by the name in CUDA_VISIBLE_DEVICES


def _next(
    waiting: list[Job],
    places: list[Place],
    running: Sequence[tuple[Job, Place]],
    memory: int | None,
    device_memory: int | None,
) -> tuple[Job, Place] | None:
    """Take the first job that fits beside the running ones, and its place; if none runs, any."""
    used = sum(job.memory for job, _ in running)
    for place in places:
        on_device = sum(job.device_memory for job, other in running if other.device == place.device)
        for job in waiting:
            fits = not used or memory is None or used + job.memory <= memory
            shares = place.device and on_device and device_memory is not None
            if fits and (not shares or on_device + job.device_memory <= (device_memory or 0)):
                waiting.remove(job)
                places.remove(place)
                return job, place
    return None


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cuda_devices() -> list[str]:
    """The CUDA devices of this process, by the names that CUDA_VISIBLE_DEVICES takes.

    Where that variable is set, by a cluster for example, they are those of its list: numbers of
    other devices than the first, UUIDs or MIG instances.
    """
    import torch

    count = torch.cuda.device_count()
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = [name.strip() for name in given.split(",")] if given else map(str, range(count))
    return list(names)[:count]


def _places(jobs: int | None) -> list[Place]:
    """Places of jobs that run at the same time: one per core, or per CUDA device."""
    devices = cuda_devices()
    count = jobs or len(devices) or cores()
    threads = dict.fromkeys(THREADS, str(max(1, cores() // count)))
    if not devices:
        return [Place(threads)] * count
    turns = (devices[i % len(devices)] for i in range(count))
    return [Place(threads | {"CUDA_VISIBLE_DEVICES": device}, device) for device in turns]


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
