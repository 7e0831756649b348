"""A panel redraws for each change, and says at once what takes longer."""

import ipywidgets as ipw
import pytest

from lowrank_lab.config import InputError, RunConfig
from lowrank_lab.figures import Drawing
from lowrank_lab.widgets import notebook
from lowrank_lab.widgets.panel import panel


def texts(box):
    return box.children[1].children[:2]  # text, picture


def test_a_panel_says_something_at_once_and_then_what_is_drawn():
    knob, seen = ipw.IntText(1), []
    made = []

    def draw(values):
        seen.extend(texts(box)[0].value for box in made)
        return Drawing(figsize=(1, 1)), f"drawn {values['k']}"

    made.append(panel({"k": knob}, draw, waiting=lambda values: f"about {values['k']} < 9"))
    text, picture = texts(made[0])
    assert text.value == "drawn 1"
    assert picture.value.startswith("<img")
    knob.value = 2
    assert seen == ["about 2 &lt; 9"]
    assert text.value == "drawn 2"


@pytest.mark.parametrize("fails", ["draw", "waiting"])
def test_what_is_refused_is_a_line_without_a_picture(fails):
    def refuse(values):
        raise InputError("rank", 0, "at least 1")

    draw = refuse if fails == "draw" else lambda values: (Drawing(), "drawn")
    made = panel({"k": ipw.IntText(1)}, draw, waiting=refuse if fails == "waiting" else None)
    text, picture = texts(made)
    assert "at least 1" in text.value
    assert picture.value == ""


def test_a_configuration_that_was_simulated_is_not_simulated_again(monkeypatch):
    shown, simulated = [], []
    monkeypatch.setattr("IPython.display.display", shown.append)
    figure = notebook._step_figure

    def counted(config, capacity):
        simulated.append(config)
        return figure(config, capacity)

    monkeypatch.setattr(notebook, "_measurable", lambda config: False)
    monkeypatch.setattr(notebook, "_step_figure", counted)
    config = RunConfig(model="tiny", method="galore", rank=4, batch=2, sequence_length=32)
    notebook.what_fits(config, 10**9, headless=False)
    knobs = {knob.description: knob for knob in shown[0].children[0].children}
    knobs["rank"].value = 8
    knobs["rank"].value = 4
    assert [one.rank for one in simulated] == [4, 8]
    assert "rank = 4" in texts(shown[0])[0].value
    assert notebook._formula_line(config).startswith("weights + optimizer states = 0.00")


def test_a_panel_follows_the_theme_of_its_page():
    made = panel({"k": ipw.IntText(1)}, lambda values: (Drawing(figsize=(1, 1)), "drawn"))
    picture, theme = made.children[1].children[1:]
    light = picture.value
    theme.dark = True
    assert picture.value.startswith("<img")
    assert picture.value != light
    theme.dark = False
    assert picture.value == light
