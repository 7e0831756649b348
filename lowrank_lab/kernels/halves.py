"""The halves of a block with dense layers, each in one kernel: y = x + f(RMSNorm(x)).

A few rows, or one sequence, go through all of a half, so that what is between stays in a core's
cache. The backward pass computes norms and SwiGLU again. Weights are (out×in), without bias.
Shapes in this file: B = batch, T = sequence, H = heads, D = head size, d = H·D = hidden, f = width
of the MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lowrank_lab.kernels.dispatch import NAMESPACE, call, register, scratch_of

Tensors = tuple[Tensor, ...]
MULTIPLE = 16  # of all widths
FEWEST_ROWS = 384  # of x; fewer have not been measured


def mlp(x: Tensor, weights: Sequence[Tensor], eps: float) -> Tensor:
    """x + down(silu(gate(n)) · up(n)) with n = RMSNorm(x) for x (..., d).

    The weights are those of norm (d), gate, up (f×d) and down (d×f).
    """
    out: Tensor = _MLP.apply(x, *weights, eps)  # type: ignore[no-untyped-call]
    return out


def self_attention(
    x: Tensor, weights: Sequence[Tensor], cos: Tensor, sin: Tensor, heads: int, eps: float
) -> Tensor:
    """x + o(causal rotary attention of q(n), k(n), v(n)) with n = RMSNorm(x) for x (B, T, d).

    The weights are those of norm (d), q, k, v and o (d×d); cos and sin are (T, D/2).
    """
    out: Tensor = _SelfAttention.apply(  # type: ignore[no-untyped-call]
        x, *weights, cos, sin, heads, eps
    )
    return out


def _allocate_mlp(x: Tensor, norm: Tensor, gate: Tensor, *others: Any) -> Tensors:
    f, d = gate.shape
    g, u = (x.new_empty((*x.shape[:-1], f)) for _ in range(2))
    scratch = x.new_empty(scratch_of("mlp", x.numel() // d, d, f, False))
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1]), g, u, scratch


def _mlp(*args: Any) -> Tensors:
    *tensors, eps = args
    given = [t.contiguous() for t in tensors]
    made, (f, d) = _allocate_mlp(*given), given[2].shape
    call("mlp_forward", *given, *made, given[0].numel() // d, d, f, eps)
    return made[:-1]


def _allocate_mlp_gradients(
    x: Tensor, norm: Tensor, s: Tensor, g: Tensor, u: Tensor, grad: Tensor,
    gate: Tensor, up: Tensor, down: Tensor,
) -> Tensors:  # fmt: skip
    f, d = gate.shape
    scratch = x.new_empty(scratch_of("mlp", x.numel() // d, d, f, True))
    return *(t.new_empty(t.shape) for t in (x, norm, gate, up, down)), scratch


def _mlp_backward(*given: Tensor) -> Tensors:
    given = tuple(t.contiguous() for t in given)
    made, x = _allocate_mlp_gradients(*given), given[0]
    f, d = given[6].shape
    call("mlp_backward", *given, *made, x.numel() // d, d, f)
    return made[:-1]


def _allocate_self_attention(x: Tensor, *others: Any) -> Tensors:
    (B, T, d), heads = x.shape, others[-2]
    scratch = x.new_empty(scratch_of("self_attention", len(x), T, heads, d // heads, False))
    y, *qkvm = (x.new_empty(x.shape) for _ in range(5))
    return y, x.new_empty((B, T)), *qkvm, x.new_empty((B, heads, T)), scratch


def _self_attention(*args: Any) -> Tensors:
    *tensors, heads, eps = args
    given = [t.contiguous() for t in tensors]
    made = _allocate_self_attention(*given, heads, eps)
    B, T, d = given[0].shape
    call("self_attention_forward", *given, *made, B, T, heads, d // heads, eps)
    return made[:-1]


def _allocate_self_attention_gradients(
    x: Tensor, norm: Tensor, s: Tensor, q: Tensor, k: Tensor, v: Tensor, mixed: Tensor,
    log_sums: Tensor, cos: Tensor, sin: Tensor, grad: Tensor, *weights: Tensor,
) -> Tensors:  # fmt: skip
    _, heads, T = log_sums.shape
    scratch = x.new_empty(scratch_of("self_attention", len(x), T, heads, x.shape[2] // heads, True))
    return *(t.new_empty(t.shape) for t in (x, norm, *weights)), scratch


def _self_attention_backward(*given: Tensor) -> Tensors:
    given = tuple(t.contiguous() for t in given)
    made = _allocate_self_attention_gradients(*given)
    B, T, d = given[0].shape
    heads = given[7].shape[1]
    call("self_attention_backward", *given, *made, B, T, heads, d // heads)
    return made[:-1]


def _results(count: int) -> str:
    return f" -> ({', '.join(count * ['Tensor'])})"


def _tensors(names: str) -> str:
    return ", ".join(f"Tensor {name}" for name in names.split())


register(
    "mlp", f"({_tensors('x norm gate up down')}, float eps)" + _results(4), _mlp, _allocate_mlp, 4
)
register(
    "mlp_backward", f"({_tensors('x norm s g u grad gate up down')})" + _results(5),
    _mlp_backward, _allocate_mlp_gradients, 5,
)  # fmt: skip
register(
    "self_attention",
    f"({_tensors('x norm q k v o cos sin')}, int heads, float eps)" + _results(7),
    _self_attention, _allocate_self_attention, 7,
)  # fmt: skip
register(
    "self_attention_backward",
    f"({_tensors('x norm s q k v mixed log_sums cos sin grad wq wk wv wo')})" + _results(6),
    _self_attention_backward, _allocate_self_attention_gradients, 6,
)  # fmt: skip
_operators: Any = getattr(torch.ops, NAMESPACE)


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Tensor, gate: Tensor, up: Tensor, down: Tensor, eps: float
    ) -> Tensor:
        y, *between = _operators.mlp(x, norm, gate, up, down, eps)
        ctx.save_for_backward(x, norm, *between, gate, up, down)
        return y  # type: ignore[no-any-return]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *first, gate, up, down = ctx.saved_tensors
        return *_operators.mlp_backward(*first, grad, gate, up, down), None


class _SelfAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor,
        cos: Tensor, sin: Tensor, heads: int, eps: float,
    ) -> Tensor:  # fmt: skip
        cos, sin = cos.float(), sin.float()
        y, *between = _operators.self_attention(x, norm, q, k, v, o, cos, sin, heads, eps)
        ctx.save_for_backward(x, norm, *between, cos, sin, q, k, v, o)
        return y  # type: ignore[no-any-return]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *first, q, k, v, o = ctx.saved_tensors
        found = _operators.self_attention_backward(*first, grad, q, k, v, o)
        return *found, None, None, None, None
