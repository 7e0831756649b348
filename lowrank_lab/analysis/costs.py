"""Losses at equal cost: each variant against a dense model of the same bytes or FLOPs.

The dense models are the reference at the sizes of a ladder. Between two sizes their loss is taken
from a straight line over the logarithm of the cost, seed by seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from lowrank_lab.analysis.ladder import REFERENCE, sizes_of
from lowrank_lab.analysis.tables import intervals
from lowrank_lab.config import ResolvedConfig
from lowrank_lab.memory.formulas import flops_per_token
from lowrank_lab.methods.registry import METHODS

COSTS = ("bytes", "flops")


def costs_of(folders: Iterable[Path | str], reference: str = REFERENCE) -> pd.DataFrame:
    """One row per run: label, parameters (of the reference at its size), seed, steps, loss, COSTS.

    `loss` is the test loss, in nats per token; `bytes` are those of weights and optimizer states,
    `flops` those of all forward and backward passes of training, without the optimizer's; NaN for
    a method that is not registered here.

    Args and errors: those of `ladder.gaps_of`.
    """
    tables = []
    for runs, finals, parameters in sizes_of(folders, reference):
        steps = [run.config.total_steps for run in runs]
        flops = [_training_flops(run.config) for run in runs]
        held = finals["weight_bytes"] + finals["optimizer_state_bytes"]
        table = finals.assign(parameters=parameters, steps=steps, flops=flops, bytes=held)
        tables.append(table.rename(columns={"test_loss": "loss"}))
    names = ["label", "parameters", "seed", "steps", "loss", *COSTS]
    return pd.concat(tables, ignore_index=True)[names]


def _training_flops(config: ResolvedConfig) -> float:
    """NaN for a method that is not registered here."""
    if config.method not in METHODS:
        return math.nan
    return flops_per_token(config) * config.tokens_per_step * config.total_steps


def at_equal_cost(
    costs: pd.DataFrame, cost: str = "flops", reference: str = REFERENCE
) -> pd.DataFrame:
    """Each label's loss minus that of a dense model of the same cost, seed by seed.

    Columns: label, parameters, share (the label's cost over that of the reference at its size),
    dense (mean loss of the dense model), `A − dense` (mean), ± (95 %, Student's t) and n. Labels
    whose cost lies outside that of the reference's sizes have no row: nothing is extrapolated.

    Args:
        costs: returned by `costs_of`.
        cost: a column with costs, as those of COSTS.
    """
    dense = costs[costs["label"] == reference]
    table = costs[costs["label"] != reference].merge(
        dense.groupby("parameters")[cost].first().rename("whole"), on="parameters"
    )
    table["share"] = table[cost] / table["whole"]
    table["dense"] = [
        _interpolated(dense[dense["seed"] == seed], cost, at)
        for seed, at in zip(table["seed"], table[cost], strict=True)
    ]
    table["A − dense"] = table["loss"] - table["dense"]
    table = table.dropna(subset=["dense"])
    by = ["label", "parameters"]
    means = table.groupby(by, sort=False)[["share", "dense"]].mean().reset_index()
    found = intervals(
        table.assign(**{"A − dense": table["loss"] - table["dense"]}), by, "A − dense"
    )
    return means.merge(found.rename(columns={"mean": "A − dense"}), on=by)


def _interpolated(dense: pd.DataFrame, cost: str, at: float) -> float:
    """Loss of the dense runs of one seed at a cost between theirs; else NaN."""
    line = dense.sort_values(cost)
    if line.empty:
        return np.nan
    known = np.log(line[cost].to_numpy(float))
    return float(np.interp(np.log(at), known, line["loss"], left=np.nan, right=np.nan))
