"""What every factorised layer is: W (out×in) = scale · B @ A (+ a sparse part), B and A trained.

Shapes in this folder: m = out features, n = in features, r = rank; B is m×r, A is r×n.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from lowrank_lab.distributed import REPLICATED, Placement
from lowrank_lab.layers.association import Association, cheapest

# B·A counts as rank-deficient while its smallest singular value is below this share of the largest.
RANK_TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.bfloat16: 1e-3,
    torch.float16: 1e-4,
}
GRAM_TOLERANCE = 1e-8  # smallest share of squared singular values that Gram matrices get right


class FactorizedLinear(nn.Module):
    """A linear layer with weight `scale · B @ A`; the factors are parameters `B` and `A`."""

    has_other_weights: ClassVar[bool] = False  # is there more to the weight than scale · B A

    B: nn.Parameter
    A: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, rank: int, scale: float) -> None:
        super().__init__()
        if not 1 <= rank <= min(in_features, out_features):
            limit, shape = min(in_features, out_features), f"{out_features}×{in_features}"
            raise ValueError(f"rank: {rank} is not allowed; a {shape} layer takes 1 to {limit}")
        self.in_features, self.out_features = in_features, out_features
        self.rank, self.scale = rank, scale

    def factors(self) -> tuple[Tensor, Tensor]:
        """B (m×r) and A (r×n), the parameters themselves; the scale is not in them."""
        return self.B, self.A

    def dense_weight(self) -> Tensor:
        """The whole m×n weight, scale included. Forms the product: for tests and export."""
        return self.scale * (self.B @ self.A)

    def association(self, x: Tensor, *, base: bool = False) -> Association:
        """The cheapest order of products for an input x (..., n); `base`: is there a dense W₀."""
        tokens = x.numel() // self.in_features
        trains = self.B.requires_grad or self.A.requires_grad
        return cheapest(
            tokens, self.out_features, self.in_features, self.rank, base=base, trains=trains
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"rank={self.rank}, scale={self.scale:g}, bias={self.bias is not None}"
        )


class Balance(NamedTuple):
    """B A = (B T) (T⁻¹ A), where (B T)ᵀ (B T) = (T⁻¹ A) (T⁻¹ A)ᵀ = Σ. All of it in float64.

    Of `nearest` both sides are equal too, but not diagonal: Σ turned by an orthogonal matrix.
    """

    S: Tensor  # r, descending: the singular values of B A
    T: Tensor  # r×r; where B A is rank-deficient (RANK_TOLERANCE), T and T⁻¹ mean nothing
    T_inverse: Tensor  # r×r

    def nearest(self) -> Balance:
        """The one that turns the factors least: T = H O ⇒ T ← H, symmetric and positive.

        Balanced factors stay what they are (H = I), and what is one entry's history, like Adam's
        moments, goes on being about nearly the same entry.
        """
        U, s, _ = torch.linalg.svd(self.T)
        return Balance(self.S, (U * s) @ U.T, (U / s) @ U.T)


def balance(B: Tensor, A: Tensor, placement: Placement = REPLICATED) -> Balance:
    """What balances B (m×r) and A (r×n), from r×r matrices: the product is never formed.

    Of factors in shards, rows of B and columns of A, only such matrices travel.

    BᵀB = L Lᵀ,  Lᵀ (A Aᵀ) L = U Σ² Uᵀ  ⇒  T = L⁻ᵀ U Σ^½,  T⁻¹ = Σ^(−½) Uᵀ Lᵀ. Gram matrices square
    the condition number: where they lose the small singular values, QR takes their place.
    """
    B, A = B.double(), A.double()
    found = _from_grams(*_grams(B, A, placement))
    lost = placement.all_reduce_max_(B.new_tensor(float(found is None)))  # all take the same way
    if found is None or value_of(lost, usually=0):
        found = _from_triangles(_triangular(B, placement), _triangular(A.T, placement))
    return Balance(*map(placement.broadcast, found))


def _from_grams(gram_B: Tensor, gram_A: Tensor) -> Balance | None:
    """`balance` from BᵀB and A Aᵀ; None where they have lost the small singular values."""
    L, failed = torch.linalg.cholesky_ex(gram_B)
    if value_of(failed, usually=0):
        return None
    squares, U = torch.linalg.eigh(L.T @ gram_A @ L)  # ascending
    if not value_of(squares[0] > GRAM_TOLERANCE * squares[-1], usually=True):
        return None
    S, U = squares.flip(0).sqrt(), U.flip(1)
    root = S.sqrt()
    T = torch.linalg.solve_triangular(L.T, U * root, upper=True)
    return Balance(S, T, (U / root).T @ L.T)


def _from_triangles(R_B: Tensor, R_A: Tensor) -> Balance:
    """`balance` from the triangles of B = Q_B R_B and Aᵀ = Q_A R_A."""
    # R_B R_Aᵀ = U Σ Vᵀ  ⇒  T = R_Aᵀ V Σ^(−½),  T⁻¹ = Σ^(−½) Uᵀ R_B
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T)
    inverse_root = S.rsqrt()
    return Balance(S, R_A.T @ Vh.T * inverse_root, (U * inverse_root).T @ R_B)


def imbalance(B: Tensor, A: Tensor, placement: Placement = REPLICATED) -> Tensor:
    """‖BᵀB − AAᵀ‖ / (‖BᵀB‖ + ‖AAᵀ‖) in float64: 0 balanced, towards 1 one-sided; 0 of zeros.

    Args:
        placement: `Sharded` for shards that are rows of B and columns of A.
    """
    left, right = _grams(B.double(), A.double(), placement)
    total = left.norm() + right.norm()
    return torch.where(total > 0, (left - right).norm() / total, torch.zeros_like(total))


def _grams(B: Tensor, A: Tensor, placement: Placement) -> Tensor:
    """BᵀB and A Aᵀ (2, r, r) of the whole factors."""
    return placement.all_reduce_sum_(torch.stack([gram(B), gram(A.T)]))


def value_of(scalar: Tensor, usually: float) -> float:
    """The value of a scalar tensor to decide by; `usually` where tensors have no values."""
    return usually if isinstance(scalar, FakeTensor) else scalar.item()


def product_singular_values(B: Tensor, A: Tensor) -> Tensor:
    """The r singular values of B (m×r) times A (r×n), descending, float64."""
    S: Tensor = torch.linalg.svdvals(_triangular(B.double()) @ _triangular(A.T.double()).T)
    return S


def _triangular(X: Tensor, placement: Placement = REPLICATED) -> Tensor:
    """R (r×r) of X = Q R; of X in shards of rows that of their stacked triangles."""
    R: Tensor = torch.linalg.qr(X, mode="r")[1]
    if placement is REPLICATED:
        return R
    few = X.shape[1] - R.shape[0]  # rows missing in a shard of fewer than r
    return _triangular(placement.all_gather(F.pad(R, (0, 0, 0, few))))


def gram(X: Tensor) -> Tensor:
    """Xᵀ X (r×r) of X (p×r), half of it computed and half mirrored."""
    r, width = X.shape[1], 128
    G = X.new_empty(r, r)
    for i in range(0, r, width):
        block = X[:, i : i + width].T @ X[:, i:]
        G[i:, i : i + width] = block.T
        G[i : i + width, i:] = block
    return G
