"""Low-rank (2505.22922, "Low-Rank"): W = (α/r) · B A, both trained from scratch."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from lowrank_lab.layers.association import linear_through_weight
from lowrank_lab.layers.base import FactorizedLinear, kaiming_
from lowrank_lab.layers.dense import dense_weight_of, is_fake_or_meta, reset_linear_
from lowrank_lab.layers.padded import padded_linear, zero_padded
from lowrank_lab.layers.svd import truncated_svd


def usual_alpha(init: str | None, rank: int) -> float:
    """The default α of factors without a dense weight: r; for `kaiming` at most the paper's 32."""
    return float(min(rank, 32) if init == "kaiming" else rank)


class LowRankLinear(FactorizedLinear):
    """y = (α/r) · B (A x) + bias, without a dense weight.

    Args:
        linear: the dense layer to replace; only `init="spectral"` uses its weight (m×n).
        rank: r, from 1 to min(m, n).
        alpha: α; default `usual_alpha`.
        init: `kaiming` draws both factors Kaiming-uniform(a=√5), as the paper's code does;
            `spectral` splits the truncated SVD of the dense initial weight evenly.
        decompose_on: device on which `spectral` computes this SVD; default: that of the weight.

    `drawn_rows` is the number of last rows of A that `spectral` draws, beside zero columns of B,
    because the rank of the weight is less than r.

    Raises:
        ValueError: as FactorizedLinear; an unknown init; `spectral` of a weight with NaN or
            infinity, or on the meta device.
    """

    pads = True
    drawn_rows: int = 0

    def __init__(
        self,
        linear: nn.Linear,
        rank: int,
        alpha: float | None = None,
        init: Literal["kaiming", "spectral"] = "kaiming",
        decompose_on: torch.device | str | None = None,
    ) -> None:
        if alpha is None:
            alpha = usual_alpha(init, rank)
        super().__init__(linear, rank, alpha)
        if init not in ("kaiming", "spectral"):
            raise ValueError(f"init: {init!r} is not allowed; kaiming or spectral")
        W = dense_weight_of(linear)
        self.init: Literal["kaiming", "spectral"] = init
        self.B = nn.Parameter(W.new_empty(self.out_features, rank), W.requires_grad)
        self.A = nn.Parameter(W.new_empty(rank, self.in_features), W.requires_grad)
        self.bias = linear.bias
        if init == "kaiming":
            self.reset_factors()
        else:
            self._init_spectral(W, decompose_on)

    @torch.no_grad()
    def reset_factors(self) -> None:
        """Draw the factors in place; with `spectral`, from a weight drawn as nn.Linear does."""
        if self.init == "kaiming":
            kaiming_(self.B)
            kaiming_(self.A)
            return
        W = self.B.new_empty(self.out_features, self.in_features)
        reset_linear_(W, None, self.in_features)
        if not is_fake_or_meta(W):
            self._init_spectral(W)

    @torch.no_grad()
    def _init_spectral(self, W: Tensor, device: torch.device | str | None = None) -> None:
        """scale · B A = the best rank-r approximation of W, with BᵀB = AAᵀ.

        A zero column of B beside a zero row of A would never receive a gradient. If the rank of W
        is less than r, the remaining rows of A are therefore drawn; B A stays the same.
        """
        if W.is_meta:
            raise ValueError("init: 'spectral' is not allowed; the weight is on the meta device")
        fake = is_fake_or_meta(W)
        if not fake and not W.isfinite().all():
            raise ValueError("init: 'spectral' is not allowed; the weight has NaN or infinity")
        U, S, Vh = truncated_svd(W, self.rank, device)
        root = (S[: self.rank] / self.scale).sqrt()
        self.B.copy_(U * root)
        self.A.copy_(root[:, None] * Vh)
        if fake:
            return
        tolerance = max(W.shape) * torch.finfo(torch.float32).eps * S[0]
        found = int((S[: self.rank] > tolerance).sum())
        self.drawn_rows = self.rank - found
        if self.drawn_rows:
            drawn = torch.empty_like(self.A)
            kaiming_(drawn)
            self.A[found:] = drawn[found:]
            self.B[:, found:] = 0

    def forward(self, x: Tensor, rows: int | None = None) -> Tensor:
        """x (..., n) → (..., m), by the cheaper association; the scale acts on r channels.

        x and the result may have zero columns beyond n and m, the result up to `rows`.
        """
        if self.goes_through_factors(x):
            return self.outer(x, padded_linear(x, self.A, None), rows)
        B, A = zero_padded(self.B, rows), zero_padded(self.A, None, x.shape[-1])
        bias = zero_padded(self.bias, rows)
        return linear_through_weight(x, B, A, None, bias, self.scale, self.association(x))

    def goes_through_factors(self, x: Tensor) -> bool:
        """Whether `outer` of A x is the layer's result for x."""
        return self.association(x) == "factors"

    def outer(self, x: Tensor, h: Tensor, rows: int | None = None) -> Tensor:
        """As `forward`, from A x (..., r)."""
        return padded_linear(h * self.scale, self.B, self.bias, rows)
