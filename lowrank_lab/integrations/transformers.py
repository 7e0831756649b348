"""A callback for the Trainer of transformers. Import this module only with transformers installed.

from lowrank_lab.integrations.transformers import TechniquesCallback
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from lowrank_lab.techniques import Periodic

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError:
    raise ImportError("transformers: it is not installed; pip install transformers") from None


class TechniquesCallback(TrainerCallback):  # type: ignore[misc]
    """Refactorizes, resets and merges every so many optimizer steps of a Trainer.

    Steps are optimizer steps, whatever the gradient accumulation, and counted on after a resumed
    checkpoint. Give the Trainer a scheduler within `techniques.RecoveryLR`
    (`optimizers=(optimizer, scheduler)`), which its checkpoints store.

    Args:
        options: those of `techniques.Periodic`.

    Raises:
        ValueError: an option is not allowed; or when training begins, the optimizer, scheduler or
            model is none that the techniques can change.
    """

    def __init__(self, **options: Any) -> None:
        self.periodic = Periodic(**options)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: LRScheduler,
        **others: Any,
    ) -> None:
        """Refuse what the techniques can't change."""
        self.periodic.check(model, optimizer, lr_scheduler)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: LRScheduler,
        **others: Any,
    ) -> None:
        """Apply what is due after this optimizer step, and nothing after the last one."""
        if state.global_step < state.max_steps:
            self.periodic.apply_(model, optimizer, lr_scheduler, state.global_step)
