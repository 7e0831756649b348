"""Figures of momentum across events and of losses by position: their tables and what they name."""

import numpy as np
import pandas as pd
import pytest

from lowrank_lab import figures


def finals():
    rows = [
        {"label": label, "method": method, "seed": seed, "test_loss": loss + seed / 10}
        for label, method, loss in (
            ("plain", "low-rank", 3.0),
            ("refactor", "low-rank", 2.9),
            ("transport", "low-rank", 2.8),
            ("muon", "muon", 2.0),
        )
        for seed in (1, 2, 3)
    ]
    return pd.DataFrame(rows)


def momentum():
    rows = [("refactor", -0.1), ("refactor", 0.1), ("transport", 0.8), ("transport", 0.9)]
    return pd.DataFrame(rows, columns=["label", "momentum_cosine"])


def test_cosines_stand_beside_differences_to_labels_of_the_same_method():
    pairs = [("transport", "plain"), ("transport", "refactor"), ("refactor", "plain"),
             ("plain", "refactor"), ("transport", "muon")]  # fmt: skip
    table = figures.cosine_table(finals(), momentum(), pairs)
    assert table["A"].tolist() == ["refactor", "transport", "transport"]
    assert table["B"].tolist() == ["plain", "plain", "refactor"]
    assert table["cosine"].tolist() == pytest.approx([0.0, 0.85, 0.85])
    assert table["cosine of B"].tolist() == pytest.approx([np.nan, np.nan, 0.0], nan_ok=True)
    assert table["difference"].tolist() == pytest.approx([-0.1, -0.2, -0.1])
    text = figures.alt_text(figures.cosine_beside_gain(table))
    assert "transport − plain" in text


def test_without_events_there_is_no_row_and_the_figure_says_so():
    table = figures.cosine_table(finals(), pd.DataFrame(), [("refactor", "plain")])
    assert table.empty
    assert "no event" in figures.alt_text(figures.cosine_beside_gain(table))


def test_losses_by_position_are_means_over_seeds_one_line_an_evaluation():
    rows = [
        (label, seed, step, position, 4 - step / 100 - np.log2(position) / 10 + seed)
        for label in ("a", "b")
        for seed in (0, 1)
        for step in (50, 100)
        for position in (1, 2, 4)
    ]
    table = pd.DataFrame(rows, columns=["label", "seed", "step", "position", "loss"])
    first, second, *_ = figures.position_curves(table).axes
    assert (first.get_title("left"), second.get_title("left")) == ("a", "b")
    early, late = (line.get_ydata() for line in first.get_lines())
    assert early == pytest.approx([4.0, 3.9, 3.8])
    assert late == pytest.approx([3.5, 3.4, 3.3])


@pytest.mark.parametrize(("given", "shown"), [(4, 4), (10, 10), (24, 20)])
def test_each_variant_has_a_panel_of_its_loss_by_position_up_to_twenty(given, shown):
    rows = [(f"variant {i:02}", 1, 10, at, 3.0) for i in range(given) for at in (1, 2)]
    table = pd.DataFrame(rows, columns=["label", "seed", "step", "position", "loss"])
    figure = figures.position_curves(table)
    titles = [ax.get_title("left") for ax in figure.axes if ax.get_visible()]
    assert [title for title in titles if title] == [f"variant {i:02}" for i in range(shown)]
    assert figure.get_size_inches()[0] < 10


def test_runs_that_recorded_no_positions_give_a_figure_that_says_so():
    assert "no run" in figures.alt_text(figures.position_curves(pd.DataFrame()))
