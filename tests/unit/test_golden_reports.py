"""The kept studies' reports have the numbers that they had before their records became tables."""

import json

import pytest
from golden_reports import REPORTS, STUDIES, numbers_of

GOLDEN = json.loads(REPORTS.read_text("utf-8"))


def test_every_kept_study_has_golden_numbers():
    assert sorted(GOLDEN) == sorted(path.name for path in STUDIES.iterdir() if path.is_dir())


@pytest.mark.parametrize("name", GOLDEN)
def test_a_kept_studys_report_has_the_numbers_that_it_had(name):
    found = json.loads(json.dumps(numbers_of(STUDIES / name)))
    assert list(found) == list(GOLDEN[name])
    assert found.pop("records") == GOLDEN[name]["records"]  # every recorded float, exactly
    for column, values in found.items():
        golden = GOLDEN[name][column]
        close = 1e-5 if column.startswith("structure") else 1e-8  # effective ranks are of float32
        if all(isinstance(value, int | float) for value in golden):
            assert values == pytest.approx(golden, rel=close), column
        else:
            assert values == golden, column
