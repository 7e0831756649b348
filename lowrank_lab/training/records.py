"""The files of a run folder beside its checkpoints: what a run writes, and when it is resumed cuts.

config.json                    the configuration, the label, what it ran on
metrics.jsonl spectra.jsonl    one row per step; rows per layer and recorded step
memory.json                    bytes by category in the first step
progress.json                  while it trains: loss, speed, seconds left
model.safetensors tokenizer.json result.json    at the end
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lowrank_lab.config import ResolvedConfig
from lowrank_lab.data.corpus import Corpus
from lowrank_lab.memory.breakdown import Breakdown
from lowrank_lab.models.llama import Llama
from lowrank_lab.runs.files import append_jsonl, cut_jsonl, write_json
from lowrank_lab.training.finite import Values
from lowrank_lab.training.schedule import learning_rate

PROGRESS_SECONDS = 0.5  # between two versions of progress.json
LARGEST_LOG = 700.0  # exp of more is no float


class Records:
    """Writes the files of one run folder.

    Args:
        writes: False in all processes but the first: nothing is written there.
    """

    def __init__(self, folder: Path, config: ResolvedConfig, *, writes: bool) -> None:
        self.folder, self.writes = folder, writes
        self._config = config
        self._progress_due = 0.0

    def begin(self, label: str | None, ran_on: Mapping[str, Any]) -> None:
        """Make the folder and config.json, unless they are there."""
        if not self.writes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "config.json").exists():
            facts = {"label": label, "config": self._config.model_dump(), "ran_on": ran_on}
            write_json(self.folder / "config.json", facts)

    def cut(self, updates: int) -> str:
        """Drop the rows after `updates`; what is missing of those before, in words."""
        if not self.writes:
            return ""
        last_kept = updates or -1
        cut_jsonl(self.folder / "spectra.jsonl", last_kept)
        steps = cut_jsonl(self.folder / "metrics.jsonl", last_kept)
        if len(steps) >= updates:
            return ""
        lost = f"rows {len(steps) + 1} to {updates} of metrics.jsonl can't be read"
        return f"{self.folder}: {lost}; training goes on without them"

    def metrics(self, row: dict[str, Any]) -> None:
        """Append a row of `metrics_row`."""
        if self.writes:
            append_jsonl(self.folder / "metrics.jsonl", [row])

    def spectra(self, rows: Iterable[dict[str, Any]]) -> None:
        """Append rows of `analysis.spectra_recorder.SpectraRecorder`."""
        if self.writes:
            append_jsonl(self.folder / "spectra.jsonl", rows)

    def memory(self, persistent: Breakdown, kept: Breakdown | None, peak: int | None) -> None:
        """Write memory.json.

        Args:
            kept: bytes at the start of the backward pass; None where they aren't known.
        """
        facts: dict[str, int | None] = dict(persistent.as_dict())
        for name in ("activations", "logits"):
            facts[name] = getattr(kept, name) if kept else None
        if self.writes:
            write_json(self.folder / "memory.json", {**facts, "peak": peak})

    def progress(self, row: dict[str, Any], seconds: float) -> None:
        """Replace progress.json, at most every PROGRESS_SECONDS.

        Args:
            row: the last of metrics.jsonl.
            seconds: spent in training steps so far.
        """
        now = time.monotonic()
        if now < self._progress_due or not self.writes:
            return
        self._progress_due = now + PROGRESS_SECONDS
        left = (self._config.total_steps - row["step"]) * seconds / row["step"]
        progress = {name: row[name] for name in ("step", "loss", "tokens_per_second")}
        progress |= {"total_steps": self._config.total_steps, "seconds_left": round(left, 1)}
        write_json(self.folder / "progress.json", progress)

    def model(self, model: Llama, corpus: Corpus) -> None:
        """Write model.safetensors and the corpus's tokenizer."""
        from safetensors.torch import save_file

        weights = {name: value.contiguous() for name, value in model.state_dict().items()}
        partial = self.folder / ".model.safetensors"
        save_file(weights, partial)
        partial.replace(self.folder / "model.safetensors")
        if (tokenizer := corpus.folder / "tokenizer.json").exists():
            shutil.copyfile(tokenizer, self.folder / "tokenizer.json")

    def result(self, result: dict[str, Any]) -> None:
        """Write result.json, by which a run is finished, and remove what is no longer needed."""
        write_json(self.folder / "result.json", result)
        (self.folder / "progress.json").unlink(missing_ok=True)
        if not self._config.keep_after_finish:
            shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)


def metrics_row(
    config: ResolvedConfig,
    updates: int,
    *,
    values: Values | None,
    seconds: tuple[float, float],
    memory: Breakdown,
    peak: int | None,
    events: list[dict[str, Any]],
) -> dict[str, Any]:
    """The row of metrics.jsonl after so many updates.

    Args:
        values: loss and gradient norm, None if the update was skipped.
        seconds: spent in training steps, so far and in this one.
        memory: weights, gradients and states between steps.
        peak: bytes, if known.
    """
    loss, norm = values or (None, None)
    return {
        "step": updates,
        "tokens_seen": updates * config.tokens_per_step,
        "seconds": round(seconds[0], 4),
        "loss": loss,
        "lr": learning_rate(updates - 1, config),
        "grad_norm": norm,
        "tokens_per_second": round(config.tokens_per_step / seconds[1], 1),
        "weight_bytes": memory.weights,
        "gradient_bytes": memory.gradients,
        "optimizer_state_bytes": memory.optimizer_states,
        "peak_memory_bytes": peak,
        "events": events,
    }


def perplexities(losses: dict[str, float]) -> dict[str, float]:
    """exp of each loss, from `<name>_loss` to `<name>_perplexity`."""
    return {
        name.replace("_loss", "_perplexity"): math.exp(min(loss, LARGEST_LOG))
        for name, loss in losses.items()
    }


def parameter_counts(model: Llama) -> dict[str, int]:
    """Trainable parameters, with and without embedding and head."""
    parameters = {p for p in model.parameters() if p.requires_grad}
    ends = {*model.model.embed_tokens.parameters(), *model.lm_head.parameters()}
    return {
        "parameters": sum(p.numel() for p in parameters),
        "parameters_without_embeddings": sum(p.numel() for p in parameters - ends),
    }
