"""Figures of chosen runs: means over seeds with intervals, and no two lines alike."""

import numpy as np
import pandas as pd
import pytest

from lowrank_lab.analysis.stats import mean_interval
from lowrank_lab.figures import alt_text, png, svg
from lowrank_lab.figures.run_groups import (
    layer_spectra,
    loss_memory,
    metric_curves,
    metric_table,
)


def metrics(titles=("fira", "galore"), seeds=3):
    rows = [
        {"title": title, "step": step, "tokens_seen": 10.0 * step + seed, "loss": i + seed / step,
         "validation_loss": i + seed if step == 4 else np.nan}
        for i, title in enumerate(titles) for seed in range(seeds) for step in (1, 2, 4)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def texts(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_a_metric_is_a_mean_over_seeds_at_each_step_that_has_it():
    table = metric_table(metrics(), "loss", "tokens_seen")
    assert table.columns.tolist() == ["title", "step", "tokens_seen", "mean", "half_width", "n"]
    row = table[(table["title"] == "galore") & (table["step"] == 2)].iloc[0]
    assert tuple(row[["mean", "half_width", "n"]]) == pytest.approx(mean_interval([1.0, 1.5, 2.0]))
    assert row["tokens_seen"] == 21
    assert metric_table(metrics(), "validation_loss", "step")["step"].tolist() == [4, 4]


def test_curves_have_an_interval_and_say_the_last_mean():
    figure = metric_curves(metric_table(metrics(), "loss", "step"), "loss", "step")
    assert texts(figure) == ["galore: 1.25 ± 0.62 (n = 3)", "fira: 0.25 ± 0.62 (n = 3)"]
    assert len(figure.axes[0].collections) == 2
    single = metric_table(metrics(seeds=1), "loss", "step")
    assert texts(metric_curves(single, "loss", "step")) == ["galore: 1", "fira: 0"]


def test_bytes_are_drawn_in_mib():
    table = metrics().assign(peak_memory_bytes=2**20)
    figure = metric_curves(metric_table(table, "peak_memory_bytes", "step"), "peak_memory_bytes",
                           "step")  # fmt: skip
    assert "peak memory (MiB)" in alt_text(figure)
    assert figure.axes[0].get_lines()[0].get_ydata()[-1] == 1


@pytest.mark.parametrize("width", [3.4, 7.6])
@pytest.mark.parametrize("count", [1, 5, 12])
def test_no_two_titles_look_alike_and_all_are_named(count, width):
    titles = [f"galore, rank {i}, rate 0.00{i}" for i in range(1, count + 1)]
    figure = metric_curves(metric_table(metrics(titles), "loss", "step"), "loss", "step", width)
    lines = figure.axes[0].get_lines()
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == count
    assert [text.partition(":")[0] for text in texts(figure)] == titles[::-1]
    figure.draw_without_rendering()
    legend = figure.legends[0].get_window_extent()
    assert legend.x1 <= figure.bbox.width
    assert legend.y0 >= figure.axes[0].get_window_extent().y1


def test_loss_against_memory_names_each_mark():
    table = pd.DataFrame({"title": ["fira", "galore"], "memory_mib": [4, 5], "n": [3, 1],
                          "mean": [2.0, 1.0], "half_width": [0.1, np.nan]})  # fmt: skip
    figure = loss_memory(table)
    assert texts(figure) == ["fira: 2 ± 0.1 (n = 3)", "galore: 1"]
    assert svg(figure).startswith(b"<?xml")
    assert png(figure, dpi=50)


def test_a_spectrum_leaves_out_values_at_rounding_level():
    table = pd.DataFrame({"title": "fira", "index": [1, 2, 3], "n": 2,
                          "singular_value": [1.0, 0.5, 1e-9]})  # fmt: skip
    figure = layer_spectra(table, "a.layer, step 4")
    assert figure.axes[0].get_lines()[0].get_ydata().tolist() == [1.0, 0.5]
    assert texts(figure) == ["fira (n = 2)"]
