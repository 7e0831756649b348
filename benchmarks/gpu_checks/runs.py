"""`train` with each method: records, events, an interruption, and a change of device."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu_checks.corpus import TINY_VOCABULARY, random_corpus
from benchmarks.gpu_checks.results import at_least, at_most
from benchmarks.gpu_checks.session import Item, Session, training_on
from lowrank_lab import RunConfig, train
from lowrank_lab.methods.registry import METHODS

STEPS, KEPT, STOPPED = 10, 4, 6  # of a run; between checkpoints; the step that is interrupted
PERIODIC = {"update_proj_gap": 3, "merge_every": 3, "update_k": 3}
FACTORS = {"refactor_every": 3, "reset_every": 5, "recovery_steps": 2}
IN_DRY_RUN = ("full-rank", "low-rank", "relora", "sltrain", "fira", "apollo")
COMPILES_ITSELF = "adamw-8bit"  # tens of seconds, so it comes last
Losses = dict[int, float]


class Interrupted(Exception):
    """Ends a run as a kill would, between two steps."""


def items(session: Session) -> Iterator[Item]:
    names = [name for name in METHODS if not session.tiny or name in IN_DRY_RUN]
    for name in sorted(names, key=COMPILES_ITSELF.__eq__):
        yield name, partial(interrupted, session, name)


def configuration(method: str, device: str) -> RunConfig:
    """A short run of a tiny model in which everything that can happen does."""
    options = {k: v for k, v in PERIODIC.items() if k in METHODS[method].options}
    sizes = {"model": "tiny", "vocab_size": TINY_VOCABULARY, "batch": 8, "sequence_length": 32}
    records = {"eval_every": 3, "eval_tokens": 512, "test_tokens": 512}
    records |= {"spectra_every": 5, "checkpoint_every": KEPT}
    events: dict[str, Any] = FACTORS if method == "low-rank" else {}
    return RunConfig(
        method=method, method_options=options, device=device, steps=STEPS, repeat=True,
        **sizes, **records, **events,
    )  # fmt: skip


def interrupted(session: Session, method: str) -> None:
    """A run, the same one interrupted and resumed, and one that moves from CPU to device."""
    device = session.device.type
    folder = session.scratch / "runs" / method
    config = configuration(method, device)
    whole = losses_of(session, config, folder / "whole")
    first = losses_of(session, config, folder / "resumed", until=STOPPED)
    second = losses_of(session, config, folder / "resumed")
    report = session.results.fact
    report(f"{method}: all losses are finite", sum(map(math.isfinite, whole.values())), "steps",
           at_least(STEPS))  # fmt: skip
    report(
        f"{method}: resumed and uninterrupted", worst(first | second, whole), "relative difference",
        at_most(1e-5),
    )  # fmt: skip
    report(f"{method}: resumed at step", min(second), "", at_least(KEPT + 1))
    on_cpu = configuration(method, "cpu")
    before = losses_of(session, on_cpu, folder / "moved", until=STOPPED)
    after = losses_of(session, config, folder / "moved", until=STOPPED)
    report(
        f"{method}: first loss of a CPU's checkpoint", worst(after, before, [KEPT + 1]),
        "relative difference", at_most(1e-5),
    )  # fmt: skip
    report(
        f"{method}: second loss of a CPU's checkpoint", worst(after, before, [KEPT + 2]),
        "relative difference", at_most(1e-3),
    )  # fmt: skip


def losses_of(session: Session, config: RunConfig, folder: Path, until: int = STEPS + 1) -> Losses:
    """The losses of a run by step, from its start or its checkpoint; ended after step `until`."""
    losses: Losses = {}

    def note(row: dict[str, Any]) -> None:
        losses[row["step"]] = row["loss"]
        if row["step"] == until:
            raise Interrupted

    small = random_corpus(session.scratch / "small", TINY_VOCABULARY, 60_000)
    with training_on(small), suppress(Interrupted):
        train(config, folder, on_step=note)
    return losses


def worst(ours: Losses, theirs: Losses, steps: list[int] | None = None) -> float:
    """The largest relative difference of the losses of some steps (default: all of theirs)."""
    chosen = list(theirs) if steps is None else steps
    return max(abs(ours[step] - theirs[step]) / abs(theirs[step]) for step in chosen)
