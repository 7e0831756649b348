"""One training step: forward, loss, backward, clipping, optimizer, events. What `train` loops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowrank_lab.config import InputError, RunConfig
from lowrank_lab.layers import lora_layers, merge_, train_dense_
from lowrank_lab.llama import Llama
from lowrank_lab.methods import partition
from lowrank_lab.schedule import Event, events, learning_rate
from lowrank_lab.techniques import prune_moments_, refactorize_, reset_momentum_

Batch = tuple[Tensor, Tensor]  # tokens and targets, each (sequences, sequence_length)


def autocast(config: RunConfig, device: torch.device) -> torch.autocast:
    """Mixed precision for `amp-bf16`, nothing otherwise."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "amp-bf16")


class PerLayerUpdates:
    """Steps the optimizer for each weight as soon as its gradient is there, and frees the gradient.

    Full gradients of all weights then never exist together. It works with every optimizer that
    leaves parameters without a gradient alone; the learning rate has to be set before backward.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._squares: list[Tensor] = []
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._update)  # type: ignore[no-untyped-call]

    def _update(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self._squares.append(parameter.grad.float().square().sum())
        self._optimizer.step()
        parameter.grad = None

    def norm(self) -> Tensor:
        """Global norm of the gradients since the last call."""
        total = torch.stack(self._squares).sum().sqrt()
        self._squares.clear()
        return total


def set_learning_rate(optimizer: torch.optim.Optimizer, config: RunConfig, step: int) -> None:
    """The learning rate of update `step` (from 0) for all groups."""
    rate = learning_rate(step, config)
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # compiled steps keep it as one
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def gradients(
    model: Llama,
    batches: Sequence[Batch],
    config: RunConfig,
    per_layer: PerLayerUpdates | None = None,
) -> tuple[Tensor, Tensor]:
    """Fill the gradients from equal pieces of one batch, clipped; with `per_layer`, use them up.

    Returns:
        The mean loss and the global gradient norm before clipping, float32 scalars on the device.
    """
    total: Tensor | None = None
    for tokens, targets in batches:
        with autocast(config, tokens.device):
            loss = model.loss(tokens, targets) / len(batches)
        loss.backward()  # type: ignore[no-untyped-call]
        total = loss.detach() if total is None else total + loss.detach()
    assert total is not None
    if per_layer is not None:
        return total, per_layer.norm()
    limit = config.clip if config.clip > 0 else float("inf")
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    return total, norm


def update_(
    model: Llama, optimizer: torch.optim.Optimizer, config: RunConfig, step: int
) -> list[dict[str, Any]]:
    """Apply update `step` (from 0), then the events that follow it; gradients are freed.

    Returns:
        What the events did, as they go into metrics.jsonl.
    """
    if not config.per_layer:
        set_learning_rate(optimizer, config, step)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return [apply_(event, model, optimizer, config, step + 1) for event in events(step + 1, config)]


def apply_(
    event: Event, model: Llama, optimizer: torch.optim.Optimizer, config: RunConfig, updates: int
) -> dict[str, Any]:
    """One event after `updates` updates, and what it did."""
    if event == "refactor":
        changed, deficient = refactorize_(model, optimizer, config.on_refactor)
        return {"event": event, "layers": len(changed), "rank_deficient": deficient}
    if event == "warm-start-ends":
        names = train_dense_(model, on=False)
        for _, layer in lora_layers(model):
            optimizer.state.pop(layer.weight, None)  # W₀ is frozen from now on
        return {"event": event, "layers": len(names)}
    if event == "merge":
        options = config.method_options
        names = merge_(model, seed=config.seed * 1_000_003 + updates)
        how, share = options["merge_moments"], options["merge_share"]
        factors = config.replace(reset_moments="both", reset_params="targets")
        count = _forget_(model, optimizer, factors, how, share, updates)
        return {"event": event, "layers": len(names), "moments": how, "parameters": count}
    how, strength = config.reset_how, config.reset_strength
    count = _forget_(model, optimizer, config, how, strength, updates)
    if strength and not count:
        raise InputError("reset_every", config.reset_every, "this optimizer keeps no moments; 0")
    return {"event": event, "how": how, "strength": strength, "parameters": count}


def _forget_(
    model: Llama,
    optimizer: torch.optim.Optimizer,
    config: RunConfig,
    how: Literal["scale", "magnitude", "random"],
    strength: float,
    updates: int,
) -> int:
    """Scale or prune the moments that the configuration names; the number of parameters touched."""
    both = ("exp_avg", "exp_avg_sq")
    moments = both if config.reset_moments == "both" else (config.reset_moments,)
    params = None if config.reset_params == "all" else partition(model, config.target)[0]
    if how == "magnitude" or how == "random":
        if params is None:
            params = [p for group in optimizer.param_groups for p in group["params"]]
        seed = config.seed * 1_000_003 + updates
        return prune_moments_(optimizer, params, 1 - strength, how, seed, moments)
    return reset_momentum_(optimizer, strength, moments, params)
