"""Bytes that an operation allocates and releases within itself, where no dispatch mode sees them.

Each entry maps an operation's name to a function of its arguments that returns these bytes. They
were measured with the allocator's events in torch's profiler (`planning.simulate.measure`).
"""

from __future__ import annotations

from collections.abc import Callable

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
