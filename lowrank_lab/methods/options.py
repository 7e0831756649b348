"""Options of methods: defaults, allowed values and their checks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any


class ByWidth(dict[int, float]):
    """A number that depends on the width of the model (hidden size → number, ascending).

    Interpolated on logarithmic axes between two widths, constant outside them.
    """

    def at(self, width: int) -> float:
        """The number for a hidden size; interpolated ones have two digits."""
        widths = list(self)
        if width in self or not widths[0] < width < widths[-1]:
            return self[min(max(width, widths[0]), widths[-1])]
        low, high = next(pair for pair in pairwise(widths) if pair[1] > width)
        share = math.log(width / low) / math.log(high / low)
        return float(f"{self[low] ** (1 - share) * self[high] ** share:.2g}")

    @property
    def plain(self) -> float | dict[int, float]:
        """The number, if it is the same at all widths; else width → number."""
        return next(iter(self.values())) if len(self) == 1 else dict(self)

    def __str__(self) -> str:
        if len(self) == 1:
            return f"{self.plain:g}"
        return ", ".join(f"{value:g} at width {width}" for width, value in self.items())

    __repr__ = __str__


class StepByWidth(ByWidth):
    """A number that changes at some widths, and is constant between them."""

    def at(self, width: int) -> float:
        """The number of the largest width up to this one, or of the smallest."""
        return self[max((w for w in self if w <= width), default=min(self))]


class FlagByWidth(StepByWidth):
    """A flag that changes at some widths (hidden size → flag, ascending)."""

    def __str__(self) -> str:
        return ", ".join(f"{bool(value)} from width {width}" for width, value in self.items())

    __repr__ = __str__


def at_width(value: Any, width: int) -> Any:
    """The value for a hidden size, if it depends on it."""
    return value.at(width) if isinstance(value, ByWidth) else value


@dataclass(frozen=True)
class Option:
    """One method option."""

    default: Any
    allowed: str
    check: Callable[[Any], bool]
    real: bool = False  # converted to float

    @classmethod
    def number(cls, default: float | ByWidth | None, low: float, high: float) -> Option:
        def check(value: Any) -> bool:
            return (
                isinstance(value, int | float)
                and not isinstance(value, bool)
                and low <= value <= high
            )

        return cls(default, f"a number from {low:g} to {high:g}", check, real=True)

    @classmethod
    def integer(cls, default: int, low: int) -> Option:
        def check(value: Any) -> bool:
            return isinstance(value, int) and not isinstance(value, bool) and value >= low

        return cls(default, f"a whole number from {low}", check)

    @classmethod
    def choice(cls, default: str, names: tuple[str, ...]) -> Option:
        return cls(default, f"one of {', '.join(names)}", lambda value: value in names)

    @classmethod
    def flag(cls, default: bool | FlagByWidth) -> Option:
        return cls(default, "true or false", lambda value: isinstance(value, bool))

    @classmethod
    def like(cls, default: Any) -> Option:
        """An option of the same kind as its default: true or false, a number, or anything."""
        if isinstance(default, bool):
            return cls.flag(default)
        if isinstance(default, int | float):
            return (
                cls.number(default, -1e300, 1e300)
                if isinstance(default, float)
                else cls(
                    default,
                    "a whole number",
                    lambda v: isinstance(v, int) and not isinstance(v, bool),
                )
            )
        return cls(default, f"like {default!r}", lambda value: isinstance(value, type(default)))


def adam_options(eps: float, beta2: float = 0.999) -> dict[str, Option]:
    """Adam's β₁, β₂ (the study's below width 512, 0.999 from there on) and ε."""
    second = 0.999 if beta2 == 0.999 else StepByWidth({48: beta2, 512: 0.999})
    return {
        "beta1": Option.number(0.9, 0, 0.999999),
        "beta2": Option.number(second, 1e-6, 0.999999),
        "eps": Option.number(eps, 1e-30, 1),
    }


def projection_options(
    proj_types: tuple[str, ...],
    refreshes: tuple[str, ...] = (),
    *,
    spread: bool = False,
    on_refresh: tuple[str, ...] = (),
) -> dict[str, Option]:
    """Side, period and method of the projection; what a refresh does to moments, default first."""
    options = {
        "update_proj_gap": Option.integer(200, 1),
        "proj_type": Option.choice("std", proj_types),
    }
    options |= {"refresh": Option.choice("auto", refreshes)} if refreshes else {}
    options |= {"spread_refresh": Option.flag(False)} if spread else {}
    return options | (
        {"on_refresh": Option.choice(on_refresh[0], on_refresh)} if on_refresh else {}
    )
