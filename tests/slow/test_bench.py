"""The slower suites of benchmarks run, and their rows have what others rely on."""

import pytest
from benchmarked import assert_rows_of


@pytest.mark.parametrize(
    "suite",
    ["corpora", "subspaces", "optimizers", "steps", "steps_60m", "cpu_training", "widgets"],
)
def test_a_suite_runs_and_its_rows_have_what_others_rely_on(suite):
    assert_rows_of(suite)
