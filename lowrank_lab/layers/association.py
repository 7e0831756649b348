"""x Wᵀ with W = W₀ + scale · B A, in the cheapest order of products: through B and A, or through W.

FLOPs for t tokens, forward and backward, in an m×n layer of rank r:

    thin      2·t·r·(m+n)      (x Aᵀ) Bᵀ; or dB = dYᵀ (x Aᵀ) and dA = (dY B)ᵀ x from both brackets
    weight    2·m·n·(r+t)      W = W₀ + scale · B A, then x Wᵀ or dX = dY W
    gradient  2·m·n·(t+2r)     G = dYᵀ x, then dB = scale · G Aᵀ and dA = scale · Bᵀ G

Y and dX each cost `thin` (plus 2·t·m·n for x W₀ᵀ) or `weight`. dB and dA together cost `thin` where
x Aᵀ and dY B exist already, otherwise 2 · `thin` or `gradient`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank_lab.device import autocast_dtype, prefers_few_kernels, without_autocast

# factors: W is never formed; weight: W for Y and dX; gradient: W, and G for dB and dA as well
Association = Literal["factors", "weight", "gradient"]


def association_flops(
    tokens: int, m: int, n: int, rank: int, *, base: bool = False, trains: bool = True
) -> dict[Association, int]:
    """FLOPs of one forward and backward pass of an m×n layer, by each association.

    Args:
        tokens: rows of x.
        m, n, rank: shape of the weight, and r.
        base: whether W has a dense W₀ beside B A.
        trains: whether dB and dA are computed; Y and dX always are.
    """
    thin = 2 * tokens * rank * (m + n)
    weight = 2 * m * n * (rank + tokens)
    gradient = 2 * m * n * (tokens + 2 * rank)
    return {
        "factors": 2 * (thin + base * 2 * tokens * m * n) + trains * thin,
        "weight": 2 * weight + trains * 2 * thin,
        "gradient": 2 * weight + trains * gradient,
    }


def cheapest(
    tokens: int, m: int, n: int, rank: int, *, base: bool = False, trains: bool = True
) -> Association:
    """The association with the fewest FLOPs; of equal ones, the one that forms less."""
    flops = association_flops(tokens, m, n, rank, base=base, trains=trains)
    best: Association = "factors"
    if flops["weight"] < flops[best]:
        best = "weight"
    if flops["gradient"] < flops[best]:
        best = "gradient"
    return best


def linear_through_weight(
    x: Tensor,
    B: Tensor,
    A: Tensor,
    base: Tensor | None,
    bias: Tensor | None,
    scale: float,
    association: Association,
) -> Tensor:
    """x (..., n) → x (base + scale · B A)ᵀ + bias (..., m); autograd saves x but not W.

    Each pass needs m·n entries for W (or G) while it computes.
    """
    out: Tensor = _ThroughWeight.apply(  # type: ignore[no-untyped-call]
        x, B, A, base, bias, scale, autocast_dtype(x), association
    )
    return out


class _ThroughWeight(torch.autograd.Function):
    """Its backward is made of differentiable operations, so that second derivatives exist."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, B: Tensor, A: Tensor, base: Tensor | None, bias: Tensor | None,
        scale: float, dtype: torch.dtype | None, association: Association,
    ) -> Tensor:  # fmt: skip
        ctx.scale, ctx.dtype, ctx.association = scale, dtype, association
        ctx.save_for_backward(x, B, A, base)
        x, B, A, base, bias = (cast(t, dtype) for t in (x, B, A, base, bias))
        return F.linear(x, _weight(B, A, base, scale), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, needs_B, needs_A, needs_base, needs_bias, *_ = ctx.needs_input_grad
        dx = dB = dA = dbase = None
        scale = ctx.scale
        with without_autocast(grad.device.type):
            x, B, A, base = (cast(t, ctx.dtype) for t in ctx.saved_tensors)
            dY, X = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
            if ctx.association == "gradient" and (needs_B or needs_A):
                G = weight_gradient(dY, X)
                dB = scaled_mm(scale, G, A.T) if needs_B else None
                dA = scaled_mm(scale, B.T, G) if needs_A else None
                dbase = G if needs_base else None
                del G  # before W and dX take memory
            else:
                dB = scaled_mm(scale, dY.T, X @ A.T) if needs_B else None
                dA = scaled_mm(scale, (dY @ B).T, X) if needs_A else None
                dbase = weight_gradient(dY, X) if needs_base else None
            if needs_x:
                dx = grad @ _weight(B, A, base, scale)
        return dx, dB, dA, dbase, dY.sum(0) if needs_bias else None, None, None, None


def _weight(B: Tensor, A: Tensor, base: Tensor | None, scale: float) -> Tensor:
    """base + scale · B A, m×n."""
    return scaled_mm(scale, B, A) if base is None else torch.addmm(base, B, A, alpha=scale)


def weight_gradient(dY: Tensor, X: Tensor) -> Tensor:
    """G = dYᵀ X (m×n) from dY (t×m) and X (t×n); a transposed view where that is faster.

    In bfloat16, oneDNN takes a sixth longer for a wide matrix than for a tall one. On CUDA autograd
    would copy the view, as a gradient has its parameter's strides.
    """
    wide = X.dtype == torch.bfloat16 and X.shape[1] > dY.shape[1]
    if wide and not prefers_few_kernels(X):
        return (X.T @ dY).T
    return dY.T @ X


def scaled_mm(scale: float, left: Tensor, right: Tensor) -> Tensor:
    """scale · left @ right, rounded once."""
    return torch.addmm(left.new_zeros(()), left, right, beta=0, alpha=scale)


def cast(t: Any, dtype: torch.dtype | None) -> Any:
    """The tensor, or None, in a dtype; unchanged where the dtype is None."""
    return t if t is None or dtype is None else t.to(dtype)
