"""The largest singular value of a factor by power iteration from a stored vector.

Shapes: L is the longer side of a factor, and its wide form is r×L.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_lab.distributed.placements import REPLICATED, Placement
from lowrank_lab.optim.found_inf import lerp_, old_if_off
from lowrank_lab.optim.newton_schulz import wide_stacks
from lowrank_lab.optim.stacks import blocks_of

# Of the old vector in X Xᵀu: all there is where the factor is zero. Otherwise it shifts the
# eigenvalues by as much, and doesn't change the eigenvectors.
SHARE = 1e-16


def long_dim(shape: tuple[int, ...]) -> int:
    """The dimension of a factor's longer side."""
    return 0 if shape[0] > shape[1] else 1


def vector_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """The shape of u: L×1 of B, 1×L of A."""
    return (shape[0], 1) if long_dim(shape) == 0 else (1, shape[1])


def power_step_(X: Tensor, u: Tensor, dim: int, placement: Placement = REPLICATED) -> Tensor:
    """One step of power iteration from u, in place; σ of the factor X (0-dimensional).

    Args:
        X: a factor, or its shard along `dim`, its longer side.
        u: of the shape `vector_shape`, or its shard; stays where X is zero.
    """
    wide = (X.mT if dim == 0 else X).to(u.dtype)
    old = u.flatten()
    w = torch.addmv(old, wide.mT, placement.all_reduce_sum_(wide @ old), beta=SHARE)
    z = placement.all_reduce_sum_(wide @ w)
    size = placement.global_norm(torch.linalg.vector_norm(w))
    u.copy_(old_if_off(w.div_(size).view(u.shape), u))
    sigma: Tensor = torch.linalg.vector_norm(z).div_(size)
    return sigma


def power_steps_(factors: list[Tensor], us: list[Tensor]) -> Tensor:
    """`power_step_` of many factors; their σ in the order of their `wide_stacks`."""
    (found,) = wide_stacks(factors, factors[0].dtype)
    numbers = [i for stack in found for i in stack.numbers]
    counts, r = [len(stack.numbers) for stack in found], found[0].X.shape[1]
    olds = blocks_of(
        torch.cat([us[i].flatten() for i in numbers]),
        [(len(stack.numbers), (stack.X.shape[2], 1)) for stack in found],
    )
    zs = us[0].new_empty((sum(counts), r, 1))
    sizes = us[0].new_empty((sum(counts), 1, 1))
    ws = []
    for stack, old, z, size in zip(
        found, olds, torch.split(zs, counts), torch.split(sizes, counts), strict=True
    ):
        X = stack.X.to(old.dtype)
        ws.append(torch.baddbmm(old, X.mT, torch.bmm(X, old), beta=SHARE))
        torch.bmm(X, ws[-1], out=z)
        torch.linalg.vector_norm(ws[-1], dim=1, keepdim=True, out=size)
        ws[-1].div_(size)
    new = [w for stack in ws for w in stack.unbind()]
    targets = [us[i] for i in numbers]
    lerp_(targets, [w.view(u.shape) for w, u in zip(new, targets, strict=True)], 1.0)
    sigma: Tensor = torch.linalg.vector_norm(zs, dim=(1, 2)).div_(sizes[:, 0, 0])
    return sigma
