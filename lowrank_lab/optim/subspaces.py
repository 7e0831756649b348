"""Leading subspaces of a gradient: exact by SVD or by its Gram matrix, iterated, or randomized.

Shapes in this file: G is m×n; L is m×r and R is n×r, both with orthonormal columns. A stack of
gradients (…, m, n) of the same shape gives stacks of L and R.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank_lab.distributed.placements import REPLICATED, Placement
from lowrank_lab.layers.balance import gram
from lowrank_lab.optim.subspace_iteration import (
    OVERSAMPLING,
    leading_eigenvectors,
    random_columns,
    subspace_iteration,
)

Sides = tuple[bool, bool]  # (left, right)
Projections = tuple[Tensor | None, Tensor | None]  # L (m×r), R (n×r)


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


def leading_subspaces(G: Tensor, rank: int, which: Sides) -> Projections:
    """Leading singular vectors of G (m×n): L (m×r) and R (n×r), by an exact SVD in float32."""
    U, _, Vh = torch.linalg.svd(G.float(), full_matrices=False)
    # Copies: a view would keep all of U or V alive.
    keep = partial(torch.clone, memory_format=torch.contiguous_format)
    left = keep(U[..., :rank]) if which[0] else None
    return left, keep(Vh[..., :rank, :].mT) if which[1] else None


def randomized_subspaces(
    G: Tensor,
    rank: int,
    which: Sides,
    *,
    seed: int = 0,
    old: Projections = (None, None),
) -> Projections:
    """Approximate leading singular vectors of G by a randomized range finder (0909.4061, alg. 4.4).

    One power iteration from the old projections, or two from random columns. The result is rotated
    to ordered singular vectors with the signs of the old ones, because Adam's moments depend on the
    basis. Deterministic in `seed`.
    """
    G = G.float()
    left = _range_finder(G, rank, seed, old[0]) if which[0] else None
    return left, _range_finder(G.mT, rank, seed, old[1]) if which[1] else None


def _range_finder(G: Tensor, rank: int, seed: int, old: Tensor | None) -> Tensor:
    """Leading left singular vectors (m×rank) of G (m×n)."""
    columns = min(rank + OVERSAMPLING, *G.shape[-2:]) - (0 if old is None else rank)
    Y = G @ random_columns(G, G.shape[-1], columns, seed)
    if old is not None:
        Y = torch.cat([old.float(), Y], -1)
    for _ in range(2 if old is None else 1):
        Z = G.mT @ Y  # n×columns
        # Old singular vectors stay nearly orthogonal, so normalizing them is enough. Random
        # columns have to be orthonormalized.
        Z = torch.linalg.qr(Z)[0] if old is None else F.normalize(Z, dim=-2)
        Y = G @ Z  # m×columns
    Q = torch.linalg.qr(Y)[0]
    core = Q.mT @ G
    _, rotation = torch.linalg.eigh(core @ core.mT)  # ascending
    P: Tensor = Q @ rotation.flip(-1)[..., :rank]
    return align_signs(P, old).contiguous()


def iterated_subspaces(
    G: Tensor,
    rank: int,
    which: Sides,
    *,
    seed: int = 0,
    old: Projections = (None, None),
) -> Projections:
    """Approximate leading singular vectors of G (m×n), by subspace iteration on G Gᵀ (L), GᵀG (R).

    They capture at least 0.98 of the energy that exact ones do, also for flat spectra, and take a
    small part of an SVD's time on a GPU. Signs follow the old ones. Deterministic in `seed`.
    """
    G = G.double()  # as shards do, whose Gram matrices are added up (`sharded_refresh`)

    def found(X: Tensor, P: Tensor | None) -> Tensor:
        return align_signs(subspace_iteration(gram(X), rank, seed=seed, old=P), P)

    return found(G.mT, old[0]) if which[0] else None, found(G, old[1]) if which[1] else None


def gram_subspaces(
    G: Tensor,
    rank: int,
    which: Sides,
    *,
    old: Projections = (None, None),
) -> Projections:
    """Leading singular vectors of G (m×n) as eigenvectors of G Gᵀ (L) and GᵀG (R), in float64.

    As exact as an SVD in float32, with other rounding, and faster where m and n differ much. Signs
    follow the old ones. `refresh_sharded_` computes the same for sharded G.
    """
    G = G.double()
    left = align_signs(leading_eigenvectors(gram(G.mT), rank), old[0]) if which[0] else None
    return left, align_signs(leading_eigenvectors(gram(G), rank), old[1]) if which[1] else None


def align_signs(P: Tensor, old: Tensor | None, placement: Placement = REPLICATED) -> Tensor:
    """P with the column signs of the old one: Adam's moments depend on the basis."""
    if old is None:
        return P
    agreement = placement.all_reduce_sum_((P * old).sum(-2, keepdim=True))
    return P * torch.where(agreement < 0, -1.0, 1.0)


def next_seed(seed: int) -> int:
    """The seed of the projection that follows the one of `seed`, in the package's sequence.

    It is the last of 15 draws below 2⁶³ − 1 from torch's CPU generator. numpy has the same Mersenne
    Twister, and needs no tensors: under fake tensors they would have no values.
    """
    words = np.random.RandomState(seed % 2**32).randint(0, 2**32, size=30, dtype=np.uint32)
    return (int(words[-2]) << 32 | int(words[-1])) % (2**63 - 1)
