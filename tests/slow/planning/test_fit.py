"""All methods are compared in one table."""

import json

from click.testing import CliRunner

from lowrank_lab.cli import main
from lowrank_lab.methods.registry import METHODS


def test_all_methods_are_compared_in_one_table():
    flags = ["--model", "tiny", "--rank", "4", "--batch", "2", "--all", "--json"]
    done = CliRunner().invoke(main, ["memory", *flags])
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)["methods"]
    assert [row["method"] for row in rows] == list(METHODS)
    assert all(row["peak"] > row["weights"] for row in rows if "refused" not in row)
    assert sum("refused" in row for row in rows) == 0
