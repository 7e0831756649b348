"""Pictures of a live page: readable on dark pages, unchanged for print, laid out once."""

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.text import Text

from lowrank_lab.figures import Drawing, darkened, live_image, png
from lowrank_lab.figures.page import AS_IS, DARK, MARK, TEXT, _contrast, seen

GREYS = ("black", "0.3", "0.7", "#1f2328")
COLOURS = ("#0072B2", "#D55E00", "#117733", "navy", "#CC79A7")


def drawn():
    figure = Drawing(figsize=(3, 2), layout="constrained")
    ax = figure.subplots()
    ax.plot([1, 2, 3], "o--", color="navy")
    ax.fill_between([0, 1, 2], [1, 2, 3], [2, 3, 4], color="navy", alpha=0.2)
    ax.errorbar([1], [2], yerr=[0.5], fmt="s", color="#0072B2")
    ax.bar([0], [1], color="#117733")
    ax.text(0, 1, "in a cell", color="black", gid=AS_IS)
    ax.set_title("a title")
    ax.plot([3, 2, 1], color="0.4", label="grey")
    figure.legend()
    return figure


def contrast(colour):
    return _contrast(to_rgb(colour), to_rgb(DARK["page"]))


@pytest.mark.parametrize("colour", [*GREYS, *COLOURS])
@pytest.mark.parametrize("least", [TEXT, MARK])
def test_colours_have_contrast_on_a_dark_page_and_are_then_kept(colour, least):
    there = seen(colour, least)
    assert contrast(there[:3]) >= least
    if colour in COLOURS:
        assert np.allclose(seen(there, least), there)


def test_every_text_is_readable_on_a_dark_page_but_those_that_are_kept():
    figure = drawn()
    with darkened(figure):
        assert np.allclose(figure.get_facecolor(), (*to_rgb(DARK["page"]), 1))
        texts = [t for t in figure.findobj(Text) if t.get_text()]
        colours = {t.get_text(): t.get_color() for t in texts if t.get_gid() != AS_IS}
        assert {"a title", "grey"} <= set(colours)
        assert min(map(contrast, colours.values())) >= TEXT
        assert [t.get_color() for t in texts if t.get_gid() == AS_IS] == ["black"]


def test_a_figure_is_for_print_again_after_a_dark_page():
    figure = drawn()
    before = png(figure)
    dark = live_image(figure, dark=True)
    assert dark != live_image(figure)
    assert png(figure) == before


def test_a_layout_is_found_once_for_a_picture(monkeypatch):
    figure = drawn()
    engine, found = figure.get_layout_engine(), []
    monkeypatch.setattr(engine, "execute", found.append)
    live_image(figure)
    assert len(found) == 1
    assert figure.get_layout_engine() is engine
