"""Several optimizers as one, for methods that train matrices and other parameters differently."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from lowrank_lab.optim.checked import CheckedOptimizer
from lowrank_lab.optim.checks import parameter_name, require, require_known_keys
from lowrank_lab.optim.dtensor_optimizer import DTensorOptimizer
from lowrank_lab.optim.muon import Muon
from lowrank_lab.optim.saved_state import (
    load_,
    prepared,
    require_structure,
    saved_entries,
)


class Combined(torch.optim.Optimizer):
    """One optimizer that steps several, sharing their groups and states.

    Schedules, momentum resets and checkpoints then work on one optimizer.

    Args:
        optimizers: optimizers with disjoint parameters; none of them a Combined.

    Raises:
        ValueError: a parameter in two optimizers, a Combined among them, or an unknown group key of
            a torch optimizer.
    """

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        for optimizer in optimizers:
            kind, allowed = type(optimizer).__name__, "optimizers that are not combined themselves"
            require("optimizers", kind, not isinstance(optimizer, Combined), allowed)
            for group in optimizer.param_groups:
                _check_keys(optimizer, group)
        self.optimizers = optimizers
        super().__init__([g for o in optimizers for g in o.param_groups], {})
        for optimizer in optimizers:
            self.state.update(optimizer.state)
            optimizer.state = self.state
        self._watch_loads_()

    def _watch_loads_(self) -> None:
        for optimizer in self.optimizers:
            optimizer.register_load_state_dict_post_hook(self._rejoin_)

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _rejoin_(self, optimizer: torch.optim.Optimizer) -> None:
        """Share groups and states again with an optimizer that has loaded a state on its own."""
        if optimizer.state is self.state:
            return
        loaded = {id(p): g for g in optimizer.param_groups for p in g["params"]}
        self.param_groups = [
            loaded.get(id(next(iter(g["params"]), None)), g) for g in self.param_groups
        ]
        for p in (p for g in optimizer.param_groups for p in g["params"]):
            self.state.pop(p, None)
        self.state.update(optimizer.state)
        for each in self.optimizers:
            each.state = self.state

    def add_param_group(self, param_group: dict[str, Any], to: int | None = None) -> None:
        """Add a group to one of the optimizers: `to` is its number, from 0.

        Raises:
            ValueError: `to` is missing or not the number of an optimizer.
        """
        if any(group is param_group for o in self.optimizers for group in o.param_groups):
            super().add_param_group(param_group)  # called by torch's constructor
            return
        numbers = range(len(self.optimizers))
        kinds = ", ".join(f"{i} for {type(o).__name__}" for i, o in enumerate(self.optimizers))
        require("to", to, to in numbers, f"the optimizer of the new group: {kinds}")
        assert to is not None
        optimizer = self.optimizers[to]
        _check_keys(optimizer, param_group)
        optimizer.add_param_group(param_group)
        try:
            super().add_param_group(optimizer.param_groups[-1])
        except ValueError:  # a parameter of another optimizer
            optimizer.param_groups.pop()
            raise

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; the inner optimizers still share the groups and states.

        Raises:
            ValueError: the state isn't one of these optimizers. Nothing has changed then.
        """
        owners = self._owners()
        load_(self, state_dict, partial(self._prepared, owners))
        for optimizer in self.optimizers:
            groups = zip(self.param_groups, owners, strict=True)
            optimizer.param_groups = [group for group, owner in groups if owner is optimizer]
            optimizer.state = self.state
            if isinstance(optimizer, DTensorOptimizer):
                optimizer.place_states_()

    def _owners(self) -> list[torch.optim.Optimizer]:
        """The optimizer of each group."""
        return [
            next(o for o in self.optimizers if any(g is group for g in o.param_groups))
            for group in self.param_groups
        ]

    def _prepared(
        self, owners: list[torch.optim.Optimizer], state_dict: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The saved state, each optimizer's share of it checked and converted."""
        require_structure(self, state_dict)
        groups, states = list(state_dict["param_groups"]), dict(state_dict["state"])
        for optimizer in self.optimizers:
            at = [i for i, owner in enumerate(owners) if owner is optimizer]
            numbers = [i for k in at for i in groups[k]["params"]]
            share: dict[str, Any] = {
                "param_groups": [groups[k] for k in at],
                "state": {i: states[i] for i in numbers if i in states},
            }
            if isinstance(optimizer, CheckedOptimizer):
                share = prepared(optimizer, share)
            else:
                _check_shapes(optimizer, share)
            states = {i: s for i, s in states.items() if i not in numbers} | share["state"]
            for k, group in zip(at, share["param_groups"], strict=True):
                _check_keys(optimizer, group)
                groups[k] = group
        return {**state_dict, "param_groups": groups, "state": states}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "optimizers": self.optimizers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "optimizers" in state:  # a copy: torch copies no hooks
            self._watch_loads_()


def _check_keys(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> None:
    """Refuse unknown keys where torch's optimizers would ignore them."""
    if _is_torchs(optimizer):
        require_known_keys(group, optimizer.defaults)


def _check_shapes(optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Refuse moments of torch's optimizers that are not shaped like their parameters."""
    for p, _, entries in saved_entries(optimizer, state_dict) if _is_torchs(optimizer) else ():
        for key in entries.keys() & {"exp_avg", "exp_avg_sq", "momentum_buffer"}:
            field = f"state_dict: {key} of {parameter_name(optimizer, p)}"
            shape = tuple(entries[key].shape)
            require(field, shape, shape == tuple(p.shape), str(tuple(p.shape)))


def _is_torchs(optimizer: torch.optim.Optimizer) -> bool:
    return isinstance(optimizer, Muon) or type(optimizer).__module__.startswith("torch.optim.")
