"""Adam's moments after a change of basis: what refreshes, LDAdam and refactorization share.

A new basis turns a gradient R (p×q) into X R Y. Its first moment is an average of gradients, so it
follows exactly: m ← X m Y. A second moment lacks the products of two entries that this would need;
it follows by the squares of the entries, v ← X∘² v Y∘², as if different entries were uncorrelated.
That is exact where X and Y are signed permutations. Rotations keep the sum of v, whose entries are
right as far as the entries of R that they mix are uncorrelated.

A new subspace loses what the old moments say of other directions. A first moment becomes shorter,
which leads to smaller steps. A second moment that became smaller would lead to larger ones, so
each of its new entries is divided by the sum of squares of its row of X: it is a weighted average
of old entries.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lowrank_lab.distributed.placements import REPLICATED, Placement
from lowrank_lab.optim.columns import index_overlap, is_index
from lowrank_lab.optim.eight_bit import moment_like, read_moment
from lowrank_lab.optim.subspaces import Projections

ON_REFRESH = ("keep", "reset", "transport")
NO_OVERLAP = 1e-12  # above the squares of rounding errors; a direction without more has the mean


def carried(
    moment: Tensor, left: Tensor | None, right: Tensor | None, *, second: bool = False
) -> Tensor:
    """A moment (p×q) in a new basis: X m Y, or X∘² v Y∘² for a second moment.

    Args:
        moment: p×q, or a stack of moments.
        left: X (p′×p); None: the identity.
        right: Y (q×q′); None: the identity.
        second: whether it is a second moment.

    Returns:
        The moment, in the dtype of X and Y.
    """
    if left is not None:
        moment = (left.square() if second else left) @ moment.to(left.dtype)
    if right is not None:
        moment = moment.to(right.dtype) @ (right.square() if second else right)
    return moment


def overlaps(old: Projections, new: Projections, placement: Placement = REPLICATED) -> Projections:
    """X = LₙᵀLₒ and Y = RₒᵀRₙ (r×r, or stacks), which carry moments of old projections to new ones.

    Projections in half precision are multiplied in float32; products of shards are summed.
    """

    def product(P: Tensor | None, Q: Tensor | None) -> Tensor | None:
        if P is None or Q is None:
            return None
        if is_index(P):
            return index_overlap(P, Q)
        wide = torch.promote_types(P.dtype, torch.float32)
        return placement.all_reduce_sum_(P.to(wide).mT @ Q.to(wide))

    return product(new[0], old[0]), product(old[1], new[1])


def follow_refresh_(
    state: dict[str, Any],
    old: Projections,
    new: Projections,
    how: str,
    placement: Placement = REPLICATED,
) -> None:
    """What a refresh does to Adam's moments in a state: they are replaced, not changed in place.

    Args:
        state: of a matrix; without moments it doesn't change.
        old, new: the projections (L, R) before and after the refresh, local shards of shards.
        how: `keep` changes nothing. `reset` sets both moments to zero; their weights restart in
            `SubspaceAdamW`. `transport` carries both moments into the new subspaces, `published`
            (GoLore's rule) the first one.
        placement: of the gradient.
    """
    if how == "keep" or "exp_avg" not in state:
        return
    m, v = state["exp_avg"], state["exp_avg_sq"]
    if how == "reset":
        state["exp_avg"], state["exp_avg_sq"] = (
            moment_like(torch.zeros(t.shape, device=t.device), t) for t in (m, v)
        )
        if (norm := state.get("residual_norm")) is not None:  # as a full `reset_momentum_` does
            state["residual_norm"] = torch.full_like(norm, math.inf)
        return
    X, Y = overlaps(old, new, placement)
    state["exp_avg"] = moment_like(carried(read_moment(m), X, Y), m)
    if how == "transport":
        X, Y = None if X is None else _averaging(X), None if Y is None else _averaging(Y.T).T
        state["exp_avg_sq"] = moment_like(carried(read_moment(v), X, Y, second=True), v)


def _averaging(X: Tensor) -> Tensor:
    """X (r×r) with rows of length 1, up to signs; equal entries in a row without overlap."""
    squares = X.square() + NO_OVERLAP / X.shape[-1]
    return (squares / squares.sum(-1, keepdim=True)).sqrt()
