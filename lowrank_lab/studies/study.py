"""Running a study: notebooks by papermill, in parallel and resumable, then table, figures, report.

Each run is a notebook, executed in a process of its own in `data/runs/<study>/<run id>`. A finished
run is not repeated; a run that was killed continues from its checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from lowrank_lab.planning.resources import device_memory, machine_memory
from lowrank_lab.runs.collect import copy_run
from lowrank_lab.studies.dask_executor import connect, execute_on, worker_memory
from lowrank_lab.studies.job import Job
from lowrank_lab.studies.local_executor import execute
from lowrank_lab.studies.plan import check_fits, comparison_job, plan_study


def run_study(
    study: Path | str,
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
    """Execute the runs of a study that are not done yet, then the comparison and the report.

    Args:
        study: a path, or the name of one of the library's own studies.
        out: the study's folder; by default data/runs/<name of the file>.
        jobs: notebooks at a time; by default one per CPU core (with one thread each) or per CUDA
            device. Memory may allow fewer.
        retry: execute again what failed before.
        seeds: instead of those in the file.
        only: variants to take; all of them if empty.
        reuse: take over finished runs of the same configurations from other studies and from the
            kept studies, whatever version of the training code made them.
        time_limit: seconds after which a run is stopped and has failed, instead of the file's.
        dask: address of a Dask scheduler that executes the runs, on machines that share the files.
        report: called about twice per second with all jobs.

    Returns:
        The jobs, and the path of report.html (None if a run failed).

    Raises:
        InputError: see `load_study`; also a run that exceeds the memory or the disk.
    """
    plan = plan_study(study, out=out, retry=retry, seeds=seeds, only=only, reuse=reuse)
    folder, todo = plan.folder, plan.jobs
    for job in todo:
        if job.source is not None:
            copy_run(job.source, job.folder, job.parameters["label"])
    limit = plan.study.time_limit if time_limit is None else time_limit
    if dask is not None:
        with connect(dask) as client:
            check_fits(plan, worker_memory(client))
            folder.mkdir(parents=True, exist_ok=True)
            execute_on(client, todo, retry, report, limit)
    else:
        memory, on_device = machine_memory(), device_memory()
        check_fits(plan, memory, on_device)
        folder.mkdir(parents=True, exist_ok=True)
        execute(todo, jobs, retry, report, limit, memory, on_device)
    if any(job.state != "done" for job in todo):
        return todo, None
    comparison = comparison_job(plan.study, folder, todo)
    execute([comparison], 1, True, lambda jobs: report([*todo, *jobs]))
    page = folder / "report.html"
    return [*todo, comparison], page if page.exists() else None
