"""Heat maps of singular values over training, and the means that they show."""

import numpy as np
import pytest

from lowrank_lab.figures import alt_text, png
from lowrank_lab.figures.spectrum_maps import spectra_over_training, spectrum_table
from lowrank_lab.runs.series import Spectra


def spectra(scale=1.0, steps=(0, 10, 20), values=4):
    grid = scale * np.outer(1 + np.arange(len(steps)), 1.0 / (1 + np.arange(values)))
    return Spectra(np.array(steps), grid)


def test_a_table_has_means_over_the_runs_of_a_title():
    table = spectrum_table([("a", spectra(1.0)), ("a", spectra(3.0)), ("b", spectra(5.0))])
    assert table.columns.tolist() == ["title", "step", "index", "singular_value", "n"]
    last = table[(table["title"] == "a") & (table["step"] == 20)]
    np.testing.assert_allclose(last["singular_value"], 2.0 * 3 / np.arange(1, 5))
    assert last["index"].tolist() == [1, 2, 3, 4]
    assert table.groupby("title")["n"].first().tolist() == [2, 1]


def test_means_are_over_the_steps_that_all_runs_have():
    table = spectrum_table([("a", spectra()), ("a", spectra(steps=(0, 10)))])
    assert sorted(set(table["step"])) == [0, 10]


def test_a_table_of_no_runs_is_empty():
    assert spectrum_table([]).columns.tolist() == ["title", "step", "index", "singular_value", "n"]


@pytest.mark.parametrize("width", [3.6, 7.6])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_each_title_has_a_panel_with_the_same_scale(count, width):
    titles = [f"title {i}" for i in range(count)]
    runs = [(title, spectra(i + 1.0, values=2 + i)) for i, title in enumerate(titles)]
    figure = spectra_over_training(spectrum_table(runs), "a.layer", width)
    panels = [ax for ax in figure.axes if ax.get_title(loc="left")]
    assert [ax.get_title(loc="left") for ax in panels] == titles
    scales = {(ax.collections[0].norm.vmin, ax.collections[0].norm.vmax) for ax in panels}
    assert len(scales) == 1
    assert "a.layer" in alt_text(figure)
    assert png(figure, dpi=50)


@pytest.mark.parametrize(
    "one", [spectra(steps=(0,)), spectra(values=1), spectra(0.0), spectra(steps=(5,), values=1)]
)
def test_one_step_one_value_or_only_zeros_are_drawn(one):
    assert png(spectra_over_training(spectrum_table([("a", one)]), "a.layer"), dpi=50)
