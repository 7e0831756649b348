"""60m for 150 steps on text: the loss falls, and its first values are those of a CPU."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu_checks.results import at_most
from benchmarks.gpu_checks.runs import Interrupted
from benchmarks.gpu_checks.session import ONE_LAYER, Item, Session, training_on
from lowrank_lab import RunConfig, train
from lowrank_lab.data.corpus import Corpus

STEPS, FIRST = 150, 3
CASES: dict[str, dict[str, Any]] = {
    "full rank": {"method": "full-rank"},
    "low rank, refactor and reset": {
        "method": "low-rank", "refactor_every": 50, "reset_every": 50, "recovery_steps": 10,
    },
}  # fmt: skip


def items(session: Session) -> Iterator[Item]:
    for name in CASES:
        yield name, partial(trained, session, name)


def configuration(corpus: Corpus, name: str, device: str, tiny: bool) -> RunConfig:
    steps = 15 if tiny else STEPS
    case = CASES[name] | (
        {"refactor_every": 5, "reset_every": 10} if tiny and "low" in name else {}
    )
    batch, length = (8, 32) if tiny else (32, 256)
    return RunConfig(
        model="tiny" if tiny else "60m", vocab_size=corpus.vocab_size, precision="amp-bf16",
        batch=batch, sequence_length=length, steps=steps, device=device, repeat=True,
        spectra_layers=ONE_LAYER, spectra_every=steps, eval_every=steps, checkpoint_every=steps,
        eval_tokens=16_384, test_tokens=16_384, **case,
    )  # fmt: skip


def trained(session: Session, name: str) -> None:
    """The mean of the last ten losses against the first; the first three against the CPU's."""
    config = configuration(session.corpus, name, session.device.type, session.tiny)
    losses: list[float] = []
    with training_on(session.corpus):
        folder = session.scratch / "training" / config.method
        train(config, folder, on_step=lambda row: losses.append(row["loss"]))
    report, last = session.results.fact, statistics.mean(losses[-10:])
    fallen = 1.0 if session.tiny else 0.85
    report(f"{name}: mean of the last losses over the first", last / losses[0], "",
           at_most(fallen), first=losses[0], last=last)  # fmt: skip
    expected = session.prepared_facts("first_losses")
    if session.tiny:
        expected = {name: first_losses(session.corpus, name, tiny=True)}
    if expected is None:
        session.results.unfinished(f"{name}: first losses; the CPU's are not prepared")
        return
    differences = (abs(a - b) / b for a, b in zip(losses, expected[name], strict=False))
    report(f"{name}: first {FIRST} losses and the CPU's", max(differences), "relative difference",
           at_most(1e-3))  # fmt: skip


def first_losses(corpus: Corpus, name: str, tiny: bool = False) -> list[float]:
    """The first losses of the same run on a CPU; `prepare` keeps them."""
    losses: list[float] = []

    def note(row: dict[str, Any]) -> None:
        losses.append(row["loss"])
        if row["step"] == FIRST:
            raise Interrupted

    config = configuration(corpus, name, "cpu", tiny)
    with (
        tempfile.TemporaryDirectory() as folder,
        training_on(corpus),
        suppress(Interrupted),
    ):
        train(config, Path(folder) / "run", on_step=note)
    return losses
