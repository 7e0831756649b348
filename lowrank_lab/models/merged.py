"""Layers of a block that share their input, by one product where `layers.merged` says so.

Dense q, k and v, and dense gate and up. Of layers with two factors the inner ones, A x: the outer
products B h have inputs and results of their own, so that a batched product would save no traffic
and cost a copy of all B. Layers that form their weight (SLTrain, high ranks) are left alone.
Shapes in this file: B = batch, T = sequence, d = hidden, h = heads, D = head size, f = MLP width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lowrank_lab.device import autocast_dtype
from lowrank_lab.layers.cola import ColaLinear
from lowrank_lab.layers.lora import LoRALinear
from lowrank_lab.layers.low_rank import LowRankLinear
from lowrank_lab.layers.merged import JointWeight, merged_linear, pays
from lowrank_lab.models.fused import is_followed, is_plain_linear
from lowrank_lab.models.rotary import rotated

TWO_FACTORS = (LowRankLinear, LoRALinear, ColaLinear)


def dense_weights(x: Tensor, half: Any, packed: Tensor | None = None) -> list[Tensor] | None:
    """The weights of dense layers that one product computes for x (B, T, d); None: it doesn't.

    Args:
        half: an `Attention` or `MLP`, with layers that share the input x.
        packed: the storage of their weights, if they have one.
    """
    if not half.merges or not all(map(is_plain_linear, half.inputs())):
        return None
    weights = [layer.weight for layer in half.inputs()]
    return weights if pays(x, weights, packed) else None


def outputs(x: Tensor, half: Any, *rows: int) -> list[Tensor]:
    """What the layers that share the input make of x (B, T, d); `rows`: their further argument.

    The inner factors are one product where that pays.
    """
    layers, inner = half.inputs(), inner_products(x, half)
    if inner is None:
        return [layer(x, *rows) for layer in layers]
    return [layer.outer(x, h, *rows) for layer, h in zip(layers, inner, strict=True)]


def inner_products(x: Tensor, half: Any) -> tuple[Tensor, ...] | None:
    """A x (B, T, r) of each layer by one product; None: they don't have one, or it doesn't pay."""
    layers = half.inputs()
    if not half.merges or any(type(p) not in TWO_FACTORS or is_followed(p) for p in layers):
        return None
    factors = [layer.A for layer in layers]
    through = all(layer.goes_through_factors(x) for layer in layers)
    return merged_linear(x, factors) if through and pays(x, factors) else None


def rotary_heads(
    x: Tensor, weights: Sequence[Tensor], cos: Tensor, sin: Tensor, heads: int,
    packed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Rotated q and k, and v, each (B, h, T, D), of x (B, T, d); cos and sin are (T, D/2)."""
    out: tuple[Tensor, Tensor, Tensor] = _RotaryHeads.apply(  # type: ignore[no-untyped-call]
        x, cos, sin, heads, autocast_dtype(x), packed, *weights
    )
    return out


def swiglu(
    x: Tensor, weights: Sequence[Tensor], rows: int | None = None, packed: Tensor | None = None
) -> Tensor:
    """silu(gate) · up (B, T, f) of x (B, T, d), with zero columns up to `rows`."""
    out: Tensor = _SwiGLU.apply(  # type: ignore[no-untyped-call]
        x, rows, autocast_dtype(x), packed, *weights
    )
    return out


class _RotaryHeads(torch.autograd.Function):
    """Rotates the slices of the joint product, so that none of it outlives this function."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, heads: int, dtype: torch.dtype | None,
        packed: Tensor | None, W_q: Tensor, W_k: Tensor, W_v: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        ctx.dtype, weights = dtype, (W_q, W_k, W_v)
        ctx.save_for_backward(x, cos, sin, packed, *weights)
        joint = JointWeight(dtype, packed=packed)
        Y = _by_heads(joint.product(x, weights).view(*x.shape[:2], 3, heads, -1))
        q, k = rotated(Y[:, :2], cos, sin, 1).unbind(1)
        v = Y[:, 2].transpose(1, 2).contiguous().transpose(1, 2)  # B·T·d entries, in their order
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, cos, sin, packed, *weights = ctx.saved_tensors
        dq, dk, dv = grad_outputs
        batch, heads, length, size = dq.shape
        dY = dq.new_empty(batch, length, 3, heads, size, dtype=ctx.dtype or dq.dtype)
        parts = _by_heads(dY)
        rotated(dq, cos, sin, -1, out=parts[:, 0])
        rotated(dk, cos, sin, -1, out=parts[:, 1])
        parts[:, 2].copy_(dv)
        joint = JointWeight(ctx.dtype, packed=packed)
        dx, found = joint.gradients(_needs(ctx, weights), dY.flatten(2), x, weights)
        return dx, None, None, None, None, None, *found


def _by_heads(t: Tensor) -> Tensor:
    """(B, T, 3, h, D) → (B, 3, h, T, D), a view."""
    return t.permute(0, 2, 3, 1, 4)


class _SwiGLU(torch.autograd.Function):
    """Saves the joint product; silu(gate) is computed again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, rows: int | None, dtype: torch.dtype | None, packed: Tensor | None,
        W_gate: Tensor, W_up: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.rows, ctx.dtype, weights = rows, dtype, (W_gate, W_up)
        Y = JointWeight(dtype, rows, packed).product(x, weights)
        ctx.save_for_backward(x, Y, packed, *weights)
        gate, up = Y.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, Y, packed, *weights = ctx.saved_tensors
        dY = _swiglu_gradient(Y, grad_outputs[0])
        joint = JointWeight(ctx.dtype, ctx.rows, packed)
        dx, found = joint.gradients(_needs(ctx, weights), dY, x, weights)
        return dx, None, None, None, *found


def _needs(ctx: Any, weights: Sequence[Tensor]) -> tuple[bool, ...]:
    """Whether a function's first input, x, and its last ones, the weights, need gradients."""
    return (ctx.needs_input_grad[0], *ctx.needs_input_grad[-len(weights) :])


def _swiglu_gradient(Y: Tensor, grad: Tensor) -> Tensor:
    """The gradient of [gate, up] from that of silu(gate) · up."""
    gate, up = Y.chunk(2, dim=-1)
    silu = F.silu(gate)
    if torch.compiler.is_compiling():  # one kernel; torch compiles no `out` with gaps
        slope = torch.ops.aten.silu_backward(grad * up, gate)
        return torch.cat([slope, grad * silu], dim=-1)
    dY = torch.empty_like(Y)
    dgate, dup = dY.chunk(2, dim=-1)
    torch.mul(grad, silu, out=dup)
    torch.mul(grad, up, out=silu)
    torch.ops.aten.silu_backward.grad_input(silu, gate, grad_input=dgate)
    return dY
