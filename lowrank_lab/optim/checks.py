"""Checks of hyperparameters: one wording for every refused value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from lowrank_lab.config import nearest
from lowrank_lab.distributed.dtensors import local_part
from lowrank_lab.optim.dtensor_optimizer import param_index

# Group keys of other programs, which no optimizer reads: torch's schedulers and SWA, Lightning's
# LearningRateMonitor (`name`), timm's groups.
FOREIGN_KEYS = (
    "params", "param_names", "name", "group_name", "lr_scale", "initial_lr", "max_lr", "min_lr",
    "base_momentum", "max_momentum", "swa_lr",
)  # fmt: skip
# Group keys of torch's AdamW with the values that change nothing here; None: any value.
NEUTRAL: Mapping[str, bool | None] = {
    "amsgrad": False, "maximize": False, "capturable": False, "differentiable": False,
    "decoupled_weight_decay": True, "foreach": None, "fused": None,
}  # fmt: skip


def require(field: str, value: object, allows: bool, allowed: str) -> None:
    """Raise ValueError("field: value is not allowed; allowed") unless `allows`."""
    if not allows:
        raise ValueError(f"{field}: {value!r} is not allowed; {allowed}")


def require_int(field: str, value: object, minimum: int) -> None:
    """Require a whole number, at least `minimum`."""
    fits = isinstance(value, int) and not isinstance(value, bool) and value >= minimum
    require(field, value, fits, f"a whole number from {minimum}")


def require_bool(field: str, value: object) -> None:
    """Require True or False."""
    require(field, value, isinstance(value, bool), "True or False")


def require_choice(field: str, value: object, choices: tuple[str, ...]) -> None:
    """Require one of a few strings."""
    require(field, value, value in choices, f"one of {', '.join(choices)}")


def require_adam(values: Mapping[str, Any]) -> None:
    """Require Adam's hyperparameters, of a group or an optimizer, to be in range."""
    for key in ("lr", "eps", "weight_decay"):
        value = values[key]
        require(key, value, isinstance(value, Real | Tensor) and float(value) >= 0, "at least 0")
    betas = values["betas"]
    pair = isinstance(betas, tuple | list) and len(betas) == 2
    require("betas", betas, pair and all(0 <= b < 1 for b in betas), "two, each in [0, 1)")


def require_known_keys(
    param_group: Mapping[str, Any],
    keys: Iterable[str],
    marked: Iterable[str] = (),
    marker: str = "rank",
) -> None:
    """Refuse a group with a key that neither this optimizer nor another program reads.

    Args:
        keys: allowed in every group.
        marked: allowed only in a group with the marker; includes it.
        marker: the key of the groups that a method updates.
    """
    keys, marked = set(keys), set(marked)
    for key, value in param_group.items():
        if key in NEUTRAL and key not in keys:
            neutral = NEUTRAL[key]
            require(key, value, neutral is None or value == neutral, f"only {neutral}")
            continue
        known = key in keys or key in marked or key in FOREIGN_KEYS
        require(key, value, known, f"no such key; {nearest(key, keys | marked)}")
        fits = key not in marked or key in keys or marker in param_group
        require(key, value, fits, f"only in a group with {marker}")


def parameter_name(optimizer: torch.optim.Optimizer, p: Tensor) -> str:
    """A parameter in messages: its number, from 0, and its name if the group has names."""
    number = in_group = param_index(optimizer, p) - 1
    for group in optimizer.param_groups:
        if in_group < len(group["params"]):
            names = group.get("param_names")
            return f"parameter {number}" + (f" ({names[in_group]})" if names else "")
        in_group -= len(group["params"])
    raise ValueError("the parameter is in no group of the optimizer")


def require_real(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> None:
    """Refuse complex parameters."""
    for p in group["params"]:
        if p.is_complex():
            which = f"{parameter_name(optimizer, p)}, {p.dtype}"
            require("params", which, False, "real parameters; see torch.view_as_real")


def first_non_finite(optimizer: torch.optim.Optimizer, params: Iterable[Tensor]) -> str | None:
    """The first of these parameters or their gradients that isn't finite, for a message.

    Of a DTensor only the local part is checked: other processes may not have failed.
    """
    for p in params:
        for what, value in (("the gradient of ", p.grad), ("", p.detach())):
            if value is not None and not local_part(value).isfinite().all():
                return what + parameter_name(optimizer, p)
    return None


def is_number(value: object) -> bool:
    """A real number."""
    return isinstance(value, int | float) and not isinstance(value, bool)
