"""Projections of zeros and ones, stored as the numbers of the r rows or columns that they choose.

Shapes in this file: P is side×r with one 1 in each column; its index has r entries. A stack of
gradients (k×m×n) has a stack of indices (k×r).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_lab.optim.stacks import Stacks, StackShape

INDEX_BYTES = 8  # of an entry, int64


def is_index(P: Tensor) -> bool:
    """Whether a projection is stored as an index."""
    return P.dtype == torch.int64


def as_matrix(P: Tensor, side: int) -> Tensor:
    """P (side×r) in float32, from its index; any other projection itself."""
    return torch.nn.functional.one_hot(P, side).T.float() if is_index(P) else P


def index_of(P: Tensor) -> Tensor:
    """The index of P, whose columns are unit vectors."""
    return P.argmax(0)


def index_overlap(new: Tensor, old: Tensor) -> Tensor:
    """P′ᵀP (r×r, float64) from the indices of P′ and P."""
    return (new[:, None] == old).double()


def selected(G: Tensor, index: Tensor, dim: int) -> Tensor:
    """The chosen rows (dim 0) or columns (dim 1) of G: Pᵀ G or G P."""
    return G.index_select(dim, index)


def select_stacks(G: Stacks, indices: list[Tensor], dims: list[int], dtype: torch.dtype) -> Stacks:
    """`selected` of stacks, in that dtype, with a twin for Adam's direction."""
    shapes: list[StackShape] = [
        (count, (index.shape[1], n) if dim == 0 else (m, index.shape[1]))
        for (count, (m, n)), index, dim in zip(G.shapes, indices, dims, strict=True)
    ]
    found = Stacks.with_zero_twin(shapes, G.flat, dtype)
    for block, index, dim, out in zip(G.blocks, indices, dims, found.blocks, strict=True):
        chosen = torch.gather(block, 1 + dim, _expanded(index, out, dim))
        out.copy_(chosen)
    return found


def put_stacks_(G: Stacks, N: Stacks, indices: list[Tensor], dims: list[int]) -> None:
    """Replace the chosen rows or columns of stacks, in place."""
    for block, n, index, dim in zip(G.blocks, N.blocks, indices, dims, strict=True):
        block.scatter_(1 + dim, _expanded(index, n, dim), n)


def _expanded(index: Tensor, like: Tensor, dim: int) -> Tensor:
    return (index[:, :, None] if dim == 0 else index[:, None, :]).expand(like.shape)
