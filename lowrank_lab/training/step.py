"""One training step: forward, loss, backward, clipping, optimizer, events. What `train` loops.

Its phases are named ranges, which torch's profiler and `tracing` show under the same names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from lowrank_lab import distributed
from lowrank_lab.config import InputError, ResolvedConfig
from lowrank_lab.layers import lora_layers, merge_, train_dense_
from lowrank_lab.methods.build import partition
from lowrank_lab.models.llama import Llama
from lowrank_lab.techniques import prune_moments_, refactorize_, reset_momentum_
from lowrank_lab.training.fsdp import Shards
from lowrank_lab.training.schedule import Event, events, learning_rate, merge_period

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

Batch = tuple[Tensor, Tensor]  # tokens and targets, each (sequences, sequence_length)
Values = tuple[float, float]  # loss and gradient norm


def autocast(config: ResolvedConfig, device: torch.device) -> torch.autocast:
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
        distributed.all_reduce_mean_(
            [parameter.grad]
        )  # hooks come in the same order in all processes
        self._squares.append(parameter.grad.float().square().sum())
        self._optimizer.step()
        parameter.grad = None

    def norm(self) -> Tensor:
        """Global norm of the gradients since the last call."""
        total = torch.stack(self._squares).sum().sqrt()
        self._squares.clear()
        return total


def set_learning_rate(optimizer: torch.optim.Optimizer, config: ResolvedConfig, step: int) -> None:
    """The learning rate of update `step` (from 0) for all groups."""
    rate = learning_rate(step, config)
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # compiled steps keep it as one
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


# What optimizers do every so many updates, by the option that says how often: its name, and
# whether it is done after that many updates or in the last of them.
CLOCKS = {"update_proj_gap": ("refresh", 0), "update_k": ("exact", 1)}


def periods(config: ResolvedConfig) -> list[int]:
    """The periods of all that happens in some steps only."""
    found = [config.refactor_every, config.reset_every, merge_period(config)]
    found += [config.method_options.get(option) or 0 for option in CLOCKS]
    return [period for period in found if period]


def kind_of(config: ResolvedConfig, step: int) -> str:
    """What sets update `step` (from 0) apart; steps of one kind do the same in the same memory.

    `first`, or `next` where nothing else happens, or `refresh`, `exact` and the names of events. (A
    refresh that is spread over the gap is a part of every step, of different weights.)
    """
    names = [] if step else ["first"]
    for option, (name, early) in CLOCKS.items():
        period = config.method_options.get(option)
        if step and period and (step + early) % period == 0:
            names.append(name)
    return " + ".join([*names, *events(step + 1, config)]) or "next"


def set_clock_(optimizer: torch.optim.Optimizer, updates: int) -> None:
    """Let the optimizer's states have seen so many updates: what is due in them follows it.

    With spread refreshes, it is then the turn of the largest weight.
    """
    states = [(p, s) for p, s in optimizer.state.items() if isinstance(s.get("step"), int)]
    offset = 0
    if states:
        offset = max(states, key=lambda item: item[0].numel())[1].get("refresh_offset", 0)
    for _, state in states:
        state["step"] = updates - offset


def take_step_(
    model: Llama,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    config: ResolvedConfig,
    step: int,
    *,
    per_layer: PerLayerUpdates | None = None,
    check: Callable[[Tensor, Tensor], Values | None] | None = None,
    shards: Shards | None = None,
) -> tuple[Values | None, list[dict[str, Any]]]:
    """Update `step` (from 0) on the pieces of one batch, and the events that follow it.

    Args:
        per_layer: updates the weights within the backward pass.
        check: reads loss and gradient norm before the weights change; by raising it keeps them, by
            returning None it skips this update (not the events that follow it).
        shards: what the model is with `fsdp2`.

    Returns:
        What `check` returned, and what the events did.
    """
    if per_layer is not None:
        set_learning_rate(optimizer, config, step)
    loss, norm = gradients(model, batches, config, per_layer, shards)
    values = check(loss, norm) if check is not None else None
    skipped = check is not None and values is None
    return values, update_(model, optimizer, config, step, skipped, shards)


def gradients(
    model: Llama,
    batches: Sequence[Batch],
    config: ResolvedConfig,
    per_layer: PerLayerUpdates | None = None,
    shards: Shards | None = None,
) -> tuple[Tensor, Tensor]:
    """Fill the gradients from equal pieces of one batch, clipped; with `per_layer`, use them up.

    Of several processes each has an equal share of every piece, and all get the same results.

    Returns:
        The mean loss and the global gradient norm before clipping, float32 scalars on the device.
    """
    total: Tensor | None = None
    for piece, (tokens, targets) in enumerate(batches, 1):
        if shards is not None:
            cast("FSDPModule", model).set_requires_gradient_sync(piece == len(batches))
        with record_function("forward"), autocast(config, tokens.device):
            loss = model.loss(tokens, targets) / len(batches)
        with record_function("backward"):
            loss.backward()  # type: ignore[no-untyped-call]
        total = loss.detach() if total is None else total + loss.detach()
    assert total is not None
    # Those of shards are averages already.
    whole = [p.grad for p in model.parameters() if p.grad is not None and shards is None]
    with record_function("average"):  # once a batch, however many pieces it came in
        distributed.all_reduce_mean_([*whole, total])
    if per_layer is not None:
        return total, per_layer.norm()
    limit = config.clip if config.clip > 0 else float("inf")
    with record_function("clip"):
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    return total, norm if shards is None else cast("DTensor", norm).full_tensor()


def update_(
    model: Llama,
    optimizer: torch.optim.Optimizer,
    config: ResolvedConfig,
    step: int,
    skipped: bool = False,
    shards: Shards | None = None,
) -> list[dict[str, Any]]:
    """Apply update `step` (from 0), then the events that follow it; gradients are freed.

    Args:
        skipped: apply no update, only the events.

    Returns:
        What the events did, as they go into metrics.jsonl.
    """
    if not config.per_layer and not skipped:
        set_learning_rate(optimizer, config, step)
        with record_function("optimizer"):
            optimizer.step() if shards is None else shards.step_()
    optimizer.zero_grad(set_to_none=True)
    if shards is not None:  # the optimizer knows the mirror's gradients only
        shards.model.zero_grad(set_to_none=True)
    due = events(step + 1, config)
    return [apply_(event, model, optimizer, config, step + 1, shards) for event in due]


def apply_(
    event: Event,
    model: Llama,
    optimizer: torch.optim.Optimizer,
    config: ResolvedConfig,
    updates: int,
    shards: Shards | None = None,
) -> dict[str, Any]:
    """One event after `updates` updates, and what it did."""
    with record_function(event):
        return _applied(event, model, optimizer, config, updates, shards)


def _applied(
    event: Event,
    model: Llama,
    optimizer: torch.optim.Optimizer,
    config: ResolvedConfig,
    updates: int,
    shards: Shards | None,
) -> dict[str, Any]:
    if event == "refactor":
        how = config.on_refactor, config.refactor_basis, config.refactor_above
        done = refactorize_(model, optimizer, *how) if shards is None else shards.refactorize_()
        result = {"event": event, "layers": len(done.changed)}
        return result | {"rank_deficient": done.rank_deficient, "balanced": len(done.balanced)}
    if event == "warm-start-ends":
        names = train_dense_(model, on=False)
        for _, layer in lora_layers(model):
            optimizer.state.pop(layer.weight, None)  # W₀ is frozen from now on
        return {"event": event, "layers": len(names)}
    if event == "merge":
        options = config.method_options
        seed = config.seed * 1_000_003 + updates
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
    shards: Shards | None,
) -> int:
    """Scale or prune the moments that the configuration names; the number of parameters touched."""
    both = ("exp_avg", "exp_avg_sq")
    moments = both if config.reset_moments == "both" else (config.reset_moments,)
    chosen: nn.Module = model if shards is None else shards.mirror
    params = None if config.reset_params == "all" else partition(chosen, config.target)[0]
    if how == "magnitude" or how == "random":
        if params is None:
            params = [p for group in optimizer.param_groups for p in group["params"]]
        seed = config.seed * 1_000_003 + updates
        each = params if shards is None else shards.each_whole(params)
        count = prune_moments_(optimizer, each, 1 - strength, how, seed, moments)
    else:
        count = reset_momentum_(optimizer, strength, moments, params)
    return count if shards is None else shards.count(params)
