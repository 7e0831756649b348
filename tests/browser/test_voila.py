"""Voilà serves a notebook as an app, whose controls answer."""

from pages_in_browser import (
    EXECUTING,
    drag,
    explore,
    growing_run,
    picture,
    press,
    slider,
    wait_for_other_picture,
    wait_for_text,
    with_parameters,
)


def test_what_fits_answers_under_voila(page, voila, workplace):
    small = {"model": "tiny", "measured": "tiny", "rank": 4, "batch": 2, "sequence_length": 32}
    folder = workplace / "notebooks"
    made = with_parameters(
        folder / "06_memory.ipynb", {**small, "headless": False}, folder / "app.ipynb"
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


def test_the_explorer_answers_under_voila(page, voila, workplace):
    notebooks, folder = workplace / "notebooks", growing_run(workplace)
    made = with_parameters(
        notebooks / "07_explorer.ipynb", {"folder": str(folder), "headless": False},
        notebooks / "explorer-app.ipynb",
    )  # fmt: skip
    page.goto(voila(made), timeout=EXECUTING)
    explore(page)
