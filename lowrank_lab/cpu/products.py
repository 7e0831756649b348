"""Matrix products in faster ways than torch's: our own kernel, oneDNN, or float32 for bfloat16."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lowrank_lab.cpu import widened
from lowrank_lab.device import bf16_products, is_amd, mkl_is_slow
from lowrank_lab.kernels import operators as kernels

SMALLEST = 2**18  # multiplications; in smaller products Python's call costs more than it saves
PIECE = 2**20  # entries per copied piece; the next piece reuses its memory
FEWEST_ROWS = 256  # of a; with fewer, our kernel's copy of b costs more than it saves
SMALL_WEIGHT = 2**18  # entries of b: the most that our kernel takes on CPUs other than AMD's
SMALL_RESULT = 2**16  # entries; MKL, which copies less, is then the faster way to aᵀ b

_lock = threading.Lock()
_blocks = 0  # of `fast_products` that are running
_library: torch.library.Library | None = None


@contextmanager
def fast_products() -> Iterator[None]:
    """Compute matrix products in this block in the fastest way for their shape.

    Float32, many rows: our own kernel (`kernels/products.cpp`); with a large weight only on AMD's
    processors, which MKL, torch's library, isn't made for. Float32, few rows: oneDNN on AMD's
    processors with AVX-512, which MKL doesn't use there; else MKL. Bfloat16 on processors without
    instructions for it: float32 (`widened`). Replaces `mm` and `addmm` for the whole process, and
    so in everything built on them, forward and backward; blocks may overlap. Sums are rounded
    differently, as they are between two machines. Does nothing in compiled code. Without a C++
    compiler, float32 products stay torch's but for those of oneDNN; with torch.backends.mkldnn
    switched off, but for those of our kernel.
    """
    helps = kernels.available() or mkl_is_slow() or bf16_products() == "emulation"
    if torch.compiler.is_compiling() or not helps:
        yield
        return
    _enter()
    try:
        yield
    finally:
        _leave()


def _enter() -> None:
    global _blocks, _library
    with _lock:
        _blocks += 1
        if _library is None:
            for name in KERNELS:
                _usual(name)  # before another kernel replaces it
            _library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="(?s).*verrid")  # on purpose
                for name, kernel in KERNELS.items():
                    _library.impl(  # type: ignore[no-untyped-call]
                        name, kernel, "CPU", with_keyset=True, allow_override=True
                    )


def _leave() -> None:
    global _blocks, _library
    with _lock:
        _blocks -= 1
        if not _blocks:
            _library = None  # restores torch's own kernels


def product(a: Tensor, b: Tensor) -> Tensor:
    """a (m×k) · b (k×n), float32 on a CPU, by our kernel or by oneDNN; contiguous. b is dense."""
    if _is_ours(a, b):
        return kernels.product(a, b, a.new_empty((a.shape[0], b.shape[1])))
    if a.is_contiguous():
        return _onednn(a, b.T)
    # oneDNN's left operand has to be contiguous: copy a, or b and the product's transpose.
    (m, k), n, x = a.shape, b.shape[1], b.T
    if not _dense(a) or m * k <= m * n + (0 if x.is_contiguous() else n * k):
        rows = max(64, PIECE // k)
        if rows >= m:
            return _onednn(a, x)
        out = a.new_empty((m, n))
        for start in range(0, m, rows):
            out[start : start + rows] = _onednn(a[start : start + rows], x)
        return out
    x, rows = x.contiguous(), max(64, PIECE // m)
    if rows >= n:
        return _onednn(x, a).T.contiguous()
    out = a.new_empty((m, n))
    for start in range(0, n, rows):
        out[:, start : start + rows] = _onednn(x[start : start + rows], a).T
    return out


def _onednn(x: Tensor, W: Tensor) -> Tensor:
    """x Wᵀ by torch.compile's kernel for inference; a thousand times slower if W has gaps."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, W, None, "none", [], "")
    return out


def _dense(a: Tensor) -> bool:
    """Whether a matrix or its transpose is contiguous."""
    return a.is_contiguous() or a.T.is_contiguous()


def _is_ours(a: Tensor, b: Tensor) -> bool:
    """Whether our kernel is the fastest way to a · b, which are dense."""
    if a.shape[0] < FEWEST_ROWS or not kernels.available():
        return False
    suits = a.is_contiguous() or a.shape[0] >= 4 * b.shape[1]
    # With SSE alone, large weights have not been measured.
    any_weight = is_amd() and torch.backends.cpu.get_cpu_capability() != "DEFAULT"
    return any_weight or (suits and b.numel() <= SMALL_WEIGHT)


def _pays(a: Tensor, b: Tensor) -> bool:
    """Whether torch's own way to a · b is slower."""
    suits = (
        a.dtype is torch.float32 is b.dtype
        and a.dim() == 2 == b.dim()
        and a.shape[1] == b.shape[0]
        and a.shape[0] * b.numel() >= SMALLEST
        and _dense(a)
        and _dense(b)
    )
    return suits and (_is_ours(a, b) or _onednn_pays(a, b))


def _onednn_pays(a: Tensor, b: Tensor) -> bool:
    if not mkl_is_slow() or not torch.backends.mkldnn.enabled:
        return False
    return a.is_contiguous() or a.shape[0] * b.shape[1] > SMALL_RESULT


def _takes(out: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether a · b can be written into `out` piece by piece, as it shares no memory with them."""
    read = (a.untyped_storage().data_ptr(), b.untyped_storage().data_ptr())
    return (
        out.shape == (a.shape[0], b.shape[-1])
        and out.dtype is a.dtype
        and out.untyped_storage().data_ptr() not in read
    )


def _in_pieces(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """a · b, a few rows at a time."""
    rows = max(64, PIECE // b.shape[1])
    for start in range(0, a.shape[0], rows):
        piece = slice(start, start + rows)
        yield piece, product(a[piece], b)


def _mm(keys: Any, a: Tensor, b: Tensor) -> Any:
    if widened.pays(a, b):
        return widened.multiply_(a.new_empty((a.shape[0], b.shape[1])), a, b)
    return product(a, b) if _pays(a, b) else _usual("mm").call_boxed(keys, a, b)


def _mm_out(keys: Any, a: Tensor, b: Tensor, *, out: Tensor) -> Any:
    if _takes(out, a, b) and widened.pays(a, b):
        return widened.multiply_(out, a, b)
    if not _takes(out, a, b) or not _pays(a, b):
        return _usual("mm.out").call_boxed(keys, a, b, out=out)
    if _is_ours(a, b) and out.is_contiguous():
        return kernels.product(a, b, out)
    for piece, made in _in_pieces(a, b):
        out[piece] = made
    return out


def _addmm(keys: Any, base: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Any:
    if base.dtype is a.dtype and widened.pays(a, b):
        out = a.new_empty((a.shape[0], b.shape[1]))
        return widened.multiply_(out, a, b, base if beta else None, beta, alpha)
    if beta not in (0, 1) or base.dtype is not a.dtype or not _pays(a, b):
        return _usual("addmm").call_boxed(keys, base, a, b, beta=beta, alpha=alpha)
    made = product(a, b)
    made = made if alpha == 1 else made.mul_(alpha)
    return made.add_(base) if beta else made


def _addmm_(keys: Any, base: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Any:
    if _takes(base, a, b) and widened.pays(a, b):
        return widened.multiply_(base, a, b, base if beta else None, beta, alpha)
    if beta != 1 or not _takes(base, a, b) or not _pays(a, b):
        return _usual("addmm_").call_boxed(keys, base, a, b, beta=beta, alpha=alpha)
    for piece, made in _in_pieces(a, b):
        base[piece].add_(made, alpha=alpha)
    return base


KERNELS: dict[str, Callable[..., Any]] = {
    "mm": _mm, "mm.out": _mm_out, "addmm": _addmm, "addmm_": _addmm_,
}  # fmt: skip


@cache
def _usual(name: str) -> Any:
    """torch's own CPU kernel of an operator."""
    return torch.library.get_kernel(f"aten::{name}", "CPU")
