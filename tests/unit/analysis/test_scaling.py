"""Gaps to full rank over sizes: paired by seed, no line through two sizes, a band from three on."""

import numpy as np
import pandas as pd
import pytest

from lowrank_lab import InputError, figures
from lowrank_lab.analysis import scaling, tables
from lowrank_lab.runs.run import final_table, load_runs


def drawn(sizes, slope=0.2, noise=0.0, seeds=4):
    random = np.random.default_rng(0)
    rows = [
        ("low-rank", n, 20 * n, seed, 0.1 + slope * np.log10(n / 1e5) + noise * random.normal())
        for n in sizes
        for seed in range(seeds)
    ]
    return pd.DataFrame(rows, columns=["label", "parameters", "tokens", "seed", "gap"])


def test_gaps_are_the_paired_differences_of_each_kept_study():
    found = scaling.gaps(["study/main", "study/larger"])
    for folder, parameters in (("study/main", 266_816), ("study/larger", 663_840)):
        finals = final_table(load_runs(folder))
        expected = tables.paired(finals, [("galore", "full-rank")]).to_numpy().ravel()
        own = found[(found["label"] == "galore") & (found["parameters"] == parameters)]
        np.testing.assert_allclose(own["gap"], expected[~np.isnan(expected)])
    assert set(found["label"]) == {"fira", "galore", "low-rank", "low-rank + refactor + reset"}


def test_a_folder_without_the_baseline_is_refused_by_name():
    with pytest.raises(InputError, match="baseline"):
        scaling.gaps(["study/larger_rate"])
    with pytest.raises(InputError, match="folders"):
        scaling.gaps([])


def test_two_sizes_have_no_line_and_three_have_the_least_squares_line():
    assert scaling.extrapolated(drawn([1e5, 1e6]), [1e8]).empty
    three = drawn([1e5, 1e6, 1e7], noise=0.03)
    slope, start = np.polyfit(np.log10(three["parameters"]), three["gap"], 1)
    line = scaling.extrapolated(three, [1e5, 1e8])
    np.testing.assert_allclose(line["gap"], start + slope * np.array([5, 8]))
    assert (line["low"] < line["gap"]).all()
    assert (line["gap"] < line["high"]).all()


def test_the_band_at_a_single_point_is_that_of_the_textbook():
    three, x0 = drawn([1e5, 1e6, 1e7], noise=0.03), 7.8
    x, y = np.log10(three["parameters"]).to_numpy(), three["gap"].to_numpy()
    slope, start = np.polyfit(x, y, 1)
    variance = ((y - start - slope * x) ** 2).sum() / (len(x) - 2)
    spread = 1 + 1 / len(x) + (x0 - x.mean()) ** 2 / ((x - x.mean()) ** 2).sum()
    half = 2.2281388519649385 * np.sqrt(variance * spread)  # t of 10 degrees of freedom
    line = scaling.extrapolated(three, [10**x0]).iloc[0]
    assert line["high"] - line["gap"] == pytest.approx(half)


def test_a_ladder_of_fewer_than_two_sizes_gives_way_to_the_other_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWRANK_LAB_DATA", str(tmp_path))
    (tmp_path / "study" / "rung_1").mkdir(parents=True)
    assert scaling.kept_sizes("rung_*", ["study/main"]) == ["study/main"]
    (tmp_path / "study" / "rung_2").mkdir()
    assert [path.name for path in scaling.kept_sizes("rung_*")] == ["rung_1", "rung_2"]


def test_the_figure_says_whether_a_line_is_drawn():
    without = figures.alt_text(figures.gap_over_size(drawn([1e5, 1e6])))
    assert "fewer than three sizes: no line" in without
    assert "60 M" not in without
    assert "prediction band" in figures.alt_text(figures.gap_over_size(drawn([1e5, 1e6, 1e7])))
