"""Gradients of a batch: forward and backward passes, averaged over processes, clipped.

Phases are named ranges, which torch's profiler and `memory.tracker` show.
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
from lowrank_lab.device import prefers_few_kernels
from lowrank_lab.distributed.dtensors import is_dtensor
from lowrank_lab.models.llama import Llama
from lowrank_lab.training.ddp import ReplicatedLoss, averages_in_backward
from lowrank_lab.training.fsdp import ShardedModel

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

Batch = tuple[Tensor, Tensor]  # tokens and targets, each (sequences, sequence_length)


def autocast(config: ResolvedConfig, device: torch.device) -> torch.autocast:
    """Mixed precision for `amp-bf16`, nothing otherwise."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "amp-bf16")


class PerLayerUpdates:
    """Steps the optimizer for each parameter as soon as its gradient is complete, then frees it.

    So the gradients of all parameters never exist together. Works with every optimizer that skips
    parameters without a gradient; the learning rate has to be set before the backward pass.
    Products of several layers would give gradients at the same time: here layers have their own.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._squares: list[Tensor] = []
        for module in cast("Iterable[Any]", model.modules()):
            if hasattr(module, "merges"):
                module.merges = False
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
    grads = [p.grad for p in found if p.grad is not None]
    together = all(prefers_few_kernels(g) and not is_dtensor(g) for g in grads)
    norm = _total_norm(grads) if grads and together else torch.nn.utils.get_total_norm(grads)
    if clip > 0 and grads:
        # in the dtype of the gradients, as torch's joint kernel needs it
        torch.nn.utils.clip_grads_with_norm_(
            found, clip, norm.to(grads[0].dtype), foreach=together or None
        )
    return norm


def _total_norm(grads: list[Tensor]) -> Tensor:
    """The norm of all entries, in three kernels, in float32 or wider."""
    wide = torch.promote_types(grads[0].dtype, torch.float32)
    norms = torch._foreach_norm(grads, dtype=wide)
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total
