"""Seconds per step of the rows of studies, in turns with full rank on one thread.

Special steps (with a refresh, a merge, a reset) are timed separately, and weighted by their number
in a run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import yaml

from benchmarks.harness import Row, median, take_turns, threads
from lowrank_lab.config import RunConfig
from lowrank_lab.methods.build import build
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.training.gradients import Batch
from lowrank_lab.training.kinds import kind_of, set_clock_
from lowrank_lab.training.loop import fast_process
from lowrank_lab.training.step import take_step_

STUDIES = Path(__file__).parent.parent / "notebooks" / "studies"
TITLES = {  # study file: what its rows are called; a row that two files have is timed once
    "ladder_s1": "step at S1", "others_s1": "step at S1", "ladder_s2": "step at S2",
    "ladder_s3": "step at S3",
}  # fmt: skip
TOGETHER = 5  # methods that take turns with full rank


def rows(quick: bool = False) -> list[Row]:
    """One row per variant of each study; `ratio` is its time over full rank's beside it."""
    found: list[Row] = []
    with threads(1), fast_process():
        for study in list(TITLES)[: 1 if quick else None]:
            variants = configurations(study)
            timed = {"full-rank", *(row.name.removeprefix(f"{TITLES[study]}, ") for row in found)}
            names = [name for name in variants if name not in timed][: 2 if quick else None]
            for i in range(0, len(names), TOGETHER):
                group = ["full-rank", *names[i : i + TOGETHER]]
                seconds = mean_seconds({name: variants[name] for name in group}, 1 if quick else 15)
                base = seconds.pop("full-rank")
                found += [
                    Row(
                        f"{TITLES[study]}, {name}", 1e3 * taken, 1e3 * base, None, "ms",
                        taken / base, "", "full-rank",
                        "one thread; the mean over a run, with what happens in some steps only",
                    )
                    for name, taken in seconds.items()
                ]  # fmt: skip
    return found


def configurations(study: str) -> dict[str, RunConfig]:
    """The runs of a study, at the default learning rates of their methods."""
    content = yaml.safe_load((STUDIES / f"{study}.yaml").read_text("utf-8"))
    fields = {
        name: {
            **content["base"],
            **{k: v for k, v in changes.items() if k in RunConfig.model_fields},
        }
        for name, changes in content["variants"].items()
    }
    return {name: resolve(RunConfig(**given)) for name, given in fields.items()}


def mean_seconds(configs: dict[str, RunConfig], rounds: int) -> dict[str, float]:
    """Mean seconds per step over the whole run of each configuration."""
    kinds = {
        name: Counter(kind_of(c, step) for step in range(c.steps)) for name, c in configs.items()
    }
    contestants: dict[str, Callable[[], None]] = {}
    for name, config in configs.items():
        step = stepper(config)
        step(0)  # creates states and projections
        first = {kind_of(config, at): at for at in reversed(range(1, config.steps))}
        contestants |= {f"{name}/{kind}": partial(step, at) for kind, at in first.items()}
    seconds = {n: median(taken) for n, taken in take_turns(contestants, rounds).items()}
    return {
        name: sum(n * seconds[f"{name}/{kind}"] for kind, n in counted.items() if kind != "first")
        / (sum(counted.values()) - counted["first"])
        for name, counted in kinds.items()
    }


def stepper(config: RunConfig) -> Callable[[int], None]:
    """A function that takes a step of the given number, without those before it."""
    torch.manual_seed(0)
    model, optimizer = build(config)
    shape = config.batch, config.sequence_length

    def step(at: int) -> None:
        tokens, targets = (torch.randint(config.vocab_size, shape) for _ in range(2))
        batches: list[Batch] = [(tokens, targets)]
        set_clock_(optimizer, at)
        take_step_(model, optimizer, batches, config, at)

    return step
