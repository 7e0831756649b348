"""Many matrices updated together, on CUDA in few kernels instead of several per matrix.

An update is written for a matrix W, its gradient G and its state. It also takes `Weights`, `Stacks`
and `StackedStates` of many parameters: the tensors of one shape form a stack (k×m×n), which one
kernel processes. States belong to the parameters; stacks are copies that last for one step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from lowrank_lab.optim.adam import MOMENTS, adam_moments
from lowrank_lab.optim.found_inf import add_

STACK_ENTRIES = 2**28  # of gradients that are copied at a time
StackShape = tuple[int, tuple[int, ...]]  # the number of tensors of a shape, and that shape
State = dict[str, Any]


class Stacks:
    """Tensors of one dtype in one buffer, a stack (k×m×n) of those of each shape.

    Attributes:
        shapes: number and shape of the tensors of each stack.
        tensors: the tensors that were stacked, or views of a buffer that was given.
        twin: a second buffer of the same layout, for Adam's direction; set by `around`.
    """

    twin: Stacks
    _pair: Tensor

    def __init__(
        self, shapes: list[StackShape], flat: Tensor | None = None, tensors: Sequence[Tensor] = ()
    ) -> None:
        self.shapes, self._flat, self._tensors = shapes, flat, list(tensors)

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Stacks:
        """Stacks of these tensors, copied when their buffer is first used."""
        return cls(stack_shapes(tensors), None, tensors)

    @classmethod
    def with_zero_twin(cls, shapes: list[StackShape], like: Tensor, dtype: torch.dtype) -> Stacks:
        """Stacks of zeros with a twin of zeros."""
        size = sum(sizes_of(shapes))
        return cls.around(shapes, torch.zeros((2, size), dtype=dtype, device=like.device))

    @classmethod
    def around(cls, shapes: list[StackShape], buffer: Tensor) -> Stacks:
        """Stacks in a buffer (entries), or stacks and their twin in one (2×entries)."""
        if buffer.ndim == 1:
            return cls(shapes, buffer)
        stacks = cls(shapes, buffer[0])
        stacks.twin, stacks._pair = cls(shapes, buffer[1]), buffer
        return stacks

    @property
    def flat(self) -> Tensor:
        """The buffer, one-dimensional."""
        gather_(self)
        assert self._flat is not None
        return self._flat

    @property
    def whole(self) -> Tensor:
        """The buffer (entries), or both if there is a twin (2×entries)."""
        return self._pair if "_pair" in vars(self) else self.flat

    @property
    def dtype(self) -> torch.dtype:
        return (self._tensors[0] if self._flat is None else self._flat).dtype

    @property
    def blocks(self) -> list[Tensor]:
        """The stacks, views of the buffer."""
        return blocks_of(self.flat, self.shapes)

    @property
    def items(self) -> list[Tensor]:
        """The single tensors, views of the buffer."""
        return [item for block in self.blocks for item in block.unbind()]

    @property
    def tensors(self) -> list[Tensor]:
        return self._tensors or self.items


class Weights:
    """The tensors that an update changes; the update is collected in G's buffer.

    Attributes:
        product: N, left and right projections and alpha of a projected update, if there is one.
        factor: by which G's buffer is added; None while it is not part of the update.
    """

    def __init__(self, tensors: list[Tensor], G: Stacks) -> None:
        self.tensors, self.G = tensors, G
        self.product: tuple[Stacks, Sides, Sides, float] | None = None
        self.factor: float | None = None

    def add_update_(self) -> None:
        """W ← W + factor · G's buffer + alpha · (L N, N Rᵀ or L N Rᵀ)."""
        if self.product is not None and self.factor != 0:
            N, left, right, alpha = self.product
            sides = zip(self.G.blocks, N.blocks, left, right, strict=True)
            for block, n, L, R in sides:
                P = R if L is None else L
                assert P is not None
                n = n.to(P.dtype)
                X = n if L is None else L
                Y = n if R is None else R.mT if L is None else n @ R.mT
                if self.factor is None:
                    torch.bmm(X, Y, out=block)
                else:
                    block.baddbmm_(X, Y, alpha=alpha / self.factor)
            self.factor = alpha if self.factor is None else self.factor
        if self.factor is not None:
            add_(self.tensors, self.G.items, self.factor)


class StackedStates:
    """The states of many parameters: 0-dimensional tensors as vectors, one entry per parameter."""

    def __init__(self, states: list[State]) -> None:
        self.states = states
        self._vectors: dict[str, Tensor] = {}
        self._new: dict[str, Tensor] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.states[0] or name in self._vectors

    def __getitem__(self, name: str) -> Any:
        if name not in self._vectors and not isinstance(self.states[0][name], Tensor):
            return self.states[0][name]  # a Python number, equal for all
        if name not in self._vectors:
            names = [k for k, v in self.states[0].items() if isinstance(v, Tensor) and v.ndim == 0]
            names = [k for k in names if k not in MOMENTS]  # of a parameter that is one number
            table = torch.stack([s[k] for k in names for s in self.states])
            rows = table.view(len(names), len(self.states)).unbind()
            self._vectors = dict(zip(names, rows, strict=True)) | self._vectors
        return self._vectors[name]

    def __setitem__(self, name: str, vector: Tensor) -> None:
        self._vectors[name] = self._new[name] = vector

    def store_(self) -> None:
        """Put the new vectors into the states, each an entry of it, without a copy."""
        for name, vector in self._new.items():
            for state, value in zip(self.states, vector.unbind(), strict=True):
                state[name] = value


Sides = list[Tensor | None]  # the projections of one side, a stack (k×m×r) for each
Projections = tuple[Tensor | None, Tensor | None]
Matrices = Tensor | Stacks


def stack_shapes(tensors: Iterable[Tensor]) -> list[StackShape]:
    """Number and shape of consecutive tensors with equal shapes."""
    return [(len(list(same)), shape) for shape, same in groupby(tuple(t.shape) for t in tensors)]


def sizes_of(shapes: list[StackShape]) -> list[int]:
    """Entries of each stack."""
    return [count * math.prod(shape) for count, shape in shapes]


def blocks_of(flat: Tensor, shapes: list[StackShape]) -> list[Tensor]:
    """Views of a buffer, one for each stack."""
    parts = torch.split(flat, sizes_of(shapes))
    return [part.view(n, *shape) for part, (n, shape) in zip(parts, shapes, strict=True)]


def gather_(*stacks: Stacks) -> None:
    """Copy the tensors of several stacks into their buffers: one kernel for each dtype."""
    waiting = [s for s in stacks if s._flat is None]
    for dtype in {s.tensors[0].dtype: None for s in waiting}:
        same = [s for s in waiting if s.tensors[0].dtype == dtype]
        flat = torch.cat([t.flatten() for s in same for t in s.tensors])
        sizes = [sum(sizes_of(s.shapes)) for s in same]
        for s, part in zip(same, torch.split(flat, sizes), strict=True):
            s._flat = part


def tensors_of(X: Tensor | Stacks | Weights) -> list[Tensor]:
    """The tensors that an update may change in place: X itself, or all of them."""
    return [X] if isinstance(X, Tensor) else X.tensors


def moments_of(state: State | StackedStates, like: Matrices) -> tuple[list[Tensor], list[Tensor]]:
    """Adam's moments m and v of a tensor, or of each of many; zeros are created at first use."""
    states = [state] if isinstance(state, dict) else state.states
    pairs = [adam_moments(s, X) for s, X in zip(states, tensors_of(like), strict=True)]
    return [m for m, _ in pairs], [v for _, v in pairs]


def project_stacks(G: Stacks, left: Sides, right: Sides, dtype: torch.dtype) -> Stacks:
    """Lᵀ G, G R or Lᵀ G R of each stack, in that dtype, with a twin for Adam's direction."""
    sides = list(zip(left, right, strict=True))
    shapes: list[StackShape] = [
        (count, (m if L is None else L.shape[-1], n if R is None else R.shape[-1]))
        for (count, (m, n)), (L, R) in zip(G.shapes, sides, strict=True)
    ]
    projected = Stacks.with_zero_twin(shapes, G.flat, dtype)
    same = dtype == G.flat.dtype
    rounded = torch.empty_like(projected.flat, dtype=G.flat.dtype)
    outputs = projected if same else Stacks(shapes, rounded)
    for block, (L, R), out in zip(G.blocks, sides, outputs.blocks, strict=True):
        if L is not None:
            block = torch.bmm(L.mT, block, out=out if R is None else None)
        if R is not None:
            torch.bmm(block, R, out=out)
    if not same:
        projected.flat.copy_(outputs.flat)
    return projected


def limited(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Parts of at most STACK_ENTRIES; a larger tensor is a part of its own.

    Neighbours with equal sides, transposed ones among them, share kernels: a part ends before them
    rather than between them, if they fit into one.
    """
    part: list[Tensor] = []
    entries = 0
    for _, same in groupby(tensors, lambda t: sorted(t.shape)):
        run = list(same)
        whole = sum(t.numel() for t in run)
        if part and entries + whole > STACK_ENTRIES >= whole:
            yield part
            part, entries = [], 0
        for t in run:
            if part and entries + t.numel() > STACK_ENTRIES:
                yield part
                part, entries = [], 0
            part.append(t)
            entries += t.numel()
    if part:
        yield part
