"""Losses at equal cost: dense models between two sizes, seed by seed; nothing is extrapolated."""

import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from written_runs import write_run

from lowrank_lab import figures
from lowrank_lab.analysis.costs import COSTS, at_equal_cost, costs_of
from lowrank_lab.analysis.stats import mean_interval
from lowrank_lab.cli import main
from lowrank_lab.memory.formulas import by_formula, flops_per_token
from lowrank_lab.runs.files import write_json
from lowrank_lab.runs.run import find_runs

SEEDS = (1, 2, 3)
LOSSES = {400: {"full-rank": 3.0, "low-rank": 3.3}, 800: {"full-rank": 2.0, "low-rank": 2.7}}


def loss(steps, label, seed):
    return LOSSES[steps][label] + seed**2 / 100 * (1 if label == "low-rank" else steps / 400)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two sizes, the larger trains twice as long; bytes of results are by formula."""
    tmp_path = tmp_path_factory.mktemp("costs")
    for steps in LOSSES:
        for seed in SEEDS:
            for label in LOSSES[steps]:
                folder = tmp_path / str(steps) / f"{label}-{seed}"
                value = loss(steps, label, seed)
                width = {
                    "hidden_size": 32 * steps // 400,
                    "num_heads": 2,
                    "vocab_size": 64,
                    "rank": 16,
                }
                write_run(folder, label, seed, value, steps=steps, method=label, **width)
                (run,) = find_runs(folder)
                held = by_formula(run.config)
                result = json.loads((folder / "result.json").read_text())
                write_json(folder / "result.json", result | {
                    "parameters": steps * 1000, "weight_bytes": held.weights,
                    "optimizer_state_bytes": held.optimizer_states,
                })  # fmt: skip
    return [tmp_path / str(steps) for steps in LOSSES]


def test_costs_are_bytes_of_weights_and_states_and_flops_of_the_whole_training(folders):
    costs = costs_of(folders)
    assert len(costs) == 12
    for folder, size in zip(folders, (400_000, 800_000), strict=True):
        for run in find_runs(folder):
            own = costs[(costs["label"] == run.label) & (costs["parameters"] == size)]
            config, held = run.config, by_formula(run.config)
            flops = flops_per_token(config) * config.batch * config.sequence_length * config.steps
            assert set(own["flops"]) == {flops}
            assert set(own["bytes"]) == {held.weights + held.optimizer_states}


@pytest.mark.parametrize("cost", COSTS)
def test_a_dense_model_of_the_same_cost_lies_on_the_line_between_two_sizes(folders, cost):
    costs = costs_of(folders)
    (row,) = at_equal_cost(costs, cost).query("parameters == 800_000").to_dict("records")
    at = {key: part[cost].iloc[0] for key, part in costs.groupby(["label", "parameters"])}
    small, large = (at["full-rank", size] for size in (400_000, 800_000))
    own = at["low-rank", 800_000]
    assert small < own < large
    way = math.log(own / small) / math.log(large / small)
    dense = [(1 - way) * loss(400, "full-rank", seed) + way * loss(800, "full-rank", seed)
             for seed in SEEDS]  # fmt: skip
    expected = mean_interval(
        [loss(800, "low-rank", s) - d for s, d in zip(SEEDS, dense, strict=True)]
    )
    assert (row["A − dense"], row["±"], row["n"]) == pytest.approx(tuple(expected))
    assert row["dense"] == pytest.approx(np.mean(dense))
    assert row["share"] == pytest.approx(own / large)


def test_what_costs_less_than_the_smallest_dense_model_has_no_row(folders):
    table = at_equal_cost(costs_of(folders), "flops")
    assert table["parameters"].tolist() == [800_000]
    alone = at_equal_cost(costs_of(folders[:1]), "flops")
    assert alone.empty
    assert list(alone) == list(table)


def test_the_same_cost_as_a_dense_model_is_compared_with_it_alone():
    rows = [("full-rank", 1, s, 9, 2.0 + s, 8, 5.0) for s in SEEDS]
    rows += [("muon", 1, s, 9, 1.5 + s, 8, 5.0) for s in SEEDS]
    costs = pd.DataFrame(
        rows, columns=["label", "parameters", "seed", "steps", "loss", "bytes", "flops"]
    )
    (row,) = at_equal_cost(costs).to_dict("records")
    assert (row["share"], row["A − dense"], row["±"]) == (1, -0.5, 0)


def test_seeds_that_the_reference_lacks_do_not_count(folders):
    costs = costs_of(folders)
    costs = costs[(costs["label"] != "full-rank") | (costs["seed"] != 2)]
    assert at_equal_cost(costs)["n"].tolist() == [2]


def test_a_method_that_is_not_registered_here_has_bytes_and_no_flops(folders, tmp_path):
    for folder in folders:
        shutil.copytree(folder, tmp_path / folder.name)
        for path in (tmp_path / folder.name).glob("low-rank-*/config.json"):
            facts = json.loads(path.read_text())
            facts["config"]["method"] = "mine"
            write_json(path, facts)
    places = [str(tmp_path / folder.name) for folder in folders]
    costs = costs_of(places)
    assert at_equal_cost(costs, "flops").empty
    assert at_equal_cost(costs, "bytes")["n"].tolist() == [3]
    done = CliRunner().invoke(main, ["ladder", *places, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output


def test_the_command_prints_both_costs_and_draws_them(folders, tmp_path):
    out = tmp_path / "out"
    done = CliRunner().invoke(main, ["ladder", *map(str, folders), "--json", "--out", str(out)])
    tables = json.loads(done.output)
    for cost in COSTS:
        assert [row["label"] for row in tables[f"equal_{cost}"]] == ["low-rank"]
        assert (out / f"equal_{cost}.csv").exists()
    assert (out / "loss_over_costs.svg").exists()
    shown = CliRunner().invoke(main, ["ladder", *map(str, folders)]).output
    assert "Minus full-rank of the same FLOPs" in shown
    text = figures.alt_text(figures.loss_over_costs(costs_of(folders)))
    assert "training FLOPs" in text
    assert "low-rank" in text


def test_the_picture_shows_labels_that_are_at_all_sizes():
    at = {"full-rank": (1, 2, 3), "muon": (1, 2, 3), "fira": (1, 2)}
    rows = [
        (label, n, s, n, 3.0 - n / 9, 8 * n, 5.0 * n)
        for label in at
        for n in at[label]
        for s in SEEDS
    ]
    names = ["label", "parameters", "seed", "steps", "loss", "bytes", "flops"]
    text = figures.alt_text(figures.loss_over_costs(pd.DataFrame(rows, columns=names)))
    assert "muon" in text
    assert "fira" not in text
