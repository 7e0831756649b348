"""The benchmarks run, compare like with like, and say what they found."""

import json
import math

import pytest
from click.testing import CliRunner

from lowrank_lab.cli import main

SLOW = [
    pytest.param(s, marks=pytest.mark.slow) for s in ("corpora", "subspaces", "optimizers", "steps")
]


@pytest.mark.parametrize("suite", ["imports", "layers", *SLOW])
def test_a_suite_runs_and_its_rows_have_what_others_rely_on(suite):
    result = CliRunner().invoke(main, ["bench", suite, "--quick", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert "cpu" in found["machine"]
    assert found["rows"]
    for row in found["rows"]:
        assert row.keys() >= {"name", "ours", "peer", "floor", "ratio", "target", "met"}
        assert row["ours"] > 0
        assert math.isfinite(row["ratio"])


def test_an_unknown_suite_is_refused_by_name():
    result = CliRunner().invoke(main, ["bench", "optimisers"])
    assert result.exit_code == 2
    assert "optimisers" in result.output
