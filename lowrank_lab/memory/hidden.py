"""Bytes that an operation allocates and releases within itself, where no dispatch mode sees them.

Each entry maps an operation's name to a function of its arguments that returns these bytes. Those
on a CPU were measured by the allocator events of torch's profiler (`planning.simulate.measure`);
those on CUDA are the sizes that torch asks for, and no card has checked them yet.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable

import torch
from torch import Tensor

Hidden = dict[str, Callable[..., int]]


def _copy(A: Tensor, *args: object, **kwargs: object) -> int:
    return A.numel() * A.element_size()


def _copy_of_tall(A: Tensor, mode: str = "reduced") -> int:
    return _copy(A) if mode == "r" and A.shape[-2] > A.shape[-1] else 0


# Work arrays of LAPACK routines on a CPU, results not counted.
LAPACK: Hidden = {
    "aten::_linalg_svd": _copy,
    "aten::_linalg_eigh": lambda A, *args: 2 * _copy(A),
    "aten::linalg_cholesky_ex": _copy,
    "aten::linalg_qr": _copy_of_tall,
}
# Flat copies of all that gloo sends and receives.
GLOO: Hidden = {
    "c10d::_allgather_base_": lambda out, A, *args, **kwargs: _copy(out),
    "c10d::_reduce_scatter_base_": lambda out, A, *args, **kwargs: _copy(A),
    "_c10d_functional::all_gather_into_tensor": lambda A, size, *args: size * _copy(A),
}


def _flash_backward(grad: Tensor, q: Tensor, *args: object, **kwargs: object) -> int:
    """Sums in float32 of q's gradient and of a number per row; q is (B, h, T, D).

    T is rounded up to 128 rows, D to 32 (above 128 to 64). Float32 has other kernels, with one
    number per row.
    """
    batch, heads, length, width = q.shape
    if q.dtype not in (torch.bfloat16, torch.float16):
        return 4 * batch * heads * length
    rows, step = -(-length // 128) * 128, 32 if width <= 128 else 64
    return 4 * batch * heads * rows * (-(-width // step) * step + 1)


# Scratch memory of kernels on CUDA, by the names of torch's operations there and on fake tensors.
CUDA_KERNELS: Hidden = {
    f"aten::_scaled_dot_product_{kind}_backward": _flash_backward
    for kind in ("flash_attention", "flash_attention_for_cpu", "cudnn_attention")
}
CUBLAS_HANDLES = 2  # one for the thread of the forward pass, one for that of the backward pass
CUBLAS_BYTES = 32 << 20  # of a handle on Hopper and Blackwell; 8.1 MiB on earlier cards


def cublas_bytes() -> int:
    """Bytes of cuBLAS's workspaces, which cuBLASLt shares: those of the card here, else of an H100.

    CUBLAS_WORKSPACE_CONFIG (`:KIB:COUNT`, several in a row) sets other sizes, as in torch.
    """
    config = re.findall(r":(\d+):(\d+)", os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""))
    size = sum(1024 * int(kib) * int(count) for kib, count in config) or CUBLAS_BYTES
    if torch.cuda.is_available():
        size = torch.backends.cuda.cublas_workspace_size()
    return CUBLAS_HANDLES * size
