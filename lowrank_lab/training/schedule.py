"""The learning rate and the events of a run, as pure functions of the step.

Steps count from 0. After step t, s = t + 1 updates are done, and events are functions of s. A
checkpoint therefore stores one integer.
"""

from __future__ import annotations

import math
from typing import Literal

from lowrank_lab.config import ResolvedConfig
from lowrank_lab.techniques import recovery_factor

Event = Literal["warm-start-ends", "merge", "refactor", "reset"]


def learning_rate(step: int, config: ResolvedConfig) -> float:
    """The learning rate of update `step`, recovery after resets included (2505.22922).

    Within `recovery_steps` after a reset at s, the rate is a share of schedule(s + recovery_steps).
    """
    resets = [step - step % period for period in restarting_periods(config) if step >= period]
    resets = [reset for reset in resets if reset > warm_start(config)]
    last_reset = max(resets, default=0)
    k = step - last_reset
    if resets and k < config.recovery_steps:
        target = scheduled_rate(last_reset + config.recovery_steps, config)
        return target * recovery_factor(k, config.recovery_steps)
    return scheduled_rate(step, config)


def restarting_periods(config: ResolvedConfig) -> list[int]:
    """Periods of the events that reset moments: resets, merges, and resetting refactorizations."""
    periods = [config.reset_every, merge_period(config)]
    periods += [config.refactor_every] if config.on_refactor == "reset" else []
    return [period for period in periods if period]


def merge_period(config: ResolvedConfig) -> int:
    """Steps between two merges of ReLoRA, 0 for methods that don't merge."""
    return int(config.method_options.get("merge_every") or 0)


def warm_start(config: ResolvedConfig) -> int:
    """Steps of ReLoRA's full-rank warm start."""
    return int(config.method_options.get("warm_start") or 0)


def scheduled_rate(step: int, config: ResolvedConfig) -> float:
    """Linear warm-up to the peak, then the decay to `min_lr_ratio` of it; no resets."""
    total, warmup_steps = config.total_steps, config.warmup_steps
    if step < warmup_steps:
        return config.lr * (step + 1) / warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = min(1.0, (step - warmup_steps) / max(1, total - warmup_steps))
    if config.schedule == "cosine":
        progress = 0.5 - 0.5 * math.cos(math.pi * progress)
    return config.lr * (1.0 + (config.min_lr_ratio - 1.0) * progress)


def events(updates_done: int, config: ResolvedConfig) -> tuple[Event, ...]:
    """The events after `updates_done` updates, in order; there are none after the last update."""
    periods: dict[Event, int] = {
        "merge": merge_period(config),
        "refactor": config.refactor_every,
        "reset": config.reset_every,
    }
    if updates_done >= config.total_steps:
        return ()
    due: list[Event] = [name for name, p in periods.items() if p and updates_done % p == 0]
    if warm_start(config) and updates_done <= warm_start(config):  # no factors are trained yet
        due = ["warm-start-ends"] if updates_done == warm_start(config) else []
    return tuple(due)
