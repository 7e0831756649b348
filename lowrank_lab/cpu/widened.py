"""Bfloat16 matrix products in float32, on CPUs that have no instructions for them.

There torch multiplies one number after another, or emulates each dot product: a product of float32
matrices is 2 to 15 times as fast. Both add in float32 and round once, so that the results agree.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_lab.device import bf16_products

SMALLEST = 2**15  # multiplications; in smaller products Python's calls cost more than they save
PIECE = 2**20  # entries of a widened piece; the next piece reuses its memory


def pays(a: Tensor, b: Tensor) -> bool:
    """Whether torch's own way to a · b (bfloat16, m×k and k×n) is slower."""
    suits = a.dtype is torch.bfloat16 is b.dtype and a.dim() == 2 == b.dim()
    same = suits and a.shape[1] == b.shape[0] and a.shape[0] * b.numel() >= SMALLEST
    return same and bf16_products() == "emulation"


def multiply_(
    out: Tensor, a: Tensor, b: Tensor, base: Tensor | None = None, beta: float = 0.0,
    alpha: float = 1.0,
) -> Tensor:  # fmt: skip
    """Write alpha · a b + beta · base into `out`, which may be the base; rounded once.

    Args:
        out: m×n, of no memory of a (m×k) or b (k×n).
        base: of a shape that expands to m×n; None for nothing to add.
    """
    (m, k), n = a.shape, b.shape[1]
    added = None if base is None else base.expand(m, n)
    size = max(64, PIECE // max(k, 1))
    for left in range(0, n, size):
        columns = slice(left, left + size)
        wide_b = b[:, columns].float()
        for top in range(0, m, size):
            rows = slice(top, top + size)
            place = out[rows, columns]
            wide = wide_b.new_empty(place.shape)
            torch.mm(a[rows].float(), wide_b, out=wide)  # out: of mm alone autocast would round
            if alpha != 1:
                wide.mul_(alpha)
            if added is not None:
                wide.add_(added[rows, columns], alpha=beta)
            place.copy_(wide)
    return out
