"""What the terminal shows of a running study: redrawn in place, or one line a change in a log."""

from __future__ import annotations

import shutil
import sys
import time

from lowrank_lab.jobs import Job, progress_of

LOG_SECONDS = 15.0
MARKS = {"queued": "·", "running": "▶", "done": "✓", "failed": "✗"}


class View:
    """Call `show` with all jobs as often as you like, `close` at the end."""

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
        return f"{MARKS[job.state]} {job.state:8}{job.name:40} {progress_of(job)}".rstrip()

    @staticmethod
    def _write(text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()


def _counts(jobs: list[Job]) -> str:
    counts = {state: sum(job.state == state for job in jobs) for state in MARKS}
    return ", ".join(f"{count} {state}" for state, count in counts.items() if count)
