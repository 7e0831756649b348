"""What a test does in a page: open a notebook, run it, move controls, wait for what they wrote.

Every wait is for a state that says the work is done (a text that a callback wrote, counters of
cells), none for a length of time.
"""

import itertools
import json
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
    """A folder with two finished runs of the kept study, and a third that isn't finished."""
    folder = workplace / f"runs-{next(_numbers)}"
    folder.mkdir()
    one, other, third = find_runs(workplace / "data" / "study" / "memory")[:3]
    for run in (one, other):
        copy_run(run.folder, folder / run.folder.name)
    copy_run(third.folder, folder / "growing")
    (folder / "growing" / "result.json").unlink()
    return folder


def explore(page):
    """Move every control of the explorer: by mouse, by keyboard, and as a screen reader would."""
    wait_for_text(page, re.compile(r"^3 runs, validation_loss, layer "), timeout=EXECUTING)
    first = picture(page)
    choose_by_mouse(page, "metric", "Home", "ArrowDown")
    wait_for_text(page, re.compile(r"^3 runs, loss, layer "))
    other_metric = wait_for_other_picture(page, first)

    choose(page, "x axis", "step")
    other_axis = wait_for_other_picture(page, other_metric)

    spectra = picture(page, 1)
    press(slider(page, "step"), "Home")
    wait_for_text(page, re.compile(r"layer .*, step = 0\b"))
    earlier = wait_for_other_picture(page, spectra, 1)
    drag(page, slider(page, "step"), 1.0)
    wait_for_other_picture(page, earlier, 1)

    layer = page.get_by_label("layer", exact=True)
    before = picture(page, 1)
    name = layer.locator("option").last.inner_text()
    choose(page, "layer", name)
    wait_for_text(page, f"layer {name}, step")
    wait_for_other_picture(page, before, 1)

    page.get_by_label("runs", exact=True).locator("option").first.click()
    wait_for_text(page, re.compile(r"^1 run, loss, layer "))
    wait_for_other_picture(page, other_axis)
    page.get_by_label("runs", exact=True).select_option(index=[0, 1, 2])
    wait_for_text(page, re.compile(r"^3 runs, loss, layer "))
