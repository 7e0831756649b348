"""Statistics over seeds and documents: means, intervals, p-values and their corrections."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import pandas as pd


Correction = Literal["holm", "fdr_bh"]


def p_below(differences: Sequence[float]) -> float:
    """p-value of a one-sided paired t-test of A < B; NaN for fewer than two differences.

    Args:
        differences: A − B, one per seed.
    """
    from scipy.stats import ttest_1samp

    if len(differences) < 2:
        return math.nan
    return float(ttest_1samp(differences, 0.0, alternative="less").pvalue)


def p_within(differences: Sequence[float], margin: float) -> float:
    """p-value of two one-sided t-tests (TOST) that the mean lies within ±margin.

    NaN for fewer than two differences.

    Raises:
        ValueError: the margin isn't above 0.
    """
    from statsmodels.stats.weightstats import DescrStatsW

    if not margin > 0:
        raise ValueError(f"margin: {margin!r} is not allowed; above 0")
    if len(differences) < 2:
        return math.nan
    with np.errstate(divide="ignore"):  # of seeds that differ by the same
        return float(DescrStatsW(np.asarray(differences)).ttost_mean(-margin, margin)[0])


def p_differs(differences: Sequence[float]) -> float:
    """p-value of a two-sided t-test that the mean isn't 0; NaN for fewer than two differences."""
    below = p_below(differences)
    return 2 * min(below, 1 - below)


def corrected(p_values: Sequence[float], how: Correction) -> list[float]:
    """p-values corrected for their number; NaN stays NaN and doesn't count.

    Args:
        how: holm bounds the chance of any false rejection, fdr_bh (Benjamini–Hochberg) the share of
            false ones among the rejections.
    """
    from statsmodels.stats.multitest import multipletests

    values = np.asarray(p_values, dtype=float)
    there = ~np.isnan(values)
    if there.any():
        values[there] = multipletests(values[there], method=how)[1]
    return [float(p) for p in values]


class Interval(NamedTuple):
    """A mean with the ends of its 95 % interval."""

    mean: float
    low: float
    high: float


def seed_document_interval(
    differences: np.ndarray, tokens: np.ndarray, resamples: int = 9999
) -> Interval:
    """Bootstrap interval of a mean over seeds and documents, both drawn with replacement.

    It covers both sources of variation, but with three to five seeds it is too narrow: the
    interval of `mean_interval` over seeds stands beside it.

    Args:
        differences: (seeds, documents) of losses per token.
        tokens: (documents,) by which documents are weighted.

    Raises:
        ValueError: fewer than two seeds or documents.
    """
    from scipy.stats import bootstrap

    seeds, documents = differences.shape
    if seeds < 2 or documents < 2:
        found = f"{seeds} seeds, {documents} documents"
        raise ValueError(f"differences: {found} is not allowed; at least two of each")
    sums = differences * tokens

    def mean(drawn: np.ndarray, read: np.ndarray, axis: int = -1) -> Any:
        of_seeds, of_documents = _counts(drawn, seeds), _counts(read, documents)
        total = ((of_seeds @ sums) * of_documents).sum(-1)
        return total / (seeds * (of_documents @ tokens))

    numbers = (np.arange(seeds), np.arange(documents))
    found = bootstrap(
        numbers, mean, vectorized=True, n_resamples=resamples, batch=500, method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return Interval(float(mean(*numbers)), float(found.low), float(found.high))


def _counts(drawn: np.ndarray, size: int) -> np.ndarray:
    """How often each of `size` numbers is in the last axis of `drawn`."""
    counts: np.ndarray = (drawn[..., None] == np.arange(size)).sum(-2)
    return counts


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


def mean_intervals(
    table: pd.DataFrame, by: Sequence[str], column: str, confidence: float = 0.95
) -> pd.DataFrame:
    """`mean_interval` of a column for each group of rows, all at once; NaN is left out.

    Args:
        by: columns that define a group; its rows are the sample.

    Returns:
        One row per group, in order of appearance: the columns `by`, mean, half_width and n.
    """
    from scipy.stats import t

    kept = table.dropna(subset=[column])
    found = kept.groupby(list(by), sort=False)[column].agg(["mean", "std", "count"])
    found = found.rename(columns={"count": "n"}).reset_index()
    n = found["n"].to_numpy()
    sizes = np.unique(n[n > 1])
    quantile = dict(zip(sizes, t.ppf((1 + confidence) / 2, sizes - 1), strict=True))
    factor = np.array([quantile.get(size, np.nan) for size in n])
    found["half_width"] = factor * found.pop("std") / np.sqrt(n)
    return found[[*by, "mean", "half_width", "n"]]
