"""Checks of hyperparameters: one wording for every refused value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

FOREIGN_KEYS = ("params", "param_names", "initial_lr")  # group keys that torch itself adds


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
        require(key, values[key], values[key] >= 0, "at least 0")
    betas = values["betas"]
    require("betas", betas, all(0 <= b < 1 for b in betas), "each in [0, 1)")


def require_known_keys(param_group: Mapping[str, Any], keys: Iterable[str]) -> None:
    """Refuse a group with a key that is neither one of these nor one of torch's."""
    known = {*FOREIGN_KEYS, *keys}
    allowed = f"no such key; known: {', '.join(sorted(known))}"
    for key, value in param_group.items():
        require(key, value, key in known, allowed)


def is_number(value: object) -> bool:
    """A real number."""
    return isinstance(value, int | float) and not isinstance(value, bool)
