"""The techniques at fixed periods, for training loops that are not this package's."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from lowrank_lab.layers import lora_layers, merge_
from lowrank_lab.layers.base import require_own_parameters
from lowrank_lab.techniques.momentum import reset_momentum_, resettable
from lowrank_lab.techniques.recovery import RecoveryLR
from lowrank_lab.techniques.refactorization import (
    factorized_layers,
    refactorize_,
    require_known,
    require_moments_follow,
)


@dataclass(frozen=True, kw_only=True)
class Periodic:
    """Merges, refactorizations and momentum resets every so many optimizer steps.

    Call `check` before training and `apply_` after each optimizer and scheduler step except the
    last. Events of the same step happen in this order. `lab.train` has the same events.

    Args:
        refactor_every: steps between refactorizations, 0: never.
        reset_every: steps between momentum resets, 0: never.
        merge_every: steps between merges of LoRA layers (ReLoRA), 0: never; each restarts the
            moments of the factors.
        on_refactor, refactor_basis, refactor_above: arguments of `refactorize_`.
        reset_strength: `strength` of `reset_momentum_`.
        reset_params: `factors` resets the moments of factorised layers, `all` of every parameter.
        recovery: whether `RecoveryLR` lets the learning rate recover after a restart.
        seed: seed of the factors that merges draw.

    Raises:
        ValueError: a period that is not a whole number from 0, no period from 1, or another value
            that is not allowed.
    """

    refactor_every: int = 0
    reset_every: int = 0
    merge_every: int = 0
    on_refactor: Literal["keep", "reset", "transport"] = "keep"
    refactor_basis: Literal["singular", "nearest"] = "singular"
    refactor_above: float = 0.0
    reset_strength: float = 1.0
    reset_params: Literal["all", "factors"] = "all"
    recovery: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        periods = {f.name: getattr(self, f.name) for f in fields(self) if f.name.endswith("every")}
        for name, value in periods.items():
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"{name}: {value!r} is not allowed; a whole number from 0")
        if not any(periods.values()):
            raise ValueError(f"{', '.join(periods)}: 0 is not allowed; at least one from 1")
        if self.reset_params not in ("all", "factors"):
            raise ValueError(f"reset_params: {self.reset_params!r} is not allowed; all or factors")
        if not 0 <= self.reset_strength <= 1:
            raise ValueError(f"reset_strength: {self.reset_strength!r} is not allowed; from 0 to 1")
        if not 0 <= self.refactor_above <= 1:
            raise ValueError(f"refactor_above: {self.refactor_above!r} is not allowed; from 0 to 1")
        require_known(self.on_refactor, self.refactor_basis)

    @property
    def restarts(self) -> bool:
        """Whether an event restarts moments, so that the learning rate recovers."""
        return bool(self.reset_every or self.merge_every) or self.on_refactor == "reset"

    def check(self, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
        """Refuse a model, optimizer or scheduler that doesn't suit the events, before training.

        Raises:
            ValueError: the optimizer's restart isn't known, the scheduler is no `RecoveryLR`, or
                the model has no layers to refactorize or merge.
        """
        if self.restarts and self.recovery and _recovering(scheduler) is None:
            allowed = "wrap it in lowrank_lab.techniques.RecoveryLR, or set recovery=False"
            kind = type(scheduler).__name__
            raise ValueError(f"lr_scheduler: {kind} is not allowed; {allowed}")
        if self.refactor_every and not any(factorized_layers(model)):
            raise ValueError("model: it has no factorised layers; lowrank_lab.factorize makes them")
        if self.merge_every and not any(lora_layers(model)):
            raise ValueError('model: it has no LoRA layers; factorize(model, "lora") makes them')
        if self.refactor_every or self.merge_every:
            require_own_parameters(model)
        if self.refactor_every:
            require_moments_follow(model, optimizer, self.on_refactor)
        if self.merge_every:
            resettable(optimizer, params=_lora_factors(model))
        if self.reset_every and self.reset_strength:
            resettable(optimizer, self.reset_strength, params=self._reset_params(model))

    def due(self, updates: int) -> list[str]:
        """The names of the events after so many optimizer steps, in order."""
        names = ("merge", "refactor", "reset")
        periods = {name: getattr(self, f"{name}_every") for name in names}
        return [n for n, every in periods.items() if every and updates and updates % every == 0]

    def apply_(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: LRScheduler | None,
        updates: int,
    ) -> list[str]:
        """Apply the events due after `updates` optimizer and scheduler steps; their names."""
        due = self.due(updates)
        for event in due:
            if event == "merge":
                factors = _lora_factors(model)
                resettable(optimizer, params=factors)  # a refusal changes nothing
                merge_(model, event_seed(self.seed, updates))
                reset_momentum_(optimizer, params=factors)
            elif event == "refactor":
                how = self.on_refactor, self.refactor_basis, self.refactor_above
                refactorize_(model, optimizer, *how)
            else:
                reset_momentum_(optimizer, self.reset_strength, params=self._reset_params(model))
        restarted = {"merge", "reset"} | ({"refactor"} if self.on_refactor == "reset" else set())
        recovery = _recovering(scheduler)
        if restarted & set(due) and self.recovery and recovery is not None:
            recovery.reset()
        return due

    def _reset_params(self, model: nn.Module) -> list[Tensor] | None:
        if self.reset_params == "all":
            return None
        return [factor for _, layer in factorized_layers(model) for factor in layer.factors()]


def event_seed(seed: int, updates: int) -> int:
    """The seed of what is drawn at random after so many updates of a run with this seed."""
    return seed * 1_000_003 + updates


def _lora_factors(model: nn.Module) -> list[Tensor]:
    return [factor for _, layer in lora_layers(model) for factor in layer.factors()]


def _recovering(scheduler: Any) -> RecoveryLR | None:
    """The `RecoveryLR` of a scheduler, which accelerate may have wrapped; None if it is none."""
    if not isinstance(scheduler, RecoveryLR):
        scheduler = getattr(scheduler, "scheduler", None)
    return scheduler if isinstance(scheduler, RecoveryLR) else None
