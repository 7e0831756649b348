"""One training step: forward, loss, backward, clipping, optimizer, events.

Its phases are named ranges, which torch's profiler and `memory.tracker` show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from lowrank_lab import distributed
from lowrank_lab.config import ResolvedConfig
from lowrank_lab.models.llama import Llama
from lowrank_lab.training.clock import HostMark
from lowrank_lab.training.ddp import ReplicatedLoss, averages_in_backward
from lowrank_lab.training.events import apply_
from lowrank_lab.training.finite import StepNumbers, checks_on_device, numbers_of, off_where
from lowrank_lab.training.fsdp import ShardedModel
from lowrank_lab.training.schedule import events, learning_rate, merge_period

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

Batch = tuple[Tensor, Tensor]  # tokens and targets, each (sequences, sequence_length)
Values = tuple[float, float]  # loss and gradient norm


def autocast(config: ResolvedConfig, device: torch.device) -> torch.autocast:
    """Mixed precision for `amp-bf16`, nothing otherwise."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "amp-bf16")


class PerLayerUpdates:
    """Steps the optimizer for each parameter as soon as its gradient is complete, then frees it.

    So the gradients of all parameters never exist together. Works with every optimizer that skips
    parameters without a gradient; the learning rate has to be set before the backward pass.
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
        )  # hooks run in the same order in all processes
        self._squares.append(parameter.grad.float().square().sum())
        self._optimizer.step()
        parameter.grad = None

    def norm(self) -> Tensor:
        """Global norm of the gradients since the last call."""
        total = torch.stack(self._squares).sum().sqrt()
        self._squares.clear()
        return total


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


def take_step_(
    model: Llama,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    config: ResolvedConfig,
    step: int,
    *,
    per_layer: PerLayerUpdates | None = None,
    check: Callable[[Tensor, Tensor], Values | None] | None = None,
    ready: Callable[[], Any] = HostMark,
    wait: bool = False,
    shards: ShardedModel | None = None,
    replicas: ReplicatedLoss | None = None,
) -> tuple[Values | None, list[dict[str, Any]]]:
    """Take update `step` (from 0) on the pieces of one batch, then the events that follow it.

    Args:
        per_layer: updates the parameters within the backward pass.
        check: gets loss and gradient norm on the host, to be read when the mark of `ready` is
            reached; raises, or returns None, if they aren't finite: the weights are unchanged then
            (`training.finite`). After None, events still follow.
        ready: marks the point at which both are computed and copied.
        wait: call `check` before the update in any case, so that it can read gradients and weights.
        shards: the sharded model, with `parallel` "fsdp2".
        replicas: the loss of a model that several processes train.

    Returns:
        The result of `check`, and a record of each event.
    """
    if per_layer is not None:
        set_learning_rate(optimizer, config, step)
    loss, norm = gradients(model, batches, config, per_layer, shards, replicas)
    if check is None:
        return None, update_(model, optimizer, config, step, shards=shards)
    numbers = StepNumbers(loss, norm)
    ready()
    late = not wait and per_layer is None and shards is None and checks_on_device(optimizer, loss)
    before, values = numbers_of(optimizer) if late else [], None
    if late:
        with off_where(optimizer, numbers.found_inf()):
            apply_gradients_(optimizer, config, step)
    try:
        values = check(*numbers.on_host)
    finally:
        for state, old in before if values is None else []:
            state.update(old)
    if not late and not config.per_layer and values is not None:
        apply_gradients_(optimizer, config, step, shards)
    return values, finish_step_(model, optimizer, config, step, shards)


def replicate(
    model: Llama, batches: Callable[[], Sequence[Batch]], config: ResolvedConfig
) -> ReplicatedLoss | None:
    """The model's loss under DDP, its backward pass rehearsed; None where DDP isn't used.

    Args:
        batches: gives those of any step, on the device. Their gradients are dropped.
    """
    if not averages_in_backward(config):
        return None
    replicas = ReplicatedLoss(model)
    pieces = batches()[-1:]
    gradients(model, pieces, config, replicas=replicas)
    if any(p.grad is None for p in model.parameters() if p.requires_grad):
        del replicas  # and its hooks
        replicas = ReplicatedLoss(model, some_unused=True)
    gradients(model, pieces, config, replicas=replicas)  # with the buckets of all later steps
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    replicas.buckets = list({g.untyped_storage().data_ptr(): g for g in grads}.values())
    model.zero_grad(set_to_none=True)
    return replicas


@contextmanager
def averaged(
    model: Llama, last: bool, shards: ShardedModel | None, replicas: ReplicatedLoss | None
) -> Iterator[None]:
    """A forward and backward pass after which torch averages the gradients, if it is the last."""
    if shards is not None:
        cast("FSDPModule", model).set_requires_gradient_sync(last)
    with nullcontext() if last or replicas is None else replicas.no_sync():
        yield


def gradients(
    model: Llama,
    batches: Sequence[Batch],
    config: ResolvedConfig,
    per_layer: PerLayerUpdates | None = None,
    shards: ShardedModel | None = None,
    replicas: ReplicatedLoss | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute clipped gradients from equal pieces of one batch; with `per_layer`, apply them.

    Each process has an equal share of every piece, and all get the same results.

    Returns:
        The mean loss and the global gradient norm before clipping, float32 scalars on the device.
    """
    total: Tensor | None = None
    loss_of = model.loss if replicas is None else replicas
    for piece, (tokens, targets) in enumerate(batches, 1):
        with averaged(model, piece == len(batches), shards, replicas):
            with record_function("forward"), autocast(config, tokens.device):
                loss = loss_of(tokens, targets) / len(batches)
            with record_function("backward"):
                loss.backward()
        total = loss.detach() if total is None else total + loss.detach()
    assert total is not None
    by_torch = shards is not None or replicas is not None
    whole = [p.grad for p in model.parameters() if p.grad is not None and not by_torch]
    with record_function("average"):  # once per batch, not per piece
        distributed.all_reduce_mean_([*whole, total])
    if per_layer is not None:
        return total, per_layer.norm()
    with record_function("clip"):
        norm = clip_(model.parameters(), config.clip)
    return total, norm if shards is None else cast("DTensor", norm).full_tensor()


def clip_(parameters: Iterable[Tensor], clip: float) -> Tensor:
    """Scale gradients to a global norm of at most `clip`, if above 0; their norm before."""
    found = [p for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in found if p.grad is not None])
    if clip > 0:
        torch.nn.utils.clip_grads_with_norm_(found, clip, norm)
    return norm


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
