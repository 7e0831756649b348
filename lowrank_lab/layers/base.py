"""What every factorised layer is: W (out×in) = scale · B @ A (+ a sparse part), B and A trained.

Shapes in this folder: m = out features, n = in features, r = rank; B is m×r, A is r×n.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FactorizedLinear(nn.Module):
    """A linear layer with weight `scale · B @ A`; the factors are parameters `B` and `A`."""

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


def svd_of_product(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (m×r), S (r), Vᵀ (r×n) of B A, without forming it; in float32 or wider.

    B = Q_B R_B,  Aᵀ = Q_A R_A,  R_B R_Aᵀ = U′ Σ V′ᵀ (r×r), in float64
    ⇒  B A = (Q_B U′) Σ (Q_A V′)ᵀ
    """
    wide = torch.promote_types(B.dtype, torch.float32)
    Q_B, R_B = torch.linalg.qr(B.double())
    Q_A, R_A = torch.linalg.qr(A.T.double())
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T)
    return (Q_B @ U).to(wide), S.to(wide), (Vh @ Q_A.T).to(wide)
