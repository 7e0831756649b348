"""The five registered tests, on records whose answers are known."""

import json
import math

import numpy as np
import pytest
from paths import extension_module
from scipy import stats
from written_runs import write_run

from lowrank_lab.runs.files import write_json
from lowrank_lab.runs.run import final_table, load_runs

SIZES = (132_432, 266_816, 663_840)
SEEDS = (11, 12, 13, 14, 15)
SMALL = "full-rank, 64 × 5"


@pytest.fixture(scope="module")
def hypotheses():
    return extension_module("hypotheses")


def noise(seed, k):
    return 0.01 * math.sin(7 * seed + 3 * k)


def ladder(tmp_path, muon=(-0.3, -0.2, -0.1), low=(0.2, 0.25, 0.3), gain=0.05, seeds=SEEDS):
    """Gaps by size; at the largest, both techniques gain `gain`, transport and 64 × 5 nothing."""
    for k, size in enumerate(SIZES):
        gaps = {"full-rank": 0.0, "muon": muon[k], "low-rank": low[k]}
        if size == SIZES[-1]:
            gaps["low-rank + refactor + reset"] = low[k] - gain
            gaps["low-rank + transport"] = low[k] - gain
            gaps[SMALL] = low[k]
        for i, (label, gap) in enumerate(gaps.items()):
            for seed in seeds:
                folder = tmp_path / str(k) / f"{i}-{seed}"
                write_run(folder, label, seed, 3 + gap + noise(seed, i + 5 * k), steps=400)
                result = json.loads((folder / "result.json").read_text())
                parameters = 317_120 if label == SMALL else size
                write_json(folder / "result.json", result | {"parameters": parameters})
    return [tmp_path / str(k) for k in range(len(SIZES))]


def test_what_is_there_is_found_and_what_is_not_is_not(hypotheses, tmp_path):
    table = hypotheses.hypotheses(ladder(tmp_path))
    assert table["verdict"].tolist() == ["yes", "not shown", "yes", "yes", "not shown"]
    assert table["n"].tolist() == [5] * 5
    assert table.loc[1, "estimate"] == pytest.approx(-0.05, abs=0.02)


def test_p_values_are_those_of_scipy_and_holm_s_are_corrected_over_five(hypotheses, tmp_path):
    table = hypotheses.hypotheses(ladder(tmp_path))
    both = [-0.05 + noise(s, 13) - noise(s, 12) for s in SEEDS]
    assert table.loc[1, "p"] == pytest.approx(stats.ttest_1samp(both, 0, alternative="less").pvalue)
    low = (0.2, 0.25, 0.3)
    slopes = [
        stats.linregress(
            np.log10(SIZES),
            [low[k] + noise(s, 2 + 5 * k) - noise(s, 5 * k) for k in range(3)],
        ).slope
        for s in SEEDS
    ]
    p = stats.ttest_1samp(slopes, 0, alternative="greater").pvalue
    assert (table.loc[3, "estimate"], table.loc[3, "p"]) == pytest.approx((np.mean(slopes), p))
    order = table["p"].sort_values()
    steps = np.maximum.accumulate([min(1, p * (5 - i)) for i, p in enumerate(order)])
    assert table.loc[order.index, "p (Holm)"].tolist() == pytest.approx(steps.tolist())


def test_without_a_gain_at_the_smallest_size_nothing_can_shrink(hypotheses, tmp_path):
    table = hypotheses.hypotheses(ladder(tmp_path, muon=(0.01, 0.2, 0.4)))
    assert (table.loc[4, "p"], table.loc[4, "verdict"]) == (1, "not shown")


@pytest.mark.parametrize("k", [1, 2])
def test_gaps_at_a_size_can_be_taken_to_another_row(k, hypotheses, tmp_path):
    folders = ladder(tmp_path)
    of_size = final_table(load_runs(folders[k])).query("label == 'full-rank'").set_index("seed")
    for seed in SEEDS:  # a full rank that ends 0.1 lower
        folder = folders[k] / f"other-{seed}"
        loss = of_size.loc[seed, "test_loss"] - 0.1
        write_run(folder, "other", seed, loss, steps=400)
        result = json.loads((folder / "result.json").read_text())
        write_json(folder / "result.json", result | {"parameters": SIZES[k]})
    references = ["full-rank"] * 3
    plain = hypotheses.hypotheses(folders, references)["estimate"]
    references[k] = "other"
    other = hypotheses.hypotheses(folders, references)["estimate"]
    x = np.log10(SIZES)
    steeper = 0.1 * (x[k] - x.mean()) / ((x - x.mean()) ** 2).sum()
    assert (other - plain).loc[hypotheses.TRENDS].tolist() == pytest.approx([steeper] * 2)
    assert (other - plain).loc[[1, 2, 5]].tolist() == [0, 0, 0]


def test_fewer_seeds_than_registered_are_refused(hypotheses, tmp_path):
    with pytest.raises(ValueError, match="5 seeds or more"):
        hypotheses.hypotheses(ladder(tmp_path, seeds=SEEDS[:4]))
