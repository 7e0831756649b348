"""Cross-entropy of a small linear head in one kernel, a few rows at a time.

Shapes in this file: N = tokens, d = hidden, V = vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowrank_lab.kernels.dispatch import (
    NAMESPACE,
    call,
    refuse,
    register,
    scratch_of,
    whole_numbers,
)
from lowrank_lab.kernels.halves import FEWEST_ROWS, MULTIPLE
from lowrank_lab.kernels.operators import takes

MOST_WEIGHTS = 2**22  # entries; more have not been measured
LARGEST_VOCABULARY = 2**13  # of which a thread keeps 6 MiB of logits


def takes_head(hidden: Tensor, weight: Tensor) -> bool:
    """Whether one kernel can compute the losses of hidden (N, d) with weight (V, d)."""
    suits = all(n % MULTIPLE == 0 for n in weight.shape) and hidden.shape[1:] == weight.shape[1:]
    few = weight.numel() <= MOST_WEIGHTS and len(weight) <= LARGEST_VOCABULARY
    return suits and few and len(hidden) >= FEWEST_ROWS and takes(hidden, weight)


def head_losses(
    hidden: Tensor, weight: Tensor, targets: Tensor, slopes: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropies (N, 1) of softmax(hidden @ weightᵀ), and the gradients of their sum.

    hidden (N, d), weight (V, d), targets (N). Without `slopes` both gradients are empty.

    Raises:
        IndexError: a target that is none of the V.
        ValueError: other than N whole numbers as targets.
    """
    losses, dh, dW = getattr(torch.ops, NAMESPACE).head_losses(hidden, weight, targets, slopes)
    return losses, dh, dW


def _allocate(hidden: Tensor, weight: Tensor, targets: Tensor, slopes: bool) -> tuple[Tensor, ...]:
    losses = hidden.new_empty((len(hidden), 1))
    grads = [t.new_empty(t.shape if slopes else (0,)) for t in (hidden, weight)]
    vocabulary, d = weight.shape
    return losses, *grads, hidden.new_empty(scratch_of("head", len(hidden), d, vocabulary, slopes))


def _head_losses(hidden: Tensor, weight: Tensor, targets: Tensor, slopes: bool) -> Any:
    targets = whole_numbers(targets, len(hidden))
    hidden, weight = hidden.contiguous(), weight.contiguous()
    made, (V, d) = _allocate(hidden, weight, targets, slopes), weight.shape
    refuse(call("head_losses", hidden, weight, targets, *made, len(hidden), d, V, slopes), V)
    return made[:-1]


register(
    "head_losses",
    "(Tensor hidden, Tensor weight, Tensor targets, bool slopes) -> (Tensor, Tensor, Tensor)",
    _head_losses, _allocate, 3,
)  # fmt: skip
