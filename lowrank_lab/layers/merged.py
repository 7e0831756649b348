"""Products of several layers with the same input, computed as one: x [W₁; W₂; …]ᵀ.

On CUDA one product of q, k and v reads their input once instead of three times, and so do the one
for the gradient of the joint weight and the one for the gradient of the input; the latter replaces
two additions as well. The parameters stay apart. Shapes: x is (..., n), Wᵢ is mᵢ×n.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lowrank_lab.device import autocast_dtype, prefers_few_kernels, without_autocast
from lowrank_lab.kernels.operators import are_plain
from lowrank_lab.layers.association import cast


def pays(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether one product is faster: on CUDA's path, for as many tokens as the joint weight's rows.

    With t tokens it saves the traffic of at least 6·t·n entries, of which joining the weights, in
    each pass, costs 4·(m₁ + m₂ + …)·n.
    """
    if not prefers_few_kernels(x) or not are_plain(x, *weights):
        return False
    kinds = {(W.shape[1], W.dtype, W.device) for W in weights}
    rows = sum(W.shape[0] for W in weights)
    return kinds == {(x.shape[-1], weights[0].dtype, x.device)} and x.numel() >= rows * x.shape[-1]


def merged_linear(x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """x Wᵢᵀ (..., mᵢ) of each weight, as views of one result."""
    out: tuple[Tensor, ...] = _MergedLinear.apply(  # type: ignore[no-untyped-call]
        x, autocast_dtype(x), *weights
    )
    return out


def joint(weights: Sequence[Tensor], dtype: torch.dtype | None, rows: int | None = None) -> Tensor:
    """[W₁; W₂; …] in a dtype (None: their own), with zero rows after each, up to `rows` of it."""
    parts = []
    for W in weights:
        parts.append(cast(W, dtype))
        if rows is not None and rows > len(W):
            parts.append(parts[-1].new_zeros(rows - len(W), W.shape[1]))
    return torch.cat(parts)


def joint_product(
    x: Tensor, weights: Sequence[Tensor], dtype: torch.dtype | None, rows: int | None = None
) -> Tensor:
    """x [W₁; W₂; …]ᵀ (..., m₁ + m₂ + …), with zero columns where `joint` has zero rows."""
    return F.linear(cast(x, dtype), joint(weights, dtype, rows))


def joint_gradients(
    ctx: Any, dY: Tensor, x: Tensor, weights: Sequence[Tensor], rows: int | None = None
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradients of x and of each weight from that of `joint_product`.

    Args:
        ctx: of a function with `dtype`, whose first input is x and whose last ones are the weights.
        dY: as wide as the product.
    """
    needs = ctx.needs_input_grad[-len(weights) :]
    dx: Tensor | None = None
    found: list[Tensor | None] = [None] * len(weights)
    with without_autocast(dY.device.type):
        if any(needs):
            X = cast(x, ctx.dtype).reshape(-1, x.shape[-1])
            dW = (dY.reshape(-1, dY.shape[-1]).T @ X).to(weights[0].dtype)
            parts = dW.split([rows or len(W) for W in weights])
            found = [
                part[: len(W)] if need else None
                for part, W, need in zip(parts, weights, needs, strict=True)
            ]
        if ctx.needs_input_grad[0]:
            dx = dY @ joint(weights, ctx.dtype, rows)
    return dx, found


class _MergedLinear(torch.autograd.Function):
    """Saves the weights themselves, not the joint one."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dtype: torch.dtype | None, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.dtype = dtype
        ctx.save_for_backward(x, *weights)
        widths = [len(W) for W in weights]
        return torch.split(joint_product(x, weights, dtype), widths, dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        dx, found = joint_gradients(ctx, torch.cat(grad_outputs, dim=-1), x, weights)
        return dx, None, *found
