"""The subspaces that gradient-projecting optimizers work in, shared by all of them.

A gradient G is m×n. A left projection is an m×r matrix L with orthonormal columns, a right one an
n×r matrix R: the projected gradient is Lᵀ G, G R, or Lᵀ G R with both. They live in the optimizer's
state as `projection_left` and `projection_right`, so that checkpoints and byte counts see them.

A matrix in shards (`ProjectedAdamW.placement`) is sharded along the side that isn't projected: each
process then computes its shard of G R or Lᵀ G, of Adam's averages and of the update alone. It also
stores its rows of L or R, which are gathered when they are used.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank_lab import distributed
from lowrank_lab.distributed import REPLICATED, Placement
from lowrank_lab.layers.base import gram
from lowrank_lab.optim.base import ProjectedAdamW, in_state_precision, place

PROJ_TYPES = ("std", "reverse_std", "left", "right", "full")
REFRESHES = ("svd", "randomized", "gram")
OVERSAMPLING = 16  # random columns beyond the rank, in the randomized refresh

Sides = tuple[bool, bool]  # (left, right)
Projections = tuple[Tensor | None, Tensor | None]  # L (m×r), R (n×r)


def sides(proj_type: str, shape: tuple[int, ...]) -> Sides:
    """Which sides of an m×n gradient are projected. `std` leaves the longer side as it is."""
    tall = shape[0] >= shape[1]
    return {
        "std": (not tall, tall),
        "reverse_std": (tall, not tall),
        "left": (True, False),
        "right": (False, True),
        "full": (True, True),
    }[proj_type]


def refreshed(
    optimizer: ProjectedAdamW, state: dict[str, Any], G: Tensor, group: dict[str, Any]
) -> Projections:
    """The projections for this step, (L, R), recomputed from G every update_proj_gap steps.

    With `spread_refresh` each weight has its turn at another step of the gap, so that no step has
    to wait for all of them; all have their first one at once.
    """
    if is_due(optimizer, state, group):
        rank, old = group["rank"], stored(state)
        which = sides(group["proj_type"], G.shape)
        if "found" in state:
            found = state.pop("found")
        elif group["refresh"] == "svd":
            found = leading_subspaces(G, rank, which)
        elif group["refresh"] == "gram":
            found = gram_subspaces(G, rank, which, old=old)
        else:
            found = randomized_subspaces(G, rank, which, seed=state["step"], old=old)
        store_(state, found, G.dtype)
    return joined(stored(state), optimizer.placement)


def is_due(optimizer: ProjectedAdamW, state: dict[str, Any], group: dict[str, Any]) -> bool:
    """Whether a weight's projections are recomputed in this step."""
    gap = group["update_proj_gap"]
    if group.get("spread_refresh") and "refresh_offset" not in state:
        count = sum(len(g["params"]) for g in optimizer.param_groups)
        state["refresh_offset"] = place(optimizer, state) * gap // (count + 1)
    step: int = state.get("step", 0) + state.get("refresh_offset", 0)
    return step % gap == 0 or all(P is None for P in stored(state))


def refresh_parts_(optimizer: ProjectedAdamW, params: list[Tensor], group: dict[str, Any]) -> None:
    """Find this process's rows of the projections of parts that are due, for `refreshed`.

    Of a gradient in parts only its Gram matrix travels. Each process finds the eigenvectors of
    another gradient at the same time, and gives them to all.
    """
    due = [p for p in params if is_due(optimizer, optimizer.state[p], group)]
    me, rank, together = distributed.rank(), group["rank"], distributed.world_size()
    for batch in (due[i : i + together] for i in range(0, len(due), together)):
        mine = None
        for i, p in enumerate(batch):
            total = optimizer.placements[p].all_reduce_sum_(gram(_elongated(p, optimizer).double()))
            mine = total if i == me else mine
        V = None if mine is None else _eigenvectors(mine, rank)
        for i, p in enumerate(batch):
            placement, state, G = (
                optimizer.placements[p],
                optimizer.state[p],
                _elongated(p, optimizer),
            )
            empty = G.new_empty((G.shape[1], rank), dtype=torch.float32)
            P = V if V is not None and i == me else empty
            left, right = stored(state)
            old = right if left is None else left
            P = _aligned(placement.local_shard(placement.broadcast(P, source=i)), old, placement)
            state["found"] = (P, None) if placement.dim == 1 else (None, P)


def _elongated(p: Tensor, optimizer: ProjectedAdamW) -> Tensor:
    """A gradient in parts, or its transpose, with the side that isn't projected first."""
    assert p.grad is not None
    return p.grad.T if optimizer.placements[p].dim == 1 else p.grad


def stored(state: dict[str, Any]) -> Projections:
    """The projections in a state, as this process holds them."""
    return state.get("projection_left"), state.get("projection_right")


def store_(state: dict[str, Any], found: Projections, dtype: torch.dtype) -> None:
    """Put projections, as this process holds them, into a state."""
    for name, projection in zip(("projection_left", "projection_right"), found, strict=True):
        if projection is not None:
            state[name] = projection.to(dtype)


def joined(parts: Projections, placement: Placement) -> Projections:
    """Full projections from the rows that each process has."""
    left, right = (None if P is None else placement.all_gather(P) for P in parts)
    return left, right


def unprojected(group: dict[str, Any], shape: torch.Size) -> int | None:
    """The dimension along which an m×n matrix can be cut: None if both sides are projected."""
    left, right = sides(group["proj_type"], shape)
    return None if left and right else int(left)


def project(G: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """Lᵀ G, G R or Lᵀ G R."""
    # For both sides (Lᵀ G) R, as in galore-torch: right after a refresh the other order differs in
    # the off-diagonal entries, which are rounding noise that Adam blows up.
    G = G if left is None else left.T @ G
    return G if right is None else G @ right


def projected(
    G: Tensor, left: Tensor | None, right: Tensor | None, group: dict[str, Any]
) -> Tensor:
    """`project` in the dtype of Adam's averages."""
    return in_state_precision(project(G, left, right), group)


def lift_add_(
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
    """‖X‖ along an axis of a matrix, which is kept, or of all of it; in float32 or wider.

    The axis is the one that projections shorten: of matrices in parts all of it is here.
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


def leading_subspaces(G: Tensor, rank: int, which: Sides) -> Projections:
    """Leading singular vectors of G (m×n): L (m×r) and R (n×r), by an exact SVD in float32."""
    U, _, Vh = torch.linalg.svd(G.float(), full_matrices=False)
    # Copies: a view would keep all of U or V alive.
    left = U[:, :rank].clone(memory_format=torch.contiguous_format) if which[0] else None
    return left, Vh[:rank].T.clone(memory_format=torch.contiguous_format) if which[1] else None


def randomized_subspaces(
    G: Tensor,
    rank: int,
    which: Sides,
    *,
    seed: int = 0,
    old: Projections = (None, None),
) -> Projections:
    """Approximate leading singular vectors of G by a randomized range finder (0909.4061, alg. 4.4).

    From old projections one power iteration is enough, from nothing it takes two. The result is
    rotated to ordered singular vectors, and its signs follow the old ones: Adam's averages live in
    that basis. Deterministic in `seed`.
    """
    G = G.float()
    left = _range_finder(G, rank, seed, old[0]) if which[0] else None
    return left, _range_finder(G.T, rank, seed, old[1]) if which[1] else None


def _range_finder(G: Tensor, rank: int, seed: int, old: Tensor | None) -> Tensor:
    """Leading left singular vectors (m×rank) of G (m×n)."""
    columns = min(rank + OVERSAMPLING, *G.shape) - (0 if old is None else rank)
    generator = torch.Generator(G.device).manual_seed(seed)
    noise = torch.randn(G.shape[1], columns, generator=generator, device=G.device)
    Y = G @ noise
    if old is not None:
        Y = torch.cat([old.float(), Y], 1)
    for _ in range(2 if old is None else 1):
        Z = G.T @ Y  # n×columns
        # Columns that were singular vectors stay nearly orthogonal: their lengths alone would
        # lose digits. Random ones have to be orthonormalized.
        Z = torch.linalg.qr(Z)[0] if old is None else F.normalize(Z, dim=0)
        Y = G @ Z  # m×columns
    Q = torch.linalg.qr(Y)[0]
    core = Q.T @ G
    _, rotation = torch.linalg.eigh(core @ core.T)  # ascending
    P: Tensor = Q @ rotation.flip(1)[:, :rank]
    return _aligned(P, old).contiguous()


def gram_subspaces(
    G: Tensor,
    rank: int,
    which: Sides,
    *,
    old: Projections = (None, None),
) -> Projections:
    """Leading singular vectors of G (m×n) as eigenvectors of G Gᵀ (L) and GᵀG (R), in float64.

    As exact as an SVD in float32, with other rounding, and cheaper where G is elongated. Signs
    follow the old ones. `refresh_parts_` does the same where processes hold parts of G.
    """
    G = G.double()
    left = _aligned(_eigenvectors(gram(G.T), rank), old[0]) if which[0] else None
    return left, _aligned(_eigenvectors(gram(G), rank), old[1]) if which[1] else None


def _eigenvectors(gram: Tensor, rank: int) -> Tensor:
    """The leading eigenvectors (p×rank) of a Gram matrix (p×p), rounded to float32."""
    V: Tensor = torch.linalg.eigh(gram)[1]  # ascending
    return V[:, -rank:].flip(1).to(torch.float32, memory_format=torch.contiguous_format)


def _aligned(P: Tensor, old: Tensor | None, placement: Placement = REPLICATED) -> Tensor:
    """P with the signs of its columns as in the old one: Adam's averages live in that basis."""
    if old is None:
        return P
    agreement = placement.all_reduce_sum_((P * old).sum(0))
    return P * torch.where(agreement < 0, -1.0, 1.0)


def check_projection(group: dict[str, Any], allowed: tuple[str, ...] = PROJ_TYPES) -> None:
    """Refuse a ranked group whose projection keys are not allowed."""
    choices: dict[str, tuple[str, ...]] = {"proj_type": allowed, "refresh": REFRESHES}
    for key, known in choices.items():
        if key in group and group[key] not in known:
            raise ValueError(f"{key}: {group[key]!r} is not allowed; one of {', '.join(known)}")
    spread = group.get("spread_refresh", False)
    if not isinstance(spread, bool):
        raise ValueError(f"spread_refresh: {spread!r} is not allowed; True or False")
    gap = group["update_proj_gap"]
    if not isinstance(gap, int) or gap < 1:
        raise ValueError(f"update_proj_gap: {gap!r} is not allowed; a whole number from 1")
