"""Gaps over sizes: seed by seed, slopes and bands against plain fits to each seed."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from pandas.testing import assert_frame_equal
from scipy import stats
from written_runs import write_run

from lowrank_lab import figures
from lowrank_lab.analysis.ladder import (
    extrapolated,
    extrapolation_table,
    gap_table,
    gaps_of,
    kept_sizes,
    slopes,
)
from lowrank_lab.cli import main
from lowrank_lab.config import InputError
from lowrank_lab.runs.files import write_json

SIZES = (100_000, 1_000_000, 10_000_000)
SEEDS = (1, 2, 3)


def gap(size, seed):
    return 0.1 * np.log10(size) + 0.02 * seed + 0.01 * ((seed * 7 + len(str(size))) % 3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three sizes with three seeds of full-rank and low-rank; muon is at the first two."""
    tmp_path = tmp_path_factory.mktemp("ladder")
    for size in SIZES:
        for seed in SEEDS:
            losses = {"full-rank": 3.0 + seed / 10, "low-rank": 3.0 + seed / 10 + gap(size, seed)}
            if size < SIZES[-1]:
                losses["muon"] = 2.5 + seed / 10
            for label, loss in losses.items():
                folder = tmp_path / str(size) / f"{label}-{seed}"
                write_run(folder, label, seed, loss, steps=400)
                result = json.loads((folder / "result.json").read_text())
                write_json(folder / "result.json", result | {"parameters": size})
    return [tmp_path / str(size) for size in SIZES]


def test_a_gap_is_the_difference_to_the_reference_with_the_same_seed(folders):
    table = gaps_of(folders).query("label == 'low-rank'")
    assert len(table) == 9
    for row in table.itertuples():
        assert row.gap == pytest.approx(gap(row.parameters, row.seed))
    means = gap_table(gaps_of(folders)).set_index(["label", "parameters"])
    assert means.loc[("muon", SIZES[0]), "gap"] == pytest.approx(-0.5)
    assert means.loc[("muon", SIZES[0]), "n"] == 3


def test_a_slope_is_fitted_to_each_seed_and_tested_over_them(folders):
    found = slopes(gaps_of(folders)).set_index("label")
    own = [
        stats.linregress(np.log10(SIZES), [gap(size, seed) for size in SIZES]).slope
        for seed in SEEDS
    ]
    assert found.loc["low-rank", "slope"] == pytest.approx(np.mean(own))
    p = stats.ttest_1samp(own, 0, alternative="greater").pvalue
    assert found.loc["low-rank", "p (above 0)"] == pytest.approx(p)
    assert found.loc["low-rank", ["sizes", "n"]].tolist() == [3, 3]
    assert found.loc["muon", "slope"] == pytest.approx(0, abs=1e-9)


def test_seeds_that_are_missing_at_a_size_do_not_count_in_a_slope(folders):
    table = gaps_of(folders)
    table = table[(table["parameters"] != SIZES[1]) | (table["seed"] != 2)]
    assert slopes(table).set_index("label").loc["low-rank", "n"] == 2


def test_the_band_is_that_of_one_line_per_seed(folders):
    part = gaps_of(folders).query("label == 'low-rank'")
    ends = []
    for _, seed in part.groupby("seed"):
        fit = stats.linregress(np.log10(seed["parameters"].to_numpy()), seed["gap"].to_numpy())
        ends.append(fit.intercept + fit.slope * np.log10(60e6))
    _, high = stats.t.interval(0.95, len(ends) - 1, np.mean(ends), stats.sem(ends))
    line = extrapolated(gaps_of(folders), [60e6]).set_index("label").loc["low-rank"]
    assert line["gap"] == pytest.approx(np.mean(ends))
    assert line["±"] == pytest.approx(high - np.mean(ends))


def test_seeds_that_are_missing_at_a_size_have_no_line_to_extrapolate(folders):
    table = gaps_of(folders)
    without = table[(table["parameters"] != SIZES[1]) | (table["seed"] != 2)]
    assert_frame_equal(
        extrapolated(without, [60e6]), extrapolated(table[table["seed"] != 2], [60e6])
    )


def test_two_sizes_are_not_extrapolated(folders):
    table = extrapolation_table(gaps_of(folders), 60e6).set_index("label")
    assert pd.isna(table.loc["muon", "predicted"])
    assert not pd.isna(table.loc["low-rank", "predicted"])


def test_kept_studies_of_several_sizes_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWRANK_LAB_DATA", str(tmp_path))
    for name in ("rung_2", "rung_1", "other"):
        (tmp_path / "study" / name).mkdir(parents=True)
    assert [path.name for path in kept_sizes("rung_*")] == ["rung_1", "rung_2"]


def test_the_figure_says_whether_a_line_is_drawn(folders):
    two = gaps_of(folders[:2])
    assert "no seed at three sizes: no line" in figures.alt_text(figures.gap_over_size(two))


def test_rows_at_fewer_sizes_have_no_panel_but_a_line_of_the_figure_of_all_rows(folders):
    gaps = gaps_of(folders)
    assert [ax.get_title(loc="left") for ax in figures.gap_over_size(gaps).axes] == ["low-rank"]
    figure = figures.gaps_by_row(gaps)
    (ax,) = figure.axes
    assert [text.get_text() for text in ax.get_yticklabels()] == ["muon", "low-rank"]
    points = [bars[0] for bars in ax.containers]
    drawn = {(round(p.get_ydata()[0]), p.get_marker()): p.get_xdata()[0] for p in points}
    expected = gap_table(gaps).set_index(["label", "parameters"])["gap"]
    assert drawn == {
        (row, mark): pytest.approx(expected[label, size])
        for row, label in enumerate(["muon", "low-rank"])
        for size, mark in zip(SIZES, "osD", strict=True)
        if (label, size) in expected
    }
    sizes = [text.get_text() for text in ax.get_legend().get_texts()]
    assert sizes == ["0.1 M", "1 M", "10 M"]


def test_a_reference_that_is_missing_twice_there_or_of_equal_size_is_refused(folders, tmp_path):
    with pytest.raises(InputError, match="a label of"):
        gaps_of(folders, "galore")
    with pytest.raises(InputError, match="each folder has another size"):
        gaps_of([folders[0], folders[0]])
    for run, lr in (("once", 0.1), ("again", 0.5)):
        write_run(tmp_path / run, "full-rank", 1, 2.0, lr=lr)
    with pytest.raises(InputError, match="it has several"):
        gaps_of([tmp_path])


def test_the_figure_names_each_label_and_the_command_prints_both_tables(folders, tmp_path):
    text = figures.alt_text(figures.gap_over_size(gaps_of(folders), 60e6))
    assert "low-rank" in text
    assert "mean line of the seeds" in text
    out = tmp_path / "out"
    done = CliRunner().invoke(main, ["ladder", *map(str, folders), "--json", "--out", str(out)])
    tables = json.loads(done.output)
    assert [row["label"] for row in tables["slopes"]] == ["low-rank", "muon"]
    assert len(tables["gaps"]) == 5
    assert {file.name for file in out.iterdir()} >= {"gap_over_size.png", "slopes.csv"}


def test_the_command_prints_predictions_with_three_digits_and_none_of_a_single_seed(folders):
    said = CliRunner().invoke(main, ["ladder", *map(str, folders)]).output
    assert re.search(r"low-rank +3 +3 .* [+-]\d\.\d{3} +\d\.\d{3}\n", said)
    one = gaps_of(folders).query("seed == 1")
    assert extrapolated(one, [60e6])["±"].isna().all()
    assert "nan" not in figures.alt_text(figures.gap_over_size(one))
    assert all("nan" not in t.get_text() for a in figures.gap_over_size(one).axes for t in a.texts)


def test_a_size_to_extrapolate_to_is_beyond_those_that_are_there(folders):
    done = CliRunner().invoke(main, ["ladder", *map(str, folders), "--to", "1e6"])
    assert done.exit_code != 0
    assert "more than the 10000000 parameters" in done.output
