"""The subspaces that gradient-projecting optimizers work in, shared by all of them.

A gradient G is m×n. A left projection is an m×r matrix L with orthonormal columns, a right one an
n×r matrix R: the projected gradient is Lᵀ G, G R, or Lᵀ G R with both. They live in the optimizer's
state as `projection_left` and `projection_right`, so that checkpoints and byte counts see them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

PROJ_TYPES = ("std", "reverse_std", "left", "right", "full")
REFRESHES = ("svd", "randomized")
OVERSAMPLING = 8  # random columns beyond the rank, in the randomized refresh

Sides = tuple[bool, bool]  # (left, right)


def sides(proj_type: str, shape: tuple[int, int] | torch.Size) -> Sides:
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
    state: dict[str, Any], G: Tensor, group: dict[str, Any]
) -> tuple[Tensor | None, Tensor | None]:
    """The projections for this step, (L, R), recomputed from G when step % update_proj_gap == 0."""
    if state["step"] % group["update_proj_gap"] == 0 or not _stored(state):
        which = sides(group["proj_type"], G.shape)
        if group["refresh"] == "svd":
            left, right = leading_subspaces(G, group["rank"], which)
        else:
            left, right = randomized_subspaces(
                G, group["rank"], which, seed=state["step"], old=_pair(state)
            )
        for name, projection in (("projection_left", left), ("projection_right", right)):
            if projection is not None:
                state[name] = projection.to(G.dtype)
    return _pair(state)


def _pair(state: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    return state.get("projection_left"), state.get("projection_right")


def _stored(state: dict[str, Any]) -> bool:
    return "projection_left" in state or "projection_right" in state


def project(G: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """Lᵀ G, G R or Lᵀ G R."""
    if left is not None:
        G = left.T @ G
    return G if right is None else G @ right


def lift_add_(
    W: Tensor, N: Tensor, left: Tensor | None, right: Tensor | None, alpha: float
) -> Tensor:
    """W ← W + alpha · (L N, N Rᵀ or L N Rᵀ), in place."""
    if left is None:
        assert right is not None
        return W.addmm_(N, right.T, alpha=alpha)
    return W.addmm_(left, N if right is None else N @ right.T, alpha=alpha)


def leading_subspaces(G: Tensor, rank: int, which: Sides) -> tuple[Tensor | None, Tensor | None]:
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
    old: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor | None, Tensor | None]:
    """Approximate leading singular vectors of G by a randomized range finder (0909.4061, alg. 4.4).

    They are rotated to ordered singular vectors, and their signs follow the old ones: Adam's
    averages live in that basis. Deterministic in `seed`.
    """
    G = G.float()
    left = _range_finder(G, rank, seed, old[0]) if which[0] else None
    return left, _range_finder(G.T, rank, seed, old[1]) if which[1] else None


def _range_finder(G: Tensor, rank: int, seed: int, old: Tensor | None) -> Tensor:
    """Leading left singular vectors (m×rank) of G (m×n), with two power iterations."""
    columns = min(rank + OVERSAMPLING, *G.shape)
    generator = torch.Generator(G.device).manual_seed(seed)
    noise = torch.randn(G.shape[1], columns, generator=generator, device=G.device)
    Q = torch.linalg.qr(G @ noise)[0]
    for _ in range(2):
        Q = torch.linalg.qr(G @ torch.linalg.qr(G.T @ Q)[0])[0]
    core = Q.T @ G
    _, rotation = torch.linalg.eigh(core @ core.T)  # ascending
    P: Tensor = Q @ rotation.flip(1)[:, :rank]
    if old is not None:
        agreement = (P * old).sum(0)
        P = P * torch.where(agreement < 0, -1.0, 1.0)
    return P.contiguous()


def check_projection(group: dict[str, Any], allowed: tuple[str, ...] = PROJ_TYPES) -> None:
    """Refuse a ranked group whose projection keys are not allowed."""
    choices: dict[str, tuple[str, ...]] = {"proj_type": allowed, "refresh": REFRESHES}
    for key, known in choices.items():
        if key in group and group[key] not in known:
            raise ValueError(f"{key}: {group[key]!r} is not allowed; one of {', '.join(known)}")
    gap = group["update_proj_gap"]
    if not isinstance(gap, int) or gap < 1:
        raise ValueError(f"update_proj_gap: {gap!r} is not allowed; a whole number from 1")
