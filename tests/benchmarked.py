"""What the rows of a suite of benchmarks have that others rely on."""

import json
import math

from click.testing import CliRunner

from lowrank_lab.cli import main


def assert_rows_of(suite):
    """Run a suite at its quick sizes and check its rows."""
    result = CliRunner().invoke(main, ["bench", suite, "--quick", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert "cpu" in found["machine"]
    assert found["rows"]
    for row in found["rows"]:
        assert row.keys() >= {"name", "ours", "peer", "floor", "ratio", "target", "met"}
        assert row["ours"] > 0
        assert math.isfinite(row["ratio"])
