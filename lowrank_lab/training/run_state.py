"""A run in progress as what it is made of: built, saved in checkpoints, and resumed."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lowrank_lab import distributed
from lowrank_lab.analysis.spectra_recorder import SpectraRecorder
from lowrank_lab.config import ResolvedConfig
from lowrank_lab.data.corpus import Corpus
from lowrank_lab.device import prefers_few_kernels
from lowrank_lab.layers import train_dense_
from lowrank_lab.memory.breakdown import Breakdown, persistent
from lowrank_lab.methods.build import build
from lowrank_lab.models.llama import Llama
from lowrank_lab.optim import ProjectedAdamW
from lowrank_lab.techniques.states import switching, unwrapped
from lowrank_lab.training import checkpoint
from lowrank_lab.training.batches import Batches
from lowrank_lab.training.clock import StepClock
from lowrank_lab.training.errors import TrainingError
from lowrank_lab.training.fsdp import ShardedModel
from lowrank_lab.training.gradients import PerLayerUpdates, replicate
from lowrank_lab.training.monitor import LossWatch
from lowrank_lab.training.outside import OutsideState
from lowrank_lab.training.peaks import PeakMemory
from lowrank_lab.training.preflight import device_of
from lowrank_lab.training.provenance import ran_on
from lowrank_lab.training.records import Records
from lowrank_lab.training.schedule import warm_start


class RunState:
    """The model, the optimizer, the clock and the folder of a run."""

    def __init__(
        self, config: ResolvedConfig, corpus: Corpus, folder: Path, label: str | None = None
    ) -> None:
        """Build model and optimizer; write config.json."""
        self.config, self.corpus, self.folder = config, corpus, folder
        self.device = device_of(config)
        self._shards = ShardedModel(config, self.device) if config.parallel == "fsdp2" else None
        if self._shards is None:
            self.model, self.optimizer = build(config, self.device)
        else:
            self.model, self.optimizer = self._shards.model, self._shards.optimizer
        self.model.to(self.device).train()
        if self._shards is None and not config.per_layer:
            self.model.pack_(aligned=config.precision != "fp32")
        for switch in switching(self.optimizer):  # some can't step before
            switch.train()
        if config.compile:
            self.model.compile_blocks()
            few = prefers_few_kernels(next(self.model.parameters()))
            for inner in unwrapped(self.optimizer):
                if isinstance(inner, ProjectedAdamW):
                    inner.compile_chains = few  # on a CPU, updates are not stacked
        self.updates = 0
        self._clock = StepClock(self.device)
        self.bytes = Breakdown()
        self._per_layer = PerLayerUpdates(self.model, self.optimizer) if config.per_layer else None
        self._outside = OutsideState(self.optimizer)
        self._batches = Batches(config, corpus, self.device)
        self._replicas = replicate(self.model, partial(self._batches.of, 0), config)
        self._peaks = PeakMemory(
            self.model, self.optimizer, trackable=not config.compile and self._shards is None,
            buckets=self._replicas.buckets if self._replicas else (),
        )  # fmt: skip
        self._spectra = SpectraRecorder(*self._plain(), config.spectra_layers)
        self._records = Records(folder, config, writes=distributed.is_rank_zero())
        self._records.begin(label, ran_on(self.device, corpus))
        self._watch = LossWatch()
        self._skipped = 0  # updates in a row
        self._found: list[dict[str, Any]] = []  # events for the next metrics row
        self._best: dict[str, float] = {}  # the lowest validation loss, and after which step

    def resume(self) -> None:
        """Load the newest checkpoint, if any, and cut the records back to its step."""
        whole = self._plain() if self._shards is None else self._shards.new_full()
        self.updates, extra = checkpoint.load(
            self.folder / "checkpoints", *whole, self._report_damage
        )
        if self._shards is not None and self.updates:
            self._shards.load_full_(*whole)
        if not distributed.equal_on_all_ranks(self.updates):
            where = self.folder / "checkpoints"
            raise TrainingError(f"not every process sees the same checkpoints in {where}")
        self._clock.seconds = extra.get("seconds", 0.0)
        self._peaks.by_kind = extra.get("peaks", {})
        self._watch = LossWatch(extra.get("recent_losses", ()))
        self._skipped = extra.get("skipped", 0)
        self._outside.restore_(extra.get("outside", {}), self._report_damage)
        self._best = extra.get("best", {})
        if warm_start(self.config):
            train_dense_(self.model, on=self.updates < warm_start(self.config))
        self.bytes = Breakdown(**extra.get("bytes", {}))
        if lost := self._records.cut(self.updates):
            self._report_damage(lost)

    def _persistent(self) -> Breakdown:
        """Bytes of weights, gradients and optimizer states in this process."""
        if self._shards is not None:
            return self._shards.persistent()
        return persistent(self.model, self.optimizer, self.config.per_layer)

    def _plain(self) -> tuple[Llama, torch.optim.Optimizer]:
        """Model and optimizer in plain tensors; if sharded, the first process's full copy."""
        plain = None if self._shards is None else self._shards.full_copy
        return plain or (self.model, self.optimizer)

    def _gather(self, gradients: bool = False) -> None:
        """Update the full copy of a sharded model; all processes call it."""
        if self._shards is not None:
            self._shards.gather_full_(gradients)

    def save_checkpoint(self, loss: float | None = None) -> None:
        """Save the current state, unless its weights are no longer finite.

        Args:
            loss: on the validation block, if it was just measured.
        """
        self._clock.settle()
        self._gather()
        model, optimizer = self._plain()
        if self._records.writes and all(bool(p.isfinite().all()) for p in model.parameters()):
            checkpoint.save(
                self.folder / "checkpoints", self.updates, model, optimizer,
                kept=self.config.keep_latest, loss=loss, seconds=self._clock.seconds,
                peaks=self._peaks.by_kind, recent_losses=list(self._watch.recent), best=self._best,
                skipped=self._skipped, outside=self._outside.changed(), bytes=self.bytes.as_dict(),
            )  # fmt: skip

    def kept_state(self) -> str:
        """The place of the last good state, in words."""
        kept = checkpoint.all_checkpoints(self.folder / "checkpoints")
        return f"the last good state is kept in {kept[-1]}" if kept else "no good state was kept"

    def _report_damage(self, line: str) -> None:
        if self._records.writes:
            warnings.warn(line, stacklevel=2)
        self._found.append({"event": "damage", "what": line})
