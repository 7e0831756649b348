"""Newton and Schulz's iteration X ← aX + (bA + cA²)X with A = X Xᵀ, of one matrix or of many.

It moves the singular values of X towards 1, so that its result is near U Vᵀ for X = U S Vᵀ. Many
matrices are iterated in stacks; stacks with equal shorter sides share their r×r products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

Coefficients = tuple[float, float, float]  # a, b and c of one iteration


def form_of(X: Tensor) -> tuple[int, int, bool]:
    """Shorter and longer side of a matrix, and whether it is wide."""
    m, n = X.shape
    return min(m, n), max(m, n), m <= n


class WideStack(NamedTuple):
    """Matrices of one form, tall ones transposed.

    Attributes:
        X: k×r×n with r ≤ n.
        numbers: which matrices they are; tall ones come first.
        tall: how many are tall.
        scale: a factor of their results.
    """

    X: Tensor
    numbers: list[int]
    tall: int
    scale: float = 1.0

    def matrices(self, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        """Number and contiguous tensor of each matrix, in its own orientation."""
        parts = (self.X[: self.tall].mT, self.X[self.tall :])
        found = [M for part in parts if len(part) for M in part.to(dtype).contiguous().unbind()]
        yield from zip(self.numbers, found, strict=True)


def one(U: Tensor) -> float:
    """No factor."""
    return 1.0


def wide_stacks(
    matrices: Sequence[Tensor], dtype: torch.dtype, scale: Callable[[Tensor], float] = one
) -> list[list[WideStack]]:
    """Copies of the matrices in stacks; those with equal shorter sides together."""
    forms = [form_of(M) for M in matrices]
    order = sorted(range(len(matrices)), key=forms.__getitem__)
    together: list[list[WideStack]] = []
    for _, rows in groupby(order, lambda i: forms[i][0]):
        stacks = []
        for _, same in groupby(rows, lambda i: (*forms[i][:2], scale(matrices[i]))):
            numbers = list(same)
            wide = [matrices[i] if forms[i][2] else matrices[i].mT for i in numbers]
            tall = sum(not forms[i][2] for i in numbers)
            stacks.append(
                WideStack(torch.stack(wide).to(dtype), numbers, tall, scale(matrices[numbers[0]]))
            )
        together.append(stacks)
    return together


def orthogonalized(
    updates: Sequence[Tensor],
    schedule: Sequence[Coefficients],
    eps: float,
    dtype: torch.dtype = torch.bfloat16,
    scale: Callable[[Tensor], float] = one,
) -> list[Tensor]:
    """The results of the iteration, after the division of each matrix by its norm.

    Args:
        updates: matrices, each m×n, not changed.
        schedule: coefficients of each iteration.
        eps: least norm by which a matrix is divided.
        dtype: of the iteration; that of torch's Muon is bfloat16.
        scale: a factor of the result, from an update; it is part of the last product.

    Returns:
        Contiguous tensors shaped like the updates, in their dtype.
    """
    results = list(updates)
    for stacks in orthogonalized_stacks(updates, schedule, eps, dtype, scale):
        for stack in stacks:
            for i, Q in stack.matrices(updates[stack.numbers[0]].dtype):
                results[i] = Q
    return results


def orthogonalized_stacks(
    updates: Sequence[Tensor],
    schedule: Sequence[Coefficients],
    eps: float,
    dtype: torch.dtype,
    scale: Callable[[Tensor], float] = one,
) -> list[list[WideStack]]:
    """`orthogonalized`, in stacks and in the dtype of the iteration."""
    return [_iterated(stacks, schedule, eps) for stacks in wide_stacks(updates, dtype, scale)]


def _iterated(
    stacks: list[WideStack], schedule: Sequence[Coefficients], eps: float
) -> list[WideStack]:
    """The iteration of stacks with the same r."""
    Xs = [stack.X for stack in stacks]
    counts = [len(X) for X in Xs]
    norms = Xs[0].new_empty(sum(counts))
    for X, norm in zip(Xs, torch.split(norms, counts), strict=True):
        torch.linalg.vector_norm(X, dim=(-2, -1), out=norm)
    norms = norms.clamp_(min=eps)[:, None, None]
    for X, norm in zip(Xs, torch.split(norms, counts), strict=True):
        X.div_(norm)
    gram = Xs[0].new_empty((sum(counts), Xs[0].shape[1], Xs[0].shape[1]))
    scales = [stack.scale for stack in stacks]
    if not schedule:
        Xs = [X * s for X, s in zip(Xs, scales, strict=True)]
    for i, (a, b, c) in enumerate(schedule, 1):
        now = scales if i == len(schedule) else [1.0] * len(Xs)
        for X, A in zip(Xs, torch.split(gram, counts), strict=True):
            torch.bmm(X, X.mT, out=A)
        polynomials = torch.split(torch.baddbmm(gram, gram, gram, beta=b, alpha=c), counts)
        Xs = [
            torch.baddbmm(X, P, X, beta=a * s, alpha=s)
            for X, P, s in zip(Xs, polynomials, now, strict=True)
        ]
    return [stack._replace(X=X) for stack, X in zip(stacks, Xs, strict=True)]
