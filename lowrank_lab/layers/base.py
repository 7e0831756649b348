"""The base class of factorised layers: W (out×in) = scale · B @ A (+ W₀ or S).

Shapes in this package: m = out features, n = in features, r = rank; B is m×r, A is r×n.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from lowrank_lab.layers.association import Association, cheapest


class FactorizedLinear(nn.Module):
    """A linear layer with weight `scale · B @ A`; the factors are parameters `B` and `A`."""

    has_other_weights: ClassVar[bool] = False  # whether W has a part beside scale · B A

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
        """The parameters B (m×r) and A (r×n), without the scale."""
        return self.B, self.A

    def dense_weight(self) -> Tensor:
        """W (m×n), with the scale. Forms the product: for tests and export."""
        return self.scale * (self.B @ self.A)

    def association(self, x: Tensor, *, base: bool = False) -> Association:
        """The cheapest order of products for an input x (..., n); `base`: with a dense W₀."""
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
