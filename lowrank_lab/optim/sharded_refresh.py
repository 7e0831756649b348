"""New projections of DTensors: each rank decomposes the gradient of another matrix."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lowrank_lab.distributed.dtensors import (
    ShardLayout,
    full_tensor,
    is_dtensor,
    layout_of,
    local_part,
)
from lowrank_lab.layers.balance import gram, value_of
from lowrank_lab.optim.base import ProjectedAdamW
from lowrank_lab.optim.found_inf import found_inf, zero_if_off_
from lowrank_lab.optim.projection import (
    PROJECTIONS,
    is_refresh_due,
    load_projections,
    new_projections,
    refresh_on,
)
from lowrank_lab.optim.subspace_iteration import leading_eigenvectors, subspace_iteration
from lowrank_lab.optim.subspaces import Projections, align_signs, sides


def refresh_sharded_(
    optimizer: ProjectedAdamW, params: list[Tensor], group: dict[str, Any]
) -> None:
    """Recompute the projections of DTensors that are due, for `get_projections`.

    Each rank solves the problem of another matrix at the same time and broadcasts the projections,
    of which each rank keeps its rows. A matrix in shards of shards is left to `get_projections`.

    Raises:
        LinAlgError: a gradient that can't be decomposed; on all ranks, before anything has changed.
    """
    waiting: dict[Any, list[ShardLayout]] = {}
    for p in params:
        optimizer.param = p
        assert is_dtensor(p)
        layout = layout_of(p, optimizer.shard_dim(group, p.shape))
        if len(layout.groups) == 1 and is_refresh_due(optimizer, optimizer.state[p], group):
            assert p.grad is not None
            zero_if_off_(local_part(p.grad))  # projections of NaN would spoil weights
            waiting.setdefault(layout.groups[0], []).append(layout)
    for ranks, due in waiting.items():
        count, me = dist.get_world_size(ranks), dist.get_rank(ranks)
        for batch in (due[i : i + count] for i in range(0, len(due), count)):
            mine: Callable[[], Projections] | None = None
            for owner, layout in enumerate(batch):
                problem = _problem(layout, optimizer.state[layout.p], group)
                mine = problem if owner == me else mine
                del problem  # a full gradient
            solved = (None, None) if mine is None else _solved(mine)
            for owner, layout in enumerate(batch):
                found = solved if owner == me else (None, None)
                state = optimizer.state[layout.p]
                optimizer.refreshed[layout.p] = _shared(found, owner, layout, state, group)


def _problem(
    layout: ShardLayout, state: dict[str, Any], group: dict[str, Any]
) -> Callable[[], Projections]:
    """What computes the projections of a matrix, from what all ranks have gathered for it."""
    p = layout.p
    assert p.grad is not None
    old: Projections = (None, None)
    refresh, reduces = refresh_on(p, group), by_gram(layout, group)
    if refresh != "svd" and not (reduces and refresh == "gram"):
        left, right = load_projections(state)
        old = (
            (left if left is None else full_tensor(left)),
            (right if right is None else full_tensor(right)),
        )
    step: int = state.get("step", 0)
    if reduces:
        assert layout.dim is not None
        G = layout.gradient()
        local_gram = gram((G.T if layout.dim == 1 else G).double())
        total = layout.placement.all_reduce_sum_(local_gram)
        return partial(_of_gram, total, old[1 - layout.dim], layout.dim, step, group)
    return partial(new_projections, full_tensor(p.grad), old, step, group)


def by_gram(layout: ShardLayout, group: dict[str, Any]) -> bool:
    """Whether projections come from the Gram matrix of the shards, not from a full gradient."""
    return layout.dim is not None and refresh_on(layout.p, group) in ("subspace", "gram")


def _of_gram(
    total: Tensor, old: Tensor | None, dim: int, step: int, group: dict[str, Any]
) -> Projections:
    if refresh_on(total, group) == "gram":
        P = leading_eigenvectors(total, group["rank"])
    else:
        P = subspace_iteration(total, group["rank"], seed=step, old=old)
    return (P, None) if dim == 1 else (None, P)


def _solved(problem: Callable[[], Projections]) -> Projections:
    """Its projections; NaN where there are none: the other ranks are waiting for an answer."""
    try:
        return problem()
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return torch.tensor(torch.nan), torch.tensor(torch.nan)


def _shared(
    solved: Projections,
    owner: int,
    layout: ShardLayout,
    state: dict[str, Any],
    group: dict[str, Any],
) -> Projections:
    """This rank's rows of the projections that the owner has solved, in float32."""
    p, placement = layout.p, layout.placement
    old = load_projections(layout.load_states({k: state.get(k) for k in PROJECTIONS}))
    found: list[Tensor | None] = []
    for side, projects in enumerate(sides(group["proj_type"], tuple(p.shape))):
        P, shape = solved[side], (p.shape[side], group["rank"])
        if not projects:
            found.append(None)
            continue
        if P is None or P.ndim == 0:
            fill = 0.0 if P is None else torch.nan
            P = torch.full(shape, fill, dtype=torch.float32, device=p.device)
        P = placement.broadcast(P, owner)
        # where a flag guards the update, projections are finite or unused
        if found_inf() is None and not value_of(P.isfinite().all(), usually=True):
            raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
                f"the gradient of a matrix {tuple(p.shape)} can't be decomposed"
            )
        P = placement.local_shard(P)
        aligned = not by_gram(layout, group)
        found.append(P if aligned else align_signs(P, old[side], placement))
    return found[0], found[1]
