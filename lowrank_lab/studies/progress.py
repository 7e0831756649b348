"""A running study in the terminal: redrawn in place, or in a log, one line per change."""

from __future__ import annotations

import shutil
import sys
import time
from typing import Any

from lowrank_lab.memory.formulas import GB, MIB
from lowrank_lab.planning.resources import free_disk, machine_memory
from lowrank_lab.studies.job import Job, progress_of
from lowrank_lab.studies.plan import Plan

LOG_SECONDS = 15.0
MARKS = {"queued": "·", "running": "▶", "done": "✓", "failed": "✗"}


class View:
    """The states of all jobs: call `show` at any rate, and `close` at the end."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._lines = 0
        self._states: dict[str, str] = {}
        self._logged = 0.0

    def show(self, jobs: list[Job]) -> None:
        if self._live:
            self._redraw(jobs)
        else:
            self._log(jobs)

    def close(self) -> None:
        if self._live:
            self._write("\n")

    def _redraw(self, jobs: list[Job]) -> None:
        width = shutil.get_terminal_size().columns - 1
        lines = [self._line(job)[:width] for job in jobs] + [_counts(jobs)]
        up = f"\x1b[{self._lines - 1}A" if self._lines > 1 else ""
        self._write(f"\r{up}\x1b[J" + "\n".join(lines))
        self._lines = len(lines)

    def _log(self, jobs: list[Job]) -> None:
        due = time.monotonic() - self._logged > LOG_SECONDS
        for job in jobs:
            changed = self._states.get(str(job.folder), "queued") != job.state
            self._states[str(job.folder)] = job.state
            if changed or (due and job.state == "running"):
                self._write(self._line(job) + "\n")
        if due:
            self._logged = time.monotonic()

    @staticmethod
    def _line(job: Job) -> str:
        line = f"{MARKS[job.state]} {job.state:8}{job.name:40} {progress_of(job)}".rstrip()
        return "".join(
            c if c.isprintable() else " " for c in line
        )  # an error may have control characters

    @staticmethod
    def _write(text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()


def _counts(jobs: list[Job]) -> str:
    counts = {state: sum(job.state == state for job in jobs) for state in MARKS}
    return ", ".join(f"{count} {state}" for state, count in counts.items() if count)


def plan_facts(plan: Plan, rate: float | None = None) -> dict[str, Any]:
    """The runs of a study with their memory, disk and FLOPs, and the memory and disk available.

    Args:
        rate: FLOP/s, to turn FLOPs into hours.
    """
    runs = [
        {
            "run": job.folder.name, "label": job.name, "state": job.state, "error": job.error,
            "trained": job.trained or job.state == "done",
            "memory_bytes": need.memory, "device_memory_bytes": need.device,
            "disk_bytes": need.disk, "memory_by": need.source,
            "weights_and_states_bytes": need.held, "flops": need.flops,
            "hours": None if rate is None else need.flops / rate / 3600,
        }
        for job, need in zip(plan.jobs, plan.needs, strict=True)
    ]  # fmt: skip
    return {
        "study": plan.study.name,
        "folder": str(plan.folder),
        "machine_memory_bytes": machine_memory(),
        "free_disk_bytes": free_disk(plan.folder),
        "time_limit": plan.study.time_limit,
        "runs": runs,
    }


def plan_text(facts: dict[str, Any]) -> str:
    """`plan_facts` as a table."""
    width = max(len(run["label"]) for run in facts["runs"])
    lines = [f"{'state':8}{'run':{width}}  {'memory':>9} {'by':10} {'disk':>9}"]
    for run in facts["runs"]:
        memory, disk = run["memory_bytes"] / GB, run["disk_bytes"] / MIB
        state = "trained" if run["trained"] and run["state"] == "queued" else run["state"]
        line = f"{state:8}{run['label']:{width}}  {memory:6.2f} GB {run['memory_by']:10} "
        lines.append(f"{line}{disk:5.0f} MiB")
    todo = [run for run in facts["runs"] if run["state"] == "queued"]
    has = facts["machine_memory_bytes"]
    trained = sum(run["trained"] for run in todo)
    already = f", {trained} of them trained already" if trained else ""
    lines.append(
        f"{len(todo)} to run{already}; the machine has {(has or 0) / GB:.2f} GB of memory, "
        f"and {facts['free_disk_bytes'] / GB:.1f} GB are free in {facts['folder']}"
    )
    return "\n".join(lines)


def card_text(facts: dict[str, Any]) -> str:
    """`plan_facts` as a table of memory and hours on a CUDA card of that rate."""
    runs = facts["runs"]
    width = max(len(run["label"]) for run in runs)
    lines = [f"{'run':{width}}  weights + states  peak memory    EFLOP    hours      disk"]
    for run in runs:
        states, peak = run["weights_and_states_bytes"] / GB, run["device_memory_bytes"] / GB
        lines.append(
            f"{run['label']:{width}}  {states:13.3f} GB  {peak:8.2f} GB  {run['flops'] / 1e18:7.3f}"
            f"  {run['hours']:7.2f}  {run['disk_bytes'] / GB:5.2f} GB"
        )
    hours, disk = (sum(run[name] for run in runs) for name in ("hours", "disk_bytes"))
    lines.append(f"{len(runs)} runs, {hours:.1f} hours, {disk / GB:.1f} GB of disk")
    return "\n".join(lines)
