"""Published pages: nothing from outside, words for every picture, failures named, wrong input."""

import base64
import json
import re

import nbformat
import pytest
from click.testing import CliRunner
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from paths import ROOT

from lowrank_lab import figures, publish
from lowrank_lab.cli import main
from lowrank_lab.config import InputError
from lowrank_lab.pages import is_live, markdown_of, preformatted, read_notebook
from lowrank_lab.studies.job import known_parameters
from lowrank_lab.widgets.slider import slider

PNG = base64.b64encode(b"not drawn").decode()
STUDY = ROOT / "data" / "study" / "memory"
NOTEBOOKS = publish._notebooks(None)


def page_of(tmp_path, *cells, links=None):
    path = tmp_path / "executed.ipynb"
    nbformat.write(new_notebook(cells=list(cells)), path)
    return read_notebook(path, links or {}, tmp_path)


def drawn(metadata=None, kind="display_data", **data):
    bundle = {name.replace("_", "/"): value for name, value in data.items()} or {"image/png": PNG}
    extra = {"execution_count": 1} if kind == "execute_result" else {}
    return new_output(kind, bundle, metadata=metadata or {}, **extra)


def wave(k):
    figure = figures.Drawing(figsize=(2, 1))
    ax = figure.subplots()
    ax.plot([0, k], [0, 1])
    ax.set_xlabel("step")
    ax.set_ylabel("loss")
    return figure


def alts(body):
    return re.findall(r'<img alt="([^"]*)"', body)


def test_a_picture_says_what_its_figure_shows():
    metadata = {"image/png": {"alt": figures.alt_text(wave(1))}}
    assert wave(1)._repr_mimebundle_() == ({}, metadata)
    assert metadata["image/png"]["alt"] == "loss against step"


def test_a_picture_without_words_gets_the_sentence_that_says_what_to_expect(tmp_path):
    text = "## Loss\n\nHeld-out text. **Expect** a steep start.\n\nThe next cell draws."
    page = page_of(
        tmp_path,
        new_markdown_cell("# Title"),
        new_code_cell("first", outputs=[drawn()]),
        new_markdown_cell(text),
        new_code_cell("second", outputs=[drawn(), drawn({"image/png": {"alt": "loss"}})]),
        new_code_cell("third", outputs=[drawn(text_markdown="**A caption**"), drawn()]),
    )
    expected = ["Title", "Loss: Expect a steep start.", "Loss: loss", "Loss: A caption"]
    assert alts(page.body) == expected


def test_an_unnamed_picture_in_a_notebook_without_text_still_has_words(tmp_path):
    assert alts(page_of(tmp_path, new_code_cell("x", outputs=[drawn()])).body) == ["Figure"]


def test_a_widget_and_a_cell_with_controls_say_that_they_need_a_kernel(tmp_path):
    widget = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "HBox"}
    page = page_of(
        tmp_path,
        new_code_cell("box", outputs=[new_output("display_data", widget)]),
        new_code_cell("explore(runs, headless)", outputs=[drawn()]),
        new_code_cell("with progress(config, headless):\n    pass"),
    )
    assert page.body.count("needs a running kernel: make lab") == 2
    assert "HBox" not in page.body


@pytest.mark.parametrize(
    ("source", "live"),
    [
        ("widgets.what_fits(config, capacity, headless)", True),
        ("panel(headless=headless)", True),
        ("with widgets.progress(config, headless) as on_step:\n    pass", False),
        ("headless: bool = True  # plain", False),
        ("%matplotlib inline\nshow(headless)", False),
    ],
)
def test_only_cells_with_controls_count_as_live(source, live):
    assert is_live(source) is live


def test_formulas_become_mathml_and_what_is_no_formula_stays_readable(tmp_path):
    convert = markdown_of({}, tmp_path)
    assert "<mfrac>" in convert(r"with $W = \frac{\alpha}{r} BA$ inside")
    assert 'display="block"' in convert("$$a,\n\\qquad b$$")
    assert "<mtext>sign</mtext>" in convert(r"$\mathrm{sign}(c)$")
    assert convert("$x_{$") == '<p><i class="math">x_{</i></p>\n'
    assert convert("it costs $5 or $6") == "<p>it costs $5 or $6</p>\n"


def test_names_of_notebooks_lead_to_their_pages(tmp_path):
    convert = markdown_of({"02_run.ipynb": "02_run.html"}, tmp_path)
    both = convert("`02_run.ipynb`, [the run](02_run.ipynb), `other.ipynb`")
    assert both.count('href="02_run.html"') == 2
    assert "<code>other.ipynb</code>" in both


def test_pictures_in_text_are_put_into_the_page_and_never_fetched(tmp_path):
    (tmp_path / "a.png").write_bytes(b"png")
    convert = markdown_of({}, tmp_path)
    assert 'alt="a" src="data:image/png;base64,' in convert("![](a.png)")
    assert "<img" not in convert("![far](https://example.org/a.png)")


def test_of_a_line_that_is_written_over_the_last_state_stays():
    assert preformatted("\x1b[31m10%\r50%\r100%\x1b[0m\n<b>\n") == (
        '<pre class="text" tabindex="0">100%\n&lt;b&gt;</pre>'
    )


def test_a_slider_has_every_picture_inside_and_says_which_is_shown():
    found = slider({4: wave(1), 8.0: wave(2)}, "rank", lambda r: f"loss at rank {r}", start=8.0)
    text = found._repr_html_()
    assert alts(text) == ["loss at rank 4", "loss at rank 8.0"]
    assert text.count('src="data:image/png;base64,') == 2
    assert text.count(" hidden ") == 1
    assert 'value="1"' in text
    assert "rank = 8</output>" in text
    assert 'data-texts="rank = 4|rank = 8"' in text


@pytest.mark.parametrize(
    ("change", "field"),
    [({"figures": {}}, "figures"), ({"start": 3}, "start"), ({"alt": lambda _: " "}, "alt")],
)
def test_a_slider_refuses_what_it_could_not_show(change, field):
    given = {"figures": {1: wave(1)}, "name": "rank", "alt": lambda _: "words"}
    with pytest.raises(InputError) as raised:
        slider(**given | change)
    assert raised.value.field == field


@pytest.mark.parametrize("name", publish.QUICK)
def test_the_quick_settings_are_parameters_of_notebooks_that_exist(name):
    (notebook,) = [path for path in NOTEBOOKS if path.stem == name]
    known_parameters(notebook, publish.QUICK[name])


def test_a_failing_notebook_is_named_and_the_others_are_published(tmp_path, monkeypatch):
    folder = tmp_path / "notebooks"
    folder.mkdir()
    parameters = new_code_cell("n: int = 1  # of", metadata={"tags": ["parameters"]})
    for name, code in {"good": "print(n + 1)", "bad": "n / 0"}.items():
        cells = [new_markdown_cell(f"# The {name} one\n\nSays."), parameters, new_code_cell(code)]
        nbformat.write(new_notebook(cells=cells), folder / f"{name}.ipynb")
    monkeypatch.setattr(publish, "_notebooks", lambda given: sorted(folder.glob("*.ipynb")))
    out = tmp_path / "out"
    done = CliRunner().invoke(main, ["report", "--publish", str(out), str(STUDY)])
    assert done.exit_code == 1, done.exception
    assert re.search(r"^failed: bad: ZeroDivisionError: division by zero; see ", done.stderr, re.M)
    index = (out / "index.html").read_text()
    assert "failed: ZeroDivisionError" in index
    assert index.index("The bad one") < index.index("The good one") < index.index("studies/memory")
    assert '<pre class="text" tabindex="0">2</pre>' in (out / "good.html").read_text()
    assert "shown as far as it went" in (out / "bad.html").read_text()
    for page in out.rglob("*.html"):
        text = page.read_text()
        assert "default-src 'none'" in text
        assert not re.findall(r'(?:src|href)="(?:https?:)?//', text)
        assert all(alts(text))


def test_names_and_error_lines_of_published_notebooks_are_escaped(tmp_path, monkeypatch):
    folder = tmp_path / "notebooks"
    folder.mkdir()
    hostile = "<img src=x onerror=alert(1)>"
    parameters = new_code_cell("n: int = 1  # of", metadata={"tags": ["parameters"]})
    cells = [
        new_markdown_cell(f"# {hostile}"),
        parameters,
        new_code_cell(f"raise OSError({hostile!r})"),
    ]
    nbformat.write(new_notebook(cells=cells), folder / f"{hostile}.ipynb")
    monkeypatch.setattr(publish, "_notebooks", lambda given: sorted(folder.glob("*.ipynb")))
    published = publish.publish(tmp_path / "out", [STUDY])
    assert published.failed
    for page in published.pages[0], published.index:
        assert "<img src=x" not in page.read_text()
        assert "OSError: &lt;img src=x" in page.read_text()


def test_two_studies_of_one_name_are_wrong_input(tmp_path):
    done = CliRunner().invoke(main, ["report", "--publish", "x", "a/same", "b/same"])
    assert (done.exit_code, done.stderr.partition(":")[0]) == (2, "folder")


def test_a_report_without_publish_takes_one_folder(tmp_path):
    done = CliRunner().invoke(main, ["report"])
    assert (done.exit_code, done.stderr.partition(":")[0]) == (2, "folder")
    assert json.dumps(done.stderr).count("\\n") == 1
