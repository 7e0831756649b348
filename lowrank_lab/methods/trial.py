"""A trial of a named optimizer on two tiny layers, which shows before a run what it can't do."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from lowrank_lab.config import InputError, ResolvedConfig, RunConfig
from lowrank_lab.layers import factorize
from lowrank_lab.methods.optimizers import adamw
from lowrank_lab.techniques import prune_moments_, refactorize_, reset_momentum_
from lowrank_lab.techniques.momentum import MOMENTS
from lowrank_lab.techniques.states import switching


def check_events(config: RunConfig, merge: tuple[str, float] | None) -> None:
    """Refuse events that the states of `config.optimizer` can't follow.

    Args:
        merge: what a merge does to the moments, and to which share; None without merges.

    Raises:
        InputError: its states aren't known, or can't be reset, pruned or carried in this way.
    """
    if config.refactor_every:
        model, optimizer = stepped(config)
        try:
            refactorize_(model, optimizer, config.on_refactor)
        except ValueError as error:
            raise InputError("on_refactor", config.on_refactor, _allowed(error)) from None
    if config.reset_every and config.reset_strength:
        moments = MOMENTS if config.reset_moments == "both" else (config.reset_moments,)
        how = config.reset_how, config.reset_strength, moments
        _check_reset(config, "reset_every", config.reset_every, *how)
    if merge is not None:
        _check_reset(config, "optimizer", config.optimizer, *merge, MOMENTS)


def _check_reset(
    config: RunConfig, name: str, value: Any, how: str, strength: float, moments: tuple[str, ...]
) -> None:
    model, optimizer = stepped(config)
    params = list(model.parameters())
    try:
        if how == "scale":
            count = reset_momentum_(optimizer, strength, moments, params)
        else:
            count = prune_moments_(optimizer, params, 1 - strength, cast(Any, how), 0, moments)
    except ValueError as error:
        raise InputError(name, value, _allowed(error)) from None
    if strength and not count:
        raise InputError(name, value, f"{config.optimizer} keeps no moments; 0")


def check_sharded(config: RunConfig) -> None:
    """Refuse an optimizer that evaluates other weights than it trains: shards have no such ones.

    Raises:
        InputError: it does.
    """
    if switching(stepped(config)[1]):
        allowed = f"{config.optimizer} evaluates other weights than it trains; ddp"
        raise InputError("parallel", config.parallel, allowed)


def check_per_layer(config: RunConfig) -> None:
    """Refuse an optimizer that counts steps per group: updates per layer step it once per weight.

    Raises:
        InputError: it does.
    """
    groups = stepped(config)[1].param_groups
    if any("step" in group or "k" in group for group in groups):
        raise InputError("per_layer", True, f"{config.optimizer} counts steps per group")


def stepped(
    config: RunConfig, model: nn.Module | None = None, steps: int = 1
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model and the optimizer of the configuration after steps on random gradients.

    Args:
        model: whose first parameter is the target; by default two factorised layers, all targets.

    Raises:
        InputError: it can't be built, or can't take an ordinary step.
    """
    targets: list[Tensor] = []
    rest: list[Tensor] = []
    if model is None:
        model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
        factorize(model, rank=2, target=".", init="kaiming")
        targets += model.parameters()
    else:
        rest += model.parameters()
        targets.append(rest.pop(0))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    tried = config.replace(lr=config.lr or 1e-3)
    optimizer = adamw(targets, rest, cast(ResolvedConfig, tried))
    try:
        for switch in switching(optimizer):  # some can't step before
            switch.train()
        for _ in range(steps):
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator).to(p)
            optimizer.step()
    except Exception as error:  # whatever a foreign class raises
        line = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError("optimizer", config.optimizer, f"it can't step: {line}") from None
    return model, optimizer


def _allowed(error: ValueError) -> str:
    """What a technique's message says after the field and its value."""
    return str(error).partition("; ")[2] or str(error)
