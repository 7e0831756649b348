"""Drawings of ideas: two variants that say the same, readable on their page, with true numbers."""

import re
from html import escape

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from paths import ROOT
from PIL import Image

from lowrank_lab import figures
from lowrank_lab.figures import ideas


def texts(figure):
    found = [*figure.texts, *(t for ax in figure.axes for t in (*ax.texts, ax.title))]
    return [t for t in found if t.get_text()]


def luminance(colour):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return np.dot(linear, (0.2126, 0.7152, 0.0722))


@pytest.mark.parametrize("name", ideas.IDEAS)
def test_both_variants_say_the_same_and_have_an_alt_text_of_their_own(name):
    light, dark = (ideas.IDEAS[name](dark) for dark in (False, True))
    assert [t.get_text() for t in texts(light)] == [t.get_text() for t in texts(dark)]
    assert figures.alt_text(light) == figures.alt_text(dark) == light.alt
    assert len(light.alt.split()) > 15


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("name", ideas.IDEAS)
def test_texts_are_readable_on_their_page(name, dark):
    figure = ideas.IDEAS[name](dark)
    page = luminance(figure.get_facecolor())
    for text in texts(figure):
        bright, dim = sorted((page, luminance(text.get_color())), reverse=True)
        assert (bright + 0.05) / (dim + 0.05) > 3.8, text.get_text()


def test_the_transported_coordinates_are_those_of_the_same_arrow():
    figure = ideas.turning()
    numbers = [
        [float(x) for x in re.findall(r"-?\d+\.\d", t.get_text().replace("−", "-"))]
        for t in texts(figure)
        if t.get_text().startswith("coordinates")
    ]
    before, kept, moved = (np.hypot(*pair) for pair in numbers)
    assert before == kept == pytest.approx(moved, abs=0.1)


def test_refactorization_keeps_the_products_that_are_drawn():
    words = [t.get_text() for t in texts(ideas.balance()) if "=" in t.get_text()]
    products = [word.partition("= ")[2] for word in words]
    assert sorted(products[:3], reverse=True) == products[3:]


def test_pictures_are_drawn_again_in_their_folder_and_no_others(tmp_path):
    (tmp_path / "shapes_dark.png").touch()
    assert [path.name for path in ideas.redraw(tmp_path)] == ["shapes_dark.png"]
    with Image.open(tmp_path / "shapes_dark.png") as picture:
        assert picture.convert("RGB").getpixel((0, 0)) == (0x12, 0x12, 0x12)
    (tmp_path / "mine.png").touch()
    assert len(ideas.redraw(tmp_path)) == 1
    assert (tmp_path / "mine.png").read_bytes() == b""
    assert ideas.redraw(tmp_path / "nowhere") == []


def test_the_book_shows_each_idea_on_light_and_on_dark_pages_with_its_alt_text():
    pages = "".join(
        (ROOT / "docs" / "explanation" / f"{page}.md").read_text()
        for page in ("methods", "techniques")
    )
    for name, draw in ideas.IDEAS.items():
        for page in ("light", "dark"):
            block = f"ideas/{name}_{page}.png\n:class: only-{page}\n:alt: {draw(False).alt}\n"
            assert block in pages


@pytest.mark.parametrize("name", ideas.IDEAS)
def test_a_notebook_shows_the_variant_of_its_page_and_the_light_one_without_a_style(name):
    light = ideas.IDEAS[name](False)
    html = light._repr_mimebundle_()[0]["text/html"]
    images = re.findall(r'<img alt="[^"]+" src="data:image/png;base64,([^"]+)" ([^>]+)>', html)
    (day, of_day), (night, of_night) = images
    assert day != night
    assert "only-light" in of_day
    assert "hidden" not in of_day
    assert "only-dark" in of_night
    assert " hidden" in of_night
    assert html.count(f'alt="{escape(light.alt)}"') == 2
    assert len(html) < 120_000
