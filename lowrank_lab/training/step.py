"""One training step: forward, loss, backward, clipping, optimizer, events.

Its phases are named ranges, which torch's profiler and `memory.tracker` show.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from lowrank_lab.config import ResolvedConfig
from lowrank_lab.models.llama import Llama
from lowrank_lab.training.ddp import ReplicatedLoss
from lowrank_lab.training.events import apply_
from lowrank_lab.training.finite import (
    FiniteCheck,
    NotFiniteStepError,
    StatesBefore,
    Values,
    checks_on_device,
    off_where,
)
from lowrank_lab.training.fsdp import ShardedModel
from lowrank_lab.training.gradients import Batch, PerLayerUpdates, gradients
from lowrank_lab.training.schedule import events, learning_rate


def set_learning_rate(optimizer: torch.optim.Optimizer, config: ResolvedConfig, step: int) -> None:
    """The learning rate of update `step` (from 0) for all groups.

    Groups with `lr_ratio` get so many times of it: those of `rest_lr`.
    """
    scheduled = learning_rate(step, config)
    for group in optimizer.param_groups:
        rate = scheduled * group.get("lr_ratio", 1.0)
        if isinstance(group["lr"], Tensor):  # compiled steps keep it as one
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def take_step_(
    model: Llama,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    config: ResolvedConfig,
    step: int,
    *,
    per_layer: PerLayerUpdates | None = None,
    check: FiniteCheck | None = None,
    wait: bool = False,
    shards: ShardedModel | None = None,
    replicas: ReplicatedLoss | None = None,
) -> tuple[Values | None, list[dict[str, Any]]]:
    """Take update `step` (from 0) on the pieces of one batch, then the events that follow it.

    Args:
        per_layer: updates the parameters within the backward pass.
        check: reads loss and gradient norm. Where they aren't finite, weights and states are
            unchanged, and the step is skipped: its events follow. Or its error is passed on.
        wait: check before the update in any case, so that gradients and weights can be read.
        shards: the sharded model, with `parallel` "fsdp2".
        replicas: the loss of a model that several processes train.

    Returns:
        Loss and gradient norm, None of a skipped step, and a record of each event.
    """
    if per_layer is not None:
        set_learning_rate(optimizer, config, step)
    loss, norm = gradients(model, batches, config, per_layer, shards, replicas)
    if check is None:
        return None, update_(model, optimizer, config, step, shards=shards)
    check.start(loss, norm)
    late = not wait and per_layer is None and checks_on_device(optimizer, loss)
    before = StatesBefore(optimizer) if late else None
    if late:
        with off_where(optimizer, check.found_inf()):
            apply_gradients_(optimizer, config, step, shards)
    try:
        values = check.values()
    except NotFiniteStepError:
        if before is not None:
            before.restore_()
        raise
    if values is None and before is not None:
        before.restore_()
    del before  # and with it what the update has replaced
    if not late and not config.per_layer and values is not None:
        apply_gradients_(optimizer, config, step, shards)
    return values, finish_step_(model, optimizer, config, step, shards)


def update_(
    model: Llama,
    optimizer: torch.optim.Optimizer,
    config: ResolvedConfig,
    step: int,
    shards: ShardedModel | None = None,
) -> list[dict[str, Any]]:
    """Apply update `step` (from 0), then the events that follow it; their records."""
    if not config.per_layer:
        apply_gradients_(optimizer, config, step, shards)
    return finish_step_(model, optimizer, config, step, shards)


def apply_gradients_(
    optimizer: torch.optim.Optimizer,
    config: ResolvedConfig,
    step: int,
    shards: ShardedModel | None = None,
) -> None:
    """The optimizer's part of update `step` (from 0)."""
    set_learning_rate(optimizer, config, step)
    with record_function("optimizer"):
        optimizer.step() if shards is None else shards.step_()


def finish_step_(
    model: Llama,
    optimizer: torch.optim.Optimizer,
    config: ResolvedConfig,
    step: int,
    shards: ShardedModel | None = None,
) -> list[dict[str, Any]]:
    """Free the gradients and apply the events that follow update `step` (from 0); their records."""
    optimizer.zero_grad(set_to_none=True)
    if shards is not None:  # the optimizer knows the mirror's gradients only
        shards.model.zero_grad(set_to_none=True)
    due = events(step + 1, config)
    return [apply_(event, model, optimizer, config, step + 1, shards) for event in due]
