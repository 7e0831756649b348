"""A slider over pictures: all of them inside, words for each, and a start that exists."""

import re

import pytest

from lowrank_lab import figures
from lowrank_lab.config import InputError
from lowrank_lab.widgets.slider import slider


def wave(k):
    figure = figures.Drawing(figsize=(2, 1))
    ax = figure.subplots()
    ax.plot([0, k], [0, 1])
    ax.set_xlabel("step")
    ax.set_ylabel("loss")
    return figure


def alts(body):
    return re.findall(r'<img alt="([^"]*)"', body)


def test_a_picture_says_what_its_figure_shows():
    metadata = {"image/png": {"alt": figures.alt_text(wave(1))}}
    assert wave(1)._repr_mimebundle_() == ({}, metadata)
    assert metadata["image/png"]["alt"] == "loss against step"


def test_a_slider_has_every_picture_inside_and_says_which_is_shown():
    found = slider({4: wave(1), 8.0: wave(2)}, "rank", lambda r: f"loss at rank {r}", start=8.0)
    text = found._repr_html_()
    assert alts(text) == ["loss at rank 4", "loss at rank 8.0"]
    assert text.count('src="data:image/png;base64,') == 2
    assert text.count(" hidden ") == 1
    assert 'value="1"' in text
    assert "rank = 8</output>" in text
    assert 'data-texts="rank = 4|rank = 8"' in text


@pytest.mark.parametrize(
    ("change", "field"),
    [({"figures": {}}, "figures"), ({"start": 3}, "start"), ({"alt": lambda _: " "}, "alt")],
)
def test_a_slider_refuses_what_it_could_not_show(change, field):
    given = {"figures": {1: wave(1)}, "name": "rank", "alt": lambda _: "words"}
    with pytest.raises(InputError) as raised:
        slider(**given | change)
    assert raised.value.field == field
