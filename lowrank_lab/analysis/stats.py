"""Statistics over seeds: one home for means and intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


def p_below(differences: Sequence[float]) -> float:
    """Probability of a mean as low as theirs if the true one were 0: paired t-test, one-sided.

    Args:
        differences: A − B, one a seed, for the claim that A is below B; NaN for fewer than two.
    """
    from scipy.stats import ttest_1samp

    if len(differences) < 2:
        return math.nan
    return float(ttest_1samp(differences, 0.0, alternative="less").pvalue)


class Mean(NamedTuple):
    """A mean over n values, and half the width of its 95 % interval (NaN for n = 1)."""

    mean: float
    half_width: float
    n: int


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Mean:
    """Mean and Student-t interval of a sample.

    Raises:
        ValueError: no values, or one that isn't finite.
    """
    from scipy.stats import t

    n = len(values)
    if n == 0 or not all(map(math.isfinite, values)):
        raise ValueError(f"values: {list(values)!r} is not allowed; at least one, all finite")
    mean = math.fsum(values) / n
    if n == 1:
        return Mean(mean, math.nan, 1)
    variance = math.fsum((v - mean) ** 2 for v in values) / (n - 1)
    return Mean(mean, float(t.ppf((1 + confidence) / 2, n - 1)) * math.sqrt(variance / n), n)
