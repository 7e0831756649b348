"""The training loop: corpus and configuration in, a run folder out."""

from __future__ import annotations

import math
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from lowrank_lab import distributed
from lowrank_lab.analysis.spectra import SpectraRecorder
from lowrank_lab.config import NOT_IN_RUN_ID, InputError, ResolvedConfig, RunConfig
from lowrank_lab.cpu.malloc import keep_freed_memory
from lowrank_lab.cpu.onednn_matmul import fast_products
from lowrank_lab.data.corpus import Corpus, prepare
from lowrank_lab.data.sources import Split
from lowrank_lab.layers import train_dense_
from lowrank_lab.memory.breakdown import Breakdown, persistent
from lowrank_lab.memory.hidden import LAPACK
from lowrank_lab.memory.tracker import Tracker, untracked
from lowrank_lab.methods.build import build
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.models.llama import Llama
from lowrank_lab.paths import data_folder
from lowrank_lab.runs.run import RUNNER_FILES, Run, append_jsonl, cut_jsonl, locked, write_json
from lowrank_lab.training import checkpoint
from lowrank_lab.training.fsdp import Shards, check_shards
from lowrank_lab.training.monitor import LossWatch, asked_to_stop
from lowrank_lab.training.provenance import ran_on
from lowrank_lab.training.schedule import learning_rate, warm_start
from lowrank_lab.training.step import (
    Batch,
    PerLayerUpdates,
    Values,
    autocast,
    kind_of,
    take_step_,
)

PROGRESS_SECONDS = 0.5
MOST_SKIPPED = 20  # updates in a row: then nothing good is to be expected any more


class TrainingError(RuntimeError):
    """Training stopped because of what it computed or couldn't write, not because of its input."""


class Terminated(TrainingError):
    """Training was asked to stop, and has saved its state."""

    exit_status = 143  # what a shell shows for a process that SIGTERM ended


def check(config: RunConfig) -> tuple[ResolvedConfig, Corpus]:
    """The resolved configuration and its corpus, after every check that can be made before
    training.

    Raises:
        InputError: see `resolve` and `prepare`; also a run longer than its corpus without
            `repeat`, a held-out part shorter than a sequence, or a device that isn't there.
    """
    given, config = config, resolve(config)
    device_of(config)
    _check_processes(config)
    if config.parallel == "fsdp2":
        check_shards(config)
    with distributed.local_rank_zero_first():
        corpus = prepare(config)
    for split in ("validation", "test"):
        if not corpus.num_windows(split, config.sequence_length):
            most = corpus.length(split) - 1
            allowed = f"the {split} part of {config.corpus} has {most} tokens"
            raise InputError("sequence_length", config.sequence_length, allowed)
    once = corpus.num_windows("train", config.sequence_length) * config.sequence_length
    needed = config.total_steps * config.tokens_per_step
    if needed > once and not config.repeat:
        name = "steps" if given.tokens is None else "tokens"
        value = config.total_steps if given.tokens is None else given.tokens
        allowed = f"{needed} tokens, but {config.corpus} has {once} to train on; or set repeat"
        raise InputError(name, value, allowed)
    return config, corpus


def device_of(config: RunConfig) -> torch.device:
    """The device a run computes on."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise InputError("device", "cuda", "there is no CUDA device here; auto or cpu")
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if not distributed.is_launched():
        return torch.device("cuda")
    here, count = distributed.local_rank(), torch.cuda.device_count()
    if here >= count:
        raise InputError("nproc-per-node", here + 1, f"this machine has {count} CUDA devices")
    return torch.device("cuda", here)


def _check_processes(config: ResolvedConfig) -> None:
    """Each process has an equal share of every piece of a batch."""
    processes, pieces = distributed.world_size(), config.gradient_accumulation
    if config.batch % (processes * pieces):
        allowed = f"{processes} processes × gradient_accumulation {pieces} must divide it"
        raise InputError("batch", config.batch, allowed)
    if config.parallel != "ddp" and not distributed.is_launched():
        raise InputError("parallel", config.parallel, "needs processes: torchrun starts them")


@torch.no_grad()
def evaluate(
    model: Llama, corpus: Corpus, split: Split, tokens: int, config: ResolvedConfig
) -> float:
    """Mean loss in nats per token over a fixed block: the first windows of a split, about `tokens`
    long.

    Weighted by tokens, so that a ragged last batch counts for what it holds.
    """
    length = config.sequence_length
    count = min(corpus.num_windows(split, length), max(1, tokens // length))
    device = next(model.parameters()).device
    totals = torch.zeros(2, dtype=torch.float64, device=device)  # of losses and tokens
    training = model.training
    model.eval()
    rank, processes = distributed.rank(), distributed.world_size()
    for start in range(0, count, config.batch):
        own = torch.arange(start + rank, min(start + config.batch, count), processes)
        # Every process computes in every turn, as sharded models do so together.
        indices = own.numpy() if len(own) else torch.tensor([start]).numpy()
        inputs, targets = (t.to(device) for t in corpus.windows(split, indices, length))
        with autocast(config, device):
            loss = model.loss(inputs, targets).double()
        tokens_here = len(own) * length
        totals += torch.stack([loss * tokens_here, torch.full_like(loss, tokens_here)])
    model.train(training)
    total, seen = distributed.all_reduce_sum_(totals).tolist()
    return float(total / seen)


def train(
    config: RunConfig,
    folder: Path | str | None = None,
    *,
    label: str | None = None,
    on_step: Callable[[dict[str, Any]], None] | None = None,
) -> Run:
    """Train a configuration, or go on with a run that was interrupted, and return its folder as a
    Run.

    Args:
        folder: the run folder; by default data/runs/<run id>. A finished run is returned as it is.
        label: what figures call the run.
        on_step: called after every step with its row of metrics.jsonl.

    Raises:
        InputError: before anything is written; also a folder that another process trains in, that
            can't be written to, or whose checkpoints are all damaged.
        TrainingError: the loss or a gradient is not finite, or a record can't be written; the last
            good state is in the folder.
        Terminated: SIGTERM came; the step was finished and its state saved.
    """
    with distributed.process_group(device_of(config)), fast_process():
        return _train(config, folder, label, on_step)


@contextmanager
def fast_process() -> Iterator[None]:
    """What `train` does to the process that it trains in, while it does."""
    with keep_freed_memory(), fast_products():
        yield


def _train(
    config: RunConfig,
    folder: Path | str | None,
    label: str | None,
    on_step: Callable[[dict[str, Any]], None] | None,
) -> Run:
    config, corpus = check(config)
    target = Path(folder) if folder is not None else data_folder() / "runs" / config.run_id
    finished = _is_finished(target, config)
    distributed.barrier()  # before the first of us writes there
    if finished:
        return Run(target)
    begun = (target / "config.json").exists()
    if begun and Run(target).ran_on.get("corpus_sha256") not in (None, corpus.facts["sha256"]):
        raise InputError("corpus", config.corpus, "it has changed since the run in out began")
    with locked(target) if distributed.is_rank_zero() else nullcontext(), asked_to_stop() as stop:
        distributed.barrier()
        if not _is_finished(target, config):  # the process that held it may just have ended it
            _advance(Trainer(config, corpus, target, label), on_step, stop)
        distributed.barrier()
    return Run(target)


def _advance(
    trainer: Trainer, on_step: Callable[[dict[str, Any]], None] | None, stop: Callable[[], bool]
) -> None:
    try:
        trainer.resume()
        while trainer.updates < trainer.config.total_steps:
            row = trainer.advance()
            if on_step is not None:
                on_step(row)
            if distributed.any_rank(stop(), trainer.device):
                trainer.save_checkpoint()
                line = f"stopped after step {trainer.updates}; started again, it goes on from there"
                raise Terminated(line)
        trainer.finish()
    except OSError as error:
        what = f"{error.strerror or error}: {error.filename or trainer.folder}"
        raise TrainingError(f"{what}; {trainer.kept_state()}; started again, it goes on") from error


def _is_finished(folder: Path, config: ResolvedConfig) -> bool:
    """Whether this very run has ended there; a folder with anything else in it is refused."""
    if folder.is_file():
        raise InputError("out", str(folder), "it is a file; name a folder")
    if not (folder / "config.json").exists():
        names = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
        if any(name not in RUNNER_FILES and not name.startswith(".") for name in names):
            raise InputError("out", str(folder), "it has files in it that are not a run")
        return False
    run = Run(folder)
    if run.config.run_id != config.run_id:
        ours, theirs = config.model_dump(), run.config.model_dump()
        differing = [n for n in ours if ours[n] != theirs[n] and n not in NOT_IN_RUN_ID]
        allowed = f"it holds another run, which differs in {', '.join(differing)}"
        raise InputError("out", str(folder), allowed)
    return run.finished


class Trainer:
    """A run in progress: the model, the optimizer, the clock and the folder."""

    def __init__(
        self, config: ResolvedConfig, corpus: Corpus, folder: Path, label: str | None = None
    ) -> None:
        """Makes model and optimizer; writes config.json."""
        self.config, self.corpus, self.folder = config, corpus, folder
        self.device = device_of(config)
        self._shards = Shards(config, self.device) if config.parallel == "fsdp2" else None
        if self._shards is None:
            self.model, self.optimizer = build(config)
        else:
            self.model, self.optimizer = self._shards.model, self._shards.optimizer
        self.model.to(self.device).train()
        if config.compile:
            self.model.compile_blocks()
        self.updates = 0
        self.seconds = 0.0  # spent in training steps, evaluations not counted
        self.bytes = Breakdown()
        self._per_layer = PerLayerUpdates(self.model, self.optimizer) if config.per_layer else None
        self._peaks: dict[str, int] = {}  # bytes, by kind of step
        self._spectra = SpectraRecorder(*self._plain(), config.spectra_layers)
        self._progress_due = 0.0
        self._watch = LossWatch()
        self._skipped = 0  # updates in a row
        self._found: list[dict[str, Any]] = []  # events for the next metrics row
        self._best: dict[str, float] = {}  # the lowest validation loss, and after which step
        self._writes = distributed.is_rank_zero()
        self._ahead: tuple[int, list[Batch]] | None = None  # the next step and its batches
        if not self._writes:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "config.json").exists():
            facts = {
                "label": label,
                "config": config.model_dump(),
                "ran_on": ran_on(self.device, corpus),
            }
            write_json(folder / "config.json", facts)

    def resume(self) -> None:
        """Go back to the newest checkpoint, and cut the records back to its step."""
        whole = self._plain() if self._shards is None else self._shards.blank()
        self.updates, extra = checkpoint.load(
            self.folder / "checkpoints", *whole, self._report_damage
        )
        if self._shards is not None and self.updates:
            self._shards.take_(*whole)
        if not distributed.equal_on_all_ranks(self.updates):
            where = self.folder / "checkpoints"
            raise TrainingError(f"not every process sees the same checkpoints in {where}")
        self.seconds = extra.get("seconds", 0.0)
        self._peaks = extra.get("peaks", {})
        self._watch = LossWatch(extra.get("recent_losses", ()))
        self._skipped = extra.get("skipped", 0)
        self._best = extra.get("best", {})
        if warm_start(self.config):
            train_dense_(self.model, on=self.updates < warm_start(self.config))
        self.bytes = Breakdown(**extra.get("bytes", {}))
        if self._writes:
            self._cut_records(self.updates if self.updates else -1)
        if self.updates == 0:
            self._record_spectra()

    def _persistent(self) -> Breakdown:
        """Bytes of weights, gradients and states that this process holds."""
        if self._shards is not None:
            return self._shards.persistent()
        return persistent(self.model, self.optimizer, self.config.per_layer)

    def _plain(self) -> tuple[Llama, torch.optim.Optimizer]:
        """Model and optimizer in ordinary tensors; of shards the first process's copy."""
        plain = None if self._shards is None else self._shards.plain
        return plain or (self.model, self.optimizer)

    def _gather(self, gradients: bool = False) -> None:
        """Bring the copy of what is in shards up to date; all processes call it."""
        if self._shards is not None:
            self._shards.gather_(gradients)

    def advance(self) -> dict[str, Any]:
        """One step, and what is due after it: evaluation, spectra, checkpoint. Its metrics row."""
        config, kind = self.config, kind_of(self.config, self.updates)
        eventful = kind not in ("first", "next")
        if eventful:
            self._gather()
        if eventful and self._writes:
            self._spectra.note_momentum()
        started, batches = time.perf_counter(), self._batches(self.updates)
        with self._traced(kind):
            values, done = take_step_(
                self.model, self.optimizer, batches, config, self.updates,
                per_layer=self._per_layer, check=self._finite, shards=self._shards,
            )  # fmt: skip
        elapsed = time.perf_counter() - started
        self.seconds += elapsed
        self.updates += 1
        found = [*self._found, *(self._watch.observe(values[0]) if values else ())]
        self._found.clear()
        row = self._row(values, elapsed, found + done, self._peaks.get(kind))
        if self._due(config.eval_every):
            loss = row["validation_loss"] = self.evaluate("validation", config.eval_tokens)
            if loss < self._best.get("validation_loss", math.inf):
                self._best = {"validation_loss": loss, "step": self.updates}
        if self._writes:
            append_jsonl(self.folder / "metrics.jsonl", [row])
        if eventful:
            self._gather()
        if eventful and self._writes:
            moved = self._spectra.momentum_rows(self.updates, kind)
            append_jsonl(self.folder / "spectra.jsonl", moved)
        if self._due(config.spectra_every):
            self._record_spectra()
        if self.updates % config.checkpoint_every == 0:
            self.save_checkpoint(row.get("validation_loss"))
        if values is not None:
            self._report_progress(row)
        return row

    def finish(self) -> None:
        """Final evaluations, the trained model and result.json."""
        from safetensors.torch import save_file

        losses = {
            f"{split}_loss": self.evaluate(split, self.config.test_tokens)
            for split in ("validation", "test")
        }
        self._gather()
        if not self._writes:
            return
        model, _ = self._plain()
        weights = {name: value.contiguous() for name, value in model.state_dict().items()}
        partial = self.folder / ".model.safetensors"
        save_file(weights, partial)
        partial.replace(self.folder / "model.safetensors")
        if (tokenizer := self.corpus.folder / "tokenizer.json").exists():
            shutil.copyfile(tokenizer, self.folder / "tokenizer.json")
        parameters = {p for p in model.parameters() if p.requires_grad}
        ends = {*model.model.embed_tokens.parameters(), *model.lm_head.parameters()}
        result = {
            **losses,
            "validation_perplexity": math.exp(min(losses["validation_loss"], 700.0)),
            "test_perplexity": math.exp(min(losses["test_loss"], 700.0)),
            "best_validation_loss": self._best.get("validation_loss"),
            "best_step": self._best.get("step"),
            "entropy": self.corpus.entropy,
            "steps": self.updates,
            "tokens_seen": self.updates * self.config.tokens_per_step,
            "seconds": self.seconds,
            "parameters": sum(p.numel() for p in parameters),
            "parameters_without_embeddings": sum(p.numel() for p in parameters - ends),
            "weight_bytes": self.bytes.weights,
            "optimizer_state_bytes": self.bytes.optimizer_states,
        }
        write_json(self.folder / "result.json", result)
        (self.folder / "progress.json").unlink(missing_ok=True)
        if not self.config.keep_checkpoints:
            shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)

    def evaluate(self, split: Split, tokens: int) -> float:
        loss = evaluate(self.model, self.corpus, split, tokens, self.config)
        if not math.isfinite(loss):
            self._stop(f"the {split} loss after step {self.updates} is {loss}")
        return loss

    def save_checkpoint(self, loss: float | None = None) -> None:
        """Keep the present state, unless weights in it are no longer finite.

        Args:
            loss: on the validation block, if it was just measured.
        """
        self._gather()
        model, optimizer = self._plain()
        if self._writes and all(bool(p.isfinite().all()) for p in model.parameters()):
            checkpoint.save(
                self.folder / "checkpoints", self.updates, model, optimizer,
                kept=self.config.checkpoints_kept, loss=loss, seconds=self.seconds,
                peaks=self._peaks, recent_losses=list(self._watch.recent), best=self._best,
                skipped=self._skipped, bytes=self.bytes.as_dict(),
            )  # fmt: skip

    def kept_state(self) -> str:
        """Where the last good state is, in words."""
        kept = checkpoint.all_checkpoints(self.folder / "checkpoints")
        return f"the last good state is kept in {kept[-1]}" if kept else "no good state was kept"

    def _cut_records(self, last_kept: int) -> None:
        """Drop what was recorded after the step from which training goes on."""
        cut_jsonl(self.folder / "spectra.jsonl", last_kept)
        steps = cut_jsonl(self.folder / "metrics.jsonl", last_kept)
        if len(steps) < self.updates:
            lost = f"rows {len(steps) + 1} to {self.updates} of metrics.jsonl can't be read"
            self._report_damage(f"{self.folder}: {lost}; training goes on without them")

    def _report_damage(self, line: str) -> None:
        if self._writes:
            warnings.warn(line, stacklevel=2)
        self._found.append({"event": "damage", "what": line})

    def _stop(self, reason: str) -> NoReturn:
        """End the run, with the last good state kept."""
        self.optimizer.zero_grad(set_to_none=True)
        self.save_checkpoint()
        distributed.barrier()
        raise TrainingError(f"{reason}; {self.kept_state()}; a lower lr may help")

    def _batches(self, updates: int) -> list[Batch]:
        """The batches of the step after so many, on the device; those fetched ahead if they are."""
        if self._ahead is not None and self._ahead[0] == updates:
            return self._ahead[1]
        config = self.config
        tokens, targets = self.corpus.batch(
            "train", updates,
            batch=config.batch, sequence_length=config.sequence_length, seed=config.seed,
        )  # fmt: skip
        return list(zip(self._pieces(tokens), self._pieces(targets), strict=True))

    def _pieces(self, t: Tensor) -> list[Tensor]:
        """This process's share of every piece of a batch, on the device."""
        pieces = t.chunk(self.config.gradient_accumulation)
        return [self._to_device(distributed.local_chunk(piece)) for piece in pieces]

    def _fetch_ahead(self) -> None:
        """Get the next step's batches while the device still computes this one."""
        upcoming = self.updates + 1
        if upcoming < self.config.total_steps:
            self._ahead = upcoming, self._batches(upcoming)

    def _to_device(self, t: Tensor) -> Tensor:
        return (
            t.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else t
        )

    def _finite(self, loss: Tensor, norm: Tensor) -> tuple[float, float] | None:
        """Loss and gradient norm as numbers, fetched at once.

        If one isn't finite, the run stops, or with `on_nonfinite="skip"` its update is skipped.

        Called while the gradients are there: those of a recorded step are noted. The numbers are
        waited for, so what can be done meanwhile is done before.
        """
        with untracked():
            self._fetch_ahead()
        values = torch.stack([loss.float(), norm.float()]).tolist()
        for name, value in zip(("loss", "gradient norm"), values, strict=True):
            if not math.isfinite(value):
                reason = f"the {name} of step {self.updates + 1} is {value}"
                self._skipped += 1
                if self.config.on_nonfinite == "stop" or self._skipped > MOST_SKIPPED:
                    self._stop(reason)
                self._found.append({"event": "skipped", "what": reason})
                return None
        self._skipped = 0
        if self._due(self.config.cadence("spectra_every"), self.updates + 1):
            with untracked():  # it is no part of training
                self._gather(gradients=True)
                if self._writes:
                    self._spectra.see_gradients()
        return values[0], values[1]

    def _row(
        self, values: Values | None, elapsed: float, done: list[dict[str, Any]], peak: int | None
    ) -> dict[str, Any]:
        loss, norm = values or (None, None)
        return {
            "step": self.updates,
            "tokens_seen": self.updates * self.config.tokens_per_step,
            "seconds": round(self.seconds, 4),
            "loss": loss,
            "lr": learning_rate(self.updates - 1, self.config),
            "grad_norm": norm,
            "tokens_per_second": round(self.config.tokens_per_step / elapsed, 1),
            "weight_bytes": self.bytes.weights,
            "gradient_bytes": self.bytes.gradients,
            "optimizer_state_bytes": self.bytes.optimizer_states,
            "peak_memory_bytes": peak,
            "events": done,
        }

    def _due(self, every: int, updates: int | None = None) -> bool:
        """Whether what happens every so many updates happens after these (by default so far)."""
        updates = self.updates if updates is None else updates
        return updates % every == 0 or updates == self.config.total_steps

    @contextmanager
    def _traced(self, kind: str) -> Iterator[None]:
        """Learn the peak memory of this step: on CUDA of each one, on a CPU of the first of a kind.

        Steps of one kind allocate the same, and only CUDA's allocator counts at no cost. Compiled
        blocks and shards can't be followed operation by operation.
        """
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        opaque = self.config.compile or self._shards is not None
        if opaque or kind in self._peaks or (cuda and self.updates):
            yield
            activations = None
        else:
            hidden = {} if cuda else LAPACK
            tracker = Tracker(self.model, self.optimizer, hidden=hidden)
            try:
                with tracker:
                    yield
            finally:
                tracker.close()
            trace = tracker.trace()
            self._peaks[kind], activations = trace.peak.total, trace.kept
        if cuda:
            self._peaks[kind] = torch.cuda.max_memory_allocated(self.device)
        if self.updates == 0:
            self.bytes = self._persistent()
            facts: dict[str, int | None] = dict(self.bytes.as_dict())
            for name in ("activations", "logits"):
                facts[name] = getattr(activations, name) if activations else None
            if self._writes:
                write_json(self.folder / "memory.json", {**facts, "peak": self._peaks.get(kind)})

    def _record_spectra(self) -> None:
        self._gather()
        if self._writes:
            append_jsonl(self.folder / "spectra.jsonl", self._spectra.rows(self.updates))

    def _report_progress(self, row: dict[str, Any]) -> None:
        now = time.monotonic()
        if now < self._progress_due or not self._writes:
            return
        self._progress_due = now + PROGRESS_SECONDS
        left = (self.config.total_steps - self.updates) * self.seconds / self.updates
        progress = {name: row[name] for name in ("step", "loss", "tokens_per_second")}
        progress |= {"total_steps": self.config.total_steps, "seconds_left": round(left, 1)}
        write_json(self.folder / "progress.json", progress)
