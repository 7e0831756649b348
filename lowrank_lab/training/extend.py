"""Extending a run: more steps in its folder, with the result of a run that had them from the start.

Nothing that was computed may depend on the number of steps, so the schedule has to be constant and
its warm-up as long as before. Training goes on from the last checkpoint that a longer run would
have written too.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

from lowrank_lab.config import (
    NOT_IN_RUN_ID,
    InputError,
    ResolvedConfig,
    RunConfig,
    counted_options,
)
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.runs.files import write_json
from lowrank_lab.runs.run import Run
from lowrank_lab.training import checkpoint
from lowrank_lab.training.schedule import events

FREE = {*NOT_IN_RUN_ID, "steps", "warmup"}  # fields in which an extended run may differ
CADENCES = ("eval_every", "spectra_every")  # their defaults follow from the number of steps
# Options whose default follows from it too, or was another one in earlier versions
OPTIONS = ("merge_every", "refresh")


def as_extension(config: RunConfig, folder: Path) -> RunConfig:
    """The configuration with the cadences of the shorter run in a folder, where it gives none.

    It is returned as it is if the folder has another run, or none.
    """
    if not (folder / "config.json").exists():
        return config
    old = Run(folder).config
    if config.total_steps <= old.total_steps:
        return config
    changes = {name: getattr(config, name) or getattr(old, name) for name in CADENCES}
    kept = {n: old.method_options[n] for n in OPTIONS if n in old.method_options}
    if kept and config.method == old.method:
        changes["method_options"] = kept | config.method_options
    longer = config.replace(**changes)
    return longer if extends(resolve(longer), old) else config


def extends(config: ResolvedConfig, old: ResolvedConfig) -> bool:
    """Whether a configuration is another one with more steps."""
    ours, theirs = (c.model_dump(exclude=FREE) for c in (config, old))
    for fields in (ours, theirs):
        fields["method_options"] = counted_options(fields["method_options"])
    return ours == theirs and config.total_steps > old.total_steps


def check_extension(config: ResolvedConfig, run: Run) -> None:
    """Refuse an extension that would differ from a run of so many steps from the start.

    Raises:
        InputError: the schedule depends on the number of steps, or no checkpoint is left.
    """
    old = run.config
    if config.schedule != "constant" and config.min_lr_ratio != 1:
        allowed = (
            f"the run there has {old.total_steps} steps, on which its schedule {old.schedule} "
            "depends; only the schedule constant can be extended: name another folder"
        )
        raise InputError("steps", config.total_steps, allowed)
    if config.warmup_steps != old.warmup_steps:
        allowed = f"the run there warmed up for {old.warmup_steps} steps: give warmup in steps"
        raise InputError("warmup", config.warmup, allowed)
    begun = run.finished or checkpoint.all_checkpoints(run.folder / "checkpoints")
    if begun and not _usable(run, config):
        allowed = (
            f"the run there ended after {old.total_steps} steps and has no checkpoint to go on "
            "from; keep_after_finish keeps them"
        )
        raise InputError("steps", config.total_steps, allowed)


def begin_extension(config: ResolvedConfig, folder: Path) -> None:
    """Make the finished or unfinished run in a folder the beginning of a longer one.

    Its result stays as `result.steps-N.json`. A run that is no extension is left as it is.
    """
    if not (folder / "config.json").exists():
        return
    run = Run(folder)
    if not extends(config, run.config):
        return
    usable, steps = _usable(run, config), run.config.total_steps
    for found in checkpoint.all_checkpoints(folder / "checkpoints"):
        if found not in usable:
            (folder / "checkpoints" / checkpoint.BEST).unlink(missing_ok=True)
            shutil.rmtree(found)
    facts = run.facts | {"config": config.model_dump()}
    with suppress(FileNotFoundError):
        (folder / "result.json").rename(folder / f"result.steps-{steps:08d}.json")
    write_json(folder / "config.json", facts)


def _usable(run: Run, config: ResolvedConfig) -> list[Path]:
    """The checkpoints that the longer run would have written with the same records.

    A run evaluates and records spectra after its last step, and has no event then.
    """
    end, old = run.config.total_steps, run.config
    extra = any(end % every for every in (old.eval_every, old.spectra_every))
    found = checkpoint.all_checkpoints(run.folder / "checkpoints")
    if not extra and not events(end, config):
        return found
    return [path for path in found if path.name != f"step-{end:08d}"]
