"""Recovery of the learning rate after a momentum reset (2505.22922)."""

from __future__ import annotations


def recovery_factor(k: int, recovery_steps: int) -> float:
    """The share of its target that the learning rate has k steps after a reset: 0.001 to 1.

    The first step after a reset has k = 0, the last of the recovery k = recovery_steps − 1; the
    target is what the ordinary schedule has recovery_steps after the reset:
        lr = target · (0.001 + 0.999 · k / (recovery_steps − 1))
    """
    return 0.001 + 0.999 * k / (recovery_steps - 1)
