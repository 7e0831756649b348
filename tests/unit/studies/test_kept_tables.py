"""Tables of the book: what the kept records say, in Markdown."""

import re

import numpy as np
import pytest
from paths import ROOT, extension_module

from lowrank_lab.analysis.ladder import gap_table, gaps_of, slopes
from lowrank_lab.analysis.rates import robustness
from lowrank_lab.analysis.tables import verdicts
from lowrank_lab.report import asked_in
from lowrank_lab.runs.run import final_table, load_runs

KEPT = ROOT / "data" / "study"


@pytest.fixture(scope="module")
def tables():
    return extension_module("kept_tables")


@pytest.fixture(scope="module")
def costs():
    return extension_module("cost_tables")


def rows_of(lines):
    """The cells of a table by its first cell, and its head."""
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    return {row[0]: row[1:] for row in cells[2:]}, cells[0]


def test_gaps_have_a_star_where_they_differ_from_0_after_correction(tables):
    names = ["ladder_s1", "ladder_s2"]
    rows, head = rows_of(tables.gaps(*names))
    assert head[:3] == ["row", "132,432", "266,816"]
    table = gap_table(gaps_of([KEPT / name for name in names]))
    for label, size, gap, width, n, p in table.to_numpy():
        cell = rows[label][[132_432, 266_816].index(size)].replace("\u00a0", " ")
        assert cell.startswith(f"{gap:+.3f} ± {width:.3f} ({n})".replace("-", "−"))
        assert cell.endswith("*") == (p < 0.05), (label, size)
    assert {label for label, cells in rows.items() if cells[0].endswith("*")} > {"muon", "low-rank"}
    assert not rows["fira"][0].endswith("*")


def test_trends_are_the_slopes_with_their_tests(tables):
    names = ["ladder_s1", "ladder_s2"]
    rows, _ = rows_of(tables.trends(*names))
    table = slopes(gaps_of([KEPT / name for name in names])).set_index("label")
    assert list(rows) == list(table.index)
    slope, width, n, p = table.loc["muon", ["slope", "±", "n", "p (above 0)"]].tolist()
    assert rows["muon"][:2] == [f"{slope:+.3f} ± {width:.3f}".replace("-", "−"), f"{n:g}"]
    assert float(rows["muon"][2]) == pytest.approx(p, rel=0.01)


def test_the_differences_at_equal_time_that_the_chapter_states_are_those_of_the_table(costs):
    lines = costs.equal_costs("ladder_s1", "ladder_s2", "ladder_s3")
    of_low_rank = [line.strip("| ").split(" | ") for line in lines if "| low-rank |" in line]
    at_equal_time = [cells[-1] for cells in of_low_rank]
    chapter = " ".join((ROOT / "docs" / "explanation" / "study.md").read_text().split())
    assert "time of low-rank on one core it would end lower, by {} and {} (".format(
        *(difference.removeprefix("+") for difference in at_equal_time)
    ) in chapter  # fmt: skip


def test_the_answers_of_a_study_are_corrected_and_leave_out_pairs_without_runs(tables, monkeypatch):
    def with_one_more(path):
        what, pairs = asked_in(path)
        return what, [*pairs, ("not trained", "low-rank")]

    monkeypatch.setattr(tables, "asked_in", with_one_more)
    lines = tables.study("ladder_s2")
    asked = [line for line in lines if line.startswith("| low-rank + transport | low-rank |")]
    finals = final_table(load_runs(KEPT / "ladder_s2"))
    _, pairs = asked_in(ROOT / "notebooks" / "studies" / "ladder_s2.yaml")
    table = verdicts(finals, pairs).set_index(["A", "B"])
    row = table.loc[("low-rank + transport", "low-rank")]
    assert f"| {row['p (BH)']:.2g} |" in asked[0]
    assert f"| {row['verdict']} |" in asked[0]
    assert asked[0].count(" to ") == 1  # of the bootstrap over seeds and documents
    assert [line for line in lines if line.startswith("| cola | low-rank |")]
    assert not [line for line in lines if line.startswith("| not trained |")]


def test_robustness_has_the_width_of_what_was_tried(tables):
    rows, head = rows_of(tables.robust("rates_s1"))
    found = robustness(final_table(load_runs(KEPT / "rates_s1"))).set_index("label")
    assert rows["low-rank"][head.index("width") - 1] == f"{found.loc['low-rank', 'width']:.3g}"
    assert rows["low-rank"][head.index("diverges at") - 1] == "0.04"


def test_each_variant_of_a_study_file_has_its_robustness(tables):
    rows, _ = rows_of(tables.robust("rates_s3"))
    assert {"full-rank", "full-rank, 64 × 5", "muon", "low-rank"} <= set(rows)
    rows, head = rows_of(tables.robust("rates_s1"))
    assert rows["muon"][head.index("setting") - 1] == "momentum 0.8"


def test_published_gaps_are_differences_of_the_logarithms_of_perplexities(tables):
    assert tables.published("muon") == ["−0.040", "−0.041", "−0.117", "−0.153"]
    assert tables.published("galore")[0] == "+0.140"
    assert tables.published("low-rank + transport") == [""] * 4


def test_times_at_equal_cost_are_those_of_the_benchmarks(costs):
    rows = [line for line in costs.equal_costs("ladder_s1", "ladder_s2") if "| low-rank |" in line]
    assert len(rows) == 1
    share = float(rows[0].split("|")[7].strip().rstrip("%")) / 100
    taken = costs.step_times()
    assert share == pytest.approx(
        taken["step at S2, low-rank"] / taken["step at S2, full-rank"], abs=0.006
    )


def test_differences_at_equal_bytes_are_read_from_the_dense_models_of_a_study(costs):
    rows, _ = rows_of(costs.equal_bytes("ranks_s1"))
    table = final_table(load_runs(KEPT / "ranks_s1"))
    table["log bytes"] = np.log(table["weight_bytes"] + table["optimizer_state_bytes"])
    found = []
    for _, seed in table.groupby("seed"):
        dense = seed[seed["method"] == "full-rank"].sort_values("log bytes")
        (own,) = seed[seed["label"] == "low-rank, rank 3"].to_dict("records")
        at = np.interp(own["log bytes"], dense["log bytes"], dense["test_loss"])
        found.append(own["test_loss"] - at)
    assert rows["low-rank, rank 3"][1].startswith(f"{np.mean(found):+.3f} ± ")
    above = {
        row for row, cells in rows.items() if row.startswith("low-rank, ") and separated(cells[1])
    }
    assert above == {"low-rank, rank 3", "low-rank, rank 24"}  # as the page says


def separated(interval):
    mean, width = (float(number) for number in interval.replace("−", "-").split(" ± "))
    return mean > width


@pytest.mark.parametrize("setting", ["", "beta2"])
def test_rates_are_validation_losses_by_row(tables, setting):
    name = "betas_s1" if setting else "rates_s2"
    rows, _ = rows_of(tables.rates(name, setting))
    finals = final_table(load_runs(KEPT / name))
    best = (
        finals[finals["label"].str.startswith("muon,")]["validation_loss"].min()
        if setting
        else (finals[finals["method"] == "muon"].groupby("lr")["validation_loss"].mean().min())
    )
    assert f"{best:.3f}" in " ".join(rows["muon"])


def test_the_registered_tests_have_their_seeds_and_verdicts_and_the_trends_another_reference(
    tables,
):
    lines = tables.registered()
    between = next(i for i, line in enumerate(lines) if "full-rank at 8.05e-4" in line)
    rows, head = rows_of(lines[:between])
    assert head == ["hypothesis", "statement", "measured", "n", "p", "p (Holm)", "verdict"]
    assert [*rows] == list("12345")
    assert {cells[2] for cells in rows.values()} == {"5"}
    assert {cells[-1] for cells in rows.values()} <= {"yes", "not shown"}
    other = next(i for i, line in enumerate(lines) if "full-rank at beta2 0.95" in line)
    for part in (lines[between:other], lines[other:]):
        trends, _ = rows_of(part)
        assert [*trends] == list("34")
        assert all(trends[i][1] != rows[i][1] for i in trends)
    assert "nan" not in "".join(lines)


def test_the_hours_of_the_registration_are_those_of_the_records():
    text = (KEPT / "README.md").read_text().partition("## Hours used")[2].partition("\n## ")[0]
    rows = re.findall(r"\| `(\w+)` \| (\d+) \| ([\d.]+) \|", text)
    assert len(rows) >= 10
    hours = []
    for name, runs, shown in rows:
        finals = final_table(load_runs(KEPT / name))
        hours.append(finals["seconds"].sum() / 2 / 3600)
        assert (int(runs), shown) == (len(finals), f"{hours[-1]:.1f}"), name
    whole = sum(int(runs) for _, runs, _ in rows)
    assert f"| all | {whole} | {sum(hours):.1f} |" in text
