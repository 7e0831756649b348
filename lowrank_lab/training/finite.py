"""The check of a step for NaN and infinity: before the update on a CPU, within it on CUDA.

A step whose loss or gradient norm isn't finite changes no weight and no optimizer state. On a CPU
the host reads both numbers before the update. On CUDA that would leave the device without work
until the host has read them, so the update is queued at once, with a flag on the device that turns
it off: `found_inf`, the attribute that torch's GradScaler sets on fused optimizers, whose kernels
then change nothing, step counts included. The host reads the numbers while the device updates, and
before the step's events: a run's records are the same either way.

Only an optimizer that knows the flag can be turned off on the device: fused ones of torch, and this
package's (`ProjectedAdamW.can_skip`) between two refreshes. All others wait for the numbers as on a
CPU (Muon and its relatives, SCALE, 8-bit moments, an optimizer by import path that isn't fused,
DTensors): copies of weights and states to undo an update with would double their memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lowrank_lab.device import prefers_few_kernels
from lowrank_lab.optim import ProjectedAdamW
from lowrank_lab.techniques.states import unwrapped


class StepNumbers:
    """Loss and gradient norm of a step, on their way to the host.

    Args:
        loss, norm: 0-dimensional, on one device.

    Attributes:
        on_host: loss and norm in float32, to be read after the work queued here is done.
    """

    def __init__(self, loss: Tensor, norm: Tensor) -> None:
        self._numbers = torch.stack([loss.float(), norm.float()])
        host = self._numbers
        if host.is_cuda:
            host = torch.empty(2, pin_memory=True).copy_(host, non_blocking=True)
        self.on_host = (host[0], host[1])

    def found_inf(self) -> Tensor:
        """1 if one of them isn't finite, else 0 (0-dimensional float32, on the device)."""
        return self._numbers.isfinite().all().logical_not().float()


def checks_on_device(optimizer: torch.optim.Optimizer, loss: Tensor) -> bool:
    """Whether the device can turn the update off, and it pays: `loss` is on the path of CUDA."""
    return prefers_few_kernels(loss) and all(map(_knows_flag, unwrapped(optimizer)))


def _knows_flag(optimizer: torch.optim.Optimizer) -> bool:
    if isinstance(optimizer, ProjectedAdamW):
        return optimizer.can_skip()
    if isinstance(optimizer, torch.optim.SGD) and not optimizer.state:
        return False  # a first step that is off leaves memory that nothing has written as momenta
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def numbers_of(optimizer: torch.optim.Optimizer) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """States and the Python numbers in them, which the device can't leave as they are."""
    states = [s for s in optimizer.state.values() if isinstance(s, dict)]
    return [(s, {k: v for k, v in s.items() if not isinstance(v, Tensor)}) for s in states]


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
