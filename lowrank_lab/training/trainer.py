"""A run in progress: one step, what is due after it, and how a run stops and ends."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from lowrank_lab import distributed
from lowrank_lab.config import ResolvedConfig
from lowrank_lab.data.corpus import Corpus
from lowrank_lab.data.splits import Split
from lowrank_lab.memory.tracker import untracked
from lowrank_lab.techniques import NotFiniteError
from lowrank_lab.training.errors import TrainingError
from lowrank_lab.training.evaluate import (
    Evaluation,
    copying_loss,
    evaluate,
    evaluation_weights,
)
from lowrank_lab.training.finite import FiniteCheck, NotFiniteStepError
from lowrank_lab.training.kinds import kind_of
from lowrank_lab.training.records import metrics_row, parameter_counts, perplexities
from lowrank_lab.training.run_state import RunState
from lowrank_lab.training.step import take_step_

MOST_SKIPPED = 20  # updates in a row; one more stops the run


class Trainer(RunState):
    """A run in progress: its steps, and what is due after them."""

    def __init__(
        self, config: ResolvedConfig, corpus: Corpus, folder: Path, label: str | None = None
    ) -> None:
        super().__init__(config, corpus, folder, label)
        self._check = FiniteCheck(self._finite, self._clock.ready)

    def resume(self) -> None:
        super().resume()
        if self.updates == 0:
            self._record_spectra()

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
                    per_layer=self._per_layer, check=self._check,
                    wait=self._due(self.config.spectra_every, self.updates + 1),
                    shards=self._shards, replicas=self._replicas,
                )  # fmt: skip
        except NotFiniteError as error:
            self._stop(f"after step {self.updates + 1}: {error}")
        except NotFiniteStepError as error:
            self._stop(str(error))
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
        ends = {
            split: self.evaluate(split, self.config.test_tokens, split == "test")
            for split in splits
        }
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

    def evaluate(self, split: Split, tokens: int, documents: bool = False) -> Evaluation:
        with evaluation_weights(self.model, self.optimizer):
            found = evaluate(
                self.model, self.corpus, split, tokens, self.config, documents=documents
            )
        if not math.isfinite(found.loss):
            self._stop(f"the {split} loss after step {self.updates} is {found.loss}")
        return found

    def _copying_loss(self) -> float:
        with evaluation_weights(self.model, self.optimizer):
            return copying_loss(self.model, self.corpus.vocab_size, self.config)

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
            NotFiniteStepError: one isn't finite, unless `on_nonfinite` is "skip".
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
                    raise NotFiniteStepError(reason)
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
