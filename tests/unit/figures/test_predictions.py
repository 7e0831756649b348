"""Figures of predictions show every mean with its interval, and equal values on the line."""

import pandas as pd
import pytest

from lowrank_lab import figures
from lowrank_lab.analysis.tables import intervals


def measured():
    rows = [
        (label, size, k + size / 10 + seed / 100)
        for k, label in enumerate(("keep", "reset"))
        for size in (1.0, 10.0, 100.0)
        for seed in range(3)
    ]
    return intervals(
        pd.DataFrame(rows, columns=["label", "size", "error"]), ["label", "size"], "error"
    )


def test_each_label_is_a_line_with_a_bar_per_mean_and_its_last_value_beside_it():
    table = measured()
    figure = figures.interval_lines(table, "size", "error", {"floor": 5.0})
    (ax,) = figure.axes
    keep = table[table["label"] == "keep"]
    line, _, (bars,) = ax.containers[0]
    assert line.get_ydata() == pytest.approx(keep["mean"])
    halves = [(high[1] - low[1]) / 2 for low, high in bars.get_segments()]
    assert halves == pytest.approx(keep["±"])
    assert {t.get_text() for t in ax.texts} == {"keep  10.01", "reset  11.01", "floor  5.00"}
    assert "n = 3" in ax.get_title(loc="right")


def test_a_single_value_has_no_interval_and_is_drawn():
    alone = intervals(
        pd.DataFrame({"label": ["a"], "size": [2.0], "error": [0.5]}), ["label", "size"], "error"
    )
    assert alone["±"].isna().all()
    figures.interval_lines(alone, "size", "error", logy=True).canvas.draw()


def test_values_against_each_other_have_a_panel_per_group_and_a_line_where_they_are_equal():
    table = pd.DataFrame({"way": ["a", "a", "b"], "p": [1.0, 2.0, 4.0], "q": [1.0, 3.0, 8.0]})
    figure = figures.against(table, "p", "q", by="way")
    assert [ax.get_title() for ax in figure.axes] == ["a", "b"]
    for ax in figure.axes:
        assert ax.get_xlim() == ax.get_ylim()
        assert list(ax.lines[0].get_xdata()) == list(ax.lines[0].get_ydata())
    assert list(figure.axes[0].lines[1].get_ydata()) == [1.0, 3.0]
