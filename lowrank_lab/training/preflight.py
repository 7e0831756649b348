"""What is checked before training: the configuration, the processes, the corpus and the folder."""

from __future__ import annotations

from pathlib import Path

import torch

from lowrank_lab import distributed
from lowrank_lab.config import NOT_IN_RUN_ID, InputError, ResolvedConfig, RunConfig
from lowrank_lab.data.corpus import Corpus
from lowrank_lab.data.prepare import prepare
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.runs.run import RUNNER_FILES, Run
from lowrank_lab.training.extend import check_extension, extends
from lowrank_lab.training.fsdp_layout import check_fsdp
from lowrank_lab.training.optimizer_trial import try_optimizer


def check(config: RunConfig) -> tuple[ResolvedConfig, Corpus]:
    """The resolved configuration and its prepared corpus, after all checks before training.

    Raises:
        InputError: see `resolve` and `prepare`; also a run longer than its corpus without
            `repeat`, a held-out part shorter than a sequence, or a device that isn't there.
    """
    given, config = config, resolve(config)
    try_optimizer(config, device_of(config))
    _check_processes(config)
    if config.parallel == "fsdp2":
        check_fsdp(config)
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


def is_finished(folder: Path, config: ResolvedConfig) -> bool:
    """Whether this run has finished in a folder, with as many steps.

    Raises:
        InputError: the folder has anything else in it, or a shorter run that can't be extended.
    """
    if folder.is_file():
        raise InputError("out", str(folder), "it is a file; name a folder")
    if not (folder / "config.json").exists():
        names = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
        if any(name not in RUNNER_FILES and not name.startswith(".") for name in names):
            raise InputError("out", str(folder), "it has files in it that are not a run")
        return False
    run = Run(folder)
    if extends(config, run.config):
        check_extension(config, run)
        return False
    if run.config.run_id != config.run_id:
        ours, theirs = config.model_dump(), run.config.model_dump()
        differing = [n for n in ours if ours[n] != theirs[n] and n not in NOT_IN_RUN_ID]
        allowed = f"it has another run, which differs in {', '.join(differing)}"
        raise InputError("out", str(folder), allowed)
    return run.finished
