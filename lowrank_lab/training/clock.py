"""The time of training steps on their device, which may lag behind the host."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch


class Mark(Protocol):
    """A point in a device's queue of work: `torch.cuda.Event`, or the present on a CPU."""

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: Any, /) -> float:
        """Milliseconds from this mark to a later one; both have been reached."""
        ...


class HostMark:
    """A mark on a CPU, where work is done when its call returns."""

    def __init__(self) -> None:
        self._at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: HostMark, /) -> float:
        return (end._at - self._at) * 1e3


def mark(device: torch.device) -> Mark:
    """A mark after all work that is queued on the device so far."""
    if device.type != "cuda":
        return HostMark()
    event: Mark = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()  # type: ignore[attr-defined]
    return event


class StepClock:
    """Seconds that a device spends in training steps.

    The host waits for a step's loss and gradient norm, but not for its update, which computes while
    the host prepares the next step. So a step's time ends with its numbers (`ready`), and the time
    of its update is added to the next step's, or by `settle`, which waits for it. Work between
    steps (evaluation, spectra, checkpoints) is not counted if the clock is settled before. A step
    waits for the device once: what lies before its numbers has been reached with them.

    Args:
        device: of the steps.
        new_mark: makes the marks.
    """

    def __init__(
        self, device: torch.device, new_mark: Callable[[torch.device], Mark] = mark
    ) -> None:
        self.seconds = 0.0
        self._device, self._new_mark = device, new_mark
        self._from: Mark | None = None  # counted up to here
        self._ready: Mark | None = None
        self._reached = False  # whether the host has waited for `_ready`
        self._unfinished: tuple[Mark, Mark] | None = None  # an update that isn't counted yet

    def start(self) -> None:
        """A step begins."""
        self._from, self._ready = self._new_mark(self._device), None

    def ready(self) -> None:
        """The step's loss and gradient norm have been copied to the host when this is reached."""
        self._ready, self._reached = self._new_mark(self._device), False

    def wait(self) -> None:
        """Wait until loss and gradient norm are on the host."""
        assert self._ready is not None
        if not self._reached:
            self._ready.synchronize()
            self._reached = True

    def stop(self) -> float:
        """A step ends; returns the seconds that it adds."""
        assert self._from is not None
        assert self._ready is not None
        before, end = self.seconds, self._new_mark(self._device)
        self.wait()
        self._count_update()  # the one before this step
        self.seconds += self._from.elapsed_time(self._ready) / 1e3
        self._unfinished = self._ready, end
        if self._device.type != "cuda":
            self.settle()
        return self.seconds - before

    def settle(self) -> float:
        """Wait for the last update and count it; returns the seconds that it adds."""
        if self._unfinished is not None:
            self._unfinished[1].synchronize()
        return self._count_update()

    def _count_update(self) -> float:
        if self._unfinished is None:
            return 0.0
        begin, end = self._unfinished
        self._unfinished = None
        added = begin.elapsed_time(end) / 1e3
        self.seconds += added
        return added
