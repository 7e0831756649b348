"""Groups whose parameters are pairs of factors, B1, A1, B2, A2, … (B m×r, A r×n)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lowrank_lab.optim.checks import require, require_int

Pair = tuple[Tensor, Tensor]


def check_pairs(group: dict[str, Any]) -> None:
    """Refuse a group whose parameters are no pairs of factors of its rank."""
    rank, params = group["rank"], group["params"]
    require_int("rank", rank, 1)
    require("params", len(params), len(params) % 2 == 0, "pairs of factors: B1, A1, B2, A2, …")
    for B, A in pairs_of(params):
        shapes = (tuple(B.shape), tuple(A.shape))
        factors = B.ndim == A.ndim == 2 and B.shape[1] == A.shape[0] == rank
        require("params", shapes, factors, f"each B m×{rank}, followed by its A {rank}×n")
        fits = rank <= min(B.shape[0], A.shape[1])
        require("rank", rank, fits, f"at most min(m, n) of each pair, not {shapes}")


def pairs_of(params: list[Tensor]) -> list[Pair]:
    """The pairs (B, A)."""
    return list(zip(params[::2], params[1::2], strict=True))


def with_gradients(pairs: list[Pair]) -> list[Pair]:
    """The pairs of which both factors have a gradient."""
    return [(B, A) for B, A in pairs if B.grad is not None and A.grad is not None]
