"""Kernels that a training step launches on CUDA, counted without a card.

Operators are counted as torch dispatches them, on tensors without values and on the path of CUDA
(`lowrank_lab.device.cuda_path`). Views and allocations launch nothing and don't count. A fused or
foreach operator counts once for each list of tensors that one launch can hold.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

NO_KERNEL = {
    "detach", "alias", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided",
    "set_", "lift_fresh", "_unsafe_view", "resize_", "is_same_size", "_local_scalar_dense",
}  # fmt: skip
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2"}


class KernelCount(TorchDispatchMode):
    """Counts operators that launch a kernel, and those that make the host wait.

    Attributes:
        kernels: counts by operator.
        waits: counts by operator.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITS:
            self.waits[name] += 1
        if name not in NO_KERNEL and not func.is_view and func.namespace != "profiler":
            self.kernels[name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        """All kernels."""
        return sum(self.kernels.values())


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = False) -> Tensor:
    """A tensor without values."""
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)
