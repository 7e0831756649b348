"""The check of a step for NaN and infinity: before the update on a CPU, within it on CUDA.

A step whose loss or gradient norm isn't finite changes no weight and no optimizer state. On a CPU
the host reads both numbers before the update. On CUDA that would leave the device without work
until the host has read them, so the update is queued at once, with a flag on the device that turns
it off: `found_inf`, the attribute that torch's GradScaler sets on fused optimizers, whose kernels
then change nothing, step counts included. The host reads the numbers while the device updates, and
before the step's events: a run's records are the same either way.

The optimizers of this package and torch's fused ones know the flag, in every kind of step, and in
shards (`parallel` fsdp2), where all ranks have the same numbers. What they don't change in place
the host takes back: entries of states that were replaced or added, Python numbers among them. All
other steps wait for the numbers before the update, as on a CPU:

* of optimizers by import path that aren't fused: their code can't be told to change nothing;
* updates per layer, which are over before the norm of all gradients is known;
* steps whose gradients are recorded as spectra: the host decomposes these gradients together with
  the weights before the update, and takes far longer than the wait.

Within an update, the host waits only for torch's decompositions: eigenvalues at a refresh, singular
values at LORO's exact steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lowrank_lab.device import prefers_few_kernels
from lowrank_lab.optim import ProjectedAdamW
from lowrank_lab.optim.flagged_8bit import FlaggedSteps
from lowrank_lab.optim.muon import Muon
from lowrank_lab.techniques.states import unwrapped
from lowrank_lab.training.clock import HostMark

Values = tuple[float, float]  # loss and gradient norm


class NotFiniteStepError(ArithmeticError):
    """A step whose loss or gradient norm isn't finite, after which the run can't go on."""


class FiniteCheck:
    """Loss and gradient norm of each step, on their way to the host, and their flag on the device.

    Args:
        read: gets both (0-dimensional, float32) on the host, to be read when the mark of `ready` is
            reached. Returns their values, or None if one isn't finite and the step is skipped.
        ready: marks the point at which both are computed and copied.
    """

    def __init__(
        self, read: Callable[[Tensor, Tensor], Values | None], ready: Callable[[], Any] = HostMark
    ) -> None:
        self._read, self._ready = read, ready
        self._flag: tuple[Tensor, Tensor] | None = None  # 0 as long as all steps were finite; 1

    def start(self, loss: Tensor, norm: Tensor) -> None:
        """Queue the copies to the host."""
        self._numbers = [loss.float(), norm.float()]
        self._on_host = [
            torch.empty((), pin_memory=True).copy_(t, non_blocking=True) if t.is_cuda else t
            for t in self._numbers
        ]
        self._ready()

    def found_inf(self) -> Tensor:
        """1 if a number of this step isn't finite, else 0 (0-dimensional float32)."""
        if self._flag is None:
            zero, one = torch.arange(2.0, device=self._numbers[0].device)
            self._flag = zero, one
        found, one = self._flag
        # One kernel, in which numbers are multiplied by 1.
        torch._amp_foreach_non_finite_check_and_unscale_(self._numbers, found, one)
        return found

    def values(self) -> Values | None:
        """What `read` returns of this step; its errors are passed on."""
        values: Values | None = None
        try:
            values = self._read(self._on_host[0], self._on_host[1])
        finally:
            if values is None:
                self._flag = None  # it may be 1
        return values


def checks_on_device(optimizer: torch.optim.Optimizer, loss: Tensor) -> bool:
    """Whether the device can turn the update off, and it pays: `loss` is on the path of CUDA."""
    return prefers_few_kernels(loss) and all(map(_knows_flag, unwrapped(optimizer)))


def _knows_flag(optimizer: torch.optim.Optimizer) -> bool:
    ours = isinstance(optimizer, ProjectedAdamW | Muon | FlaggedSteps)
    return ours or getattr(optimizer, "_step_supports_amp_scaling", False)


class StatesBefore:
    """The states of an optimizer before a step that may have to be taken back, without copies."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._states = {
            p: (state, dict(state))
            for p, state in optimizer.state.items()
            if isinstance(state, dict)
        }

    def restore_(self) -> None:
        """Take back what a step that was off has replaced or added."""
        for p in [p for p in self._optimizer.state if p not in self._states]:
            del self._optimizer.state[p]
        for state, before in self._states.values():
            state.clear()
            state.update(before)


@contextmanager
def off_where(optimizer: torch.optim.Optimizer, found_inf: Tensor) -> Iterator[None]:
    """Steps in this block change nothing if `found_inf` is 1."""
    inner = list(unwrapped(optimizer))
    for each in inner:
        each.found_inf = found_inf  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for each in inner:
            del each.found_inf  # type: ignore[attr-defined]
