"""Bytes of optimizer states by formula: the rules that several optimizers share.

The rule of one optimizer alone stands in the file of that optimizer; the row of a method names it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from lowrank_lab.config import ResolvedConfig
from lowrank_lab.optim.eight_bit import EIGHT_BIT, eight_bit_bytes
from lowrank_lab.optim.subspaces import sides

SCALAR = 4  # bytes of a step count or a norm, float32


class Weight(NamedTuple):
    """A weight of a model that nobody has built: what counting its bytes needs.

    Attributes:
        itemsize: bytes per entry.
        target: whether the method acts on it.
        trains: whether it has a gradient and optimizer states.
        role: `embedding` or `head`, the matrices at the model's ends; empty for all others.
    """

    shape: tuple[int, ...]
    itemsize: int
    target: bool = False
    trains: bool = True
    role: str = ""

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        return self.itemsize * self.numel()

    def numel(self) -> int:
        return math.prod(self.shape)


StateRule = Callable[[Weight, ResolvedConfig], int]  # bytes of a weight's optimizer states


def adamw_states(w: Weight, config: ResolvedConfig) -> int:
    """torch's AdamW: m, v and a step count."""
    return 2 * w.nbytes + SCALAR


def adamw_8bit_states(w: Weight, config: ResolvedConfig) -> int:
    """torchao's AdamW: m and v in 8 bits, or in the weight's dtype, and a step count."""
    return 2 * eight_bit_bytes(w.numel(), otherwise=w.itemsize) + SCALAR


def two_moments(w: Weight, config: ResolvedConfig) -> int:
    """m and v; the step count is a Python number."""
    return 2 * w.nbytes


def projected_states(w: Weight, config: ResolvedConfig) -> int:
    """m and v of the projected gradient, and the projections; m and v of the other weights."""
    if not w.target:
        return 2 * moment_bytes(w.numel(), w, config)
    m, n = w.shape
    left, right = sides(config.method_options["proj_type"], (m, n))
    rows, columns = (config.method_rank if left else m), (config.method_rank if right else n)
    return 2 * moment_bytes(rows * columns, w, config) + stored_projections(w, config)


def moment_bytes(entries: int, w: Weight, config: ResolvedConfig) -> int:
    """A moment with so many entries of a projected optimizer, in its `state_precision`."""
    if config.state_precision == EIGHT_BIT:
        return eight_bit_bytes(entries, otherwise=4)
    return entries * (4 if config.state_precision == "fp32" else w.itemsize)


def limited_states(w: Weight, config: ResolvedConfig) -> int:
    """`projected_states`, and the norm that the growth limiter compares with."""
    return projected_states(w, config) + SCALAR * w.target


def stored_projections(w: Weight, config: ResolvedConfig) -> int:
    """The share of `projected_states` that is stored projections."""
    if not w.target or not config.method_options.get("store_projection", True):
        return 0
    m, n = w.shape
    left, right = sides(config.method_options["proj_type"], (m, n))
    return config.method_rank * (m * left + n * right) * w.itemsize
