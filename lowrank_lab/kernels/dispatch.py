"""The compiled kernels, registered with torch: what each allocates, and its call.

Shapes in this file: B = batch, T = sequence, H = heads, D = head size, d = hidden.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from lowrank_lab.kernels.library import library

NAMESPACE = "lowrank_lab_cpu"
PARTIAL_SUMS = 16  # per column, on any number of threads: results don't depend on that number


def call(name: str, *args: Any) -> int:
    """Call a kernel: tensors by their address, the number of threads last."""
    found = library()
    assert found is not None
    passed = (a.data_ptr() if isinstance(a, Tensor) else a for a in args)
    result: int = getattr(found, name)(*passed, torch.get_num_threads())
    return result


def _rows(*tensors: Tensor) -> list[Tensor]:
    """The tensors, each with a contiguous last dimension."""
    return [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]


def _suffix(x: Tensor) -> str:
    """Of the name of the kernel for tensors of this dtype."""
    return "_bf16" if x.dtype == torch.bfloat16 else ""


def _strides(*tensors: Tensor) -> Any:
    found = [stride for t in tensors for stride in t.stride()[:3]]
    return (ctypes.c_int64 * len(found))(*found)


def _allocate_attention(q: Tensor, k: Tensor, v: Tensor, *angles: Tensor) -> tuple[Tensor, ...]:
    """The results, and the scratch memory of all threads."""
    B, T, H, D = q.shape
    floats = scratch_of("attention_forward", B * H, T, D, q.dtype == torch.bfloat16)
    wide = [q.new_empty(shape, dtype=torch.float32) for shape in ((B, H, T), (floats,))]
    return q.new_empty(q.shape), *wide


def _allocate_attention_gradients(q: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    B, T, H, D = q.shape
    floats = scratch_of("attention_backward", B * H, T, D, q.dtype == torch.bfloat16)
    scratch = q.new_empty(floats, dtype=torch.float32)
    return (*(q.new_empty(q.shape) for _ in range(3)), scratch)


def scratch_of(name: str, *sizes: int) -> int:
    """Floats of scratch memory that a kernel needs for these sizes on torch's number of threads.

    None while torch.compile makes a graph for all sizes, which would become one for these alone.
    """
    if any(isinstance(size, torch.SymInt) for size in sizes):
        return 0
    return call(f"{name}_scratch", *sizes)


def _attention(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    out, log_sums, scratch = _allocate_attention(q, k, v)
    q, k, v = _rows(q, k, v)
    cos, sin = cos.contiguous(), sin.contiguous()
    call(
        f"attention_forward{_suffix(q)}", q, k, v, cos, sin, out, log_sums, scratch, *q.shape,
        _strides(q, k, v),
    )  # fmt: skip
    return out, log_sums


def _attention_backward(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, log_sums: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv, scratch = _allocate_attention_gradients(q)
    q, k, v, grad = _rows(q, k, v, grad)
    cos, sin = cos.contiguous(), sin.contiguous()
    call(
        f"attention_backward{_suffix(q)}", q, k, v, cos, sin, log_sums, grad, dq, dk, dv, scratch,
        *q.shape, _strides(q, k, v, grad),
    )  # fmt: skip
    return dq, dk, dv


def _allocate_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1])


def _norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, s = _allocate_norm(x, weight, eps)
    d = x.shape[-1]
    call(
        "norm_forward", x.contiguous(), weight.contiguous(), y, s, x.numel() // d, d, eps,
    )  # fmt: skip
    return y, s


def _allocate_norm_gradients(
    x: Tensor, s: Tensor, weight: Tensor, grad: Tensor
) -> tuple[Tensor, ...]:
    sums = x.new_empty((PARTIAL_SUMS, x.shape[-1]))
    return x.new_empty(x.shape), weight.new_empty(weight.shape), sums


def _norm_backward(x: Tensor, s: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    dx, dweight, sums = _allocate_norm_gradients(x, s, weight, grad)
    d = x.shape[-1]
    x, weight, grad = x.contiguous(), weight.contiguous(), grad.contiguous()
    call("norm_backward", x, weight, s, grad, dx, sums, x.numel() // d, d, PARTIAL_SUMS)
    return dx, torch.sum(sums, 0, out=dweight)


def _allocate_swiglu(gate: Tensor, *others: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    out = _allocate_swiglu(gate)
    call("swiglu_forward", gate.contiguous(), up.contiguous(), out, out.numel())
    return out


def _allocate_swiglu_gradients(gate: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


def _swiglu_backward(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = _allocate_swiglu_gradients(gate)
    gate, up, grad = gate.contiguous(), up.contiguous(), grad.contiguous()
    call("swiglu_backward", gate, up, grad, dgate, dup, gate.numel())
    return dgate, dup


def _losses(logits: Tensor, targets: Tensor, losses: Tensor, slopes: bool) -> None:
    targets = whole_numbers(targets, len(logits))
    if not logits.is_contiguous() or not losses.is_contiguous():
        raise ValueError("losses_: gaps in logits or losses are not allowed; contiguous ones")
    refuse(call("losses", logits, targets, losses, *logits.shape, slopes), logits.shape[1])


def whole_numbers(targets: Tensor, count: int) -> Tensor:
    """So many targets, contiguous int64; ValueError for others."""
    if targets.dtype.is_floating_point or targets.numel() != count:
        given = f"{targets.dtype} {tuple(targets.shape)}"
        raise ValueError(f"targets: {given} is not allowed; {count} whole numbers")
    return targets.long().contiguous()


def refuse(wrong: int, vocabulary: int) -> None:
    """IndexError if so many targets are no token."""
    if wrong:
        raise IndexError(f"targets: {wrong} are not allowed; 0 to {vocabulary - 1}")


def _mm(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b)


def _allocate_product(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[1]))


def _allocate_nothing(*args: Any) -> None:
    return None


_OPERATORS: dict[str, tuple[str, Callable[..., Any], Callable[..., Any], int]] = {
    # schema, kernel, what it allocates, the number of these that are results (0: not a tuple)
    "attention": (
        "(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin) -> (Tensor, Tensor)",
        _attention, _allocate_attention, 2,
    ),
    "attention_backward": (
        "(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor log_sums, "
        "Tensor grad) -> (Tensor, Tensor, Tensor)",
        _attention_backward, _allocate_attention_gradients, 3,
    ),
    "rms_norm": (
        "(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
        _norm, _allocate_norm, 2,
    ),
    "rms_norm_backward": (
        "(Tensor x, Tensor s, Tensor weight, Tensor grad) -> (Tensor, Tensor)",
        _norm_backward, _allocate_norm_gradients, 2,
    ),
    "swiglu": ("(Tensor gate, Tensor up) -> Tensor", _swiglu, _allocate_swiglu, 0),
    "swiglu_backward": (
        "(Tensor gate, Tensor up, Tensor grad) -> (Tensor, Tensor)",
        _swiglu_backward, _allocate_swiglu_gradients, 2,
    ),
    "mm": ("(Tensor a, Tensor b) -> Tensor", _mm, _allocate_product, 0),  # see graphs.py
    "losses_": (
        "(Tensor(a!) logits, Tensor targets, Tensor(b!) losses, bool slopes) -> ()",
        _losses, _allocate_nothing, 0,
    ),
}  # fmt: skip

_library = torch.library.Library(NAMESPACE, "DEF")  # type: ignore[no-untyped-call]
PYTHON_BODIES: dict[str, Callable[..., Any]] = {}


def register(
    name: str, schema: str, kernel: Any, allocate: Callable[..., Any], results: int
) -> None:
    """Register an operator of `NAMESPACE`.

    Args:
        schema: its arguments and results.
        kernel: computes it on a CPU.
        allocate: its results, unfilled, and then its scratch memory.
        results: the number of the former; 0 where `allocate` returns a single one.
    """

    def fake(*args: Any) -> Any:
        return allocate(*args)[:results] if results else allocate(*args)

    def body(*args: Any) -> Any:  # a tracker sees what is allocated within
        return (fake if isinstance(args[0], FakeTensor) else kernel)(*args)

    _library.define(name + schema)  # type: ignore[no-untyped-call]
    _library.impl(name, kernel, "CPU")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    PYTHON_BODIES[f"{NAMESPACE}::{name}"] = body


for _name, _described in _OPERATORS.items():
    register(_name, *_described)
