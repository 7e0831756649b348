"""The learning rate and the events of a run, as pure functions of the step.

Steps count from 0. After step t has been applied, s = t + 1 updates are done, and events are asked
for by that s. A checkpoint therefore stores one integer.
"""

from __future__ import annotations

import math
from typing import Literal

from lowrank_lab.config import RunConfig

Event = Literal["refactor", "reset"]


def learning_rate(step: int, config: RunConfig) -> float:
    """The learning rate of update `step`, recovery after resets included (2505.22922).

    k steps after a reset at s, within `recovery_steps`:
        lr = target · (0.001 + 0.999 · k / (recovery_steps − 1))
        target = schedule(s + recovery_steps)
    """
    since_reset = step % config.reset_every if config.reset_every else step
    last_reset = step - since_reset
    if config.reset_every and last_reset > 0 and since_reset < config.recovery_steps:
        target = scheduled_rate(last_reset + config.recovery_steps, config)
        return target * (0.001 + 0.999 * since_reset / (config.recovery_steps - 1))
    return scheduled_rate(step, config)


def scheduled_rate(step: int, config: RunConfig) -> float:
    """Linear warm-up to the peak, then the decay to `min_lr_ratio` of it; no resets."""
    assert config.lr is not None, "resolve the configuration first"
    total = config.total_steps
    warmup_steps = math.ceil(round(config.warmup * total, 6))  # 0.07 · 100 is 7, not 8
    if step < warmup_steps:
        return config.lr * (step + 1) / warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = min(1.0, (step - warmup_steps) / max(1, total - warmup_steps))
    if config.schedule == "cosine":
        progress = 0.5 - 0.5 * math.cos(math.pi * progress)
    return config.lr * (1.0 + (config.min_lr_ratio - 1.0) * progress)


def events(updates_done: int, config: RunConfig) -> tuple[Event, ...]:
    """What happens after `updates_done` updates, in order. Nothing happens at the very end."""
    if updates_done >= config.total_steps:
        return ()
    due: list[Event] = []
    if config.refactor_every and updates_done % config.refactor_every == 0:
        due.append("refactor")
    if config.reset_every and updates_done % config.reset_every == 0:
        due.append("reset")
    return tuple(due)
