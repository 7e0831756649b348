"""CoLA (2502.10940): y = B silu(A x), two factors with an activation between them."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_lab.layers.base import FactorizedLinear, refusal_of
from lowrank_lab.layers.dense import dense_weight_of
from lowrank_lab.layers.padded import padded_linear


class ColaLinear(FactorizedLinear):
    """y = B silu(A x) + bias, with B (m×r) and A (r×n) from scratch.

    No dense weight computes the same: `weight` has a shape, dtype and device but no values,
    `to_dense_` and refactorization refuse the layer, and spectra are those of B and of A.

    Args:
        linear: the dense layer to replace; its weight (m×n) decides shape, dtype and device.
        rank: r, from 1 to min(m, n); the paper's is a quarter of the model's width.
        init: `normal` draws both factors with variance r^(−1/2) · (m+n)^(−1/2), as the authors do.

    Raises:
        ValueError: as FactorizedLinear; an unknown init.
    """

    has_dense_weight: ClassVar[bool] = False
    pads = True

    def __init__(self, linear: nn.Linear, rank: int, init: Literal["normal"] = "normal") -> None:
        super().__init__(linear, rank, alpha=rank)  # a scale of 1
        if init != "normal":
            raise ValueError(f"init: {init!r} is not allowed; normal")
        W = dense_weight_of(linear)
        self.B = nn.Parameter(W.new_empty(self.out_features, rank), W.requires_grad)
        self.A = nn.Parameter(W.new_empty(rank, self.in_features), W.requires_grad)
        self.bias = linear.bias
        self.reset_factors()

    @torch.no_grad()
    def reset_factors(self) -> None:
        """Draw both factors in place."""
        std = (self.rank * (self.out_features + self.in_features)) ** -0.25
        nn.init.normal_(self.B, std=std)
        nn.init.normal_(self.A, std=std)

    def narrow(self, x: Tensor) -> Tensor:
        """h = silu(A x) (..., r) of x (..., n, or zero columns beyond)."""
        return F.silu(padded_linear(x, self.A, None))

    def widen(self, h: Tensor, rows: int | None = None) -> Tensor:
        """B h + bias (..., m, or zero columns up to `rows`) of h (..., r)."""
        return padded_linear(h, self.B, self.bias, rows)

    def forward(self, x: Tensor, rows: int | None = None) -> Tensor:
        """x (..., n) → (..., m); both may have zero columns beyond, the result up to `rows`."""
        return self.widen(self.narrow(x), rows)

    def goes_through_factors(self, x: Tensor) -> bool:
        """Whether `outer` of A x is the layer's result for x."""
        return True

    def outer(self, x: Tensor, h: Tensor, rows: int | None = None) -> Tensor:
        """As `forward`, from A x (..., r)."""
        return self.widen(F.silu(h), rows)

    def form(self, B: Tensor, A: Tensor, other: Tensor | None) -> Tensor:
        """Refused: there is no dense weight."""
        raise ValueError(f"weight: {refusal_of(self)}")

    def extra_repr(self) -> str:
        return super().extra_repr().replace(f"scale={self.scale:g}", "silu")
