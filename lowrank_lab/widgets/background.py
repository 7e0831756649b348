"""Work of the explorer beside its answers, in threads that end with the kernel."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import suppress

from lowrank_lab.runs.catalogue import Entry
from lowrank_lab.runs.series import RUNS_IN_MEMORY, metrics_of

BREATH = 0.01  # seconds between two runs that are read ahead: a click comes first


def repeat(action: Callable[[], None], period: float) -> threading.Event:
    """Act every `period` seconds, until the returned event is set."""
    stop = threading.Event()

    def act() -> None:
        while not stop.wait(period):
            action()

    threading.Thread(target=act, name="follow", daemon=True).start()
    return stop


def read_ahead(entries: Iterable[Entry]) -> threading.Event:
    """Read metrics that may be asked for next, until the returned event is set."""
    stop = threading.Event()
    wanted = [entry for entry in entries if entry.state != "broken"][: RUNS_IN_MEMORY // 2]

    def read() -> None:
        for entry in wanted:
            if stop.wait(BREATH):
                return
            with suppress(Exception):  # whoever asks for these metrics gets the error
                metrics_of(entry)

    threading.Thread(target=read, name="read ahead", daemon=True).start()
    return stop
