"""Kinds of training steps: those of one kind do the same, in the same memory."""

from __future__ import annotations

import torch

from lowrank_lab.config import ResolvedConfig
from lowrank_lab.training.schedule import events, merge_period

# What optimizers do periodically, by the option that sets the period: its name, and 1 if it is part
# of the last update of each period, 0 if of the first update of the next.
CLOCKS = {"update_proj_gap": ("refresh", 0), "update_k": ("exact", 1)}


def periods(config: ResolvedConfig) -> list[int]:
    """Periods of everything that happens in some steps only."""
    found = [config.refactor_every, config.reset_every, merge_period(config)]
    found += [config.method_options.get(option) or 0 for option in CLOCKS]
    return [period for period in found if period]


def kind_of(config: ResolvedConfig, step: int) -> str:
    """The kind of update `step` (from 0): steps of one kind do the same, in the same memory.

    `first`, or `next` if nothing else happens, or `refresh`, `exact` and the names of events. (A
    spread refresh is part of every step, of other weights each time.)
    """
    names = [] if step else ["first"]
    for option, (name, early) in CLOCKS.items():
        period = config.method_options.get(option)
        if step and period and (step + early) % period == 0:
            names.append(name)
    return " + ".join([*names, *events(step + 1, config)]) or "next"


def set_clock_(optimizer: torch.optim.Optimizer, updates: int) -> None:
    """Set the number of updates in the optimizer's states, so that what is due then is next.

    With spread refreshes, the largest weight is due.
    """
    each = [(p, s) for p, s in optimizer.state.items() if isinstance(s, dict)]
    states = [(p, s) for p, s in each if isinstance(s.get("step"), int)]
    offset = 0
    if states:
        offset = max(states, key=lambda item: item[0].numel())[1].get("refresh_offset", 0)
    for _, state in states:
        state["step"] = updates - offset
