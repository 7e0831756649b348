"""Products of several layers with the same input, computed as one: x [W₁; W₂; …]ᵀ.

On CUDA one product of q, k and v reads their input once instead of three times, and so do the one
for the gradient of the joint weight and the one for the gradient of the input; the latter replaces
two additions as well. The parameters stay apart. Shapes: x is (..., n), Wᵢ is mᵢ×n.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lowrank_lab.device import autocast_dtype, prefers_few_kernels, without_autocast
from lowrank_lab.kernels.operators import are_plain
from lowrank_lab.layers.association import cast


def pays(x: Tensor, weights: Sequence[Tensor], packed: Tensor | None = None) -> bool:
    """Whether one product is faster: on CUDA's path, for as many tokens as the joint weight's rows.

    With t tokens it saves the traffic of at least 6·t·n entries, of which joining the weights, in
    each pass, costs 4·(m₁ + m₂ + …)·n. Weights with a joint storage always pay.
    """
    if not prefers_few_kernels(x) or not are_plain(x, *weights):
        return False
    kinds = {(W.shape[1], W.dtype, W.device) for W in weights}
    rows = 0 if packed is not None else sum(W.shape[0] for W in weights)
    return kinds == {(x.shape[-1], weights[0].dtype, x.device)} and x.numel() >= rows * x.shape[-1]


def merged_linear(x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """x Wᵢᵀ (..., mᵢ) of each of two or three weights, as views of one result."""
    first, second, third = (*weights, None)[:3]
    out: tuple[Tensor, ...] = _MergedLinear.apply(  # type: ignore[no-untyped-call]
        x, autocast_dtype(x), first, second, third
    )
    return out


class JointWeight(NamedTuple):
    """[W₁; W₂; …], with zero rows after each of m rows up to `rows` of them (None: m).

    Attributes:
        dtype: of products (None: the weights').
        packed: the storage of the weights (`layers.packed`); None: it is made for each product.
    """

    dtype: torch.dtype | None
    rows: int | None = None
    packed: Tensor | None = None

    def of(self, weights: Sequence[Tensor]) -> Tensor:
        """The joint weight in `dtype`."""
        if self.packed is not None:
            found: Tensor = cast(self.packed, self.dtype)
            return found
        parts = []
        for W in weights:
            parts.append(cast(W, self.dtype))
            if self.rows is not None and self.rows > len(W):
                parts.append(parts[-1].new_zeros(self.rows - len(W), W.shape[1]))
        return torch.cat(parts)

    def product(self, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """x [W₁; W₂; …]ᵀ (..., m₁ + m₂ + …), with zero columns where there are zero rows."""
        return F.linear(cast(x, self.dtype), self.of(weights))

    def gradients(
        self, needs: Sequence[bool], dY: Tensor, x: Tensor, weights: Sequence[Tensor]
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Gradients of x and of each weight from that of the product; `needs`: which of them."""
        dx: Tensor | None = None
        found: list[Tensor | None] = [None] * len(weights)
        with without_autocast(dY.device.type):
            if any(needs[1:]):
                X = cast(x, self.dtype).reshape(-1, x.shape[-1])
                dW = (dY.reshape(-1, dY.shape[-1]).T @ X).to(weights[0].dtype)
                parts = torch.split(dW, [self.rows or len(W) for W in weights])
                found = [
                    part[: len(W)] if need else None
                    for part, W, need in zip(parts, weights, needs[1:], strict=True)
                ]
            if needs[0]:
                dx = dY @ self.of(weights)
        return dx, found


class _MergedLinear(torch.autograd.Function):
    """Saves the weights themselves, not the joint one."""

    @staticmethod
    def forward(  # Dynamo miscounts a variable number of arguments
        ctx: Any, x: Tensor, dtype: torch.dtype | None, W1: Tensor, W2: Tensor, W3: Tensor | None
    ) -> tuple[Tensor, ...]:
        weights = [W1, W2] if W3 is None else [W1, W2, W3]
        ctx.dtype = dtype
        ctx.save_for_backward(x, *weights)
        Y = JointWeight(dtype).product(x, weights)
        return torch.split(Y, [len(W) for W in weights], dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[2 : 2 + len(weights)])
        dY = torch.cat(grad_outputs, dim=-1)
        dx, found = JointWeight(ctx.dtype).gradients(needs, dY, x, weights)
        return dx, None, *found, *([None] * (3 - len(weights)))
