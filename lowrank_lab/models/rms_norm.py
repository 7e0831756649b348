"""RMSNorm (1910.07467), with fewer passes over its input than autograd would take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lowrank_lab.kernels import operators as kernels
from lowrank_lab.models.compiled import Compiled

NORM_EPS = 1e-6


class RMSNorm(nn.Module):
    """y = x · s · weight with s = 1/√(mean x² + ε), over the last dimension."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.compiled: Compiled | None = None  # `rms_norm`

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = (self.compiled or rms_norm)(x, self.weight)
        return out


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """x / √(mean x² + ε) · weight over the last dimension."""
    if weight.shape == x.shape[-1:] and kernels.takes(x, weight):
        return kernels.rms_norm(x, weight, NORM_EPS)
    out: Tensor = _RMSNorm.apply(x, weight)  # type: ignore[no-untyped-call]
    return out


class _RMSNorm(torch.autograd.Function):
    """Three passes over x forward and five backward: half as many as autograd would take."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        s = norm.square_().div_(x.shape[-1]).add_(NORM_EPS).rsqrt_().to(x.dtype)
        ctx.save_for_backward(x, s, weight)
        out: Tensor = (x * s).mul_(weight.to(x.dtype))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        # with x̂ = x·s:  d weight = Σ g∘x̂,  d x = s·(g∘weight − x̂ · mean(g∘weight∘x̂))
        (g,) = grad_outputs
        x, s, weight = ctx.saved_tensors
        x_hat = x * s
        g_x = g * x_hat
        w = weight.to(x.dtype)
        mean = (g_x @ w).unsqueeze(-1).div_(x.shape[-1])
        wide = torch.promote_types(x.dtype, torch.float32)
        grad_weight = g_x.reshape(-1, g_x.shape[-1]).sum(0, dtype=wide).to(weight.dtype)
        return (g * w).addcmul_(x_hat, mean, value=-1).mul_(s), grad_weight
