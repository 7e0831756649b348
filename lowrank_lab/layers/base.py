"""What every factorised layer is: W (out×in) = scale · B @ A (+ a sparse part), B and A trained.

Shapes in this folder: m = out features, n = in features, r = rank; B is m×r, A is r×n.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

# B·A counts as rank-deficient while its smallest singular value is below this share of the largest.
RANK_TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.bfloat16: 1e-3,
    torch.float16: 1e-4,
}


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

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"rank={self.rank}, scale={self.scale:g}, bias={self.bias is not None}"
        )


class Core(NamedTuple):
    """B A (m×n) through its r×r core, in float64: the product itself is never formed.

    B = Q_B R_B,  Aᵀ = Q_A R_A,  R_B R_Aᵀ = U Σ Vᵀ  ⇒  B A = (Q_B U) Σ (Q_A V)ᵀ
    """

    Q_B: Tensor  # m×r
    R_B: Tensor  # r×r
    Q_A: Tensor  # n×r
    R_A: Tensor  # r×r
    U: Tensor  # r×r
    S: Tensor  # r, descending: the singular values of B A
    V: Tensor  # r×r


def core_of(B: Tensor, A: Tensor) -> Core:
    """The r×r core of B (m×r) times A (r×n)."""
    Q_B, R_B = torch.linalg.qr(B.double())
    Q_A, R_A = torch.linalg.qr(A.T.double())
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T)
    return Core(Q_B, R_B, Q_A, R_A, U, S, Vh.T)
