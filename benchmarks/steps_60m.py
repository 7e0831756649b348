"""Seconds per step of every method at 60m on this CPU, in turns with full rank.

The step has few tokens, so that the optimizer's share shows. Steps with a refresh or an exact step
are timed separately and weighted by their number in 200 steps.
"""

from __future__ import annotations

import torch

from benchmarks.harness import Row
from benchmarks.steps import mean_seconds
from lowrank_lab.config import RunConfig
from lowrank_lab.methods.registry import METHODS
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.training.loop import fast_process

BASE = "full-rank"
SHAPE = {"batch": 2, "sequence_length": 256}
STEPS = 401  # two periods of 200, and the first step, which isn't counted
RANK = 128  # as in notebooks/studies/paper_60m.yaml


def rows(quick: bool = False) -> list[Row]:
    """One row per method; `ratio` is its steps per second over those of full rank."""
    names = [name for name in METHODS if name not in (BASE, "adamw-8bit")][: 2 if quick else None]
    found = []
    for name in names:
        with fast_process():
            pair = {BASE: config_of(BASE, quick), name: config_of(name, quick)}
            seconds = mean_seconds(pair, 1 if quick else 3)
        found.append(
            Row(
                f"step at 60m, {name}", 1 / seconds[name], 1 / seconds[BASE], None, "steps/s",
                seconds[BASE] / seconds[name], "", BASE,
                f"float32, {torch.get_num_threads()} threads, 512 tokens per step, rank {RANK}",
            )
        )  # fmt: skip
    return found


def config_of(method: str, quick: bool) -> RunConfig:
    """A run without evaluation; refreshes every 200 steps."""
    row = METHODS[method]
    options = {"update_proj_gap": 200} if "update_proj_gap" in row.options else {}
    rank = {"rank": RANK if not quick else 4} if row.uses_rank and row.rank is None else {}
    size = {"model": "tiny" if quick else "60m"}
    fields = {**size, **SHAPE, **rank, "corpus": "markov", "steps": STEPS}
    return resolve(RunConfig(method=method, method_options=options, **fields))
