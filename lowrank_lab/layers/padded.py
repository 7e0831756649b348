"""Products with zero rows and columns appended, where a width is no multiple of 8.

On CUDA, half-precision products of 1b's MLP (width 5461) would take kernels for unaligned rows.
There its gate and up projections return zero columns up to 5464, and its down projection takes
them. Gradients of the zero columns are zero: at g = u = 0, silu(g) · u has no slope.

Gate and up store their zeros, 3 rows after each weight, which stays contiguous (`packed`). The down
projection's would be 3 columns: its weight would have gaps in memory, or be transposed to have
none. torch's fused optimizers walk through memory as if there were neither: they write into the
gaps, and match a transposed weight with the moments of a checkpoint in the wrong order, without an
error; safetensors refuses both. So its zeros, and those of factors, are appended in a copy for one
product, which autocast makes anyway.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_lab.device import autocast_dtype, prefers_few_kernels, without_autocast
from lowrank_lab.layers.association import cast, weight_gradient

MULTIPLE = 8  # elements: 16 bytes, which tensor cores load at a time
PADDED = (torch.bfloat16, torch.float16)  # dtypes of these products; float32 has other cores


def padded_width(x: Tensor, *layers: nn.Module) -> int | None:
    """The width up to which layers of equal width should pad; None for no padding.

    They pad for x in half precision on CUDA's path, if all of them can: `AlignedLinear` and the
    factorised layers.
    """
    if not prefers_few_kernels(x) or (autocast_dtype(x) or x.dtype) not in PADDED:
        return None
    if not all(hasattr(layer, "pads") for layer in layers):
        return None
    width: Any = layers[0].out_features
    return width + -width % MULTIPLE if width % MULTIPLE else None


def zero_padded(t: Any, rows: int | None = None, columns: int | None = None) -> Any:
    """A matrix or vector (or None) with zeros up to so many rows and columns."""
    if t is None:
        return None
    below = (rows or t.shape[0]) - t.shape[0]
    beside = (columns or t.shape[-1]) - t.shape[-1]
    if not below and not beside:
        return t
    return F.pad(t, (0, below) if t.ndim == 1 else (0, beside, 0, below))


def _widened(W: Tensor, rows: int | None, columns: int, dtype: torch.dtype | None) -> Tensor:
    """A matrix in a dtype with zeros up to so many rows and columns, in one pass over memory."""
    m, n = W.shape
    if torch.compiler.is_compiling():  # one kernel
        padded: Tensor = zero_padded(cast(W, dtype), rows, columns)
        return padded
    if (rows or m, columns) == (m, n):
        same: Tensor = cast(W, dtype)
        return same
    out = W.new_empty(rows or m, columns, dtype=dtype or W.dtype)
    out[:m, :n].copy_(W)
    if columns > n:
        out[:, n:].zero_()
    if len(out) > m:
        out[m:, :n].zero_()
    return out


def padded_linear(x: Tensor, W: Tensor, bias: Tensor | None, rows: int | None = None) -> Tensor:
    """x Wᵀ + bias for x (..., n or more), W (m×n) → (..., m), or with zero columns up to `rows`."""
    if (rows or W.shape[0], x.shape[-1]) == tuple(W.shape):
        return F.linear(x, W, bias)
    out: Tensor = _PaddedLinear.apply(  # type: ignore[no-untyped-call]
        x, W, bias, rows, autocast_dtype(x)
    )
    return out


class AlignedLinear(nn.Linear):
    """nn.Linear whose input and output may have zero columns beyond its own."""

    pads = True

    def forward(self, x: Tensor, rows: int | None = None) -> Tensor:
        """x (..., n or more) → (..., m), or with zero columns up to `rows`."""
        return padded_linear(x, self.weight, self.bias, rows)


class _PaddedLinear(torch.autograd.Function):
    """Saves W without padding."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, rows: int | None,
        dtype: torch.dtype | None,
    ) -> Tensor:  # fmt: skip
        ctx.rows, ctx.dtype = rows, dtype
        ctx.save_for_backward(x, W)
        x, bias = cast(x, dtype), cast(bias, dtype)
        return F.linear(x, _widened(W, rows, x.shape[-1], dtype), zero_padded(bias, rows))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        needs_x, needs_W, needs_bias, *_ = ctx.needs_input_grad
        dx = dW = None
        with without_autocast(grad.device.type):
            x, W = ctx.saved_tensors
            x, (m, n) = cast(x, ctx.dtype), W.shape
            dY = grad.reshape(-1, grad.shape[-1])
            if needs_W:
                dW = weight_gradient(dY, x.reshape(-1, x.shape[-1]))[:m, :n]
            if needs_x:
                dx = grad @ _widened(W, ctx.rows, x.shape[-1], ctx.dtype)
        return dx, dW, dY[:, :m].sum(0) if needs_bias else None, None, None
