"""Jobs executed on an existing Dask cluster, whose machines share the file system with this one.

A job is one task: a worker executes the notebook as a local runner would, in the same folder and
with the same records. When a worker dies its jobs are given to others, and training goes on from
its last checkpoint. When the task is no longer wanted (the study was interrupted, its runner or the
scheduler is gone), the worker ends the notebook.
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
from lowrank_lab.studies.job import PARTIAL, Job, settle
from lowrank_lab.studies.local_executor import THREADS, fail, perform

if TYPE_CHECKING:
    from distributed import Client

log = logging.getLogger(__name__)

CONNECT_SECONDS = 4


def connect(address: str) -> Client:
    """A client of a running Dask scheduler.

    Raises:
        InputError: Dask isn't installed, or nobody answers at the address.
    """
    try:
        from distributed import Client
    except ImportError:
        allowed = "Dask isn't installed here: pip install 'lowrank-lab[dask]'"
        raise InputError("dask", address, allowed) from None

    class Quiet(Client):
        """A client that doesn't try to say goodbye to something that never was a scheduler."""

        def __del__(self) -> None:
            pass

    # What it would say of lost connections, the study says in one line.
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    try:
        _knock(address)
        return Quiet(  # type: ignore[no-untyped-call]
            address, timeout=CONNECT_SECONDS, set_as_default=False
        )
    except Exception as error:  # anything, if something else than a scheduler answers
        why = f"{error or type(error).__name__}".splitlines()[0]
        allowed = f"no Dask scheduler answers there, as one would at tcp://host:8786 ({why})"
        raise InputError("dask", address, allowed) from None


def _knock(address: str) -> None:
    """Raise OSError or ValueError, at once where that can be, if nobody listens at an address."""
    parts = urlsplit(address)
    if parts.scheme not in ("tcp", "tls", "ws", "wss") or not parts.hostname or not parts.port:
        raise ValueError("it isn't of the form tcp://host:port")
    socket.create_connection((parts.hostname, parts.port), CONNECT_SECONDS).close()


def worker_memory(client: Client) -> int | None:
    """Bytes of the worker that has most; None if there is no worker or none says."""
    return max((w["memory_limit"] for w in _workers(client).values()), default=0) or None


def execute_on(
    client: Client,
    todo: list[Job],
    retry: bool,
    report: Callable[[list[Job]], None],
    time_limit: float | None = None,
) -> None:
    """Run all jobs that are neither done nor, without `retry`, known to fail, as tasks of Dask.

    Args:
        time_limit: seconds after which a job is ended and counts as failed.

    Raises:
        RuntimeError: the scheduler is lost.
    """
    waiting = settle(todo, retry)
    if waiting and not _workers(client):
        log.warning("no worker is connected to %s yet; the study waits for one", _address(client))
    environment = {DATA: str(data_folder().resolve())}
    environment |= {name: os.environ[name] for name in (OWN_METHODS,) if name in os.environ}
    futures: dict[Any, Job] = {}
    try:
        for job in waiting:
            (job.folder / PARTIAL).unlink(missing_ok=True)  # its sign that a worker has begun
            task = f"{job.folder.name}-{uuid4().hex[:8]}"
            arguments = (replace(job), job.key, environment, time_limit)
            futures[client.submit(on_worker, *arguments, key=task, pure=False)] = job
        while futures:
            for future, job in list(futures.items()):
                if _settled(future, job):
                    del futures[future]
            report(todo)
            if client.status != "running":
                raise RuntimeError(
                    f"the Dask scheduler at {_address(client)} was lost; started again, the study "
                    "goes on"
                )
            time.sleep(0.5 if futures else 0.0)
    except BaseException:  # workers see it, and end what runs
        if client.status == "running":
            client.cancel(list(futures), force=True)  # type: ignore[no-untyped-call]
        raise
    report(todo)


def _settled(future: Any, job: Job) -> bool:
    """Whether a task has come to its end; its job then has the state and the words for it."""
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
    """What a worker does: the job, as long as its task is wanted."""
    from distributed import get_worker

    worker = get_worker()
    if job.key != key:
        raise RuntimeError(f"the worker {worker.address} has another version of lowrank_lab")
    task = worker.get_current_task()
    threads = {name: os.environ.get(name, "1") for name in THREADS}

    def wanted() -> bool:
        state = worker.state.tasks.get(task)
        return worker.status.name == "running" and state is not None and state.state == "executing"

    perform(job, threads | environment, time_limit, wanted)
    return job


def _workers(client: Client) -> dict[str, Any]:
    workers: dict[str, Any] = client.scheduler_info(n_workers=-1)["workers"]
    return workers


def _address(client: Client) -> str:
    return str(client.scheduler.address) if client.scheduler is not None else "its address"
