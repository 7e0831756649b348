"""FLOPs of the compiled kernels for torch's FlopCounterMode, which knows torch's operators alone.

They are those of the model's own products, of which attention's count for half as it is causal;
what the backward pass computes again doesn't count.
Shapes in this file: B = batch, T = sequence, H = heads, D = head size, N = tokens, d = hidden,
V = vocabulary, f = width of the MLP.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from lowrank_lab.kernels import halves, head
from lowrank_lab.kernels.dispatch import NAMESPACE

REGISTERED = halves, head  # their operators exist
_operators: Any = getattr(torch.ops, NAMESPACE)


@register_flop_formula(_operators.mm)
def _mm(a: Any, b: Any, *args: Any, out_shape: Any = None) -> int:
    """a (m, k), b (k, n)."""
    return int(2 * a[0] * a[1] * b[1])


@register_flop_formula(_operators.attention)
def _attention(q: Any, *args: Any, out_shape: Any = None) -> int:
    """q (B, T, H, D): scores and their mean of values."""
    B, T, H, D = q
    return int(2 * B * H * T * T * D)


@register_flop_formula(_operators.attention_backward)
def _attention_backward(q: Any, *args: Any, out_shape: Any = None) -> int:
    return int(2 * _attention(q))


@register_flop_formula(_operators.self_attention)
def _self_attention(x: Any, *args: Any, out_shape: Any = None) -> int:
    """x (B, T, d): four layers, and attention."""
    B, T, d = x
    return int(8 * B * T * d * d + 2 * B * T * T * d)


@register_flop_formula(_operators.self_attention_backward)
def _self_attention_backward(x: Any, *args: Any, out_shape: Any = None) -> int:
    return int(2 * _self_attention(x))


@register_flop_formula(_operators.mlp)
def _mlp(x: Any, norm: Any, gate: Any, *args: Any, out_shape: Any = None) -> int:
    """x (..., d), gate (f, d): three layers."""
    return int(6 * math.prod(x) * gate[0])


@register_flop_formula(_operators.mlp_backward)
def _mlp_backward(x: Any, *args: Any, out_shape: Any = None) -> int:
    """gate is the seventh."""
    return int(12 * math.prod(x) * args[5][0])


@register_flop_formula(_operators.head_losses)
def _head_losses(
    hidden: Any, weight: Any, targets: Any, slopes: bool, *args: Any, out_shape: Any = None
) -> int:
    """hidden (N, d), weight (V, d): logits, and both gradients."""
    return int((6 if slopes else 2) * math.prod(hidden) * weight[0])
