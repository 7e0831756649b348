"""Runs grouped over seeds, and the filter and order of a table of them."""

import math

import pytest

from lowrank_lab.analysis.run_groups import (
    best_of_each,
    choices_of,
    groups_of,
    matching,
    sorted_by,
    titles_of,
)
from lowrank_lab.analysis.stats import mean_interval
from lowrank_lab.config import InputError
from lowrank_lab.runs.catalogue import Entry


def entry(label, seed=0, loss=2.0, state="finished", memory=2**21, **config):
    config = {"model": "tiny", "rank": 8, "lr": 0.01, "seed": seed} | config
    name = "-".join(map(str, [label, *config.values()]))
    if state == "broken":
        config, loss, label = {}, math.nan, name
    return Entry(name, name, state, "", label, config, 10, loss, memory)


@pytest.fixture
def entries():
    return [
        *(entry("galore", seed, 2.0 + seed / 10) for seed in range(3)),
        *(entry("galore", seed, 3.0, rank=16) for seed in range(2)),
        entry("fira", 0, 2.5), entry("fira", 1, 9.0, "training"),
        entry("full-rank", 0, 1.5, rank=None, lr=0.001), entry("lora", 0, state="broken"),
    ]  # fmt: skip


def rows(groups):
    return [(g.label, g.row["rank"]) for g in groups]


def test_runs_that_differ_in_their_seed_alone_are_one_group(entries):
    groups = groups_of(entries)
    assert [len(group.entries) for group in groups] == [2, 1, 3, 2, 1]
    assert [group.cells["seed"] for group in groups] == ["2 seeds", "0", "3 seeds", "2 seeds", ""]
    assert [len(group.entries) for group in groups_of(entries, over_seeds=False)] == [1] * 9


def test_a_group_has_the_mean_and_interval_of_its_finished_runs(entries):
    fira, _, galore, *_ = groups_of(entries)
    assert galore.loss == mean_interval([2.0, 2.1, 2.2])
    assert galore.cells["loss"] == "2.1000"
    assert galore.cells["half_width"] == "0.2484"
    assert galore.cells["memory"] == "2.00"
    assert fira.loss.mean == 2.5  # the run in training is at another step
    assert fira.state == "1 finished, 1 training"


def test_a_group_in_training_has_its_losses_so_far():
    [group] = groups_of([entry("a", 0, 3.0, "training"), entry("a", 1, 4.0, "stopped")])
    assert (group.loss.mean, group.loss.n) == (3.5, 2)


def test_a_group_without_a_loss_has_empty_cells():
    [group] = groups_of([entry("a", 0, math.nan, "training", memory=math.nan)])
    assert (group.cells["loss"], group.cells["half_width"], group.cells["memory"]) == ("", "", "")


def test_what_else_differs_is_named():
    groups = groups_of([
        entry("a", method_options={"gap": 10}, steps=5), entry("a", method_options={"gap": 20}),
        entry("b", steps=7),
    ])  # fmt: skip
    assert [group.other for group in groups] == ["steps 5, gap 10", "gap 20", ""]


def test_titles_have_what_differs(entries):
    fira, full, small, large, _ = groups_of(entries)
    assert titles_of([fira, small]) == ["fira", "galore"]
    assert titles_of([small, large]) == ["galore, rank 8", "galore, rank 16"]
    assert titles_of([full, small]) == ["full-rank, rate 0.001", "galore, rank 8, rate 0.01"]
    single = groups_of(entries[:2], over_seeds=False)
    assert titles_of(single) == ["galore, seed 0", "galore, seed 1"]
    twice = groups_of([Entry(n, n, "finished", "", "a", {"seed": 0}) for n in "xy"], False)
    assert titles_of(twice) == ["a, seed 0 (x)", "a, seed 0 (y)"]


@pytest.mark.parametrize(
    ("search", "found"),
    [
        ("", 5), ("galore", 2), ("GALORE 16", 1), ("rank=8", 2), ("rank>=8", 3), ("rank<16", 2),
        ("rate=0.001", 1), ("lr<0.01", 1), ("loss<2.2", 2), ("loss>2.2 galore", 1),
        ("label=full", 1), ("method=full", 1), ("state=training", 1), ("seed=2", 1), ("seed>0", 3),
        ("training", 1), ("mib>1", 5), ("nothing", 0), ("rank=7", 0),
    ],
)  # fmt: skip
def test_a_search_takes_words_and_conditions(entries, search, found):
    assert len(matching(groups_of(entries), search)) == found


@pytest.mark.parametrize(("search", "words"), [("nothing=3", "one of label"), ("rank=x", "number"),
                                               ("label<3", "no numbers")])  # fmt: skip
def test_a_search_that_means_nothing_is_refused(entries, search, words):
    with pytest.raises(InputError, match=words):
        matching(groups_of(entries), search)


def test_fields_filter_by_the_text_of_a_cell(entries):
    groups = groups_of(entries)
    assert len(matching(groups, fields={"label": "galore", "rank": "16"})) == 1
    assert len(matching(groups, fields={"seed": "1"})) == 3
    assert len(matching(groups, fields={"state": "training"})) == 1
    assert len(matching(groups, "galore", {"label": "", "rank": ""})) == 2


def test_every_choice_of_a_field_finds_a_row(entries):
    for over_seeds in (True, False):
        groups = groups_of(entries, over_seeds)
        choices = choices_of(groups)
        assert choices["rank"] == ["8", "16"]
        assert choices["lr"] == ["0.001", "0.01"]
        assert "model" not in choices  # all runs have the same
        for name, texts in choices.items():
            assert all(matching(groups, fields={name: text}) for text in texts)


def test_rows_without_a_value_are_sorted_last(entries):
    groups = groups_of(entries)
    assert rows(groups) == [("fira", 8), ("full-rank", None), ("galore", 8), ("galore", 16),
                            (groups[-1].label, None)]  # fmt: skip
    for descending in (False, True):
        ordered = sorted_by(groups, "loss", descending)
        losses = [group.loss.mean for group in ordered]
        assert losses[:4] == sorted(losses[:4], reverse=descending)
        assert math.isnan(losses[4])
    for column in groups[0].row:
        assert len(sorted_by(groups, column)) == 5


def test_the_first_rows_are_the_best_of_each_label(entries):
    groups = groups_of(entries)
    assert rows(best_of_each(groups, 6)) == [("fira", 8), ("full-rank", None), ("galore", 8)]
    assert len(best_of_each(groups, 2)) == 2
    assert best_of_each(groups_of([entry("a", 0, math.nan)]), 6)
