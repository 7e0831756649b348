"""The book answers from a disk: search, formulas and sliders, with no request to a network."""

import importlib.util
import shutil
import subprocess
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from pages_in_browser import drag, press, slider, wait_for_text
from paths import ROOT, docs_module

from lowrank_lab.figures import Drawing
from lowrank_lab.widgets import slider as sliders

chapters = docs_module("chapters")

WIDTHS = (1280, 390)


def wave(k):
    figure = Drawing(figsize=(4, 2))
    figure.subplots().plot([0, 1, 2], [0, k, 0])
    return figure


def chapter_with_a_slider():
    """An executed notebook whose only output is a slider over pictures."""
    shown = sliders.slider({k: wave(k) for k in (1, 2, 4, 8)}, "rank", lambda k: f"a peak of {k}")
    output = new_output("execute_result", {"text/html": shown._repr_html_()}, execution_count=1)
    cells = [new_markdown_cell("# Peaks"), new_code_cell("peaks", outputs=[output])]
    language = {"language_info": {"name": "python"}}
    return new_notebook(cells=cells, metadata=language)


@pytest.fixture(scope="session")
def book(browser, tmp_path_factory):
    """The book of this checkout; its chapters are notebooks without outputs, and one slider."""
    for name in ("sphinx", "myst_nb", "sphinx_book_theme", "sphinx_click"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: pip install -e '.[docs]'")
    root = tmp_path_factory.mktemp("checkout")
    for name in ("lowrank_lab", "benchmarks", "figures", "data", "notebooks", "pyproject.toml"):
        (root / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "docs", root / "docs", ignore=shutil.ignore_patterns("*.ipynb"))
    written = root / "docs" / "notebooks"
    (written / "solutions").mkdir(parents=True, exist_ok=True)
    for name in chapters.names():
        notebook = nbformat.read(chapters.SOURCES / f"{name}.ipynb", as_version=4)
        nbformat.write(chapters.chapter(notebook, name), written / f"{name}.ipynb")
    nbformat.write(chapter_with_a_slider(), written / "00_start_here.ipynb")
    out = root / "build" / "docs"
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "docs", str(out)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.fixture
def heard(offline_page):
    """What a page asks of a network, and errors that it reports."""
    page, asked = offline_page
    page.on("pageerror", lambda error: asked.append(str(error)))
    page.on("requestfailed", lambda request: asked.append(request.url))
    page.on("console", lambda m: asked.append(m.text) if m.type == "error" else None)
    return asked


@pytest.mark.parametrize("width", WIDTHS)
def test_every_page_opens_without_network_and_fits(book, offline_page, heard, width):
    page, _ = offline_page
    page.set_viewport_size({"width": width, "height": 900})
    found = [path for path in sorted(book.rglob("*.html")) if "_static" not in path.parts]
    assert len(found) > 40
    for path in found:
        page.goto(path.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path.name
        for image in page.locator("article img").all():
            assert image.get_attribute("alt").strip(), path.name
    assert not heard


@pytest.mark.parametrize("width", WIDTHS)
def test_search_finds_a_method_and_leads_to_it(book, offline_page, heard, width):
    page, _ = offline_page
    page.set_viewport_size({"width": width, "height": 900})
    page.goto((book / "search.html").as_uri())
    page.locator("form.bd-search:visible input[name=q]").first.fill("GaLore")
    page.keyboard.press("Enter")
    page.get_by_role("link", name="lowrank_lab.optim.GaLore").click()
    page.wait_for_url("**/optimizers.html*")
    assert page.locator("[id='lowrank_lab.optim.GaLore']").is_visible()
    assert not heard


@pytest.mark.parametrize("width", WIDTHS)
def test_formulas_are_drawn_beside_the_lines_that_compute_them(book, offline_page, heard, width):
    page, _ = offline_page
    page.set_viewport_size({"width": width, "height": 900})
    page.goto((book / "explanation" / "methods.html").as_uri())
    section = page.locator("section#galore")
    formula = section.locator("mjx-container[display=true] svg").first
    formula.wait_for()
    assert formula.bounding_box()["width"] > 100
    assert "def update_(" in section.locator("pre").first.inner_text()
    assert page.locator("mjx-container [data-mml-node=merror]").count() == 0
    assert not heard


@pytest.mark.parametrize("width", WIDTHS)
def test_a_slider_moves_its_picture(book, offline_page, heard, width):
    page, _ = offline_page
    page.set_viewport_size({"width": width, "height": 900})
    page.goto((book / "notebooks" / "00_start_here.html").as_uri())
    rank, shown = slider(page, "rank"), page.locator(".slider img:visible")
    wait_for_text(page, "rank = 1")
    first = shown.get_attribute("src")

    press(rank, "ArrowRight", "ArrowRight")
    wait_for_text(page, "rank = 4")
    assert rank.get_attribute("aria-valuetext") == "rank = 4"
    assert page.get_by_alt_text("a peak of 4").is_visible()
    assert shown.get_attribute("src") != first

    drag(page, rank, 1.0)
    wait_for_text(page, "rank = 8")
    press(rank, "Home")
    wait_for_text(page, "rank = 1")
    assert shown.count() == 1
    assert shown.get_attribute("src") == first
    assert not heard
