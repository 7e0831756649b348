"""The compiled kernels as torch operators and autograd functions, on a CPU.

Tensors are float32; those of attention may be bfloat16.

`takes` says whether they can be used; the callers have torch's own operators for everything else.
Shapes in this file: B = batch, T = sequence, H = heads, D = head size, d = hidden, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from lowrank_lab.device import bf16_products, constant_in_graphs, prefers_few_kernels
from lowrank_lab.kernels.dispatch import PYTHON_BODIES, call, scratch_of
from lowrank_lab.kernels.library import library

HEAD_SIZE = 16  # head sizes are its multiples


@constant_in_graphs
def available() -> bool:
    """Whether the compiled kernels exist on this machine."""
    return library() is not None


@constant_in_graphs
def largest_bf16_head() -> int:
    """The largest size of heads in bfloat16 whose attention `rotary_attention` computes faster.

    It has dot products, or float32 on a CPU without them. Where a CPU has tiles (AMX), torch uses
    them, which pays for larger heads.
    """
    return {"dots": 1 << 20, "emulation": 1 << 20}.get(bf16_products(), 32)


def takes(*tensors: Tensor) -> bool:
    """Whether the kernels can compute with these: float32 on a CPU, dense, not empty.

    The kernels trust shapes: callers compare them, and leave those that don't fit to torch.
    """
    return all(t.dtype == torch.float32 for t in tensors) and _exist_for(*tensors)


def _exist_for(*tensors: Tensor) -> bool:
    """Whether there are kernels for tensors that are such but for their dtype."""
    suits = all(t.device.type == "cpu" and t.layout is torch.strided and t.numel() for t in tensors)
    return suits and are_plain(*tensors) and not prefers_few_kernels(tensors[0]) and available()


def are_plain(*tensors: Tensor) -> bool:
    """Whether none is of another class (a DTensor, for example), which has products of its own."""
    return all(type(t) in (Tensor, torch.nn.Parameter, FakeTensor) for t in tensors)


def takes_heads(q: Tensor, k: Tensor, v: Tensor, *angles: Tensor) -> bool:
    """Whether `rotary_attention` can compute with q, k and v (B, T, H, D), and is the faster way.

    In bfloat16 it is up to `largest_bf16_head`. `angles`: cos and sin.
    """
    T, _, size = q.shape[1:]
    if size % HEAD_SIZE or not q.shape == k.shape == v.shape:
        return False
    if any(t.shape != (T, size // 2) for t in angles):
        return False
    if {q.dtype, k.dtype, v.dtype} == {torch.bfloat16} and size <= largest_bf16_head():
        return _exist_for(q, k, v)
    return takes(q, k, v)


def rotary_attention(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Causal attention of rotated q and k; q, k, v (B, T, H, D) → (B, T, H, D).

    cos and sin are (T, D/2). The backward pass computes the probabilities again. Sums, softmax and
    rotation of bfloat16 tensors are float32.
    """
    return _apply(_RotaryAttention, q, k, v, cos, sin)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x · weight / √(mean x² + eps) over the last dimension."""
    return _apply(_RMSNorm, x, weight, eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up; silu(gate) is not kept for the backward pass."""
    return _apply(_SwiGLU, gate, up)


def losses_(logits: Tensor, targets: Tensor, losses: Tensor, slopes: bool) -> None:
    """Fill `losses` (n, 1); with `slopes`, turn logits (n, V) into softmax − one_hot(target).

    Raises IndexError for a target that is none of the V, ValueError for other than n of them, or
    for logits or losses that aren't contiguous.
    """
    torch.ops.lowrank_lab_cpu.losses_(logits, targets, losses, slopes)


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Write a (m×k) · b (k×n) into `out`, which is contiguous, as is a or its transpose."""
    (m, k), n = a.shape, b.shape[1]
    panels = a.new_empty(scratch_of("product", k, n))
    call("product", a, *a.stride(), b, *b.stride(), out, panels, m, k, n)
    return out


def python_body(operation: Any) -> Callable[..., Any] | None:
    """The Python body of one of these operators, None for others; fake ones only allocate."""
    return PYTHON_BODIES.get(operation.name())


def _apply(function: Any, *args: Any) -> Tensor:
    out: Tensor = function.apply(*args)
    return out


class _RotaryAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        out, log_sums = torch.ops.lowrank_lab_cpu.attention(q, k, v, cos.float(), sin.float())
        ctx.save_for_backward(q, k, v, cos, sin, log_sums)
        return out  # type: ignore[no-any-return]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, cos, sin, log_sums = ctx.saved_tensors
        found = torch.ops.lowrank_lab_cpu.attention_backward(
            q, k, v, cos.float(), sin.float(), log_sums, grad
        )
        return (*found, None, None)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, s = torch.ops.lowrank_lab_cpu.rms_norm(x, weight, eps)
        ctx.save_for_backward(x, s, weight)
        return y  # type: ignore[no-any-return]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found = torch.ops.lowrank_lab_cpu.rms_norm_backward(*ctx.saved_tensors, grad)
        return (*found, None)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.ops.lowrank_lab_cpu.swiglu(gate, up)  # type: ignore[no-any-return]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        dgate, dup = torch.ops.lowrank_lab_cpu.swiglu_backward(*ctx.saved_tensors, grad)
        return dgate, dup
