"""Causal attention, with kernels of its own for bfloat16 on a CPU.

There torch's flash kernels stay far below the speed of matrix products. Ours take a few heads and
a block of query rows at a time, so that their scores stay in a core's cache, and never touch keys
after the block. Scores and their softmax are float32; the backward pass recomputes them.
Shapes in this file: B = batch, h = heads, T = sequence, D = head size; a block has g heads and
R query rows, which attend to C keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor

from lowrank_lab.device import prefers_few_kernels
from lowrank_lab.kernels import operators as kernels

QUERY_ROWS = 128  # per block; half of each block on the diagonal is computed and masked
SCORES_IN_FLIGHT = 1 << 19  # elements of scores in a block, so that they stay in cache


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √D + causal mask) v for q, k, v (B, h, T, D) → (B, h, T, D)."""
    small_pieces = q.device.type == "cpu" and not prefers_few_kernels(q)
    if small_pieces and q.dtype == torch.bfloat16 and q.numel():
        # contiguous here and only once, so that a compiler can write them contiguous at once
        out: Tensor = _attention(q.contiguous(), k.contiguous(), v.contiguous())
        return out
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def python_body(operation: Any) -> Callable[..., Any] | None:
    """The Python body of one of our operations, None for others; a tracker runs it instead."""
    return _PYTHON_BODIES.get(operation.name()) or kernels.python_body(operation)


def _mixed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = q.new_empty(q.shape)
    Q, K, V, mixed = (_heads(t) for t in (q, k, v, out))
    mask = _mask(Q)
    with torch.autocast("cpu", enabled=False):  # it would round scores to bfloat16
        for heads in _groups(Q):
            K_wide = _wide(K[heads])
            for rows, keys in _blocks(q.shape[2]):
                P = _probabilities(Q[heads, rows], K_wide[:, keys], mask).to(q.dtype)
                mixed[heads, rows] = P @ V[heads, keys]
    return out


def _mixed_backward(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    grads = [q.new_empty(q.shape) for _ in range(3)]
    Q, K, V, dO, dQ, dK, dV = (_heads(t) for t in (q, k, v, grad, *grads))
    scale, mask = 1 / math.sqrt(q.shape[-1]), _mask(Q)
    with torch.autocast("cpu", enabled=False):
        for heads in _groups(Q):
            K_wide = _wide(K[heads])
            dK_sum, dV_sum = torch.zeros_like(K_wide), torch.zeros_like(K_wide)
            for rows, keys in _blocks(q.shape[2]):
                P = _probabilities(Q[heads, rows], K_wide[:, keys], mask)
                # dV = Pᵀ dO,  dS = P ∘ (dP − rowsum(P ∘ dP)) with dP = dO Vᵀ,  and S = scale · Q Kᵀ
                dV_sum[:, keys] += P.to(q.dtype).mT @ dO[heads, rows]
                dP = _wide(dO[heads, rows] @ V[heads, keys].mT)
                dS = torch._softmax_backward_data(dP, P, -1, P.dtype).mul_(scale).to(q.dtype)
                dQ[heads, rows] = dS @ K[heads, keys]
                dK_sum[:, keys] += dS.mT @ Q[heads, rows]
            dK[heads], dV[heads] = dK_sum, dV_sum
    return grads[0], grads[1], grads[2]


def _heads(t: Tensor) -> Tensor:
    """(B, h, T, D) → (B·h, T, D), contiguous."""
    return t.contiguous().flatten(0, 1)


def _groups(Q: Tensor) -> Iterator[slice]:
    """Groups of as many heads as fit into the cache; Q is (B·h, T, D)."""
    count, length, _ = Q.shape
    size = max(1, SCORES_IN_FLIGHT // (min(QUERY_ROWS, length) * length))
    if isinstance(Q, FakeTensor):  # a third group takes as much memory as the second
        count = min(count, 2 * size)
    return (slice(first, first + size) for first in range(0, count, size))


def _blocks(length: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of query rows, each with the keys that it attends to."""
    for start in range(0, length, QUERY_ROWS):
        stop = min(start + QUERY_ROWS, length)
        yield slice(start, stop), slice(0, stop)


def _mask(Q: Tensor) -> Tensor:
    """−∞ where a key comes after the query, else 0, for the last R of the T rows of Q: (R, T)."""
    length = Q.shape[1]
    rows = min(QUERY_ROWS, length)
    dtype = torch.promote_types(Q.dtype, torch.float32)
    return Q.new_full((rows, length), -math.inf, dtype=dtype).triu_(1 + length - rows)


def _probabilities(Q: Tensor, K: Tensor, mask: Tensor) -> Tensor:
    """Softmax of scale · Q Kᵀ + mask, (g, R, C).

    Q (g, R, D) are the queries at the last R positions of K (g, C, D), which is in float32; their
    mask is the lower right corner of `mask`.
    """
    scale = 1 / math.sqrt(Q.shape[2])
    corner = mask[-Q.shape[1] :, -K.shape[1] :]
    return torch.baddbmm(corner, _wide(Q), K.mT, alpha=scale).softmax(-1)


def _wide(t: Tensor) -> Tensor:
    """t in float32; float64 stays."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


_attention = torch.library.custom_op("lowrank_lab::causal_attention", _mixed, mutates_args=())
_gradients = torch.library.custom_op(
    "lowrank_lab::causal_attention_backward", _mixed_backward, mutates_args=()
)
_PYTHON_BODIES: dict[str, Callable[..., Any]] = {
    "lowrank_lab::causal_attention": _mixed,
    "lowrank_lab::causal_attention_backward": _mixed_backward,
}


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(q.shape)


@_gradients.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    grads: tuple[Tensor, Tensor, Tensor] = _gradients(*ctx.saved_tensors, grad)
    return grads


_attention.register_autograd(_backward, setup_context=_keep)
