"""JupyterLab runs the notebooks, and their controls answer to keyboard and mouse."""

import re
from pathlib import Path

from pages_in_browser import (
    choose,
    drag,
    open_notebook,
    outputs,
    picture,
    press,
    run_all,
    slider,
    wait_for_other_picture,
    wait_for_text,
)

import lowrank_lab


def test_start_here_trains_and_shows_what_it_says(page, lab):
    own_source = Path(lowrank_lab.__file__).parent
    parameters = {"corpus": f"text:{own_source}", "steps": 51, "headless": False}
    open_notebook(page, lab, "00_start_here", parameters)
    run_all(page)
    assert "low-rank + refactor + reset" in outputs(page)
    images = page.locator(".jp-OutputArea-output img")
    assert images.count() == 2
    assert all(image.evaluate("i => i.naturalWidth") > 300 for image in images.all())


def test_what_fits_answers_to_keyboard_and_mouse(page, lab):
    small = {"model": "tiny", "measured": "tiny", "rank": 4, "batch": 2, "sequence_length": 32}
    open_notebook(page, lab, "06_memory", {**small, "headless": False})
    run_all(page)
    wait_for_text(page, "rank = 4")
    first = picture(page)

    press(slider(page, "rank"), "ArrowRight")
    wait_for_text(page, re.compile(r"galore, tiny, batch 2 × 32, rank = 8: peak = \d\.\d+ GB"))
    by_keyboard = wait_for_other_picture(page, first)

    drag(page, slider(page, "batch"), 0.0)
    wait_for_text(page, "galore, tiny, batch 1 × 32, rank = 8")
    by_mouse = wait_for_other_picture(page, by_keyboard)

    choose(page, "method", "low-rank")
    wait_for_text(page, "low-rank, tiny, batch 1 × 32, rank = 8")
    chosen = wait_for_other_picture(page, by_mouse)

    # Home, not an arrow: JupyterLab takes plain arrows for itself unless the list is open
    press(page.get_by_label("method", exact=True), "Home")
    wait_for_text(page, "full-rank, tiny, batch 1 × 32, no rank")
    wait_for_other_picture(page, chosen)
