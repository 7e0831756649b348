"""How a computation depends on its device: the size of its pieces, its dtype, and autocast."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

_on_cuda_path = False


def constant_in_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a function whose result is a constant of compiled code.

    `torch.compiler.assume_constant_result` does the same, but imports the compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def prefers_few_kernels(t: Tensor) -> bool:
    """Whether work on `t` takes the path of CUDA: its tensors are there, or `cuda_path` is on."""
    return t.is_cuda or _on_cuda_path


@contextmanager
def cuda_path() -> Iterator[None]:
    """Take the path of CUDA in this block, on any device.

    Simulations enter it, and tests that count kernels on tensors without values.
    """
    global _on_cuda_path
    before, _on_cuda_path = _on_cuda_path, True
    try:
        yield
    finally:
        _on_cuda_path = before


def autocast_dtype(t: Tensor) -> torch.dtype | None:
    """The dtype in which autocast computes products with t; None where it is that of t.

    Autocast doesn't know every device: on the meta device it is never on.
    """
    device = t.device.type
    if t.dtype == torch.float64 or not torch.amp.is_autocast_available(device):
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """A block in which autocast is off; nothing to do for the meta device, which has none.

    Compiled code has its dtypes from the time of tracing. There the block does nothing: within a
    backward pass, Dynamo would keep autocast off in all that it traces afterwards.
    """
    available = torch.amp.is_autocast_available(device) and not torch.compiler.is_compiling()
    return torch.autocast(device, enabled=False) if available else nullcontext()


def bf16_products() -> str:
    """What multiplies bfloat16 matrices: "tiles" (AMX), "dots" (AVX-512) or "emulation" (else).

    Other than x86 processors, of which nothing is measured: "unknown".
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return "unknown"
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        if torch.cpu._is_amx_tile_supported():
            return "tiles"
        if torch.cpu._is_avx512_bf16_supported():
            return "dots"
    return "emulation"


@cache
def is_amd() -> bool:
    """Whether the CPU is AMD's, for which MKL, torch's library of products, isn't made."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return "AMD" in str(capabilities.get("cpu_name"))


@cache
def mkl_is_slow() -> bool:
    """Whether this CPU has AVX-512 that oneDNN uses and MKL, which torch calls, does not."""
    libraries = torch.backends.mkl, torch.backends.mkldnn
    if not all(library.is_available() for library in libraries):
        return False
    if not hasattr(torch.library, "get_kernel"):
        return False  # an older torch
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and is_amd()
