"""Kernels that a training step launches on CUDA, counted without a card.

Operators are counted as torch dispatches them, on tensors without values and on the path of CUDA
(`lowrank_lab.device.cuda_path`). Views and allocations launch nothing and don't count; a fused
operator on many tensors counts once. `python -m benchmarks.kernels` prints the counts of the loss.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import click
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank_lab.config import SIZES, Size
from lowrank_lab.device import cuda_path
from lowrank_lab.models.cross_entropy import linear_cross_entropy

NO_KERNEL = {
    "detach", "alias", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided",
    "set_", "lift_fresh", "device", "promote_types", "scalar_tensor", "_unsafe_view", "resize_", "is_same_size", "_local_scalar_dense",
}  # fmt: skip


class KernelCount(TorchDispatchMode):
    """Counts the operators within its block that launch a kernel.

    Attributes:
        kernels: counts by operator.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name not in NO_KERNEL and not func.is_view and func.namespace != "profiler":
            self.kernels[name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        """All kernels."""
        return sum(self.kernels.values())


def loss_kernels(size: Size, tokens: int, *, gradients: bool = True) -> KernelCount:
    """Kernels of a bf16 loss of so many tokens on CUDA, with its gradients or without."""
    empty = partial(torch.empty, dtype=torch.bfloat16, device="meta", requires_grad=True)
    hidden, head = empty(tokens, size.hidden_size), empty(size.vocab_size, size.hidden_size)
    targets = torch.empty(tokens, dtype=torch.long, device="meta")
    with cuda_path(), torch.set_grad_enabled(gradients), KernelCount() as count:
        loss = linear_cross_entropy(hidden, head, targets)
        if gradients:
            loss.backward()
    return count


if __name__ == "__main__":
    for name in ("60m", "130m", "350m", "1b"):
        counts = (loss_kernels(SIZES[name], 512 * 256, gradients=g).total for g in (True, False))
        click.echo("{}: {} kernels with gradients, {} without".format(name, *counts))
