"""Checks of a saved state before it is loaded: groups, their keys, entries and shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lowrank_lab.optim.adam import is_quantized, state_dtype
from lowrank_lab.optim.checked import CheckedOptimizer
from lowrank_lab.optim.checks import parameter_name, require, require_known_keys
from lowrank_lab.optim.eight_bit import in_precision, quantizes
from lowrank_lab.optim.foreign_state import converted

# Group keys that decide the shapes of states
FIXED = ("rank", "proj_type", "density", "norm_dim", "use_muon")
OPTIONAL = ("refresh_offset",)  # entries that a state may lack
MOMENTS = ("exp_avg", "exp_avg_sq")


def load_(
    optimizer: torch.optim.Optimizer,
    state_dict: dict[str, Any],
    prepare: Callable[[Any], dict[str, Any]],
) -> None:
    """Apply the user's hooks and `prepare` to a state, then torch's `load_state_dict`."""
    require_mapping(state_dict)
    ready: list[dict[str, Any]] = []

    def hook(_: torch.optim.Optimizer, found: dict[str, Any]) -> dict[str, Any]:
        ready.append(prepare(found))
        return ready[0]

    handle = optimizer.register_load_state_dict_pre_hook(hook)
    try:
        torch.optim.Optimizer.load_state_dict(optimizer, state_dict)
    finally:
        handle.remove()
    restore_dtypes_(optimizer, ready[0])


def prepared(optimizer: CheckedOptimizer, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A saved state in the form of this optimizer, converted if another package saved it.

    Raises:
        ValueError: it belongs to another optimizer, model or rank, or entries are missing.
    """
    require_structure(optimizer, state_dict)
    state_dict = converted(optimizer, state_dict)
    groups = [
        _merged(optimizer, own, saved)
        for own, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True)
    ]
    states = dict(state_dict["state"])
    for group in groups:
        for i in group["params"]:
            if states.get(i):
                states[i] = optimizer.upgraded(group, states[i])
    ready = {**state_dict, "param_groups": groups, "state": states}
    for p, group, entries in saved_entries(optimizer, ready):
        _require_entries(optimizer, p, group, entries)
    return ready


def require_structure(optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Refuse a state with other numbers of groups or parameters than this optimizer."""
    require_mapping(state_dict)
    ours = [len(group["params"]) for group in optimizer.param_groups]
    theirs = [len(group["params"]) for group in state_dict["param_groups"]]
    require("state_dict", theirs, theirs == ours, f"groups of {ours} parameters, as here")
    numbers = {i for group in state_dict["param_groups"] for i in group["params"]}
    extra = [i for i in state_dict["state"] if isinstance(i, int) and i not in numbers]
    require("state_dict", extra, not extra, "states of the parameters in its groups alone")


def require_mapping(state_dict: Any) -> None:
    """Refuse anything but a dictionary with `state` and `param_groups`."""
    known = isinstance(state_dict, Mapping) and {"state", "param_groups"} <= state_dict.keys()
    kind = sorted(map(str, state_dict)) if isinstance(state_dict, Mapping) else type(state_dict)
    require("state_dict", kind, known, "what `optimizer.state_dict()` returns")


def _merged(
    optimizer: CheckedOptimizer, own: dict[str, Any], saved: dict[str, Any]
) -> dict[str, Any]:
    """The group after loading: own values, replaced by saved ones where there are any."""
    for key in FIXED:
        ours, theirs = own.get(key), saved.get(key)
        asked = "no such key" if ours is None else f"{ours!r}, as in this optimizer's group"
        same = ours == theirs or (theirs is None and key != "rank")
        require(f"state_dict: {key}", theirs, same, asked)
    try:
        unread = {k for k in saved if k in own}  # a program's own key, set in both
        require_known_keys(
            saved, {*optimizer.defaults, *unread}, optimizer.marked_keys(), optimizer.marker
        )
        merged = {**own, **saved}
        optimizer.check_any_group({**merged, "params": own["params"]})
    except ValueError as error:
        raise ValueError(f"state_dict: {error}") from None
    return merged


def saved_entries(
    optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]
) -> Iterator[tuple[Tensor, dict[str, Any], dict[str, Any]]]:
    """(parameter, saved group, saved entries) of the parameters that have a saved state."""
    for own, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        for p, i in zip(own["params"], saved["params"], strict=True):
            if state_dict["state"].get(i):
                yield p, saved, state_dict["state"][i]


def _require_entries(
    optimizer: CheckedOptimizer, p: Tensor, group: dict[str, Any], entries: dict[str, Any]
) -> None:
    """Refuse a state with missing or unknown entries, or with tensors of other shapes."""
    shapes, name = optimizer.state_shapes(group, tuple(p.shape)), parameter_name(optimizer, p)
    missing = sorted(shapes.keys() - entries.keys())
    unknown = sorted(map(str, entries.keys() - shapes.keys() - {*OPTIONAL}))
    here = f"the entries of {type(optimizer).__name__}: {', '.join(shapes)}"
    require(f"state_dict: {name}", f"without {', '.join(missing)}", not missing, here)
    require(f"state_dict: {name}", f"with {', '.join(unknown)}", not unknown, here)
    for key, shape in shapes.items():
        value = entries[key]
        is_tensor = isinstance(value, Tensor)
        found = tuple(value.shape) if is_tensor else type(value).__name__
        if shape is None:
            fits, allowed = isinstance(value, int | float), "a number"
        else:
            fits, allowed = is_tensor and found == shape, str(shape)
        require(f"state_dict: {key} of {name}", found, fits, allowed)


def restore_dtypes_(optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Restore the dtypes of loaded states, which torch casts to the dtype of the parameter.

    Moments and projections have the parameter's dtype; moments those of `state_precision`. Norms,
    masks and indices keep the dtype in which they were saved.
    """
    for p, group, entries in saved_entries(optimizer, state_dict):
        moments = state_dtype(p.dtype, group)
        for key, value in entries.items():
            if not isinstance(value, Tensor):
                continue
            if key.startswith("projection_") and value.is_floating_point():
                continue
            if key in MOMENTS and (is_quantized(value) or quantizes(group, value.numel())):
                optimizer.state[p][key] = in_precision(value.to(p.device), key, group, moments)
                continue
            dtype = moments if key in MOMENTS else value.dtype
            if optimizer.state[p][key].dtype != dtype:
                optimizer.state[p][key] = value.to(p.device, dtype, copy=True)
