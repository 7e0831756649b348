"""Bytes by category, and the bytes that stay allocated between training steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

# Categories that add up to all bytes, in the order of tables and figures.
CATEGORIES = (
    "weights", "gradients", "optimizer_states", "activations", "logits", "temporaries",
    "workspaces",
)  # fmt: skip
# Parts of categories: part → category.
PARTS = {
    "frozen": "weights", "indices": "weights", "projections": "optimizer_states",
    "gathered": "temporaries",
}  # fmt: skip

PERSISTENT = ["weights", "gradients", "optimizer_states"]  # what methods differ in


@dataclass
class Breakdown:
    """Bytes by category.

    Attributes:
        weights: parameters and buffers.
        frozen: the part of `weights` that isn't trained (LoRA's W₀).
        indices: the part of `weights` that is positions of sparse entries (SLTrain).
        gradients: gradients of parameters.
        optimizer_states: all tensors that an optimizer keeps from step to step.
        projections: the part of `optimizer_states` that is stored projections (GaLore's P).
        activations: tensors kept for the backward pass.
        logits: logits, loss and the gradients that the loss computes in its forward pass.
        temporaries: everything else: gradients of activations, outputs of running operations.
        workspaces: scratch memory of CUDA's kernels: cuBLAS's, which stays allocated, and the
            float32 sums of flash attention's backward pass.
        gathered: with sharding, the part of `temporaries` that is gathered weights of the current
            block or layer, and buffers of collectives.
    """

    weights: int = 0
    frozen: int = 0
    indices: int = 0
    gradients: int = 0
    optimizer_states: int = 0
    projections: int = 0
    activations: int = 0
    logits: int = 0
    temporaries: int = 0
    workspaces: int = 0
    gathered: int = 0

    @property
    def total(self) -> int:
        """All bytes; parts are not counted twice."""
        return sum(getattr(self, name) for name in CATEGORIES)

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


NAMES = tuple(f.name for f in fields(Breakdown))


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind the tensors, shared ones counted once."""
    return sum({key: size for t in tensors for key, size in storages(t)}.values())


def storages(t: Tensor) -> list[tuple[int, int]]:
    """(key, bytes) of a tensor's storages: several if quantized, its shard's of a DTensor."""
    return [(s._cdata, s.nbytes()) for s in storages_of(t)]


def storages_of(t: Tensor) -> list[torch.UntypedStorage]:
    """The storages themselves; see `storages`."""
    quantized: bool = is_traceable_wrapper_subclass(t)  # mypy would narrow t to Never
    if not quantized:
        return [t.untyped_storage()]
    names: list[str] = t.__tensor_flatten__()[0]  # type: ignore[attr-defined]
    parts = [getattr(t, name) for name in names]  # one part of a DTensor is its mesh
    return [s for part in parts if isinstance(part, Tensor) for s in storages_of(part)]


def state_tensors(optimizer: torch.optim.Optimizer) -> Iterator[tuple[Any, str, Tensor]]:
    """The tensors of an optimizer's states, in lists and objects too: owner, key and tensor.

    The owner is a parameter, or a name of the optimizer's own.
    """
    states: dict[Any, Any] = optimizer.state
    for owner, state in states.items():
        for key, value in state.items() if isinstance(state, dict) else [("", state)]:
            for tensor in _tensors_in(value):
                yield owner, str(key), tensor


def _tensors_in(value: Any, seen: tuple[int, ...] = ()) -> Iterator[Tensor]:
    """The tensors in lists, mappings and objects that are no parameters.

    Args:
        seen: ids of what `value` is in: an object may refer to itself.
    """
    if isinstance(value, Tensor):
        if not isinstance(value, nn.Parameter):  # of the model
            yield value
        return
    parts = value.values() if isinstance(value, dict) else value
    if not isinstance(value, dict | list | tuple | set | deque):
        parts = vars(value).values() if hasattr(value, "__dict__") else ()
    for part in () if id(value) in seen else parts:
        yield from _tensors_in(part, (*seen, id(value)))


def persistent(
    model: nn.Module, optimizer: torch.optim.Optimizer, per_layer: bool = False
) -> Breakdown:
    """Bytes of weights, gradients and optimizer states.

    Args:
        per_layer: gradients exist one at a time, so only the largest is counted.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    indices = [b for name, b in model.named_buffers() if name.endswith("indices")]
    states = [(key, tensor) for _, key, tensor in state_tensors(optimizer)]
    if type(optimizer).state_dict is not torch.optim.Optimizer.state_dict:
        whole = optimizer.state_dict().items()
        more = [value for key, value in whole if key not in ("state", "param_groups")]
        states += [("", tensor) for tensor in _tensors_in(more)]
    return Breakdown(
        weights=tensor_bytes([*model.parameters(), *model.buffers()]),
        frozen=tensor_bytes(frozen),
        indices=tensor_bytes(indices),
        gradients=max(map(tensor_bytes, ([p] for p in trained)), default=0)
        if per_layer
        else tensor_bytes(trained),
        optimizer_states=tensor_bytes(t for _, t in states),
        projections=tensor_bytes(t for k, t in states if k.startswith("projection")),
    )


def compiles_itself(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer's step calls torch.compile, as those of torchao and its subclasses."""
    return any(cls.__module__.startswith("torchao") for cls in type(optimizer).__mro__)
