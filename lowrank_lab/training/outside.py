"""What an optimizer has outside its states and groups: kept in checkpoints if they are numbers.

`checkpoint.save` stores states and groups. Some optimizers count in attributes of their own; a
resumed run goes on with their numbers, and warns of what it can't restore.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lowrank_lab.optim import ProjectedAdamW
from lowrank_lab.techniques.states import unwrapped

PLAIN = (int, float, str)


class OutsideState:
    """Compares an optimizer's attributes with those that it began with.

    Args:
        optimizer: one that has just been built.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._began = dict(_attributes(optimizer))

    def changed(self) -> dict[str, Any]:
        """Values of numbers that have changed, and names of what else has, as JSON."""
        now = dict(_attributes(self._optimizer))
        new = {name: v for name, v in now.items() if v != self._began.get(name, _MISSING)}
        values = {name: v for name, v in new.items() if v is None or type(v) in (*PLAIN, bool)}
        return {"values": values, "lost": sorted(new.keys() - values.keys())}

    def restore_(self, kept: Mapping[str, Any], report: Callable[[str], None]) -> None:
        """Set the numbers that `changed` returned; report in one line what is lost."""
        inner = list(unwrapped(self._optimizer))
        for name, value in kept.get("values", {}).items():
            place, _, attribute = name.partition(".")
            setattr(inner[int(place)], attribute, value)
        if lost := kept.get("lost"):
            kind, names = (
                type(self._optimizer).__name__,
                ", ".join(n.partition(".")[2] for n in lost),
            )
            report(f"{kind} keeps {names} outside its state_dict; training goes on without it")


_MISSING = object()


@cache
def _usual() -> set[str]:
    """Attributes of every optimizer, and those that torch's schedulers and hooks add."""
    return {*vars(torch.optim.SGD([torch.zeros(1)])), "_opt_called", "optimizers"}


def _attributes(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Any]]:
    """Names and values of attributes: numbers as they are, tensors and containers as digests."""
    for place, inner in enumerate(unwrapped(optimizer)):
        if isinstance(inner, ProjectedAdamW):  # whose states are complete
            continue
        weights = {id(p) for group in inner.param_groups for p in group["params"]}
        for name, value in vars(inner).items():
            if name in _usual() or callable(value):
                continue
            if value is None or isinstance(value, PLAIN):
                yield f"{place}.{name}", value
            elif any(True for _ in _leaves(value)):
                yield f"{place}.{name}", _digest(value, weights)


def _digest(value: Any, weights: set[int]) -> bytes:
    """A hash of the numbers within tensors, containers and optimizers, `weights` left out."""
    found = hashlib.sha256()
    for leaf in _leaves(value):
        if id(leaf) in weights:
            continue
        if isinstance(leaf, Tensor):
            found.update(
                leaf.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data
            )
        else:
            found.update(repr(leaf).encode())
    return found.digest()


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, torch.optim.Optimizer):  # one within a wrapper, which has states
        yield from _leaves(list(value.state.values()))
    elif isinstance(value, Mapping):
        yield from (leaf for key in value for leaf in _leaves(value[key]))
    elif isinstance(value, list | tuple | set) or hasattr(value, "popleft"):
        yield from (leaf for item in value for leaf in _leaves(item))
    elif value is None or isinstance(value, (Tensor, *PLAIN)):
        yield value
