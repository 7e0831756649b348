"""Projections of the gradient: stored in the state, refreshed every update_proj_gap steps.

A gradient G is m×n. A left projection L (m×r) and a right projection R (n×r) have orthonormal
columns; the projected gradient is Lᵀ G, G R, or Lᵀ G R with both. They are entries of the
optimizer's state, `projection_left` and `projection_right`, so that checkpoints and byte counts
include them.

A DTensor is updated in shards along the side that isn't projected. Each process computes its shard
of G R or Lᵀ G, of Adam's moments and of the update without the others. It also stores its rows of L
or R, which are gathered at each use. Only a refresh needs more: the full gradient, or its Gram
matrix (`refresh: gram`).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowrank_lab.device import prefers_few_kernels
from lowrank_lab.distributed.placements import Placement
from lowrank_lab.layers.balance import value_of
from lowrank_lab.optim.base import ProjectedAdamW
from lowrank_lab.optim.carried import ON_REFRESH, follow_refresh_
from lowrank_lab.optim.checked import Shapes
from lowrank_lab.optim.checks import require_bool, require_choice, require_int
from lowrank_lab.optim.columns import is_index
from lowrank_lab.optim.dtensor_optimizer import param_index
from lowrank_lab.optim.found_inf import found_inf, zero_if_off_
from lowrank_lab.optim.matrix_updates import each
from lowrank_lab.optim.projecting import (  # for methods of one's own, beside get_projections
    project as project,
)
from lowrank_lab.optim.projecting import (
    project_back_add_ as project_back_add_,
)
from lowrank_lab.optim.projecting import (
    projected_gradient as projected_gradient,
)
from lowrank_lab.optim.subspaces import (
    Projections,
    gram_subspaces,
    iterated_subspaces,
    leading_subspaces,
    randomized_subspaces,
    sides,
)

PROJ_TYPES = ("std", "reverse_std", "left", "right", "full")
PROJECTIONS = ("projection_left", "projection_right")  # in the states
ONE_SIDED = ("std", "reverse_std", "left", "right")
REFRESHES = ("auto", "svd", "subspace", "randomized", "gram")
STACK_BYTES = 1 << 28  # of float32 gradients that a refresh decomposes at once


def unprojected_dim(group: dict[str, Any], shape: torch.Size) -> int | None:
    """The dimension of an m×n matrix that isn't projected; None if both are."""
    left, right = sides(group["proj_type"], shape)
    return None if left and right else int(left)


def get_projections(
    optimizer: ProjectedAdamW, state: Any, G: Any, group: dict[str, Any]
) -> tuple[Any, Any]:
    """The projections of this step, (L, R), recomputed from G every update_proj_gap steps.

    With `spread_refresh` each parameter is refreshed at another step of the gap, so that no step
    waits for all of them; the first projections are computed together.
    """
    if not isinstance(G, Tensor):
        refresh_together_(optimizer, group)
    return each(optimizer, partial(_projections, optimizer), G, state, group)


def refresh_together_(optimizer: ProjectedAdamW, group: dict[str, Any]) -> None:
    """Recompute the projections of the batch that are due, of all matrices of a shape at once."""
    due: dict[Any, list[Tensor]] = {}
    for p in optimizer.batch:
        optimizer.param = p
        state = optimizer.state[p]
        if p not in optimizer.refreshed and is_refresh_due(optimizer, state, group):
            has = tuple(P is not None for P in load_projections(state))
            due.setdefault((tuple(p.shape), has), []).append(p)
    for same in due.values():
        states = [optimizer.state[p] for p in same]
        old = [
            None if Ps[0] is None else torch.stack(Ps)
            for Ps in zip(*map(load_projections, states), strict=True)
        ]
        G = zero_if_off_(torch.stack([p.grad for p in same if p.grad is not None]))
        new = new_projections(G, (old[0], old[1]), states[0]["step"], group)
        for i, p in enumerate(same):  # copies: a view would keep, and save, the whole stack
            left, right = (None if P is None else P[i].clone() for P in new)
            optimizer.refreshed[p] = left, right


def _projections(
    optimizer: ProjectedAdamW, G: Tensor, state: dict[str, Any], group: dict[str, Any]
) -> Projections:
    shape = optimizer.placement.global_shape(G)
    if is_refresh_due(optimizer, state, group):
        new: Projections | None = optimizer.refreshed.pop(optimizer.param, None)
        if new is None:
            assert optimizer.placement.dim is None, "prepare_sharded_ has to call refresh_sharded_"
            left, right = new_projections(G, load_projections(state), state["step"], group)
            agreed = optimizer.placement.broadcast
            new = left if left is None else agreed(left), right if right is None else agreed(right)
        replace_projections_(optimizer, state, new, G.dtype, group)
    return gather_projections(load_projections(state), shape, optimizer.placement)


def new_projections(G: Tensor, old: Projections, step: int, group: dict[str, Any]) -> Projections:
    """The projections (L, R) of a full gradient G (m×n), or of a stack of them, given the old ones.

    Args:
        G: m×n, or matrices×m×n; a large stack is decomposed in pieces of STACK_BYTES.
        old: (L, R) or stacks of them; None for a side that isn't projected, or has none yet.
        step: the seed of random columns.
        group: its `rank`, `proj_type` and `refresh`.

    Returns:
        (L, R) in float32, or stacks of them; None for a side that isn't projected.

    Raises:
        LinAlgError: a gradient that isn't finite.
    """
    pieces = max(1, STACK_BYTES // (4 * G.shape[-2:].numel()))
    if G.ndim > 2 and len(G) > pieces:
        found = []
        for i in range(0, len(G), pieces):
            left, right = (None if P is None else P[i : i + pieces] for P in old)
            found.append(new_projections(G[i : i + pieces], (left, right), step, group))
        left, right = (None if Ps[0] is None else torch.cat(Ps) for Ps in zip(*found, strict=True))
        return left, right
    rank, which = group["rank"], sides(group["proj_type"], tuple(G.shape[-2:]))
    refresh = refresh_on(G, group)
    if refresh == "svd":
        new = leading_subspaces(G, rank, which)
    elif refresh == "gram":
        new = gram_subspaces(G, rank, which, old=old)
    else:
        solve = iterated_subspaces if refresh == "subspace" else randomized_subspaces
        new = solve(G, rank, which, seed=step, old=old)
    require_finite(new)
    return new


def refresh_on(G: Tensor, group: dict[str, Any]) -> str:
    """How projections are recomputed where G is: `auto` is subspace on a GPU, svd elsewhere."""
    refresh: str = group["refresh"]
    return refresh if refresh != "auto" else "subspace" if prefers_few_kernels(G) else "svd"


def require_finite(projections: Projections) -> None:
    """Raise LinAlgError if projections aren't finite: a GPU's solvers may not have failed.

    Where a flag guards the update, gradients are finite or unused: the host doesn't wait.
    """
    if found_inf() is not None:
        return
    for P in projections:
        if P is not None and not value_of(P.isfinite().all(), usually=True):
            shape = tuple(P.shape)
            raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
                f"a gradient can't be decomposed: its projections {shape} are not finite"
            )


def is_refresh_due(optimizer: ProjectedAdamW, state: dict[str, Any], group: dict[str, Any]) -> bool:
    """Whether the projections of `optimizer.param` are recomputed in this step."""
    gap = group["update_proj_gap"]
    if group.get("spread_refresh") and "refresh_offset" not in state:
        count = sum(len(g["params"]) for g in optimizer.param_groups)
        state["refresh_offset"] = param_index(optimizer, optimizer.param) * gap // (count + 1)
    step: int = state.get("step", 0) + state.get("refresh_offset", 0)
    return step % gap == 0 or all(P is None for P in load_projections(state))


def load_projections(state: dict[str, Any]) -> Projections:
    """The projections in a state: local shards while a DTensor is updated in shards."""
    return state.get("projection_left"), state.get("projection_right")


def replace_projections_(
    optimizer: ProjectedAdamW,
    state: dict[str, Any],
    new: Projections,
    dtype: torch.dtype,
    group: dict[str, Any],
) -> None:
    """Replace the projections in a state, and do to its moments what the group's `on_refresh` says.

    The projections are local shards where `load_projections` returns them.
    """
    old = load_projections(state)
    for name, projection in zip(PROJECTIONS, new, strict=True):
        if projection is not None:
            state[name] = projection if is_index(projection) else projection.to(dtype)
    how = group.get("on_refresh", "keep")
    follow_refresh_(state, old, load_projections(state), how, optimizer.placement)


def gather_projections(
    shards: Projections, shape: tuple[int, ...], placement: Placement
) -> Projections:
    """Full projections of an m×n matrix from the rows, or indices, that each process stores."""
    left, right = (
        P if P is None or is_index(P) else placement.all_gather(P, length=side)
        for P, side in zip(shards, shape, strict=True)
    )
    return left, right


def projected_shapes(group: dict[str, Any], shape: tuple[int, ...]) -> Shapes:
    """Shapes of the moments and projections of an m×n matrix; none in a group without `rank`."""
    if "rank" not in group:
        return {}
    (m, n), r = shape, group["rank"]
    left, right = sides(group["proj_type"], shape)
    projected = (r if left else m, r if right else n)
    shapes: Shapes = {"exp_avg": projected, "exp_avg_sq": projected}
    if group.get("store_projection", True):
        shapes |= {"projection_left": (m, r)} if left else {}
        shapes |= {"projection_right": (n, r)} if right else {}
    return shapes


def check_projection(
    group: dict[str, Any],
    proj_types: tuple[str, ...] = PROJ_TYPES,
    on_refresh: tuple[str, ...] = ON_REFRESH,
) -> None:
    """Refuse a ranked group with values of its projection keys that are not allowed."""
    require_choice("proj_type", group["proj_type"], proj_types)
    if "on_refresh" in group:
        require_choice("on_refresh", group["on_refresh"], on_refresh)
    if "refresh" in group:
        require_choice("refresh", group["refresh"], REFRESHES)
    require_bool("spread_refresh", group.get("spread_refresh", False))
    require_int("update_proj_gap", group.get("update_proj_gap", 1), 1)
