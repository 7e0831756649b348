"""Norms and scales per channel, of one matrix or of stacks of many.

A channel is a row of an m×n matrix (axis 1: norms run along it), a column (axis 0), or the whole
tensor (None). The channels of stacked tensors form one vector: after the norms, one chain of small
kernels serves all shapes. `Channels` and `StackedChannels` compute the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import groupby

import torch
from torch import Tensor

from lowrank_lab.device import prefers_few_kernels
from lowrank_lab.distributed.placements import REPLICATED, Placement
from lowrank_lab.optim.stacks import Matrices, Stacks, StackShape, Weights


def channel_norms(X: Tensor, axis: int | None) -> Tensor:
    """‖X‖ along an axis, keeping its dimension, or of the whole matrix; in float32 or wider.

    The axis is the projected one, which is never sharded: the norms need no communication.
    """
    wide = torch.promote_types(X.dtype, torch.float32)
    if axis != 0 or prefers_few_kernels(X):
        norms: Tensor = torch.linalg.vector_norm(X, dim=axis, keepdim=True, dtype=wide)
        return norms
    # torch's norm of columns takes four times as long on a CPU
    squares: Tensor = torch.zeros((1, X.shape[1]), dtype=wide, device=X.device)
    for i in range(0, X.shape[0], 512):
        squares += X[i : i + 512].to(wide).square().sum(0, keepdim=True)
    return squares.sqrt_()


class Channels:
    """The channels of one matrix; values of channels broadcast against it."""

    def __init__(self, axis: int | None, placement: Placement = REPLICATED) -> None:
        self.axis, self.placement = axis, placement

    def norms(self, R: Tensor, N: Tensor, G: Tensor) -> list[Tensor]:
        """Norms per channel of R, N and G, in float32 or wider."""
        found = [channel_norms(X, self.axis) for X in (R, N, G)]
        if self.axis is None:
            found = list(self.placement.global_norm(torch.stack(found)))
        return found

    def rms(self, X: Tensor) -> Tensor:
        """Root mean square of each channel, in float32 or wider; the axis may be sharded."""
        assert self.axis is not None
        norms = channel_norms(X, self.axis)
        if self.placement.dim == self.axis:
            norms = self.placement.global_norm(norms)
        return norms.div_(math.sqrt(self.placement.global_shape(X)[self.axis]))

    def total(self, norms: Tensor) -> Tensor:
        """The norm of the matrix from those of its channels."""
        total: Tensor = torch.linalg.vector_norm(norms)
        return total if self.axis is None else self.placement.global_norm(total)

    def divided(self, values: Tensor, by: Tensor, dtype: torch.dtype) -> Tensor:
        """Values of channels divided by one of the matrix, rounded to that dtype."""
        return (values / by).to(dtype)

    def over(self, value: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
        """A value of the matrix divided by those of its channels, rounded to that dtype."""
        return (value / values).to(dtype)

    def subtract_scaled_(self, N: Tensor, R: Tensor, scale: Tensor) -> None:
        """N ← N − scale∘R, in place."""
        N.addcmul_(R, scale.to(N.dtype), value=-1)

    def scale_(self, X: Tensor, scale: Tensor) -> None:
        """Nothing: a single matrix is scaled where it is added."""

    def add_scaled_(self, W: Tensor, G: Tensor, scale: Tensor, alpha: float) -> None:
        """W ← W + alpha · scale∘G, in place."""
        W.addcmul_(G, scale.to(G.dtype), value=alpha)


class StackedChannels:
    """The channels of stacks of many tensors: as `Channels` of each, in one vector.

    Args:
        shapes: of the stacks of gradients.
        axes: the axis of each stack.
    """

    def __init__(self, shapes: list[StackShape], axes: list[int | None]) -> None:
        self.axes = axes
        # number of tensors, and of the channels of each
        self.parts = [
            (count, 1 if axis is None else shape[1 - axis])
            for (count, shape), axis in zip(shapes, axes, strict=True)
        ]
        self.count = sum(count * channels for count, channels in self.parts)

    def views(self, flat: Tensor, shapes: list[StackShape]) -> Iterator[tuple[Tensor, int, slice]]:
        """Views of a buffer (…, entries), the dimension along which norms run, and the channels.

        Consecutive stacks share a view if their channels are rows of one length.
        """
        lead, at, channel = flat.shape[:-1], 0, 0

        def form(item: tuple[StackShape, int | None]) -> tuple[int, ...]:
            (_, shape), axis = item
            return shape if axis == 0 else (shape[-1] if axis == 1 else math.prod(shape),)

        for shape, same in groupby(zip(shapes, self.axes, strict=True), form):
            entries = sum(count * math.prod(each) for (count, each), _ in same)
            view = flat[..., at : at + entries].view(*lead, -1, *shape)
            channels = entries // (shape[0])
            yield view, -len(shape), slice(channel, channel + channels)
            at, channel = at + entries, channel + channels

    def reduce(
        self, flat: Tensor, shapes: list[StackShape], out: Tensor, order: float = 2
    ) -> Tensor:
        """Norms of the channels of a buffer (…, entries), into a tensor (…, channels)."""
        for view, dim, channels in self.views(flat, shapes):
            part = out[..., channels]
            shape = [n for i, n in enumerate(view.shape) if i != view.ndim + dim]
            torch.linalg.vector_norm(view, order, dim, dtype=out.dtype, out=part.view(shape))
        return out

    def norms(self, R: Stacks, N: Stacks, G: Stacks) -> list[Tensor]:
        """Norms per channel of R, its twin N and G, in float32 or wider."""
        wide = torch.promote_types(R.flat.dtype, torch.float32)
        found = torch.empty((3, self.count), dtype=wide, device=R.flat.device)
        self.reduce(R.with_twin, R.shapes, out=found[:2])
        self.reduce(G.flat, G.shapes, out=found[2])
        return list(found.unbind())

    def rms(self, X: Stacks) -> Tensor:
        """Root mean square of each channel, in float32 or wider."""
        wide = torch.promote_types(X.dtype, torch.float32)
        out = torch.empty(self.count, dtype=wide, device=X.flat.device)
        self.reduce(X.flat, X.shapes, out)
        for view, dim, channels in self.views(X.flat, X.shapes):
            out[channels].div_(math.sqrt(view.shape[dim]))
        return out

    def tensors(self) -> Iterator[tuple[slice, slice, int]]:
        """Slices of channels and of tensors, by consecutive tensors with equally many channels."""
        channel = tensor = 0
        for channels, same in groupby(self.parts, lambda part: part[1]):
            count = sum(n for n, _ in same)
            end = channel + count * channels
            yield slice(channel, end), slice(tensor, tensor + count), channels
            channel, tensor = end, tensor + count

    def total(self, norms: Tensor) -> Tensor:
        """Norms of the tensors from those of their channels."""
        if self.count == sum(count for count, _ in self.parts):
            return norms
        total = norms.new_empty(sum(count for count, _ in self.parts))
        for channels, tensors, length in self.tensors():
            part = norms[channels].view(-1, length)
            torch.linalg.vector_norm(part, dim=-1, out=total[tensors])
        return total

    def divided(self, values: Tensor, by: Tensor, dtype: torch.dtype) -> Tensor:
        """Values of channels divided by those of their tensors, rounded to that dtype."""
        out = torch.empty_like(values, dtype=dtype)
        for channels, tensors, length in self.tensors():
            part, quotient = values[channels].view(-1, length), out[channels].view(-1, length)
            torch.div(part, by[tensors, None], out=quotient)
        return out

    def over(self, value: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
        """Values of the tensors divided by those of their channels, rounded to that dtype."""
        out = torch.empty_like(values, dtype=dtype)
        for channels, tensors, length in self.tensors():
            part, quotient = values[channels].view(-1, length), out[channels].view(-1, length)
            torch.div(value[tensors, None], part, out=quotient)
        return out

    def subtract_scaled_(self, N: Stacks, R: Stacks, scale: Tensor) -> None:
        """N ← N − scale∘R, in place."""
        scale = scale.to(N.flat.dtype)
        both = zip(self.views(N.flat, N.shapes), self.views(R.flat, R.shapes), strict=True)
        for (n, dim, channels), (r, _, _) in both:
            n.addcmul_(r, broadcast(scale[channels], n, dim), value=-1)

    def add_scaled_(self, W: Weights, G: Stacks, scale: Tensor, alpha: float) -> None:
        """W ← W + alpha · G at the end of the update; `scale_` has scaled G."""
        W.factor = alpha

    def scale_(self, X: Stacks, scale: Tensor) -> None:
        """X ← scale∘X, in place, each entry rounded once."""
        for view, dim, channels in self.views(X.flat, X.shapes):
            torch.mul(view, broadcast(scale[channels], view, dim), out=view)


def broadcast(values: Tensor, view: Tensor, dim: int) -> Tensor:
    """Values of the channels of a view, broadcast against it along `dim`."""
    shape = [1 if i == view.ndim + dim else n for i, n in enumerate(view.shape)]
    return values.view(shape)


def rank_channels(
    G: Matrices, right: object, placement: Placement, *, whole: bool = False
) -> Channels | StackedChannels:
    """The channels of one-sided projections (None, R) or (L, None), which run along the rank.

    Args:
        G: the gradient, or stacks of them.
        right: the right projection, or that of each stack; None for left ones.
        placement: of G.
        whole: one channel for each matrix.
    """
    if isinstance(G, Tensor):
        return Channels(None if whole else 0 if right is None else 1, placement)
    assert isinstance(right, list)
    return StackedChannels(G.shapes, [None if whole else 0 if R is None else 1 for R in right])


def channels_along(
    X: Matrices, axis: int, placement: Placement = REPLICATED
) -> Channels | StackedChannels:
    """The channels of a matrix, or of stacks of them, whose norms run along one axis."""
    if isinstance(X, Tensor):
        return Channels(axis, placement)
    return StackedChannels(X.shapes, [axis] * len(X.shapes))
