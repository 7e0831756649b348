"""Projections of the gradient: stored in the state, refreshed every update_proj_gap steps, applied.

A gradient G is m×n. A left projection L (m×r) and a right projection R (n×r) have orthonormal
columns; the projected gradient is Lᵀ G, G R, or Lᵀ G R with both. They are entries of the
optimizer's state, `projection_left` and `projection_right`, so that checkpoints and byte counts
include them.

A sharded matrix (`ProjectedAdamW.placements`) is sharded along the side that isn't projected. Each
process computes its shard of G R or Lᵀ G, of Adam's moments and of the update without the others.
It also stores its rows of L or R, which are gathered at each use.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowrank_lab import distributed
from lowrank_lab.layers.balance import gram
from lowrank_lab.optim.adam import to_state_precision
from lowrank_lab.optim.base import ProjectedAdamW, param_index
from lowrank_lab.optim.checks import require_bool, require_choice, require_int
from lowrank_lab.optim.subspaces import (
    Projections,
    Sides,
    align_signs,
    gram_subspaces,
    leading_eigenvectors,
    leading_subspaces,
    randomized_subspaces,
)
from lowrank_lab.placements import Placement

PROJ_TYPES = ("std", "reverse_std", "left", "right", "full")
ONE_SIDED = ("std", "reverse_std", "left", "right")
REFRESHES = ("svd", "randomized", "gram")


def sides(proj_type: str, shape: tuple[int, ...]) -> Sides:
    """The sides of an m×n gradient that are projected. `std` projects the shorter side."""
    tall = shape[0] >= shape[1]
    return {
        "std": (not tall, tall),
        "reverse_std": (tall, not tall),
        "left": (True, False),
        "right": (False, True),
        "full": (True, True),
    }[proj_type]


def unprojected_dim(group: dict[str, Any], shape: torch.Size) -> int | None:
    """The dimension of an m×n matrix that isn't projected; None if both are."""
    left, right = sides(group["proj_type"], shape)
    return None if left and right else int(left)


def get_projections(
    optimizer: ProjectedAdamW, state: dict[str, Any], G: Tensor, group: dict[str, Any]
) -> Projections:
    """The projections of this step, (L, R), recomputed from G every update_proj_gap steps.

    With `spread_refresh` each parameter is refreshed at another step of the gap, so that no step
    waits for all of them; the first projections are computed together.
    """
    if is_refresh_due(optimizer, state, group):
        rank, old = group["rank"], load_projections(state)
        which = sides(group["proj_type"], G.shape)
        if "refreshed" in state:  # by `refresh_sharded_`
            new = state.pop("refreshed")
        elif group["refresh"] == "svd":
            new = leading_subspaces(G, rank, which)
        elif group["refresh"] == "gram":
            new = gram_subspaces(G, rank, which, old=old)
        else:
            new = randomized_subspaces(G, rank, which, seed=state["step"], old=old)
        store_projections_(state, new, G.dtype)
    return gather_projections(load_projections(state), optimizer.placement)


def is_refresh_due(optimizer: ProjectedAdamW, state: dict[str, Any], group: dict[str, Any]) -> bool:
    """Whether a parameter's projections are recomputed in this step."""
    gap = group["update_proj_gap"]
    if group.get("spread_refresh") and "refresh_offset" not in state:
        count = sum(len(g["params"]) for g in optimizer.param_groups)
        state["refresh_offset"] = param_index(optimizer, state) * gap // (count + 1)
    step: int = state.get("step", 0) + state.get("refresh_offset", 0)
    return step % gap == 0 or all(P is None for P in load_projections(state))


def refresh_sharded_(
    optimizer: ProjectedAdamW, params: list[Tensor], group: dict[str, Any]
) -> None:
    """Recompute the projections of sharded parameters that are due, for `get_projections`.

    Only the Gram matrix of a sharded gradient is communicated. Each rank solves the eigenproblem of
    another gradient at the same time and broadcasts the eigenvectors; each rank keeps its rows.
    """
    due = [p for p in params if is_refresh_due(optimizer, optimizer.state[p], group)]
    me, rank, count = distributed.rank(), group["rank"], distributed.world_size()
    for batch in (due[i : i + count] for i in range(0, len(due), count)):
        mine = None
        for owner, p in enumerate(batch):
            local_gram = gram(_unprojected_first(p, optimizer).double())
            total = optimizer.placements[p].all_reduce_sum_(local_gram)
            mine = total if owner == me else mine
        V = None if mine is None else leading_eigenvectors(mine, rank)
        for owner, p in enumerate(batch):
            placement, state = optimizer.placements[p], optimizer.state[p]
            G = _unprojected_first(p, optimizer)
            empty = G.new_empty((G.shape[1], rank), dtype=torch.float32)
            P = V if V is not None and owner == me else empty
            P = placement.local_shard(placement.broadcast(P, source=owner))
            left, right = load_projections(state)
            P = align_signs(P, right if left is None else left, placement)
            state["refreshed"] = (P, None) if placement.dim == 1 else (None, P)


def _unprojected_first(p: Tensor, optimizer: ProjectedAdamW) -> Tensor:
    """A sharded gradient, transposed if its unprojected dimension is the second one."""
    assert p.grad is not None
    return p.grad.T if optimizer.placements[p].dim == 1 else p.grad


def load_projections(state: dict[str, Any]) -> Projections:
    """The projections in a state: local shards where the parameter is sharded."""
    return state.get("projection_left"), state.get("projection_right")


def store_projections_(state: dict[str, Any], new: Projections, dtype: torch.dtype) -> None:
    """Replace the projections in a state (local shards where the parameter is sharded)."""
    for name, projection in zip(("projection_left", "projection_right"), new, strict=True):
        if projection is not None:
            state[name] = projection.to(dtype)


def gather_projections(shards: Projections, placement: Placement) -> Projections:
    """Full projections from the rows that each process stores."""
    left, right = (None if P is None else placement.all_gather(P) for P in shards)
    return left, right


def project(G: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """Lᵀ G, G R or Lᵀ G R."""
    # For both sides (Lᵀ G) R, as in galore-torch: right after a refresh, the other order differs in
    # the off-diagonal entries. They are rounding noise, which Adam amplifies.
    G = G if left is None else left.T @ G
    return G if right is None else G @ right


def projected_gradient(
    G: Tensor, left: Tensor | None, right: Tensor | None, group: dict[str, Any]
) -> Tensor:
    """`project` in the dtype of Adam's moments."""
    return to_state_precision(project(G, left, right), group)


def project_back_add_(
    W: Tensor, N: Tensor, left: Tensor | None, right: Tensor | None, alpha: float
) -> Tensor:
    """W ← W + alpha · (L N, N Rᵀ or L N Rᵀ), in place; the product in the projection's dtype."""
    P = right if left is None else left
    assert P is not None
    N = N.to(P.dtype)
    X = N if left is None else left
    Y = N if right is None else right.T if left is None else N @ right.T
    return W.addmm_(X, Y, alpha=alpha) if W.dtype == P.dtype else W.add_(X @ Y, alpha=alpha)


def channel_norms(X: Tensor, axis: int | None) -> Tensor:
    """‖X‖ along an axis, keeping its dimension, or of the whole matrix; in float32 or wider.

    The axis is the projected one, which is never sharded: the norms need no communication.
    """
    wide = torch.promote_types(X.dtype, torch.float32)
    if axis != 0:
        norms: Tensor = torch.linalg.vector_norm(X, dim=axis, keepdim=True, dtype=wide)
        return norms
    # torch's norm of columns takes four times as long on a CPU
    squares: Tensor = torch.zeros((1, X.shape[1]), dtype=wide, device=X.device)
    for i in range(0, X.shape[0], 512):
        squares += X[i : i + 512].to(wide).square().sum(0, keepdim=True)
    return squares.sqrt_()


def check_projection(group: dict[str, Any], proj_types: tuple[str, ...] = PROJ_TYPES) -> None:
    """Refuse a ranked group with values of its projection keys that are not allowed."""
    require_choice("proj_type", group["proj_type"], proj_types)
    if "refresh" in group:
        require_choice("refresh", group["refresh"], REFRESHES)
    require_bool("spread_refresh", group.get("spread_refresh", False))
    require_int("update_proj_gap", group["update_proj_gap"], 1)
