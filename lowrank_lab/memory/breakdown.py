"""Bytes by category, and the bytes that training holds between steps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

# What adds up to all bytes, in the order in which it is shown.
CATEGORIES = (
    "weights", "gradients", "optimizer_states", "activations", "logits", "temporaries",
)  # fmt: skip
# What is a part of a category: part → category.
PARTS = {
    "frozen": "weights", "indices": "weights", "projections": "optimizer_states",
    "gathered": "temporaries",
}  # fmt: skip


@dataclass
class Breakdown:
    """Bytes by category. Indented ones are parts of the category above them.

    weights           parameters and buffers
      frozen          … of them parameters that don't train (LoRA's W₀)
      indices         … of them the positions of sparse entries (SLTrain)
    gradients         of parameters
    optimizer_states  all tensors that an optimizer keeps from step to step
      projections     … of them stored projections (GaLore's P)
    activations       what the backward pass waits for
    logits            logits, loss and the gradients that the loss forms at once
    temporaries       everything else: gradients of activations, what an operation is just making
      gathered        … of them whole weights of the block or layer at work, and what travels
                      between processes (with shards)
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
    """(key, bytes) of the storages behind a tensor: several of a quantized one, of a DTensor its
    shard's.
    """
    return [(s._cdata, s.nbytes()) for s in storages_of(t)]


def storages_of(t: Tensor) -> list[torch.UntypedStorage]:
    """The storages themselves; see `storages`."""
    quantized: bool = is_traceable_wrapper_subclass(t)  # whatever mypy thinks it narrows to
    if not quantized:
        return [t.untyped_storage()]
    names: list[str] = t.__tensor_flatten__()[0]  # type: ignore[attr-defined]
    parts = [getattr(t, name) for name in names]  # of a DTensor its mesh is one
    return [s for part in parts if isinstance(part, Tensor) for s in storages_of(part)]


def persistent(
    model: nn.Module, optimizer: torch.optim.Optimizer, per_layer: bool = False
) -> Breakdown:
    """Bytes of the weights, of the gradients that training holds, and of the states.

    Args:
        per_layer: gradients exist one at a time, so that it is the largest that counts.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    indices = [b for name, b in model.named_buffers() if name.endswith("indices")]
    states = [
        (k, v) for s in optimizer.state.values() for k, v in s.items() if isinstance(v, Tensor)
    ]
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
