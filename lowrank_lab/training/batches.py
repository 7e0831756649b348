"""The batches of a run, on its device, fetched ahead of the step that needs them."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_lab import distributed
from lowrank_lab.config import ResolvedConfig
from lowrank_lab.data.corpus import Corpus
from lowrank_lab.training.gradients import Batch


class Batches:
    """This process's share of each step's batch, in `gradient_accumulation` pieces."""

    def __init__(self, config: ResolvedConfig, corpus: Corpus, device: torch.device) -> None:
        self._config, self._corpus, self._device = config, corpus, device
        self._ahead: tuple[int, list[Batch]] | None = None  # a step and its batches

    def of(self, step: int) -> list[Batch]:
        """The pieces of the batch of a step (from 0), on the device."""
        if self._ahead is not None and self._ahead[0] == step:
            return self._ahead[1]
        config = self._config
        tokens, targets = self._corpus.batch(
            "train", step,
            batch=config.batch, sequence_length=config.sequence_length, seed=config.seed,
        )  # fmt: skip
        return list(zip(self._pieces(tokens), self._pieces(targets), strict=True))

    def fetch(self, step: int) -> None:
        """Fetch the batch of a step while the device still computes the one before it."""
        if step < self._config.total_steps:
            self._ahead = step, self.of(step)

    def _pieces(self, t: Tensor) -> list[Tensor]:
        pieces = t.chunk(self._config.gradient_accumulation)
        return [self._to_device(distributed.local_chunk(piece)) for piece in pieces]

    def _to_device(self, t: Tensor) -> Tensor:
        if self._device.type != "cuda":
            return t
        return t.pin_memory().to(self._device, non_blocking=True)
