"""Jobs executed on an existing Dask cluster, whose machines share the file system with this one.

Each job is one task: a worker executes the notebook as the local executor would, in the same folder
and with the same records. If a worker dies, its jobs go to others, and training continues from the
last checkpoint. If the task is cancelled (the study was interrupted, or its runner or scheduler is
gone), the worker stops the notebook.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from uuid import uuid4

from lowrank_lab.config import InputError
from lowrank_lab.methods.own import OWN_METHODS
from lowrank_lab.paths import DATA, data_folder
from lowrank_lab.studies.job import PARTIAL, Job, plan_states
from lowrank_lab.studies.local_executor import THREADS, fail, run_job

if TYPE_CHECKING:
    from distributed import Client

log = logging.getLogger(__name__)

CONNECT_SECONDS = 4


def connect(address: str) -> Client:
    """A client of a running Dask scheduler.

    Raises:
        InputError: Dask isn't installed, or no scheduler answers at the address.
    """
    try:
        from distributed import Client
    except ImportError:
        allowed = "Dask isn't installed here: pip install 'lowrank-lab[dask]'"
        raise InputError("dask", address, allowed) from None

    class Quiet(Client):
        """A client that sends nothing when it is collected: the address may be no scheduler's."""

        def __del__(self) -> None:
            pass

    # The study reports a lost connection in one line of its own.
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    try:
        _knock(address)
        return Quiet(  # type: ignore[no-untyped-call]
            address, timeout=CONNECT_SECONDS, set_as_default=False
        )
    except Exception as error:  # of any kind, if another server answers
        why = f"{error or type(error).__name__}".splitlines()[0]
        allowed = f"no Dask scheduler answers there, as one would at tcp://host:8786 ({why})"
        raise InputError("dask", address, allowed) from None


def _knock(address: str) -> None:
    """Raise OSError or ValueError, without a timeout where possible, if nothing listens there."""
    parts = urlsplit(address)
    if parts.scheme not in ("tcp", "tls", "ws", "wss") or not parts.hostname or not parts.port:
        raise ValueError("it isn't of the form tcp://host:port")
    socket.create_connection((parts.hostname, parts.port), CONNECT_SECONDS).close()


def worker_memory(client: Client) -> int | None:
    """Bytes of the worker with the most memory; None if no worker reports a limit."""
    return max((w["memory_limit"] for w in _workers(client).values()), default=0) or None


def execute_on(
    client: Client,
    todo: list[Job],
    retry: bool,
    report: Callable[[list[Job]], None],
    time_limit: float | None = None,
) -> None:
    """Run all jobs as Dask tasks, except those done and, without `retry`, those that failed before.

    Args:
        time_limit: seconds after which a job is stopped and has failed.

    Raises:
        RuntimeError: the scheduler is lost.
    """
    waiting = plan_states(todo, retry)
    if waiting and not _workers(client):
        log.warning("no worker is connected to %s yet; the study waits for one", _address(client))
    futures: dict[Any, Job] = {}
    try:
        for job in waiting:
            (job.folder / PARTIAL).unlink(
                missing_ok=True
            )  # its presence shows that a worker has begun
            futures[_submit(client, job, time_limit)] = job
        while futures:
            for future, job in list(futures.items()):
                if _has_ended(future, job):
                    del futures[future]
            report(todo)
            if client.status != "running":
                raise RuntimeError(
                    f"the connection to the Dask scheduler at {_address(client)} was lost; started "
                    "again, the study continues"
                )
            time.sleep(0.5 if futures else 0.0)
    except BaseException:  # workers notice, and stop their notebooks
        if client.status == "running":
            client.cancel(list(futures), force=True)  # type: ignore[no-untyped-call]
        raise
    report(todo)


def _submit(client: Client, job: Job, time_limit: float | None) -> Any:
    """The future of a job as a task of its own."""
    environment = {DATA: str(data_folder().resolve())}
    environment |= {name: os.environ[name] for name in (OWN_METHODS,) if name in os.environ}
    task = f"{job.folder.name}-{uuid4().hex[:8]}"
    arguments = (replace(job), job.key, environment, time_limit)
    return client.submit(on_worker, *arguments, key=task, pure=False)


def _has_ended(future: Any, job: Job) -> bool:
    """Whether a task has ended; if so, its job gets the state and the error."""
    if future.status == "finished":
        done: Job = future.result()
        job.state, job.error, job.seconds = done.state, done.error, done.seconds
        return True
    if future.status == "error":
        error = future.exception()
        fail(job, f"{type(error).__name__}: {' '.join(str(error).split())}"[:500])
        return True
    if (job.folder / PARTIAL).exists():
        job.state = "running"
    return False


def on_worker(job: Job, key: str, environment: dict[str, str], time_limit: float | None) -> Job:
    """Run a job on a worker, for as long as its task isn't cancelled."""
    from distributed import get_worker

    worker = get_worker()
    if job.key != key:
        raise RuntimeError(f"the worker {worker.address} has another version of lowrank_lab")
    task = worker.get_current_task()
    threads = {name: os.environ.get(name, "1") for name in THREADS}

    def should_continue() -> bool:
        state = worker.state.tasks.get(task)
        return worker.status.name == "running" and state is not None and state.state == "executing"

    run_job(job, threads | environment, time_limit, should_continue)
    return job


def _workers(client: Client) -> dict[str, Any]:
    workers: dict[str, Any] = client.scheduler_info(n_workers=-1)["workers"]
    return workers


def _address(client: Client) -> str:
    return str(client.scheduler.address) if client.scheduler is not None else "its address"
