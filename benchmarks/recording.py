"""Cost of recording spectra: its share of training time at the default interval."""

from __future__ import annotations

import torch

from benchmarks.harness import Row, median, take_turns, threads
from lowrank_lab.analysis.spectra import SpectraRecorder
from lowrank_lab.config import RunConfig
from lowrank_lab.methods.build import build
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.training.gradients import Batch
from lowrank_lab.training.step import take_step_

METHODS = ("full-rank", "low-rank", "galore", "sltrain")
STEPS = 2000  # of the run; spectra are recorded at every fifth of it


def rows(quick: bool = False) -> list[Row]:
    return [share(method, rounds=1 if quick else 7) for method in METHODS]


def share(method: str, rounds: int) -> Row:
    """Time of a run's records over the time of its steps, with the quick study's model."""
    config = resolve(
        RunConfig(model="micro", num_layers=3, vocab_size=512, batch=8, method=method, steps=STEPS)
    )
    torch.manual_seed(0)
    model, optimizer = build(config)
    recorder = SpectraRecorder(model, optimizer, config.spectra_layers)
    shape = config.batch, config.sequence_length

    def batch() -> list[Batch]:
        tokens, targets = (torch.randint(512, shape) for _ in range(2))
        return [(tokens, targets)]

    def step() -> None:
        take_step_(model, optimizer, batch(), config, 1)

    def record() -> None:
        recorder.see_gradients()
        recorder.rows(1)

    def with_gradients() -> None:
        model.loss(*batch()[0]).backward()  # type: ignore[no-untyped-call]

    with threads(1):
        step()
        seconds = take_turns({"step": step}, rounds) | take_turns(
            {"record": record}, rounds, before=with_gradients
        )
    one, records = median(seconds["record"]), STEPS // config.spectra_every + 1
    percent = 100 * records * one / (STEPS * median(seconds["step"]))
    return Row(
        f"spectra of all layers, share of training, micro, {method}", percent, None, None, "%",
        percent, "≤ 2", "",
        f"{records} records of {1e3 * one:.1f} ms in {STEPS} steps; weights, updates, gradients",
    )  # fmt: skip
