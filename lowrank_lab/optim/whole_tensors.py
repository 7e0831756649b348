"""Gradients that are scaled as a whole: one tensor, or stacks of many.

`OneTensor` and `ManyTensors` compute the same.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowrank_lab.optim.channels import StackedChannels, broadcast
from lowrank_lab.optim.stacks import Matrices, Stacks


class OneTensor:
    """A gradient that is scaled as a whole; numbers are 0-dimensional, in `wide` precision."""

    def __init__(self, G: Tensor, wide: torch.dtype) -> None:
        self.g, self.wide = G, wide

    def largest(self) -> Tensor:
        """max|g|; 0 of an empty shard."""
        size = self.g.abs()
        return (size.max() if size.numel() else size.sum()).to(self.wide)

    def norm(self) -> Tensor:
        """‖g‖."""
        norm: Tensor = torch.linalg.vector_norm(self.g, dtype=self.wide)
        return norm

    def scale_larger_(self, bound: Tensor, scale: Tensor) -> None:
        """g ← scale·g where |g| > bound, as a new tensor."""
        scaled = (self.g * scale).to(self.g.dtype)  # a 0-dimensional g would be widened
        self.g = torch.where(self.g.abs() > bound, scaled, self.g)

    def scale_(self, scale: Tensor) -> Tensor:
        """g ← scale·g, in place; the result."""
        return self.g.mul_(scale)


class ManyTensors:
    """As `OneTensor` of each of many gradients, in their buffer; numbers are vectors."""

    def __init__(self, G: Stacks, wide: torch.dtype) -> None:
        self.g, self.wide = G, wide
        self.channels = StackedChannels(G.shapes, [None] * len(G.shapes))

    def _reduce(self, order: float) -> Tensor:
        out = torch.empty(self.channels.count, dtype=self.wide, device=self.g.flat.device)
        return self.channels.reduce(self.g.flat, self.g.shapes, out, order)

    def largest(self) -> Tensor:
        return self._reduce(math.inf)

    def norm(self) -> Tensor:
        return self._reduce(2)

    def scale_larger_(self, bound: Tensor, scale: Tensor) -> None:
        flat, shapes = self.g.flat, self.g.shapes
        size = flat.abs()
        larger, scaled = torch.empty_like(flat, dtype=torch.bool), torch.empty_like(flat)
        views = (self.channels.views(t, shapes) for t in (flat, size, larger, scaled))
        for (g, dim, at), (absolute, *_), (mask, *_), (out, *_) in zip(*views, strict=True):
            torch.gt(absolute, broadcast(bound[at], g, dim), out=mask)
            torch.mul(g, broadcast(scale[at], g, dim), out=out)
        torch.where(larger, scaled, flat, out=flat)

    def scale_(self, scale: Tensor) -> Stacks:
        self.channels.scale_(self.g, scale)
        return Stacks(self.g.shapes, self.g.flat)


def tensors_in(G: Matrices, wide: torch.dtype) -> OneTensor | ManyTensors:
    """A gradient, or stacks of them, to be scaled tensor by tensor."""
    return OneTensor(G, wide) if isinstance(G, Tensor) else ManyTensors(G, wide)
