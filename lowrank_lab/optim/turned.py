"""A subspace that follows the gradient by one power iteration, and Adam's moments in it (LDAdam).

Shapes in this file: G is m×n; P is m×r (left) or n×r; m and v are r×n or m×r. All may be stacks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowrank_lab.distributed.placements import REPLICATED, Placement
from lowrank_lab.optim.carried import carried, overlaps
from lowrank_lab.optim.subspace_iteration import power_step
from lowrank_lab.optim.subspaces import Projections

NO_WEIGHT = 1e-12  # of a moment that has been reset, with the rounding errors of `_weights`


class Turn(NamedTuple):
    """A projection and the moments, before and after the subspace of a matrix has changed.

    Of a run of matrices, stacks of them.

    Attributes:
        P, m: before.
        new_P, new_m, new_v: after, without this step's gradient in the moments.
    """

    P: Tensor
    m: Tensor
    new_P: Tensor
    new_m: Tensor
    new_v: Tensor


def turned(
    G: Tensor,
    P: Tensor,
    m: Tensor,
    v: Tensor,
    left: bool,
    group: dict[str, Any],
    weights: tuple[float, float],
    placement: Placement = REPLICATED,
) -> Turn:
    """One power iteration of the subspace, and the moments in it; of a matrix or a stack.

    Args:
        G: gradient, with the error.
        P, m, v: projection and moments.
        left: the projected side.
        group: has rho.
        weights: of m and v, 1 − βᵗ after t completed steps; 0 after a momentum reset.
        placement: of G; P is full.
    """
    of_m, of_v = (1 / w if w > NO_WEIGHT else 0.0 for w in weights)
    # b = ρ P m̂ + (1−ρ) G;  P′ = QR of b (bᵀP)
    b = torch.mul(G, 1 - group["rho"])
    add_back_(b, P, m, left, group["rho"] * of_m)
    new_P = power_step(b, P, left, placement).to(P.dtype)
    # C = P′ᵀP;  m ← C m;  v̂ ← |C∘² (v̂ − m̂²) + (C m̂)²|
    X, Y = overlaps(sided(P, left), sided(new_P, left))
    new_m = carried(m, X, Y)
    wide = new_m.dtype
    spread = torch.addcmul(v.to(wide) * of_v, m.to(wide), m.to(wide), value=-(of_m**2))
    new_v = carried(spread, X, Y, second=True).addcmul_(new_m, new_m, value=of_m**2)
    new_v = new_v.abs_().mul_(weights[1])
    return Turn(P, m, new_P, new_m.to(m.dtype), new_v.to(v.dtype))


def add_back_(X: Tensor, P: Tensor, m: Tensor, left: bool, factor: float) -> None:
    """X ← X + factor · (P m, or m Pᵀ), in place; of matrices or stacks."""
    m = m.to(P.dtype)
    first, second = (P, m) if left else (m, P.mT)
    add = X.baddbmm_ if X.ndim > 2 else X.addmm_
    add(first, second, alpha=factor)


def sided(P: Tensor, left: bool) -> Projections:
    return (P, None) if left else (None, P)
