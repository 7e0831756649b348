"""JupyterLab runs the notebooks, and their controls answer to keyboard and mouse."""

import json
import re
from pathlib import Path

from pages_in_browser import (
    choose,
    choose_by_mouse,
    drag,
    explore,
    growing_run,
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
    images = page.locator(".jp-OutputArea-output img:visible")
    assert images.count() == 4  # two drawings, the trade-off and the loss
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

    choose_by_mouse(page, "method", "Home", "ArrowDown")
    wait_for_text(page, "low-rank, tiny, batch 1 × 32, rank = 8")
    chosen = wait_for_other_picture(page, by_mouse)

    # Home, not an arrow: JupyterLab takes plain arrows for itself unless the list is open
    press(page.get_by_label("method", exact=True), "Home")
    wait_for_text(page, "full-rank, tiny, batch 1 × 32, no rank")
    wait_for_other_picture(page, chosen)


def test_one_matrix_and_what_is_learned_of_it_answer_to_keyboard_and_mouse(page, lab):
    open_notebook(page, lab, "01_one_matrix", {"headless": False})
    run_all(page)
    wait_for_text(page, re.compile(r"^rank = 4, error 0\.26\d\d$"))
    first = picture(page)

    press(slider(page, "rank"), "ArrowRight")
    wait_for_text(page, re.compile(r"^rank = 5, error 0\.2\d\d\d$"))
    by_keyboard = wait_for_other_picture(page, first)

    drag(page, slider(page, "rank"), 1.0)
    wait_for_text(page, "rank = 32, error 0.0000")
    wait_for_other_picture(page, by_keyboard)

    last = page.locator(".widget-html img:visible").count() - 1
    method = page.get_by_label("method", exact=True).count() - 1
    wait_for_text(page, "galore, rank = 4, period = 10, strength = 1, noise = 0.3: error")
    first = picture(page, last)

    choose_by_mouse(page, "method", "End", nth=method)
    wait_for_text(page, re.compile(r"^fira, rank = 4, period = 10, strength = 1, noise = 0\.3: "))
    chosen = wait_for_other_picture(page, first, last)

    press(slider(page, "strength", 1), "ArrowLeft")  # the second panel that has one
    wait_for_text(page, re.compile(r"^fira, rank = 4, period = 10, strength = 0\.9, noise"))
    wait_for_other_picture(page, chosen, last)


def test_the_map_of_rank_and_reset_answers_to_keyboard_and_mouse(page, lab):
    open_notebook(page, lab, "04_rank_and_reset", {"headless": False})
    run_all(page)
    wait_for_text(page, re.compile(r"^rank × reset period \(steps\), .*: best = \d+\.\d+ ± "))
    first = picture(page)

    choose(page, "across", "moments at a refactorization")
    wait_for_text(
        page, re.compile(r"^rank × moments at a refactorization, reset period.*: best = ")
    )
    other_map = wait_for_other_picture(page, first)

    press(slider(page, "reset period (steps)"), "End")
    wait_for_text(page, re.compile(r"^rank × moments at a refactorization, reset period.* 60"))
    fixed = wait_for_other_picture(page, other_map)

    drag(page, slider(page, "reset period (steps)"), 0.0)
    wait_for_other_picture(page, fixed)

    choose(page, "up", "moments at a refactorization")
    wait_for_text(page, "must be another knob than row")


def test_the_explorer_answers_to_keyboard_and_mouse_and_follows_a_run(page, lab, workplace):
    folder = growing_run(workplace)
    open_notebook(page, lab, "07_explorer", {"folder": str(folder), "headless": False})
    run_all(page)
    explore(page)

    text = wait_for_text(page, "growing training at step")
    steps = (folder / "growing" / "metrics.jsonl").read_text().splitlines()
    before = picture(page)
    row = json.loads(steps[-1])
    with (folder / "growing" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row | {"step": 99_999, "tokens_seen": 9e6}) + "\n")
    assert "99999" not in text
    wait_for_text(page, "growing training at step 99999")  # follow is on: a run is in training
    wait_for_other_picture(page, before)
    page.get_by_role("button", name="follow").click()
