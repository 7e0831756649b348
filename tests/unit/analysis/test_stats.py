"""Means and intervals against scipy's own, and what isn't a sample."""

import math

import numpy as np
import pytest
from scipy import stats

from lowrank_lab.analysis.stats import mean_interval


@pytest.mark.parametrize("n", [2, 3, 10])
def test_the_interval_is_students_t(n):
    values = np.random.default_rng(n).normal(size=n)
    low, high = stats.t.interval(0.95, n - 1, loc=values.mean(), scale=stats.sem(values))
    mean, half_width, count = mean_interval(values.tolist())
    assert (mean - half_width, mean + half_width) == pytest.approx((low, high))
    assert count == n


def test_one_value_has_no_interval():
    mean, half_width, n = mean_interval([3.0])
    assert (mean, n) == (3.0, 1)
    assert math.isnan(half_width)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_what_is_not_a_sample_is_refused(values):
    with pytest.raises(ValueError, match="values"):
        mean_interval(values)
