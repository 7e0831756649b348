"""A callback for Lightning's Trainer. Import this module only with lightning installed.

from lowrank_lab.integrations.lightning import TechniquesCallback
"""

from __future__ import annotations

from typing import Any

import torch

from lowrank_lab.techniques import Periodic

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError:
    raise ImportError("lightning: it is not installed; pip install lightning") from None


class TechniquesCallback(Callback):  # type: ignore[misc]
    """Refactorizes, resets and merges every so many optimizer steps of a Lightning Trainer.

    Steps are optimizer steps, whatever `accumulate_grad_batches`, and counted on after a resumed
    checkpoint. The scheduler within `techniques.RecoveryLR` steps per optimizer step:
    `{"scheduler": scheduler, "interval": "step"}`.

    Args:
        options: those of `techniques.Periodic`.

    Raises:
        ValueError: an option is not allowed; or when training begins, there is not one optimizer
            with one scheduler per step, or the techniques can't change it or the model.
    """

    def __init__(self, **options: Any) -> None:
        self.periodic = Periodic(**options)
        self._done = 0  # optimizer steps at the last call

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what the techniques can't change."""
        if len(trainer.optimizers) != 1:
            raise ValueError(f"optimizers: {len(trainer.optimizers)} is not allowed; exactly one")
        for config in trainer.lr_scheduler_configs:
            if (config.interval, config.frequency) != ("step", 1):
                wrong = f"{config.interval!r}, frequency {config.frequency}"
                raise ValueError(f"interval: {wrong} is not allowed; 'step', frequency 1")
        self.periodic.check(pl_module, trainer.optimizers[0], _scheduler(trainer))
        self._done = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *arguments: Any
    ) -> None:
        """Apply what is due if an optimizer step ended with this batch, and it was not the last."""
        updates, last = trainer.global_step, trainer.estimated_stepping_batches
        if updates != self._done and updates < last:
            self.periodic.apply_(pl_module, trainer.optimizers[0], _scheduler(trainer), updates)
        self._done = updates


def _scheduler(trainer: Trainer) -> Any:
    """The scheduler of a Trainer with one; None if it has none."""
    configs = trainer.lr_scheduler_configs
    return configs[0].scheduler if configs else None
