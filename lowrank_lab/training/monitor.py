"""What a run watches for while it trains: loss spikes, and SIGTERM."""

from __future__ import annotations

import signal
import statistics
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

WINDOW = 64  # losses that the next loss is compared with
ENOUGH = 16  # losses, before the next can be a spike
FACTOR = 8.0  # robust standard deviations that a spike exceeds the median by


class LossWatch:
    """Finds loss spikes, as events.

    A spike exceeds the median of the last losses by FACTOR times 1.4826 median absolute deviations
    (the standard deviation of normal losses), and by a twentieth of the median.
    """

    def __init__(self, recent: Iterable[float] = ()) -> None:
        self.recent = deque(recent, maxlen=WINDOW)

    def observe(self, loss: float) -> list[dict[str, Any]]:
        """Add a loss; a `loss-spike` event if it is one."""
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
    """A function that returns whether SIGTERM has arrived since this block began.

    Only the main thread can handle it; in other threads SIGTERM keeps its effect.
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
