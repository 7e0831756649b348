"""Statistics over seeds: means, confidence intervals and p-values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


def p_below(differences: Sequence[float]) -> float:
    """p-value of a one-sided paired t-test of A < B; NaN for fewer than two differences.

    Args:
        differences: A − B, one per seed.
    """
    from scipy.stats import ttest_1samp

    if len(differences) < 2:
        return math.nan
    return float(ttest_1samp(differences, 0.0, alternative="less").pvalue)


class Mean(NamedTuple):
    """A mean over n values, with the half-width of its confidence interval (NaN for n = 1)."""

    mean: float
    half_width: float
    n: int


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Mean:
    """Mean and Student-t confidence interval of a sample.

    Raises:
        ValueError: no values, or a value is not finite.
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
