"""Low-rank (2505.22922, "Low-Rank"): W = (α/r) · B A, both trained from scratch."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_lab.layers.association import linear_through_weight
from lowrank_lab.layers.base import FactorizedLinear


class LowRankLinear(FactorizedLinear):
    """y = (α/r) · B (A x) + bias, without a dense weight.

    Args:
        linear: the dense layer to replace; only `init="spectral"` uses its weight (m×n).
        rank: r, from 1 to min(m, n).
        alpha: α; default 32 for `kaiming` as in the paper's code, r (a scale of 1) for `spectral`.
        init: `kaiming` draws both factors Kaiming-uniform(a=√5), as the paper's code does;
            `spectral` splits the truncated SVD of the dense initial weight evenly.
    """

    def __init__(
        self,
        linear: nn.Linear,
        rank: int,
        alpha: float | None = None,
        init: Literal["kaiming", "spectral"] = "kaiming",
    ) -> None:
        if alpha is None:
            alpha = 32.0 if init == "kaiming" else float(rank)
        super().__init__(linear.in_features, linear.out_features, rank, alpha / max(rank, 1))
        W = linear.weight
        self.B = nn.Parameter(W.new_empty(self.out_features, rank))
        self.A = nn.Parameter(W.new_empty(rank, self.in_features))
        self.bias = linear.bias
        if init == "kaiming":
            nn.init.kaiming_uniform_(self.B, a=math.sqrt(5))
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        elif init == "spectral":
            self._init_spectral(W)
        else:
            raise ValueError(f"init: {init!r} is not allowed; kaiming or spectral")

    @torch.no_grad()
    def _init_spectral(self, W: Tensor) -> None:
        """scale · B A = the best rank-r approximation of W, with BᵀB = AAᵀ."""
        U, S, Vh = torch.linalg.svd(W.float(), full_matrices=False)
        root = (S[: self.rank] / self.scale).sqrt()
        self.B.copy_(U[:, : self.rank] * root)
        self.A.copy_(root[:, None] * Vh[: self.rank])

    def forward(self, x: Tensor) -> Tensor:
        """x (..., n) → (..., m), by the cheaper association; the scale acts on r channels."""
        association = self.association(x)
        if association != "factors":
            return linear_through_weight(
                x, self.B, self.A, None, self.bias, self.scale, association
            )
        return F.linear(F.linear(x, self.A) * self.scale, self.B, self.bias)
