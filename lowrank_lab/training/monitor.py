"""What a run looks out for: losses that stand out, and the wish that it stop."""

from __future__ import annotations

import signal
import statistics
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

WINDOW = 64  # losses that the next one is compared with
ENOUGH = 16  # of them, before anything stands out
FACTOR = 8.0  # robust standard deviations above the median: a spike


class LossWatch:
    """Reports a loss far above the last ones as an event.

    Far is FACTOR times 1.4826 median absolute deviations (the standard deviation, if losses were
    normal), and at least a twentieth of the median, above it.
    """

    def __init__(self, recent: Iterable[float] = ()) -> None:
        self.recent = deque(recent, maxlen=WINDOW)

    def observe(self, loss: float) -> list[dict[str, Any]]:
        """The event of this loss, if it is one."""
        spikes: list[dict[str, Any]] = []
        if len(self.recent) >= ENOUGH:
            median = statistics.median(self.recent)
            spread = 1.4826 * statistics.median(abs(x - median) for x in self.recent)
            if loss - median > max(FACTOR * spread, 0.05 * abs(median)):
                spikes.append({"event": "loss-spike", "loss": loss, "median": median})
        self.recent.append(loss)
        return spikes


@contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """A function that says whether SIGTERM has come since this block began.

    Only the main thread can listen; elsewhere the signal does what it always does.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    came = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        came.set()

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)
