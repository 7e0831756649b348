"""Changes that the device itself can turn off: torch's `found_inf`, as GradScaler sets it.

A training step queues its update before the host knows whether loss and gradient norm are finite
(`training.finite`). A flag on the device says so: where it is 1, the functions here and torch's
fused Adam leave tensors as they are. An optimizer changes tensors in place by them alone. Every
other entry of a state it replaces by a new tensor, and the trainer puts the old one back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from lowrank_lab.device import prefers_few_kernels

_flag: Tensor | None = None

if not torch._C._dispatch_has_kernel_for_dispatch_key("aten::_fused_sgd_", "Meta"):
    # It changes tensors in place and returns nothing: without values there is nothing to do.
    _META = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    _META.impl("_fused_sgd_", lambda *args, **options: None, "Meta")  # type: ignore[no-untyped-call]


@contextmanager
def off_where(found_inf: Tensor | None) -> Iterator[None]:
    """Updates in this block change nothing if the flag, 0-dimensional float32, is 1; None: on."""
    global _flag
    before, _flag = _flag, found_inf
    try:
        yield
    finally:
        _flag = before


def found_inf() -> Tensor | None:
    """The flag of the surrounding `off_where`."""
    return _flag


def zero_if_off_(t: Tensor) -> Tensor:
    """Set a tensor to zero, in place, where updates are off. Filled, as NaN · 0 is NaN."""
    return t if _flag is None else t.masked_fill_(_flag.bool(), 0)


def old_if_off(new: Tensor, old: Tensor) -> Tensor:
    """A new tensor, or the old one where updates are off."""
    return new if _flag is None else torch.where(_flag.bool(), old, new)


def zero_(tensors: list[Tensor]) -> None:
    """X ← 0 of each, in place, unless updates are off."""
    if _flag is None:
        torch._foreach_zero_(tensors)
        return
    on = _flag == 0
    for t in tensors:
        t.masked_fill_(on, 0)


def add_(tensors: list[Tensor], updates: list[Tensor], alpha: float) -> None:
    """X ← X + alpha·U of each, in place and in one kernel, unless updates are off."""
    _descend_(tensors, updates, lr=-alpha)


def lerp_(tensors: list[Tensor], ends: list[Tensor], weight: float) -> None:
    """X ← X + weight·(E − X) of each, in place and in one kernel, unless updates are off."""
    _descend_(tensors, ends, lr=-weight, weight_decay=-1.0)


def decay_(tensors: list[Tensor], share: float) -> None:
    """X ← (1 − share)·X of each, in place, unless updates are off."""
    if not all(map(prefers_few_kernels, tensors)):
        torch._foreach_mul_(tensors, 1.0 - share)
        return
    kinds = {(t.dtype, t.device): None for t in tensors}
    for kind in kinds:
        same = [t for t in tensors if (t.dtype, t.device) == kind]
        _descend_(same, same, lr=share)


def _descend_(
    tensors: list[Tensor], grads: list[Tensor], lr: float, weight_decay: float = 0.0
) -> None:
    """X ← X − lr·(G + weight_decay·X) of tensors of one dtype, by torch's fused SGD."""
    # It walks through memory: tensors with gaps or of other strides are copied first.
    pairs = [(t, g) for t, g in zip(tensors, grads, strict=True) if t.numel()]
    used = [(X.contiguous(), g.to(X.dtype).contiguous()) for X, g in map(_computed, pairs)]
    if used:
        torch._fused_sgd_(
            [t for t, _ in used], [g for _, g in used], [],
            weight_decay=weight_decay, momentum=0.0, lr=lr, dampening=0.0, nesterov=False,
            maximize=False, is_first_step=False, found_inf=_flag,
        )  # fmt: skip
    for (t, _), (copy, _) in zip(pairs, used, strict=True):
        if copy is not t:
            t.copy_(copy)


def _computed(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The tensors themselves; of 16 bits on a CPU, float32 copies: there torch's SGD is wrong."""
    t, g = pair
    wrong = t.itemsize == 2 and t.device.type == "cpu" and not isinstance(t, FakeTensor)
    return (t.float(), g.float()) if wrong else (t, g)
