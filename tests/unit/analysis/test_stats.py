"""Means and intervals against scipy's own, and what isn't a sample."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from lowrank_lab.analysis.stats import (
    corrected,
    mean_interval,
    mean_intervals,
    p_within,
    seed_document_interval,
)


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


# Corrections, equivalence, and chance over seeds and documents


def test_holm_multiplies_the_smallest_p_by_their_number_and_so_on():
    assert corrected([0.01, 0.04, 0.03, math.nan], "holm") == pytest.approx(
        [0.03, 0.06, 0.06, math.nan], nan_ok=True
    )
    assert corrected([math.nan], "holm") == pytest.approx([math.nan], nan_ok=True)
    assert corrected([], "holm") == []


def test_benjamini_hochberg_divides_by_the_rank():
    assert corrected([0.01, 0.04, 0.03], "fdr_bh") == pytest.approx([0.03, 0.04, 0.04])


def test_equivalence_is_the_larger_of_two_one_sided_tests():
    values = [0.004, -0.002, 0.003, 0.001]
    above = stats.ttest_1samp(values, -0.01, alternative="greater").pvalue
    below = stats.ttest_1samp(values, 0.01, alternative="less").pvalue
    assert p_within(values, 0.01) == pytest.approx(max(above, below))
    assert p_within([0.02, 0.021, 0.019], 0.01) > 0.9
    assert math.isnan(p_within([0.0], 0.01))
    with pytest.raises(ValueError, match="margin: 0 is not allowed"):
        p_within(values, 0)


def test_the_bootstrap_weighs_documents_by_tokens_and_knows_both_sources_of_chance():
    rng = np.random.default_rng(5)
    tokens = rng.integers(100, 5000, 40)
    of_seeds, of_documents = rng.normal(0, 0.02, (6, 1)), rng.normal(0, 0.1, (1, 40))
    both = 0.3 + of_seeds + of_documents
    found = seed_document_interval(both, tokens, 2000)
    assert found.mean == pytest.approx(np.average(both.mean(0), weights=tokens))
    assert found.low < found.mean < found.high
    seeds_alone = seed_document_interval(0.3 + of_seeds + 0 * of_documents, tokens, 2000)
    documents_alone = seed_document_interval(0.3 + 0 * of_seeds + of_documents, tokens, 2000)
    widths = [i.high - i.low for i in (seeds_alone, documents_alone, found)]
    assert widths[2] == pytest.approx(math.hypot(*widths[:2]), rel=0.15)
    assert widths[0] == pytest.approx(2 * 1.96 * of_seeds.std() / math.sqrt(6), rel=0.25)
    nothing = seed_document_interval(np.full((2, 2), 0.5), np.ones(2), 100)
    assert nothing == pytest.approx((0.5, 0.5, 0.5))


def test_the_bootstrap_needs_two_seeds_and_two_documents():
    for shape in ((1, 5), (5, 1)):
        with pytest.raises(ValueError, match="at least two of each"):
            seed_document_interval(np.zeros(shape), np.ones(shape[1]))


def test_intervals_of_all_groups_at_once_are_those_of_each():
    table = pd.DataFrame({"a": [1, 1, 2, 1, 3, 2], "b": list("xxyxzy"),
                          "v": [1.0, 2.0, 5.0, 4.0, np.nan, 7.5]})  # fmt: skip
    found = mean_intervals(table, ["a", "b"], "v", confidence=0.9)
    assert found.columns.tolist() == ["a", "b", "mean", "half_width", "n"]
    expected = [mean_interval(v, 0.9) for v in ([1.0, 2.0, 4.0], [5.0, 7.5])]
    np.testing.assert_allclose(found[["mean", "half_width", "n"]].to_numpy(), expected)
    single = mean_intervals(table[:1], ["a"], "v")
    assert single["n"].tolist() == [1]
    assert single["half_width"].isna().all()
