"""A subspace that follows the gradient by one power iteration, and Adam's moments in it (LDAdam).

    b = ρ P m̂ + (1−ρ) G;  P′ = QR of b (bᵀP)
    C = P′ᵀP;  m ← C m;  v ← |C∘² (v − w m̂²) + w (C m̂)²| with the weight w of v

Each step starts from what the last one found: rounding errors add up, and those of shards differ.
On CPUs all products are computed in float64, of a part of the gradient at a time, unless they are
in half precision anyway: an update takes twice as long, and shards give what one process gives.

Shapes in this file: G is m×n; P is m×r (left) or n×r; m and v are r×n or m×r.
"""

from __future__ import annotations

from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowrank_lab.device import prefers_few_kernels
from lowrank_lab.distributed.placements import REPLICATED, Placement
from lowrank_lab.optim.carried import carried, overlaps
from lowrank_lab.optim.stacks import Stacks, StackShape, blocks_of, gather_
from lowrank_lab.optim.subspace_iteration import power_product, thin_q
from lowrank_lab.optim.subspaces import Projections

PIECE = 1024  # rows or columns of a gradient that are converted to float64 at once
NO_WEIGHT = 1e-12  # of a moment that has been reset, with the rounding errors of `_weights`
Pair = tuple[Tensor, Tensor, float]  # P, m and a factor of their product


class Turn(NamedTuple):
    """A projection and the moments, before and after the subspace of a matrix has changed.

    Of many matrices, their `Stacks`.

    Attributes:
        P, m: before.
        new_P, new_m, new_v: after, without this step's gradient in the moments.
    """

    P: Any
    m: Any
    new_P: Any
    new_m: Any
    new_v: Any


def in_float64(G: Tensor) -> bool:
    """Whether products with a gradient are computed in float64."""
    return not prefers_few_kernels(G) and G.itemsize >= 4


def turned(
    G: Tensor,
    P: Tensor,
    m: Tensor,
    v: Tensor,
    left: bool,
    rho: float,
    weights: tuple[float, float],
    placement: Placement = REPLICATED,
) -> Turn:
    """One power iteration of the subspace, and the moments in it.

    Args:
        G: gradient, with the error.
        P, m, v: projection and moments.
        left: the projected side.
        rho: ρ.
        weights: of m and v, 1 − βᵗ after t completed steps; 0 after a momentum reset.
        placement: of G; P is full.
    """
    of_m, scale = _factors(weights)
    Y = placement.all_reduce_sum_(_power_product(G, P, m, left, rho, of_m))
    new_P = placement.broadcast(thin_q(Y.to(torch.promote_types(P.dtype, torch.float32)), P.dtype))
    C = new_P.to(Y.dtype).mT @ P.to(Y.dtype)
    X, Z = (C, None) if left else (None, C.mT)
    new_m, wide = carried(m, X, Z), m.to(Y.dtype)
    spread = torch.addcmul(v.to(Y.dtype), wide, wide, value=-scale)
    new_v = carried(spread, X, Z, second=True).addcmul_(new_m, new_m, value=scale).abs_()
    return Turn(P, m, new_P, new_m.to(m.dtype), new_v.to(v.dtype))


def _power_product(G: Tensor, P: Tensor, m: Tensor, left: bool, rho: float, of_m: float) -> Tensor:
    """b bᵀP (left) or bᵀb P (p×r), in float64 or float32."""
    if not in_float64(G):
        Y = power_product(_followed(G, P, m, left, rho, of_m), P, left)
        return Y.to(torch.promote_types(Y.dtype, torch.float32))
    P = P.double()
    Y = torch.zeros_like(P)
    dim = 1 if left else 0
    for g, x in zip(torch.split(G, PIECE, dim), torch.split(m, PIECE, dim), strict=True):
        b = _followed(g.double(), P, x, left, rho, of_m)
        Y += power_product(b, P, left)
    return Y


def turned_together(
    G: Stacks,
    P: Stacks,
    m: Stacks,
    v: Stacks,
    lefts: list[bool],
    rho: float,
    weights: tuple[float, float],
) -> Turn:
    """`turned` of stacks, in few kernels: projections of one shape are turned as one stack."""
    of_m, scale = _factors(weights)
    gather_(P, m, v)
    Ys = Stacks(P.shapes, torch.empty_like(P.flat))
    for g, p, x, left, Y in zip(G.blocks, P.blocks, m.blocks, lefts, Ys.blocks, strict=True):
        power_product(_followed(g, p, x, left, rho, of_m), p, left, out=Y)
    joint = _merged(P.shapes)
    Qs = [thin_q(Y, P.dtype) for Y in blocks_of(Ys.flat, joint)]
    pairs = zip(blocks_of(P.flat, joint), Qs, strict=True)
    Xs = [X for old, Q in pairs if (X := overlaps((old, None), (Q, None))[0]) is not None]
    C = _in_one(Xs, [(count, (r, r)) for count, (_, r) in P.shapes])
    squares = Stacks(C.shapes, C.flat.square())
    wide = m.flat.to(C.dtype)
    spread = torch.addcmul(v.flat.to(C.dtype), wide, wide, value=-scale)
    new = torch.empty((2, len(wide)), dtype=C.dtype, device=wide.device)
    for turn, old, out in ((C, wide, new[0]), (squares, spread, new[1])):
        moments = blocks_of(old, m.shapes), blocks_of(out, m.shapes)
        for X, before, after, left in zip(turn.blocks, *moments, lefts, strict=True):
            torch.bmm(*((X, before) if left else (before, X.mT)), out=after)
    new[1].addcmul_(new[0], new[0], value=scale).abs_()
    new_m, new_v = (Stacks(m.shapes, flat) for flat in new.to(m.dtype))
    return Turn(P, m, _in_one(Qs, P.shapes), new_m, new_v)


def _merged(shapes: list[StackShape]) -> list[StackShape]:
    """Shapes of stacks in which neighbours of one shape are one stack."""
    runs = [(shape, list(same)) for shape, same in groupby(shapes, itemgetter(1))]
    return [(sum(count for count, _ in same), shape) for shape, same in runs]


def _in_one(stacks: list[Tensor], shapes: list[StackShape]) -> Stacks:
    """Stacks of these shapes in a buffer, from contiguous tensors of the same entries."""
    parts = [stack.flatten() for stack in stacks]
    return Stacks(shapes, torch.cat(parts) if parts[1:] else parts[0])


def _factors(weights: tuple[float, float]) -> tuple[float, float]:
    """m̂ / m, and the factor of m² in w m̂²."""
    of_m = 1 / weights[0] if weights[0] > NO_WEIGHT else 0.0
    return of_m, weights[1] * of_m**2


def _followed(G: Tensor, P: Tensor, m: Tensor, left: bool, rho: float, of_m: float) -> Tensor:
    """b = ρ P m̂ + (1−ρ) G, of matrices or stacks."""
    m = m.to(P.dtype)
    first, second = (P, m) if left else (m, P.mT)
    add = torch.baddbmm if G.ndim > 2 else torch.addmm
    return add(G, first, second, beta=1 - rho, alpha=rho * of_m)


def projected(G: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """Lᵀ G or G R, in the dtype of G."""
    P = right if left is None else left
    assert P is not None
    if not in_float64(G):
        return P.mT @ G if right is None else G @ P
    P, dim = P.double(), 0 if left is None else 1
    parts = (P.mT @ g if dim else g @ P for g in (x.double() for x in torch.split(G, PIECE, dim)))
    return torch.cat([part.to(G.dtype) for part in parts], dim)


def add_back_(X: Tensor, pairs: list[Pair], left: bool) -> None:
    """X ← X + Σ factor · (P m, or m Pᵀ), in place; of matrices or stacks."""
    if X.ndim > 2 or not in_float64(X):
        for P, m, factor in pairs:
            first, second = (P, m.to(P.dtype)) if left else (m.to(P.dtype), P.mT)
            (X.baddbmm_ if X.ndim > 2 else X.addmm_)(first, second, alpha=factor)
        return
    dim = 1 if left else 0
    for i, part in enumerate(torch.split(X, PIECE, dim)):
        wide = part.double()
        for P, m, factor in pairs:
            m = torch.split(m, PIECE, dim)[i].double()
            first, second = (P.double(), m) if left else (m, P.double().mT)
            wide.addmm_(first, second, alpha=factor)
        part.copy_(wide)


def sided(P: Tensor, left: bool) -> Projections:
    return (P, None) if left else (None, P)
