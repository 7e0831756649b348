"""The largest singular value of a factor by power iteration from a stored vector.

Shapes: L is the longer side of a factor, and its wide form is r×L.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_lab.distributed.placements import REPLICATED, Placement
from lowrank_lab.optim.found_inf import old_if_off
from lowrank_lab.optim.newton_schulz import wide_stacks


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
    w = wide.mT @ placement.all_reduce_sum_(wide @ u.flatten())
    z = placement.all_reduce_sum_(wide @ w)
    size = placement.global_norm(torch.linalg.vector_norm(w))
    is_zero, inverse = size == 0, 1 / size
    u.copy_(old_if_off(torch.where(is_zero, u, (w * inverse).view(u.shape)), u))
    return torch.where(is_zero, 0.0, torch.linalg.vector_norm(z) * inverse)


def power_steps_(factors: list[Tensor], us: list[Tensor]) -> Tensor:
    """`power_step_` of many factors; their σ in the order of their `wide_stacks`."""
    (found,) = wide_stacks(factors, us[0].dtype)
    counts, r = [len(stack.numbers) for stack in found], found[0].X.shape[1]
    zs = us[0].new_empty((sum(counts), r, 1))
    sizes = us[0].new_empty((sum(counts), 1, 1))
    ws, olds = [], []
    for stack, z, size in zip(
        found, torch.split(zs, counts), torch.split(sizes, counts), strict=True
    ):
        olds.append(torch.stack([us[i].view(-1, 1) for i in stack.numbers]))
        w = torch.bmm(stack.X.mT, torch.bmm(stack.X, olds[-1]))
        torch.bmm(stack.X, w, out=z)
        torch.linalg.vector_norm(w, dim=1, keepdim=True, out=size)
        ws.append(w)
    is_zero, inverse = sizes == 0, sizes.reciprocal()
    for stack, w, old, zero, scale in zip(
        found, ws, olds, torch.split(is_zero, counts), torch.split(inverse, counts), strict=True
    ):
        new = old_if_off(torch.where(zero, old, w.mul_(scale)), old)
        targets = [us[i] for i in stack.numbers]
        torch._foreach_copy_(targets, [n.view(u.shape) for n, u in zip(new, targets, strict=True)])
    sigma: Tensor = torch.linalg.vector_norm(zs, dim=(1, 2)).mul_(inverse[:, 0, 0])
    return sigma.masked_fill_(is_zero[:, 0, 0], 0)
