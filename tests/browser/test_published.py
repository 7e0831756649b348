"""Published pages answer from a disk, with no kernel and no network."""

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from pages_in_browser import drag, press, slider, wait_for_text
from paths import ROOT

from lowrank_lab.publish import publish

CELLS = [
    new_markdown_cell("# Sine\n\n**Expect** a wave with more crests at larger $k$."),
    new_code_cell("headless: bool = True  # plain", metadata={"tags": ["parameters"]}),
    new_code_cell(
        "import numpy as np\n"
        "from lowrank_lab.figures import Drawing\n"
        "from lowrank_lab.widgets.slider import slider\n"
        "waves, x = {}, np.linspace(0, 6, 200)\n"
        "for k in (1, 2, 4, 8):\n"
        "    waves[k] = Drawing(figsize=(4, 2))\n"
        "    waves[k].subplots().plot(x, np.sin(k * x))\n"
        "slider(waves, 'rank', lambda k: f'sine with {k} crests')"
    ),
]


@pytest.fixture(scope="module")
def pages(browser, tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    (folder / "notebooks").mkdir()
    nbformat.write(new_notebook(cells=CELLS), folder / "notebooks" / "sine.ipynb")
    done = publish(
        folder / "out", [ROOT / "data" / "study" / "memory"], notebooks=folder / "notebooks"
    )
    assert not done.failed
    return folder / "out"


def test_a_published_slider_answers_to_keyboard_and_mouse_without_network(pages, offline_page):
    page, asked = offline_page
    page.goto((pages / "index.html").as_uri())
    page.get_by_role("link", name="Sine").click()
    rank, shown = slider(page, "rank"), ".slider img"
    wait_for_text(page, "rank = 1")
    first = picture_source(page)
    assert page.get_by_alt_text("sine with 1 crests").is_visible()

    press(rank, "ArrowRight", "ArrowRight")
    wait_for_text(page, "rank = 4")
    assert rank.get_attribute("aria-valuetext") == "rank = 4"
    second = picture_source(page)
    assert page.get_by_alt_text("sine with 4 crests").is_visible()

    drag(page, rank, 1.0)
    wait_for_text(page, "rank = 8")
    press(rank, "Home")
    wait_for_text(page, "rank = 1")
    assert page.locator(f"{shown}:visible").count() == 1
    assert first == picture_source(page) != second
    assert not asked


def test_every_page_opens_without_network_and_every_picture_has_words(pages, offline_page):
    page, asked = offline_page
    complaints = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    found = sorted(pages.rglob("*.html"))
    assert [p.name for p in found] == ["index.html", "sine.html", "report.html"]
    for path in found:
        page.goto(path.as_uri())
        for image in page.locator("img").all():
            assert image.get_attribute("alt").strip()
            assert image.evaluate("i => i.complete && i.naturalWidth > 0")
    assert not asked
    assert not complaints


def picture_source(page):
    return page.locator(".slider img:visible").get_attribute("src")
