"""The training loop: a configuration in, a run folder out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from lowrank_lab import distributed
from lowrank_lab.config import InputError, RunConfig
from lowrank_lab.cpu.malloc import keep_freed_memory
from lowrank_lab.cpu.products import fast_products
from lowrank_lab.paths import data_folder
from lowrank_lab.runs.files import locked
from lowrank_lab.runs.run import Run
from lowrank_lab.training.errors import Terminated, TrainingError
from lowrank_lab.training.extend import as_extension, begin_extension
from lowrank_lab.training.monitor import asked_to_stop
from lowrank_lab.training.preflight import check, device_of, is_finished
from lowrank_lab.training.trackers import (
    MetricsTracker,
    Mirror,
    TrackerBuilder,
    tracker_builders,
)
from lowrank_lab.training.trainer import Trainer

OnStep = Callable[[dict[str, Any]], None]  # gets each row of metrics.jsonl


def train(
    config: RunConfig,
    folder: Path | str | None = None,
    *,
    label: str | None = None,
    on_step: OnStep | None = None,
    trackers: Sequence[str | MetricsTracker] | None = None,
) -> Run:
    """Train a configuration, or resume its interrupted run; returns the run folder as a `Run`.

    Args:
        config: the run's configuration.
        folder: the run folder; by default data/runs/<run id>. A finished run is returned as it is;
            with more steps it is extended, where its schedule is constant (`training.extend`).
        label: name of the run in tables and figures.
        on_step: called after every step with its row of metrics.jsonl.
        trackers: receive the metrics during training: `tensorboard` (event files in the run
            folder), `module.Class` (called with the run's name), or objects with the methods of
            `training.trackers.MetricsTracker`, such as accelerate's trackers. None: those that the
            environment variable LOWRANK_LAB_TRACKERS names, separated by commas.

    Raises:
        InputError: the configuration or a tracker is not allowed (before anything is written), or
            the folder is in use by another process, can't be written to, or has only damaged
            checkpoints.
        TrainingError: the loss or a gradient is not finite, or a record can't be written; the last
            good state is in the folder.
        Terminated: SIGTERM came; the step was finished and its state saved.
    """
    with distributed.process_group(device_of(config)), fast_process():
        return _train(config, folder, label, on_step, tracker_builders(trackers))


@contextmanager
def fast_process() -> Iterator[None]:
    """Process-wide settings during `train`, restored at the end."""
    with keep_freed_memory(), fast_products():
        yield


def _train(
    config: RunConfig,
    folder: Path | str | None,
    label: str | None,
    on_step: OnStep | None,
    trackers: list[TrackerBuilder],
) -> Run:
    if folder is not None:
        config = as_extension(config, Path(folder))
    config, corpus = check(config)
    target = Path(folder) if folder is not None else data_folder() / "runs" / config.run_id
    finished = is_finished(target, config)
    distributed.barrier()  # before the first of us writes there
    if finished:
        return Run(target)
    begun = (target / "config.json").exists()
    if begun and Run(target).ran_on.get("corpus_sha256") not in (None, corpus.facts["sha256"]):
        raise InputError("corpus", config.corpus, "it has changed since the run in out began")
    lock = locked(target) if distributed.is_rank_zero() else nullcontext()
    with lock, asked_to_stop() as stop:
        if distributed.is_rank_zero():
            begin_extension(config, target)
        distributed.barrier()
        if not is_finished(target, config):  # the process that had the lock may have finished it
            _loop(Trainer(config, corpus, target, label), on_step, stop, trackers)
        distributed.barrier()
    return Run(target)


def _loop(
    trainer: Trainer,
    on_step: OnStep | None,
    stop: Callable[[], bool],
    trackers: list[TrackerBuilder],
) -> None:
    try:
        trainer.resume()
        asked = distributed.AnyRank(trainer.device)
        with _mirror(trainer, trackers) as mirror:
            while trainer.updates < trainer.config.total_steps:
                row = trainer.advance()
                mirror.log(row)
                if on_step is not None:
                    on_step(row)
                if asked(stop()):
                    trainer.save_checkpoint()
                    after = f"stopped after step {trainer.updates}"
                    raise Terminated(f"{after}; started again, it goes on from there")
            trainer.finish()
            if distributed.is_rank_zero():
                mirror.log_result(Run(trainer.folder).result)
    except OSError as error:
        what = f"{error.strerror or error}: {error.filename or trainer.folder}"
        raise TrainingError(f"{what}; {trainer.kept_state()}; started again, it goes on") from error


@contextmanager
def _mirror(trainer: Trainer, trackers: list[TrackerBuilder]) -> Iterator[Mirror]:
    """The trackers of a run, from its current step on; the first process alone has any."""
    chosen = trackers if distributed.is_rank_zero() else []
    folder, config = trainer.folder, trainer.config
    mirror = Mirror(chosen, config, folder.name, folder, trainer.updates)
    try:
        yield mirror
    finally:
        mirror.finish()
