"""Maps of a grid of runs: what varies, means over seeds with intervals, and the panel."""

import json
import math

import pytest

from lowrank_lab import figures, widgets
from lowrank_lab.analysis import grid
from lowrank_lab.config import InputError, RunConfig
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.widgets import grid as grid_view

BASE = {
    "model": "tiny",
    "method": "low-rank",
    "init": "spectral",
    "refactor_every": 50,
    "steps": 140,
}


def write(folder, name, perplexity, finished=True, **fields):
    """A run folder as training leaves it, with a result that is given."""
    config = resolve(RunConfig(**BASE | fields))
    (folder / name).mkdir(parents=True)
    facts = {"config": config.model_dump(), "label": name}
    (folder / name / "config.json").write_text(json.dumps(facts))
    (folder / name / "metrics.jsonl").write_text('{"step": 1, "loss": 6.0}\n')
    result = {"test_perplexity": perplexity, "test_loss": math.log(perplexity)}
    result |= {"weight_bytes": config.rank * 2**20, "optimizer_state_bytes": 2**20}
    if finished:
        (folder / name / "result.json").write_text(json.dumps(result))


@pytest.fixture
def folder(tmp_path):
    """Ranks 4 and 8; no resets, full ones every 30 steps and, at rank 4, half ones; two seeds."""
    for seed in (0, 1):
        for rank in (4, 8):
            write(tmp_path, f"none-{rank}-{seed}", 10 + rank + seed, rank=rank, seed=seed)
            reset = {"rank": rank, "seed": seed, "reset_every": 30}
            write(tmp_path, f"full-{rank}-{seed}", 13 + rank + seed, **reset)
        half = {"rank": 4, "seed": seed, "reset_every": 30, "reset_strength": 0.5}
        write(tmp_path, f"half-{seed}", 15 + seed, **half)
    return tmp_path


@pytest.fixture
def table(folder):
    return grid.settings(folder)


def at(cells, row, column):
    names = cells.columns[:2]
    return cells[(cells[names[0]] == row) & (cells[names[1]] == column)].iloc[0]


def test_only_knobs_that_can_be_turned_by_themselves_vary(table):
    assert grid.varying(table) == {
        "rank": [4, 8], "reset_every": [0, 30], "reset_strength": [0.5, 1.0]
    }  # fmt: skip
    assert table["method_options"].nunique() == 2  # but alpha follows the rank


def test_a_cell_is_the_mean_of_its_seeds_with_students_interval(table):
    cell = at(grid.cells(table, "rank", "reset_every", {"reset_strength": 1.0}), 8, 30)
    assert (cell["mean"], cell["n"]) == (21.5, 2)
    assert cell["half_width"] == pytest.approx(12.7062047 * math.sqrt(0.5) / math.sqrt(2))


def test_a_pair_without_runs_is_an_empty_cell(table):
    cell = at(grid.cells(table, "rank", "reset_every", {"reset_strength": 0.5}), 8, 30)
    assert cell["n"] == 0
    assert math.isnan(cell["mean"])


def test_without_resets_a_run_counts_for_every_strength(table):
    cells = grid.cells(table, "reset_every", "reset_strength", {"rank": 4})
    assert [at(cells, 0, s)["mean"] for s in (0.5, 1.0)] == [14.5, 14.5]
    assert [at(cells, 30, s)["mean"] for s in (0.5, 1.0)] == [15.5, 17.5]


def test_one_seed_has_a_mean_and_no_interval(folder):
    table = grid.settings(folder)
    cells = grid.cells(table[table["seed"] == 0], "rank", "reset_every", {"reset_strength": 1.0})
    assert at(cells, 4, 0)["n"] == 1
    assert math.isnan(at(cells, 4, 0)["half_width"])


def test_a_copy_of_a_run_is_not_another_seed(folder):
    write(folder, "copy", 999.0, rank=8, seed=1)
    assert len(grid.settings(folder)) == 10


@pytest.mark.parametrize(
    ("row", "column", "fixed", "message"),
    [
        ("lr", "rank", {}, "^row: 'lr'.*rank, reset_every, reset_strength"),
        ("rank", "speed", {}, "^column: 'speed'"),
        ("rank", "rank", {}, "^column: 'rank'.*another knob"),
        ("rank", "reset_every", {}, "^reset_strength: None.*fix it: 0.5, 1.0"),
        ("rank", "reset_every", {"reset_strength": 0.7}, "^reset_strength: 0.7.*0.5, 1.0"),
        ("rank", "reset_every", {"lr": 0.1}, "^lr: 'lr'"),
    ],
)
def test_what_makes_no_map_is_refused_in_one_line(table, row, column, fixed, message):
    with pytest.raises(InputError, match=message) as caught:
        grid.cells(table, row, column, fixed)
    assert "\n" not in str(caught.value)


def test_a_map_of_one_knob_is_refused(table):
    with pytest.raises(InputError, match="two knobs"):
        grid.axes_of(table[table["reset_every"] == 0])


def test_unfinished_runs_are_refused_or_left_out(folder):
    write(folder, "running", 50.0, finished=False, rank=16)
    with pytest.raises(InputError, match="running"):
        grid.settings(folder)
    assert len(grid.settings(folder, strict=False)) == 10


def test_a_broken_run_is_refused_or_left_out(folder):
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text('{"config"')
    with pytest.raises(InputError, match="broken"):
        grid.settings(folder)
    assert len(grid.settings(folder, strict=False)) == 10


def test_effects_are_paired_within_seeds(table):
    found = grid.effects(table).set_index(["knob", "from", "to"])
    reset = found.loc[("reset_every", 0, 30)]
    # at strength 1: +3 at both ranks; at 0.5: +1 at rank 4; the same for either seed
    assert reset["mean"] == pytest.approx((3 + 3 + 1) / 3)
    assert (reset["half_width"], reset["n"], reset["pairs"]) == (pytest.approx(0, abs=1e-9), 2, 6)
    assert found.loc[("reset_strength", 0.5, 1.0)]["mean"] == pytest.approx(2.0)
    assert found.loc[("reset_strength", 0.5, 1.0)]["pairs"] == 2


def test_costs_have_a_row_a_setting_with_its_bytes(table):
    costs = grid.costs(table)
    assert len(costs) == 5
    assert grid.best(costs)["weights_and_states_mib"] == 5.0  # rank 4: 4 + 1 MiB
    assert grid.best(costs)["mean"] == 14.5


def texts(figure):
    return [text.get_text() for ax in figure.axes for text in ax.texts]


def test_a_map_writes_its_numbers_hatches_empty_cells_and_marks_the_best(table):
    fixed = {"reset_strength": 0.5}
    cells = grid.cells(table, "rank", "reset_every", fixed)
    figure = figures.heat_maps([(fixed, cells)])
    written = texts(figure)
    assert {"14.50", "18.50", "15.50", "best", "± 6.35, n = 2"} <= set(written)
    assert written.count("best") == 1
    assert sum(patch.get_hatch() is not None for patch in figure.axes[0].patches) == 1
    assert figure.axes[0].get_xticklabels()[0].get_text() == "never"


def test_numbers_can_be_read_on_light_and_dark_cells(table):
    fixed = {"reset_strength": 1.0}
    figure = figures.heat_maps([(fixed, grid.cells(table, "rank", "reset_every", fixed))])
    inks = {text.get_text(): text.get_color() for text in figure.axes[0].texts}
    assert (inks["14.50"], inks["21.50"]) == ("white", "black")


def test_too_many_maps_for_a_figure_are_refused(table):
    with pytest.raises(InputError, match="fix more knobs"):
        figures.heat_maps(list(grid.maps(table, "rank", "reset_every")) * 7)


@pytest.fixture
def knobs(table):
    """The panel's widgets by their labels, its text and its picture."""
    box = grid_view.panel(table, "rank", "reset_every")
    left, (text, picture, _) = box.children[0].children, box.children[1].children
    return {knob.description: knob for knob in left}, text, picture


def test_a_slider_changes_the_text_and_the_picture(knobs):
    labels, text, picture = knobs
    assert labels["reset strength"].value == 1.0  # the fullest map comes first
    assert text.value.startswith("rank × reset period (steps), reset strength = 1: best = 14.50")
    before = picture.value
    labels["reset strength"].value = 0.5
    assert "reset strength = 0.5" in text.value
    assert "1 of 4 cells have no run" in text.value
    assert picture.value != before
    assert picture.value.startswith("<img alt=")


def test_dropdowns_choose_the_axes_and_sliders_the_rest(knobs):
    labels, text, picture = knobs
    before = picture.value
    labels["across"].value = "reset_strength"
    assert text.value.startswith("rank × reset strength, reset period = never")
    assert not labels["reset period (steps)"].disabled
    assert labels["reset strength"].disabled
    hidden = {name for name, knob in labels.items() if knob.layout.display == "none"}
    assert hidden == {"rank", "reset strength"}  # a knob that spans the map has nothing to fix
    assert picture.value != before


def test_the_same_knob_twice_is_said_in_the_text(knobs):
    labels, text, _ = knobs
    labels["across"].value = "rank"
    assert "must be another knob than row" in text.value


def test_headless_is_a_slider_through_the_maps_and_no_widget(folder):
    shown = grid_view.explore(folder)
    assert len(set(shown.images)) == len(set(shown.texts)) > 1
    assert "cells have no run" not in shown.texts[shown.start]  # it starts at the fullest
    assert all(": best = " in text for text in shown.texts)


@pytest.mark.parametrize(
    ("environment", "live"),
    [
        ({}, False),
        ({"LOWRANK_LAB_LIVE": "1"}, True),
        ({"LOWRANK_LAB_LIVE": "0"}, False),
        ({"SERVER_SOFTWARE": "voila/0.5.13"}, True),
        ({"VOILA_REQUEST_URL": "http://localhost/"}, True),
        ({"SERVER_SOFTWARE": "gunicorn"}, False),
    ],
)
def test_voila_and_the_environment_make_a_notebook_live(monkeypatch, environment, live):
    for name in ("LOWRANK_LAB_LIVE", "SERVER_SOFTWARE", "VOILA_REQUEST_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert widgets.is_live(headless=True) is live
    assert widgets.is_live(headless=False)
