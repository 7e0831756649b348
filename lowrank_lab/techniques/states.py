"""Parameters with their optimizer states, through wrappers and combined optimizers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowrank_lab.optim import Combined
from lowrank_lab.techniques.layouts import Layout, layout_of, short_name

# Wrappers of one optimizer, which they have as `optimizer`.
WRAPPERS = {
    "accelerate.AcceleratedOptimizer",
    "lightning.LightningOptimizer",
    "lightning._FabricOptimizer",
    "lightning_fabric._FabricOptimizer",
    "pytorch_lightning.LightningOptimizer",
}


class Entry(NamedTuple):
    """A parameter with its group, its state (not empty) and the layout of the state."""

    param: Tensor
    group: dict[str, Any]
    state: dict[str, Any]
    layout: Layout
    optimizer: torch.optim.Optimizer

    @property
    def name(self) -> str:
        """The name of the optimizer's class, for messages."""
        return type(self.optimizer).__name__


def unwrapped(optimizer: torch.optim.Optimizer) -> Iterator[torch.optim.Optimizer]:
    """The optimizers within wrappers (accelerate, Lightning, `Combined`) that update parameters."""
    if isinstance(optimizer, Combined):
        for inner in optimizer.optimizers:
            yield from unwrapped(inner)
    elif WRAPPERS.intersection(map(short_name, type(optimizer).__mro__)):
        yield from unwrapped(optimizer.optimizer)  # type: ignore[attr-defined]
    else:
        yield optimizer


def switching(optimizer: torch.optim.Optimizer) -> list[Any]:
    """The optimizers, within wrappers, that have both `eval` and `train`: schedule-free ones."""
    return [
        inner
        for inner in unwrapped(optimizer)
        if all(callable(getattr(inner, name, None)) for name in ("eval", "train"))
    ]


class Held(NamedTuple):
    """Where a parameter is: its group, its optimizer and the layout of its state."""

    group: dict[str, Any]
    optimizer: torch.optim.Optimizer
    layout: Layout


def held_by(optimizer: torch.optim.Optimizer) -> dict[Tensor, Held]:
    """Where each parameter of an optimizer is.

    Raises:
        ValueError: the layout of the optimizer, or of one within it, is not known.
    """
    found: dict[Tensor, Held] = {}
    for inner in unwrapped(optimizer):
        layout = layout_of(inner)
        for group in inner.param_groups:
            found |= {p: Held(group, inner, layout) for p in group["params"]}
    return found


def entries(
    optimizer: torch.optim.Optimizer, params: Iterable[Tensor] | None = None
) -> list[Entry]:
    """The entries of the given parameters (None: all), for those that have a state.

    Raises:
        ValueError: the optimizer, or one of its states, is not known; or it doesn't hold a
            trainable parameter of `params`.
    """
    held = held_by(optimizer)
    if params is None:
        chosen = list(held)
    else:
        chosen = list(dict.fromkeys(params))
        require_held(optimizer, chosen)
    found = (entry_of(p, held) for p in chosen)
    return [entry for entry in found if entry is not None]


def entry_of(p: Tensor, held: Mapping[Tensor, Held]) -> Entry | None:
    """The entry of a parameter, None if it has no state; errors as for `entries`."""
    if p not in held:
        return None
    group, optimizer, layout = held[p]
    state = optimizer.state.get(p, {})
    if all(value is None for value in state.values()):
        return None
    entry = Entry(p, group, state, layout, optimizer)
    _require_known(entry)
    return entry


def _require_known(entry: Entry) -> None:
    """Refuse a state that the layout doesn't know; those of this package are all known."""
    if type(entry.optimizer).__module__.startswith("lowrank_lab.optim"):
        return
    for name in entry.state:
        if not entry.layout.knows(name):
            raise ValueError(
                f"optimizer: {entry.name} is not allowed; a restart of its state {name!r} isn't "
                "known"
            )


def require_held(optimizer: torch.optim.Optimizer, params: Iterable[Tensor]) -> None:
    """Refuse trainable parameters that the optimizer doesn't hold; frozen ones are skipped.

    Raises:
        ValueError: there are some.
    """
    groups = [group for inner in unwrapped(optimizer) for group in inner.param_groups]
    held = {id(p) for group in groups for p in group["params"]}
    missing = sum(p.requires_grad and id(p) not in held for p in params)
    if missing:
        raise ValueError(
            f"optimizer: {type(optimizer).__name__} is not allowed; it doesn't hold {missing} of "
            "the trainable parameters"
        )
