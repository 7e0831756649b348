"""What a test does in a page: open a notebook, run it, move controls, wait for what they wrote.

Every wait is for a state that says the work is done (a text that a callback wrote, counters of
cells), none for a length of time.
"""

import itertools
import json
import os
import platform
import re

import nbformat
import pytest

from lowrank_lab.runs.collect import copy_run
from lowrank_lab.runs.run import find_runs
from lowrank_lab.studies.job import known_parameters

expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect
EXECUTING = 180_000  # ms that a notebook may take
ANSWERING = 60_000  # ms that a callback may take
_numbers = itertools.count()

# The panel's kernel: there, informed, connected and idle. Idle alone is also said of kernels
# whose connection is not yet there, and what is sent to them is lost.
_READY = """async () => {
    const session = window.jupyterapp?.shell.currentWidget?.sessionContext;
    if (!session) return false;
    await session.ready;
    const kernel = session.session?.kernel;
    if (!kernel) return false;
    await kernel.info;
    return kernel.connectionStatus === 'connected' && kernel.status === 'idle';
}"""
# The error that a cell ended with, 'done' when all cells have run, or '' until then.
_STATE = """() => {
    const panel = window.jupyterapp.shell.currentWidget;
    const cells = panel.content.widgets.map(w => w.model)
        .filter(m => m.type === 'code' && m.sharedModel.getSource().trim());
    for (const cell of cells) {
        for (const output of cell.outputs.toJSON()) {
            if (output.output_type === 'error') return output.ename + ': ' + output.evalue;
        }
    }
    const idle = panel.sessionContext.session.kernel.status === 'idle';
    return idle && cells.every(m => m.executionCount && m.sharedModel.executionState === 'idle')
        ? 'done' : '';
}"""


def with_parameters(notebook, parameters, copy):
    """Write a copy of a notebook that has these parameters, as papermill would."""
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook

    known_parameters(notebook, parameters)
    made = parameterize_notebook(
        load_notebook_node(str(notebook)), parameters, kernel_name="python3", language="python"
    )
    # JupyterLab would ask for it
    made.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3 (ipykernel)"}
    nbformat.write(made, copy)
    return copy


def open_notebook(page, lab, name, parameters):
    """Open a notebook of the copy in JupyterLab, with parameters, and wait for its kernel."""
    number = next(_numbers)
    copy = with_parameters(
        lab.notebooks / f"{name}.ipynb", parameters, lab.notebooks / f"{name}-{number}.ipynb"
    )
    # a workspace of its own: no tabs of the test before
    address = f"{lab.url}lab/workspaces/test-{number}/tree/notebooks/{copy.name}"
    page.goto(f"{address}?token={lab.token}")
    page.wait_for_function(
        "name => window.jupyterapp?.shell.currentWidget?.context?.path === name",
        arg=f"notebooks/{copy.name}",
    )
    page.wait_for_function(_READY)


def run_all(page):
    """Run all cells from the menu, and wait until they have run; a failing cell fails the test."""
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    state = page.wait_for_function(_STATE, timeout=EXECUTING).json_value()
    assert state == "done", state


def wait_for_text(page, text, timeout=ANSWERING):
    """Wait until a widget, or the text beside a published slider, says this (text or pattern)."""
    place = page.locator(".widget-html, .widget-label, .slider output").filter(has_text=text)
    expect(place.first).to_be_visible(timeout=timeout)
    return place.first.inner_text()


def control(page, label):
    """The box of the widget with this label."""
    named = page.locator(".widget-label", has_text=re.compile(f"^{re.escape(label)}$"))
    return page.locator(".widget-inline-hbox").filter(has=named)


def slider(page, label, nth=0):
    """The slider with this label (the nth of them): a widget's handle, or a published page's."""
    published = page.get_by_role("slider", name=label, exact=True)
    return control(page, label).get_by_role("slider").or_(published).nth(nth)


def press(slider, *keys):
    """Move a slider, a dropdown or a box by keyboard."""
    slider.scroll_into_view_if_needed()
    slider.focus()
    for key in keys:
        slider.press(key)


def drag(page, slider, share):
    """Move a slider by mouse, to a share (0 … 1) of its length."""
    slider.scroll_into_view_if_needed()
    track = slider.locator(
        "xpath=ancestor-or-self::*[self::input or contains(@class, 'noUi-base')]"
    )
    box, handle = track.bounding_box(), slider.bounding_box()
    y = handle["y"] + handle["height"] / 2
    if track.evaluate("element => element.tagName") == "INPUT":
        page.mouse.move(box["x"] + box["width"] / 2, y)
    else:
        page.mouse.move(handle["x"] + handle["width"] / 2, y)
    page.mouse.down()
    page.mouse.move(box["x"] + share * box["width"], y, steps=6)
    page.mouse.up()


def choose(page, label, value, nth=0):
    """Choose in a list, as a screen reader would."""
    page.get_by_label(label, exact=True).nth(nth).select_option(value)


def choose_by_mouse(page, label, *keys, nth=0):
    """Open a dropdown by a click, and choose in the open list: the browser draws it, not the page.

    Args:
        keys: pressed in the open list; Enter follows.
    """
    page.get_by_label(label, exact=True).nth(nth).click()
    for key in (*keys, "Enter"):
        page.keyboard.press(key)


def picture(page, nth=0):
    """The source of a panel's picture (the nth that is shown)."""
    image = page.locator(".widget-html img:visible").nth(nth)
    assert image.get_attribute("alt")
    return image.get_attribute("src")


def wait_for_other_picture(page, before, nth=0):
    """Wait until another picture than `before` is shown there, and decoded; its source."""
    page.wait_for_function(
        """([before, nth]) => {
            const shown = [...document.querySelectorAll('.widget-html img')];
            const image = shown.filter(e => e.offsetParent)[nth];
            return image && image.complete && image.naturalWidth > 0 && image.src !== before;
        }""",
        arg=[before, nth],
    )
    return picture(page, nth)


def outputs(page):
    """Texts of all outputs of the notebook that is open, as JSON."""
    return json.dumps(
        page.evaluate(
            "() => window.jupyterapp.shell.currentWidget.content.widgets"
            ".filter(w => w.model.type === 'code').map(w => w.model.outputs.toJSON())"
        )
    )


def growing_run(workplace):
    """A folder with two finished runs of the kept study, and a third that is in training."""
    folder = workplace / f"runs-{next(_numbers)}"
    folder.mkdir()
    one, other, third = find_runs(workplace / "data" / "study" / "memory")[:3]
    for run in (one, other):
        copy_run(run.folder, folder / run.folder.name)
    copy_run(third.folder, folder / "growing")
    (folder / "growing" / "result.json").unlink()
    (folder / "growing" / ".lock").write_text(f"{os.getpid()} on {platform.node()}\n")
    return folder


def button(page, name):
    return page.get_by_role("button", name=name, exact=True)


def rows(page):
    """The rows of the explorer's table."""
    return page.locator(".runs-table tbody tr")


def tab_to(page, selector):
    """Press Tab until an element that the selector matches has the focus."""
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("s => document.activeElement.matches(s)", selector):
            return
    raise AssertionError(f"Tab does not reach {selector}")


def explore(page):
    """Move the explorer's controls: by mouse, by keyboard, and as a screen reader would."""
    wait_for_text(page, re.compile(r"^3 configurations \(3 runs\), validation_loss "), EXECUTING)
    pictures = [picture(page)]
    choose_by_mouse(page, "metric", "Home", "ArrowDown")
    wait_for_text(page, re.compile(r"^3 configurations \(3 runs\), loss against training tokens"))
    pictures.append(wait_for_other_picture(page, pictures[-1]))
    choose(page, "x axis", "step")
    pictures.append(wait_for_other_picture(page, pictures[-1]))

    press(button(page, "spectrum of a layer"), "Enter")
    wait_for_text(page, re.compile(r", layer .*, step = [1-9]"))
    pictures.append(wait_for_other_picture(page, pictures[-1]))
    press(slider(page, "step"), "Home")
    wait_for_text(page, re.compile(r"layer .*, step = 0\b"))
    pictures.append(wait_for_other_picture(page, pictures[-1]))
    drag(page, slider(page, "step"), 1.0)
    pictures.append(wait_for_other_picture(page, pictures[-1]))
    name = page.get_by_label("layer", exact=True).locator("option").last.inner_text()
    choose(page, "layer", name)
    wait_for_text(page, f"layer {name}, step")

    button(page, "metric over training").click()
    wait_for_text(page, re.compile(r"^3 configurations \(3 runs\), loss against step"))
    rows(page).first.click()
    wait_for_text(page, re.compile(r"^1 configuration \(1 run\), loss "))
    press(rows(page).first, "ArrowDown")
    for key in (" ", "ArrowDown", " "):  # the focus has moved on
        page.keyboard.press(key)
    wait_for_text(page, re.compile(r"^3 configurations \(3 runs\), loss "))
    button(page, "sort by loss").click()
    expect(page.locator(".runs-table th[aria-sort=ascending]")).to_have_text(re.compile("loss"))
    page.get_by_label("search", exact=True).fill("state=training")
    wait_for_text(page, "1 of 3 rows, 3 chosen")
    page.get_by_label("search", exact=True).fill("")
    wait_for_text(page, "3 of 3 rows, 3 chosen")
