"""Events: what is done to weights and optimizer states after an update (`schedule` says when)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn
from torch.profiler import record_function

from lowrank_lab.config import InputError, ResolvedConfig
from lowrank_lab.layers import lora_layers, merge_, train_dense_
from lowrank_lab.methods.build import partition
from lowrank_lab.models.llama import Llama
from lowrank_lab.techniques import (
    NotFiniteError,
    prune_moments_,
    refactorize_,
    reset_momentum_,
)
from lowrank_lab.techniques.momentum import MOMENTS
from lowrank_lab.techniques.periodic import event_seed
from lowrank_lab.training.fsdp import ShardedModel
from lowrank_lab.training.schedule import Event


def apply_(
    event: Event,
    model: Llama,
    optimizer: torch.optim.Optimizer,
    config: ResolvedConfig,
    updates: int,
    shards: ShardedModel | None = None,
) -> dict[str, Any]:
    """Apply one event after `updates` updates; what it did, as a record."""
    with record_function(event):
        try:
            return _applied(event, model, optimizer, config, updates, shards)
        except (InputError, NotFiniteError):
            raise
        except ValueError as error:  # of a method of one's own, whose optimizer isn't known
            reset = {"reset": "reset_every", "refactor": "on_refactor"}
            name = reset.get(event, "optimizer")
            value = getattr(config, name) if event in reset else type(optimizer).__name__
            raise InputError(name, value, str(error)) from None


def _applied(
    event: Event,
    model: Llama,
    optimizer: torch.optim.Optimizer,
    config: ResolvedConfig,
    updates: int,
    shards: ShardedModel | None,
) -> dict[str, Any]:
    if event == "refactor":
        how = config.on_refactor, config.refactor_basis, config.refactor_above
        done = refactorize_(model, optimizer, *how) if shards is None else shards.refactorize_()
        result = {"event": event, "layers": len(done.changed)}
        return result | {"rank_deficient": done.rank_deficient, "balanced": len(done.balanced)}
    if event == "warm-start-ends":
        names = train_dense_(model, on=False)
        for _, layer in lora_layers(model):
            optimizer.state.pop(layer.base_weight, None)  # W₀ is frozen from now on
        return {"event": event, "layers": len(names)}
    if event == "merge":
        options = config.method_options
        seed = event_seed(config.seed, updates)
        names = merge_(model, seed) if shards is None else shards.merge_(seed)
        how, share = options["merge_moments"], options["merge_share"]
        factors = config.override(reset_moments="both", reset_params="targets")
        count = _reset_or_prune_(model, optimizer, factors, how, share, updates, shards)
        return {"event": event, "layers": len(names), "moments": how, "parameters": count}
    prune, strength = config.reset_how, config.reset_strength
    count = _reset_or_prune_(model, optimizer, config, prune, strength, updates, shards)
    if strength and not count:
        raise InputError("reset_every", config.reset_every, "this optimizer keeps no moments; 0")
    return {"event": event, "how": prune, "strength": strength, "parameters": count}


def _reset_or_prune_(
    model: Llama,
    optimizer: torch.optim.Optimizer,
    config: ResolvedConfig,
    how: Literal["scale", "magnitude", "random"],
    strength: float,
    updates: int,
    shards: ShardedModel | None,
) -> int:
    """Scale or prune the configured moments; the number of parameters that it changed."""
    moments = MOMENTS if config.reset_moments == "both" else (config.reset_moments,)
    chosen: nn.Module = model if shards is None else shards.mirror
    params = None if config.reset_params == "all" else partition(chosen, config.target)[0]
    if how == "magnitude" or how == "random":
        if params is None:
            params = [p for group in optimizer.param_groups for p in group["params"]]
        seed = event_seed(config.seed, updates)
        count = prune_moments_(optimizer, params, 1 - strength, how, seed, moments)
    else:
        count = reset_momentum_(optimizer, strength, moments, params)
    return count if shards is None else shards.count(params)
