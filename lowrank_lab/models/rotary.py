"""The rotary embedding (2104.09864).

Shapes in this file: B = batch, T = sequence, h = heads, D = head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ROPE_BASE = 10_000.0


def rotary_tables(length: int, head_size: int, device: Any = None) -> tuple[Tensor, Tensor]:
    """cos and sin (length, head_size / 2) of the rotary embedding (2104.09864), float32."""
    exponent = torch.arange(0, head_size, 2, dtype=torch.float32, device=device) / head_size
    angles = torch.arange(length, dtype=torch.float32, device=device)[:, None] / ROPE_BASE**exponent
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + half) of the last dimension of x (..., T, D) by position.

    cos and sin are (T, D / 2).
    """
    out: Tensor = _Rotate.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return out


class _Rotate(torch.autograd.Function):
    """Saves nothing but the angles: the backward pass rotates by −sin."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return rotated(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return rotated(grad_outputs[0], cos, sin, -1), None, None


def rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: int, out: Tensor | None = None) -> Tensor:
    """x (..., T, D) rotated by ±the angles, without gradient; written to `out` if given."""
    a, b = x.chunk(2, dim=-1)
    both = torch.cat([cos, cos], dim=-1)
    if out is None:
        out = x * both
    elif torch.compiler.is_compiling():  # torch compiles no `out` with gaps
        out.copy_(x * both)
    else:
        torch.mul(x, both, out=out)
    first, second = out.chunk(2, dim=-1)
    first.addcmul_(b, sin, value=-sign)
    second.addcmul_(a, sin, value=sign)
    return out
