"""The peak memory of each step of a run, measured while it trains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from lowrank_lab.memory.breakdown import Breakdown
from lowrank_lab.memory.hidden import LAPACK
from lowrank_lab.memory.tracker import Tracker


class PeakMemory:
    """Peak bytes by kind of step: on CUDA of each step, on a CPU of the first step of each kind.

    Steps of one kind allocate the same, and only CUDA's allocator counts at no cost.

    Args:
        trackable: whether a step can be followed operation by operation, which compiled blocks and
            sharded models can't.
        buckets: of gradients, which stay allocated between steps (`training.ddp`).

    Attributes:
        by_kind: peak bytes of each kind of step, as far as known.
        kept: bytes at the start of the backward pass of the last step that was followed.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        trackable: bool,
        buckets: Sequence[torch.Tensor] = (),
    ) -> None:
        self.by_kind: dict[str, int] = {}
        self.kept: Breakdown | None = None
        self._model, self._optimizer, self._trackable = model, optimizer, trackable
        self._buckets = buckets
        self._device = next(model.parameters()).device

    @contextmanager
    def of_step(self, kind: str, *, first: bool) -> Iterator[None]:
        """Measure the step in this block.

        Args:
            kind: its name, of `step.kind_of`.
            first: whether it is the first step of the run.
        """
        cuda = self._device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
        if not self._trackable or kind in self.by_kind or (cuda and not first):
            yield
        else:
            tracker = Tracker(self._model, self._optimizer, hidden={} if cuda else LAPACK)
            for bucket in self._buckets:
                tracker.record(bucket, "gradients", "buckets")
            try:
                with tracker:
                    yield
            finally:
                tracker.close()
            trace = tracker.trace()
            self.by_kind[kind], self.kept = trace.peak.total, trace.kept
        if cuda:
            self.by_kind[kind] = torch.cuda.max_memory_allocated(self._device)
