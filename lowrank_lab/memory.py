"""Where the bytes of training are: weights, gradients, optimizer states, activations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from lowrank_lab.optim.base import is_quantized


@dataclass
class Breakdown:
    """Bytes by category. `projections` is a part of `optimizer_states`, not beside it."""

    weights: int = 0
    gradients: int = 0
    optimizer_states: int = 0
    projections: int = 0
    activations: int = 0

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind the tensors, shared ones counted once."""
    storages = [part.untyped_storage() for t in tensors for part in _parts(t)]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def _parts(t: Tensor) -> list[Tensor]:
    """The plain tensors that a tensor consists of: several, if it is quantized."""
    if not is_quantized(t):
        return [t]
    names: list[str] = t.__tensor_flatten__()[0]  # type: ignore[attr-defined]
    return [getattr(t, name) for name in names]


def persistent(model: nn.Module, optimizer: torch.optim.Optimizer) -> Breakdown:
    """Measured bytes of the weights, of the gradients that training holds, and of the states."""
    weights = [*model.parameters(), *model.buffers()]
    states = [
        (k, v) for s in optimizer.state.values() for k, v in s.items() if isinstance(v, Tensor)
    ]
    return Breakdown(
        weights=tensor_bytes(weights),
        gradients=tensor_bytes(p for p in model.parameters() if p.requires_grad),
        optimizer_states=tensor_bytes(t for _, t in states),
        projections=tensor_bytes(t for k, t in states if k.startswith("projection")),
    )


@contextmanager
def measured_activations(model: nn.Module, into: Breakdown) -> Iterator[None]:
    """Count what autograd keeps for the first backward pass in this block: `into.activations`.

    Weights and views of what was counted already are not counted again.
    """
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}
    going_back = False  # from then on activations are freed, and their memory used again

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own and not going_back:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    def give_back(t: Tensor) -> Tensor:
        nonlocal going_back
        going_back = True
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, give_back):
        yield
    into.activations = sum(kept.values())
