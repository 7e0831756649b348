"""Whether weights look trained, so that new factors in their place would lose training.

A weight counts as trained if one of these holds:

* it has a gradient;
* it has been written to more often than initialisations do (torch counts the writes to a tensor);
* transformers marked it as loaded from a checkpoint;
* its largest singular value is far above that of independent entries, which is s·(√m + √n) for
  entries with mean square s² (Marchenko–Pastur). Normal, uniform, truncated, orthogonal and zero
  initialisations are at or below it; long training leaves a few large singular values.

A weight that was trained briefly elsewhere and then loaded by `load_state_dict` is not noticed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowrank_lab.layers.dense import is_fake_or_meta

INIT_WRITES = 8  # most writes by an initialisation; nn.Linear's own is one
ABOVE_RANDOM = 1.3  # ratio of singular values; the initialisations above reach at most 1.05
SAMPLE = 4  # weights whose singular value is computed, spread evenly
ITERATIONS = 12  # of the power method


def looks_trained(weights: Sequence[Tensor]) -> bool:
    """Whether any of the weights counts as trained; singular values are those of a sample."""
    for W in weights:
        loaded = getattr(W, "_is_hf_initialized", False)
        if W.grad is not None or W._version > INIT_WRITES or loaded:
            return True
    step = max(1, len(weights) // SAMPLE)
    return any(above_random(W) > ABOVE_RANDOM for W in weights[::step] if not is_fake_or_meta(W))


@torch.no_grad()
def above_random(W: Tensor) -> float:
    """σ₁ / (s·(√m + √n)) of W (m×n), where s² is the mean square entry; 0 for a zero matrix.

    The power method approaches σ₁ from below; its start doesn't use torch's global generator.
    """
    W = W.detach().float()
    m, n = W.shape
    start = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=W.dtype)
    v, sigma = start.to(W.device), W.new_zeros(())
    for _ in range(ITERATIONS):
        v = W.T @ (W @ (v / v.norm().clamp(min=1e-30)))
        sigma = v.norm().sqrt()
    edge = W.norm() * (m**-0.5 + n**-0.5)
    return float(torch.where(edge > 0, sigma / edge, torch.zeros_like(edge)))
