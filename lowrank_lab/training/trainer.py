"""A run in progress: one step, what is due after it, and how a run resumes, stops and ends."""

from __future__ import annotations

import math
import warnings
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from lowrank_lab import distributed
from lowrank_lab.analysis.spectra_recorder import SpectraRecorder
from lowrank_lab.config import ResolvedConfig
from lowrank_lab.data.corpus import Corpus
from lowrank_lab.data.splits import Split
from lowrank_lab.layers import train_dense_
from lowrank_lab.memory.breakdown import Breakdown, persistent
from lowrank_lab.memory.tracker import untracked
from lowrank_lab.methods.build import build
from lowrank_lab.models.llama import Llama
from lowrank_lab.techniques import NotFiniteError
from lowrank_lab.techniques.states import switching
from lowrank_lab.training import checkpoint
from lowrank_lab.training.batches import Batches
from lowrank_lab.training.clock import StepClock
from lowrank_lab.training.evaluate import (
    Evaluation,
    copying_loss,
    evaluate,
    evaluation_weights,
)
from lowrank_lab.training.fsdp import ShardedModel
from lowrank_lab.training.monitor import LossWatch
from lowrank_lab.training.outside import OutsideState
from lowrank_lab.training.peaks import PeakMemory
from lowrank_lab.training.preflight import device_of
from lowrank_lab.training.provenance import ran_on
from lowrank_lab.training.records import Records, metrics_row, parameter_counts, perplexities
from lowrank_lab.training.schedule import warm_start
from lowrank_lab.training.step import PerLayerUpdates, kind_of, replicate, take_step_

MOST_SKIPPED = 20  # updates in a row; one more stops the run


class TrainingError(RuntimeError):
    """Training stopped by what it computed or couldn't write, not by wrong input."""


class Terminated(TrainingError):
    """SIGTERM stopped training; its state is saved."""

    exit_status = 143  # a shell's status of a process that SIGTERM ended


class Trainer:
    """A run in progress: the model, the optimizer, the clock and the folder."""

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
        for switch in switching(self.optimizer):  # some can't step before
            switch.train()
        if config.compile:
            self.model.compile_blocks()
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
        if self.updates == 0:
            self._record_spectra()

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

    def advance(self) -> dict[str, Any]:
        """One step, and what is due after it: evaluation, spectra, checkpoint. Its metrics row."""
        config, kind = self.config, kind_of(self.config, self.updates)
        eventful = kind not in ("first", "next")
        if eventful:
            self._gather()
            if self._records.writes:
                self._spectra.note_momentum()
        row = self._step(kind)
        if self._due(config.eval_every):
            found = self.evaluate("validation", config.eval_tokens)
            loss = row["validation_loss"] = found.loss
            row["validation_loss_by_position"] = found.by_position
            row["copying_loss"] = self._copying_loss()
            if loss < self._best.get("validation_loss", math.inf):
                self._best = {"validation_loss": loss, "step": self.updates}
        self._records.metrics(row)
        if eventful:
            self._gather()
            if self._records.writes:
                self._records.spectra(self._spectra.momentum_rows(self.updates, kind))
        if self._due(config.spectra_every):
            self._record_spectra()
        if self.updates % config.checkpoint_every == 0:
            self.save_checkpoint(row.get("validation_loss"))
        if row["loss"] is not None:
            self._records.progress(row, self._clock.seconds)
        return row

    def _step(self, kind: str) -> dict[str, Any]:
        """One update and its events, timed and with its peak memory; the start of its row."""
        self._clock.start()
        batches, skipped = self._batches.of(self.updates), self._skipped
        try:
            with self._peaks.of_step(kind, first=self.updates == 0):
                values, events = take_step_(
                    self.model, self.optimizer, batches, self.config, self.updates,
                    per_layer=self._per_layer, check=self._finite, ready=self._clock.ready,
                    wait=self._due(self.config.spectra_every, self.updates + 1),
                    shards=self._shards, replicas=self._replicas,
                )  # fmt: skip
        except NotFiniteError as error:
            self._stop(f"after step {self.updates + 1}: {error}")
        peak = self._peaks.by_kind.get(kind)
        # A skipped first step may leave an optimizer without states.
        if self.updates == 0 or (skipped and not self.bytes.optimizer_states):
            self.bytes = self._persistent()
            self._records.memory(self.bytes, self._peaks.kept, peak)
        elapsed = self._clock.stop()
        self.updates += 1
        periods = (self.config.eval_every, self.config.spectra_every, self.config.checkpoint_every)
        if any(map(self._due, periods)):  # what follows is no part of training
            elapsed += self._clock.settle()
        found = [*self._found, *(self._watch.observe(values[0]) if values else ()), *events]
        self._found.clear()
        return metrics_row(
            self.config, self.updates,
            values=values, seconds=(self._clock.seconds, elapsed), memory=self.bytes, peak=peak,
            events=found,
        )  # fmt: skip

    def finish(self) -> None:
        """Final evaluations, the trained model and result.json."""
        self._clock.settle()
        splits: tuple[Split, ...] = ("validation", "test")
        ends = {split: self.evaluate(split, self.config.test_tokens) for split in splits}
        losses = {f"{split}_loss": end.loss for split, end in ends.items()}
        copying = self._copying_loss()
        self._gather()
        if not self._records.writes:
            return
        model, optimizer = self._plain()
        with evaluation_weights(model, optimizer):
            self._records.model(model, self.corpus)
        self._records.result({
            **losses,
            **perplexities(losses),
            **{f"{split}_loss_by_position": end.by_position for split, end in ends.items()},
            "copying_loss": copying,
            **{f"test_{name}": values for name, values in ends["test"].by_document.items()},
            "best_validation_loss": self._best.get("validation_loss"),
            "best_step": self._best.get("step"),
            "entropy": self.corpus.entropy,
            "steps": self.updates,
            "tokens_seen": self.updates * self.config.tokens_per_step,
            "seconds": self._clock.seconds,
            **parameter_counts(model),
            "weight_bytes": self.bytes.weights,
            "optimizer_state_bytes": self.bytes.optimizer_states,
        })  # fmt: skip

    def evaluate(self, split: Split, tokens: int) -> Evaluation:
        with evaluation_weights(self.model, self.optimizer):
            found = evaluate(self.model, self.corpus, split, tokens, self.config)
        if not math.isfinite(found.loss):
            self._stop(f"the {split} loss after step {self.updates} is {found.loss}")
        return found

    def _copying_loss(self) -> float:
        with evaluation_weights(self.model, self.optimizer):
            return copying_loss(self.model, self.corpus.vocab_size, self.config)

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

    def _stop(self, reason: str) -> NoReturn:
        """End the run, with the last good state kept."""
        self.optimizer.zero_grad(set_to_none=True)
        self.save_checkpoint()
        distributed.barrier()
        raise TrainingError(f"{reason}; {self.kept_state()}; a lower lr may help")

    def _finite(self, loss: Tensor, norm: Tensor) -> tuple[float, float] | None:
        """Loss and gradient norm as numbers; None if one isn't finite and the update is skipped.

        Called before the update where spectra read gradients, otherwise perhaps after it
        (`training.finite`). The next batch is fetched before the host waits for the numbers.

        Raises:
            TrainingError: one isn't finite, unless `on_nonfinite` is "skip".
        """
        with untracked():
            self._batches.fetch(self.updates + 1)
        self._clock.wait()
        values = torch.stack([loss, norm]).tolist()
        for name, value in zip(("loss", "gradient norm"), values, strict=True):
            if not math.isfinite(value):
                reason = f"the {name} of step {self.updates + 1} is {value}"
                self._skipped += 1
                if self.config.on_nonfinite == "stop" or self._skipped > MOST_SKIPPED:
                    self._stop(reason)
                self._found.append({"event": "skipped", "what": reason})
                return None
        self._skipped = 0
        if self._due(self.config.spectra_every, self.updates + 1):
            with untracked():  # no part of training
                self._gather(gradients=True)
                if self._records.writes:
                    self._spectra.see_gradients()
        return values[0], values[1]

    def _due(self, every: int, updates: int | None = None) -> bool:
        """Whether something with period `every` is due after so many updates (default: so far)."""
        updates = self.updates if updates is None else updates
        return updates % every == 0 or updates == self.config.total_steps

    def _record_spectra(self) -> None:
        self._gather()
        if self._records.writes:
            with evaluation_weights(*self._plain()):
                self._records.spectra(self._spectra.rows(self.updates))
