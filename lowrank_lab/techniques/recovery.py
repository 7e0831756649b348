"""Learning-rate recovery after a momentum reset (2505.22922), for any learning-rate schedule."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ConstantLR, LRScheduler, ReduceLROnPlateau


def recovery_factor(k: int, recovery_steps: int) -> float:
    """Factor of the learning rate k steps after a reset, rising linearly from 0.001 to 1.

    lr = target · (0.001 + 0.999 · k / (recovery_steps − 1)), where target is the scheduled learning
    rate recovery_steps after the reset.

    Args:
        k: 0 at the first step after the reset, recovery_steps − 1 at the last of the recovery.
        recovery_steps: length of the recovery, at least 2; 10 in the paper's code.
    """
    return 0.001 + 0.999 * k / (recovery_steps - 1)


class RecoveryLR(LRScheduler):
    """A learning-rate scheduler around another one that recovers after each momentum reset.

    Without resets, the learning rates are those of the wrapped scheduler. After a reset at step s,
    step s + 1 + k has the learning rate

        lr = schedule(s + recovery_steps) · (0.001 + 0.999 · k / (recovery_steps − 1)),

    for k from 0 to recovery_steps − 1; then the schedule continues. A reset within a recovery
    starts a new one. `lab.train` has the same learning rates. ::

        scheduler = RecoveryLR(CosineAnnealingLR(optimizer, T_max=1000))
        for step in range(1, 1001):
            ...
            optimizer.step()
            scheduler.step()
            if step % 100 == 0:
                reset_momentum_(optimizer)
                scheduler.reset()

    Args:
        scheduler: any scheduler of torch or transformers that is a function of the step; or an
            optimizer, whose learning rates are then constant. Call `step` of the RecoveryLR only.
        recovery_steps: steps of a recovery, at least 2; 10 in the paper's code.

    Raises:
        ValueError: fewer than 2 recovery steps, or a scheduler that follows a metric
            (ReduceLROnPlateau), whose future is not known.

    Source: 2505.22922, momentum reset.
    """

    def __init__(
        self, scheduler: LRScheduler | torch.optim.Optimizer, recovery_steps: int = 10
    ) -> None:
        if not isinstance(recovery_steps, int) or recovery_steps < 2:
            raise ValueError(f"recovery_steps: {recovery_steps!r} is not allowed; at least 2")
        if isinstance(scheduler, torch.optim.Optimizer):
            scheduler = ConstantLR(scheduler, factor=1.0, total_iters=0)
        if not isinstance(scheduler, LRScheduler) or follows_metric(scheduler):
            allowed = "a scheduler that is a function of the step"
            raise ValueError(f"scheduler: {type(scheduler).__name__} is not allowed; {allowed}")
        self.scheduler, self.recovery_steps = scheduler, recovery_steps
        self.optimizer = scheduler.optimizer
        self._scheduled = self._rates()  # what the schedule says, beside what the groups have
        self._targets: list[float] | None = None  # within a recovery
        self._k = 0

    @property
    def last_epoch(self) -> int:  # type: ignore[override]
        """The step of the scheduler within."""
        return self.scheduler.last_epoch

    @property
    def base_lrs(self) -> list[float]:  # type: ignore[override]
        """The base learning rates of the scheduler within."""
        return list(getattr(self.scheduler, "base_lrs", self._scheduled))

    def get_last_lr(self) -> list[float | Tensor]:
        """The learning rate of each group, recovery included."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def get_lr(self) -> list[float | Tensor]:
        """The same as `get_last_lr`."""
        return self.get_last_lr()

    def step(self, epoch: int | None = None) -> None:
        """One step of the schedule, and of the recovery if there is one."""
        if epoch is not None:
            raise ValueError(f"epoch: {epoch!r} is not allowed; RecoveryLR counts steps itself")
        set_rates_(self.optimizer, self._scheduled)  # some schedules multiply the last rate
        self.scheduler.step()
        self._scheduled = self._rates()
        if self._targets is not None:
            self._k += 1
            self._recover_()

    def reset(self) -> None:
        """Begin a recovery with the next optimizer step. Call it after `step`."""
        self._targets = self._future(self.recovery_steps)
        self._k = 0
        self._recover_()

    def _recover_(self) -> None:
        """Set the k-th learning rate of a recovery, or end it."""
        if self._targets is None or self._k >= self.recovery_steps:
            self._targets = None
            return
        factor = recovery_factor(self._k, self.recovery_steps)
        set_rates_(self.optimizer, [target * factor for target in self._targets])

    def _future(self, steps: int) -> list[float]:
        """The schedule's learning rates `steps` later, or its last ones if it ends before."""
        ghost = _Ghost(self.optimizer)
        set_rates_(ghost, self._scheduled)
        ahead = copy.deepcopy(self.scheduler, {id(self.optimizer): ghost})
        for _ in range(steps):
            try:
                with warnings.catch_warnings(action="ignore"):  # of steps before the optimizer's
                    ahead.step()
            except ValueError:  # OneCycleLR has an end
                break
        return [float(group["lr"]) for group in ghost.param_groups]

    def _rates(self) -> list[float]:
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, and the state of the scheduler within."""
        return {
            "scheduler": self.scheduler.state_dict(),
            "recovery_steps": self.recovery_steps,
            "scheduled": list(self._scheduled),
            "targets": self._targets,
            "k": self._k,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; the groups get its learning rates."""
        self.scheduler.load_state_dict(state_dict["scheduler"])
        self.recovery_steps = state_dict["recovery_steps"]
        self._scheduled = list(state_dict["scheduled"])
        self._targets, self._k = state_dict["targets"], state_dict["k"]
        set_rates_(self.optimizer, self._scheduled)
        self._recover_()


class _Ghost:
    """The groups of an optimizer without its parameters: a copy of a scheduler may change them."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.param_groups = [
            {k: v.clone() if isinstance(v, Tensor) else v for k, v in group.items()}
            | {"params": []}
            for group in optimizer.param_groups
        ]
        self.defaults = optimizer.defaults

    def step(self) -> None:
        """Schedulers look for it."""


def set_rates_(optimizer: Any, rates: list[float]) -> None:
    """Set the learning rate of each group; tensors, which compiled steps need, in place."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def follows_metric(scheduler: LRScheduler) -> bool:
    """Whether a scheduler, or one within it, follows a metric."""
    inner = getattr(scheduler, "_schedulers", ())
    return isinstance(scheduler, ReduceLROnPlateau) or any(map(follows_metric, inner))
