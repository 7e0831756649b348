"""The rates that are tried at S3 follow from those of S1 and S2, as the design says."""

import math

import pytest
import yaml
from paths import ROOT

from lowrank_lab.analysis.rates import lowest_point
from lowrank_lab.runs.run import final_table, load_runs

WIDTHS = {"S1": 48, "S2": 64, "S3": 96}
SAME_WIDTH = {"full-rank, 64 × 5": "full-rank"}  # whose width is that of S2


def of_study(name):
    finals = final_table(load_runs(ROOT / "data" / "study" / name))
    return finals.assign(row=finals["label"].str.partition(", lr ")[0])


@pytest.fixture(scope="module")
def best():
    """Rates by row at S1 and at S2."""
    tried = of_study("rates_s2").groupby(["row", "lr"])["validation_loss"].mean()
    return {
        "S1": of_study("ladder_s1").groupby("row")["lr"].first(),
        "S2": {row: lowest_point(part.droplevel("row").to_dict())
               for row, part in tried.groupby("row")},
    }  # fmt: skip


def test_the_rates_of_S3_lie_around_a_power_law_in_the_width(best):
    """Half, once and twice its rate; where the lowest or highest was best, its half or double."""
    study = yaml.safe_load((ROOT / "notebooks" / "studies" / "rates_s3.yaml").read_text())
    exponent = math.log(WIDTHS["S3"] / WIDTHS["S2"]) / math.log(WIDTHS["S2"] / WIDTHS["S1"])
    for row, fields in study["variants"].items():
        at_s2 = best["S2"][SAME_WIDTH.get(row, row)]
        step = 1 if row in SAME_WIDTH else (at_s2 / best["S1"][row]) ** exponent
        exponents = [math.log2(rate / (at_s2 * step)) for rate in fields["grid"]["lr"]]
        first, last = min(-1, round(exponents[0])), max(1, round(exponents[-1]))
        assert exponents == pytest.approx([*range(first, last + 1)], abs=math.log2(1.01)), row


def test_a_grid_goes_on_only_where_its_edge_was_the_best():
    tried = of_study("rates_s3").groupby(["row", "lr"])["validation_loss"].mean()
    for row, part in tried.groupby("row"):
        losses = part.droplevel("row").sort_index()
        ends = set(losses.index) - {losses.index[0], losses.index[-1]}
        assert losses.idxmin() in ends, row  # inside of its grid
        if len(losses) > 3:  # an end was added beside the best of those that were there
            position = losses.index.get_loc(losses.idxmin())
            assert position == 1 or position >= len(losses) - 3, row
