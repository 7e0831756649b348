"""Learning-rate recovery after a momentum reset (2505.22922)."""

from __future__ import annotations


def recovery_factor(k: int, recovery_steps: int) -> float:
    """Factor of the learning rate k steps after a reset, rising linearly from 0.001 to 1.

    lr = target · (0.001 + 0.999 · k / (recovery_steps − 1)), where target is the scheduled learning
    rate recovery_steps after the reset.

    Args:
        k: 0 at the first step after the reset, recovery_steps − 1 at the last of the recovery.
        recovery_steps: length of the recovery, at least 2; 10 in the paper's code.
    """
    return 0.001 + 0.999 * k / (recovery_steps - 1)
