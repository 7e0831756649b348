"""Balancing the factors of a product B A, and other facts about it, without forming the product.

Shapes in this file: B is m×r and A is r×n. Shards are rows of B and columns of A; only r×r matrices
are communicated.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor

from lowrank_lab.device import prefers_few_kernels
from lowrank_lab.distributed.placements import REPLICATED, Placement

# B A counts as rank-deficient if its smallest singular value is less than this share of the
# largest.
RANK_TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.bfloat16: 1e-3,
    torch.float16: 1e-4,
}
GRAM_TOLERANCE = 1e-8  # least share of a squared singular value that Gram matrices resolve


class Balance(NamedTuple):
    """The transformation B A = (B T) (T⁻¹ A) with (B T)ᵀ (B T) = (T⁻¹ A) (T⁻¹ A)ᵀ = Σ, in float64.

    T and T⁻¹ are meaningless where B A is rank-deficient (RANK_TOLERANCE). No entry of T's diagonal
    is negative: factors that are balanced with a diagonal Gram matrix don't change their signs.
    """

    S: Tensor  # r, descending: the singular values of B A
    T: Tensor  # r×r
    T_inverse: Tensor  # r×r

    def minimal_rotation(self) -> Balance:
        """The balance that rotates the factors least: T = H O (polar) ⇒ T ← H, symmetric positive.

        Both Gram matrices are then equal to O Σ Oᵀ, which is not diagonal. Balanced factors don't
        change (H = I), and moments of an entry still belong to nearly the same entry.
        """
        U, s, _ = torch.linalg.svd(self.T)
        return Balance(self.S, (U * s) @ U.T, (U / s) @ U.T)


def balance(B: Tensor, A: Tensor, placement: Placement = REPLICATED) -> Balance:
    """The balance of B (m×r) and A (r×n), from r×r matrices.

    BᵀB = L Lᵀ,  Lᵀ (A Aᵀ) L = U Σ² Uᵀ  ⇒  T = L⁻ᵀ U Σ^½,  T⁻¹ = Σ^(−½) Uᵀ Lᵀ. Gram matrices square
    the condition number: where they lose the small singular values, QR replaces them.

    Args:
        B, A: the factors, m×r and r×n, or their local shards.
        placement: `Sharded` for shards.

    Raises:
        ValueError: complex factors, or factors with NaN or infinity.
    """
    B, A = _wide(B), _wide(A)
    found = _from_grams(*_grams(B, A, placement))
    lost = placement.all_reduce_max_(B.new_tensor(float(found is None)))  # all ranks use the same
    if found is None or value_of(lost, usually=0):
        found = _from_triangles(_triangular(B, placement), _triangular(A.T, placement))
    return Balance(*map(placement.broadcast, found))


def _from_grams(gram_B: Tensor, gram_A: Tensor) -> Balance | None:
    """`balance` from BᵀB and A Aᵀ; None if they have lost the small singular values."""
    L, failed = torch.linalg.cholesky_ex(gram_B)
    if value_of(failed, usually=0):
        return None
    squares, U = torch.linalg.eigh(L.T @ gram_A @ L)  # ascending
    if not value_of(squares[0] > GRAM_TOLERANCE * squares[-1], usually=True):
        return None
    S, U = squares.flip(0).sqrt(), U.flip(1)
    root = S.sqrt()
    T = torch.linalg.solve_triangular(L.T, U * root, upper=True)
    return _with_signs(S, T, (U / root).T @ L.T)


def _from_triangles(R_B: Tensor, R_A: Tensor) -> Balance:
    """`balance` from R_B and R_A (r×r, or stacks) of B = Q_B R_B and Aᵀ = Q_A R_A."""
    # R_B R_Aᵀ = U Σ Vᵀ  ⇒  T = R_Aᵀ V Σ^(−½),  T⁻¹ = Σ^(−½) Uᵀ R_B
    U, S, Vh = torch.linalg.svd(R_B @ R_A.mT)
    inverse_root = S.rsqrt()[..., None, :]
    return _with_signs(S, R_A.mT @ Vh.mT * inverse_root, (U * inverse_root).mT @ R_B)


def _with_signs(S: Tensor, T: Tensor, T_inverse: Tensor) -> Balance:
    """The balance with the signs that singular vectors leave open: T has no negative diagonal."""
    diagonal = T.diagonal(dim1=-2, dim2=-1)
    signs = torch.where(diagonal < 0, -1.0, 1.0).to(T)
    return Balance(S, T * signs[..., None, :], T_inverse * signs[..., None])


def stacked_balance(B: Tensor, A: Tensor) -> Balance:
    """`balance` of each pair in stacks of factors (…, m, r) and (…, r, n), all by QR."""
    return _from_triangles(*(torch.linalg.qr(_wide(X), mode="r")[1] for X in (B, A.mT)))


def imbalance(B: Tensor, A: Tensor, placement: Placement = REPLICATED) -> Tensor:
    """‖BᵀB − AAᵀ‖ / (‖BᵀB‖ + ‖AAᵀ‖) in float64: 0 if balanced, near 1 if one factor dominates.

    0 for zero factors. Arguments as for `balance`.
    """
    left, right = _grams(_wide(B), _wide(A), placement)
    total = left.norm() + right.norm()
    return torch.where(total > 0, (left - right).norm() / total, torch.zeros_like(total))


def _grams(B: Tensor, A: Tensor, placement: Placement) -> Tensor:
    """BᵀB and A Aᵀ (2, r, r) of the full factors; every rank refuses the same factors."""
    found = placement.all_reduce_sum_(torch.stack([gram(B), gram(A.T)]))
    if not value_of(found.isfinite().all(), usually=True):
        raise ValueError("factors: NaN or infinity is not allowed; finite numbers")
    return found


def _wide(factor: Tensor) -> Tensor:
    """A factor in float64."""
    if factor.is_complex():
        raise ValueError(f"factors: {factor.dtype} is not allowed; real floating point")
    return factor.double()


def value_of(scalar: Tensor, usually: float) -> float:
    """The value of a scalar tensor for a decision; `usually` for one without (fake or meta)."""
    return usually if isinstance(scalar, FakeTensor) or scalar.is_meta else scalar.item()


def product_singular_values(B: Tensor, A: Tensor) -> Tensor:
    """The r singular values of B (m×r) A (r×n), descending, in float64."""
    S: Tensor = torch.linalg.svdvals(_triangular(B.double()) @ _triangular(A.T.double()).T)
    return S


def _triangular(X: Tensor, placement: Placement = REPLICATED) -> Tensor:
    """R (r×r) of X = Q R; with shards (rows of X), R of their stacked triangles."""
    R: Tensor = torch.linalg.qr(X, mode="r")[1]
    if placement.dim is None:
        return R
    missing = X.shape[1] - R.shape[0]  # a shard with fewer than r rows has fewer in R
    return _triangular(placement.all_gather(F.pad(R, (0, 0, 0, missing))))


def gram(X: Tensor) -> Tensor:
    """XᵀX (r×r) of X (p×r), or of a stack: half is computed and mirrored, on a GPU all at once."""
    if prefers_few_kernels(X):
        return X.mT @ X
    r, width = X.shape[-1], 128
    G = X.new_empty(*X.shape[:-2], r, r)
    for i in range(0, r, width):
        block = X[..., i : i + width].mT @ X[..., i:]
        G[..., i:, i : i + width] = block.mT
        G[..., i : i + width, i:] = block
    return G
