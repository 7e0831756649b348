"""Voilà serves a notebook as an app, whose controls answer."""

import re
from pathlib import Path

import pytest
from pages_in_browser import (
    ANSWERING,
    EXECUTING,
    button,
    drag,
    explore,
    growing_run,
    picture,
    press,
    rows,
    slider,
    tab_to,
    wait_for_other_picture,
    wait_for_text,
    with_parameters,
)

from benchmarks.many_runs import write_many

NARROW = 390
SMALL = {"model": "tiny", "measured": "tiny", "rank": 4, "batch": 2, "sequence_length": 32}

# The right end of what is farthest right; a table that scrolls in its own box does not count.
RIGHT_END = """() => Math.max(...[...document.querySelectorAll('.widget-box *')]
    .filter(e => e.offsetParent && !e.closest('.runs-table .rows'))
    .map(e => e.getBoundingClientRect().right))"""

# Brightness (0 … 1) of an element's text and of its background.
BRIGHTNESS = """element => {
    const paint = document.createElement('canvas').getContext('2d');
    const style = getComputedStyle(element);
    return [style.color, style.backgroundColor].map(colour => {
        paint.fillStyle = colour;
        paint.fillRect(0, 0, 1, 1);
        const [r, g, b] = paint.getImageData(0, 0, 1, 1).data;
        return (0.3 * r + 0.59 * g + 0.11 * b) / 255;
    });
}"""

# Whether the first pixel of the first picture suits a dark page, or a light one. It is light until
# the page has told the kernel which theme it has.
SUITS = """dark => {
    const visible = picture => picture.offsetParent !== null;
    const image = [...document.querySelectorAll('.widget-html img')].find(visible);
    if (!image?.complete) return false;
    const paint = document.createElement('canvas').getContext('2d');
    paint.drawImage(image, 0, 0);
    const [r, g, b] = paint.getImageData(0, 0, 1, 1).data;
    return (0.3 * r + 0.59 * g + 0.11 * b) / 255 < 0.5 === dark;
}"""


def test_what_fits_answers_under_voila(page, voila, workplace):
    folder = workplace / "notebooks"
    made = with_parameters(
        folder / "06_memory.ipynb", {**SMALL, "headless": False}, folder / "app.ipynb"
    )
    page.goto(voila(made), timeout=EXECUTING)
    wait_for_text(page, "rank = 4", timeout=EXECUTING)
    first = picture(page)

    press(slider(page, "rank"), "ArrowRight")
    wait_for_text(page, "galore, tiny, batch 2 × 32, rank = 8")
    second = wait_for_other_picture(page, first)

    drag(page, slider(page, "batch"), 0.0)
    wait_for_text(page, "galore, tiny, batch 1 × 32, rank = 8")
    wait_for_other_picture(page, second)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("01_one_matrix", {}), ("04_rank_and_reset", {}), ("05_spectra", {}), ("06_memory", SMALL)],
)
def test_controls_and_pictures_fit_a_narrow_dark_page(page, voila, workplace, name, parameters):
    folder = workplace / "notebooks"
    made = with_parameters(
        folder / f"{name}.ipynb", {**parameters, "headless": False}, folder / f"narrow-{name}.ipynb"
    )
    page.set_viewport_size({"width": NARROW, "height": 900})
    page.goto(f"{voila(made)}?theme=dark", timeout=EXECUTING)
    page.locator(".widget-html img:visible").first.wait_for(timeout=EXECUTING)
    assert page.evaluate(RIGHT_END) <= NARROW
    page.wait_for_function(SUITS, arg=True, timeout=ANSWERING)


def test_the_explorer_answers_under_voila(page, voila, workplace):
    notebooks, folder = workplace / "notebooks", growing_run(workplace)
    made = with_parameters(
        notebooks / "07_explorer.ipynb", {"folder": str(folder), "headless": False},
        notebooks / "explorer-app.ipynb",
    )  # fmt: skip
    page.goto(voila(made), timeout=EXECUTING)
    explore(page)


@pytest.fixture(scope="module")
def many(workplace):
    """500 runs; the last four are in training, stopped, failed and broken."""
    write_many(workplace / "many", 500)
    return workplace / "many"


def find_by_keyboard(page, words, count, chosen):
    """Search, and choose the first `count` rows; so many are chosen then."""
    page.get_by_label("search", exact=True).focus()
    page.keyboard.press("Control+A")
    page.keyboard.type(words)
    wait_for_text(page, f"{count} of 57 rows")
    tab_to(page, ".runs-table tbody tr")
    for key in ["Space", *["ArrowDown", "Space"] * (count - 1)]:
        page.keyboard.press(key)
    wait_for_text(page, f"{count} of 57 rows, {chosen} chosen")


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_three_labels_are_found_among_500_runs_by_keyboard_alone(
    page, voila, workplace, many, width, scheme
):
    notebooks = workplace / "notebooks"
    made = with_parameters(
        notebooks / "07_explorer.ipynb", {"folder": str(many), "headless": False},
        notebooks / f"many-{width}.ipynb",
    )  # fmt: skip
    page.set_viewport_size({"width": width, "height": 900})
    page.goto(f"{voila(made)}?theme={scheme}", timeout=EXECUTING)
    wait_for_text(page, re.compile(r"^6 configurations "), timeout=EXECUTING)
    trouble = wait_for_text(page, "1 of 500 broken: ")
    assert "1 of 500 failed: " in trouble

    find_by_keyboard(page, "rank=8 rate=0.003 fira", 1, 1)
    find_by_keyboard(page, "rank=8 rate=0.003 low-rank", 2, 3)
    wait_for_text(page, re.compile(r"^3 configurations \(27 runs\), validation_loss "))
    before = picture(page)

    tab_to(page, ".widget-toggle-button")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    wait_for_text(page, re.compile(r"^3 configurations \(27 runs\), loss against memory"))
    before = wait_for_other_picture(page, before)
    press(button(page, "spectra over training"), "Enter")
    wait_for_text(page, re.compile(r"^3 configurations \(27 runs\), layer .*, 11 steps"))
    wait_for_other_picture(page, before)

    for kind, start in {"PNG": b"\x89PNG", "SVG": b"<?xml", "CSV": b"title,step,index,"}.items():
        with page.expect_download() as download:
            press(button(page, kind), "Enter")
        assert download.value.suggested_filename.startswith("many-heat-model.layers.")
        assert Path(download.value.path()).read_bytes().startswith(start)

    assert page.evaluate(RIGHT_END) <= width
    table = page.locator(".runs-table").bounding_box()
    shown = page.locator(".widget-html img:visible")
    page.wait_for_function(SUITS, arg=scheme == "dark", timeout=ANSWERING)
    image = shown.bounding_box()
    beside = image["x"] > table["x"] + table["width"] - 1
    assert beside == (width > 1000)
    assert image["y"] > table["y"] + table["height"] or beside
    for line in (rows(page).first, page.locator(".runs-table th").first):  # chosen, and a heading
        text, ground = line.evaluate(BRIGHTNESS)
        assert abs(text - ground) > 0.4
        assert (ground < 0.5) == (scheme == "dark")
