"""The book has a place for every public name, notebook and method, and its checks can fail."""

import importlib
import json
import re

import pytest
from click.testing import CliRunner
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from paths import ROOT, docs_module

import lowrank_lab as lab
from lowrank_lab.cli import main
from lowrank_lab.methods.registry import ROWS
from lowrank_lab.studies.job import known_parameters

DOCS = ROOT / "docs"


chapters, links = docs_module("chapters"), docs_module("links")


def entries(page):
    """Names that a reference page documents."""
    text = (DOCS / "reference" / page).read_text()
    found = re.findall(r"^\.\. (?:auto\w+|py:data):: (\S+?)(?:\(.*\))?$", text, re.M)
    return {name.rpartition(".")[2] for name in found}


def test_every_public_name_has_a_reference_entry():
    assert set(lab.__all__) - {"optim", "__version__"} <= entries("api.md")
    assert set(lab.optim.__all__) <= entries("optimizers.md")


def test_every_field_of_a_configuration_is_in_the_tables_of_the_reference():
    text = (DOCS / "reference" / "run-config.md").read_text()
    names = list(lab.RunConfig.model_fields)
    shown = []
    for first, last in re.findall(r"run-config-fields\} (\w+) (\w+)", text):
        shown += names[names.index(first) : names.index(last) + 1]
    assert shown == names


def test_every_notebook_is_a_chapter():
    index = (DOCS / "notebooks" / "index.md").read_text()
    toctree = re.search(r"\{toctree\}\n:hidden:\n\n(.+?)\n```", index, re.S)[1].split("\n")
    assert toctree == chapters.names()


METHODS_PAGE = (DOCS / "explanation" / "methods.md").read_text()
DESCRIBED = re.findall(r"^\(([\w-]+)\)=\n## \1$", METHODS_PAGE, re.M)


def test_every_method_is_on_the_page_of_methods():
    assert set(DESCRIBED) <= {method.name for method in ROWS}
    assert len(DESCRIBED) >= 15
    assert METHODS_PAGE.endswith("```{more-methods}\n```\n")  # those without a section of their own


@pytest.mark.parametrize("name", DESCRIBED)
def test_a_method_has_its_equations_beside_its_lines(name):
    section = METHODS_PAGE.partition(f"\n({name})=\n## {name}\n")[2].partition("\n## ")[0]
    assert section.count("$$") >= 2
    shown = re.findall(r"\{literalinclude\} \.\./\.\./(\S+)\n.*\n:pyobject: (\S+)", section)
    assert shown
    for file, function in shown:
        assert f" {function.rpartition('.')[2]}(" in (ROOT / file).read_text()


def test_code_that_pages_show_and_types_that_they_document_exist():
    for page in DOCS.rglob("*.md"):
        text = page.read_text()
        for file, name in re.findall(r"\{literalinclude\} (\S+)\n.*\n:pyobject: (\S+)", text):
            source = (page.parent / file).read_text()
            assert re.search(rf"(def|class) {name.rpartition('.')[2]}\b", source), (page.name, name)
        for name in re.findall(r"^\.\. auto\w+:: (lowrank_lab\.[\w.]+)", text, re.M):
            module, _, attribute = name.rpartition(".")
            assert hasattr(importlib.import_module(module), attribute), (page.name, name)


@pytest.mark.parametrize("name", chapters.SHORT)
def test_short_parameters_are_parameters_of_notebooks_that_exist(name):
    known_parameters(chapters.SOURCES / f"{name}.ipynb", chapters.parameters(name))


def test_files_that_pages_link_to_exist():
    for page in DOCS.rglob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            path = page.parent / target
            if path.is_relative_to(DOCS) and path.suffix == ".ipynb":
                path = chapters.SOURCES / path.resolve().relative_to(DOCS / "notebooks")
            assert path.exists(), f"{page.name}: {target}"


def test_a_chapter_says_how_it_ran_and_links_to_the_others():
    injected = new_code_cell("steps = 1", metadata={"tags": ["injected-parameters"]})
    others = "`03_compare.ipynb`, `solutions/01_one_matrix.ipynb`, and `studies/quick.yaml`"
    text = f"# Run\n\nThen {others}."
    made = chapters.chapter(new_notebook(cells=[new_markdown_cell(text), injected]), "02_run")
    assert "[`03_compare`](03_compare.ipynb), [`solutions/01_one_matrix`](solutions/01" in (
        made.cells[0].source
    )
    assert "and `studies/quick.yaml`" in made.cells[0].source
    assert "`steps = 100`" in made.cells[1].source
    assert len(made.cells) == 2


def test_broken_links_foreign_files_and_silent_pictures_are_found(tmp_path):
    (tmp_path / "index.html").write_text(
        '<h1 id="top"></h1><a href="#top">a</a><a href="#none">b</a><a href="gone.html">c</a>'
        '<a href="https://example.org">d</a><script src="https://example.org/x.js"></script>'
        '<img src="data:image/png;base64,AA" alt=" ">'
    )
    assert [line.partition(": ")[2] for line in links.problems(tmp_path)] == [
        "a picture without alt text: data:image/png;base64,AA",
        "loaded from elsewhere: https://example.org/x.js",
        "no such anchor: #none",
        "no such file: gone.html",
    ]


def test_the_option_that_the_book_replaces_is_refused_by_its_name():
    done = CliRunner().invoke(main, ["report", "--publish", "build/pages"])
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("publish: ")
    assert "make docs" in done.stderr


def test_the_page_for_lecturers_has_the_minutes_and_exercises_of_each_notebook():
    text = (DOCS / "how-to" / "teach.md").read_text()
    rows = re.findall(r"\(\.\./notebooks/(\d\d_\w+)\.ipynb\) \| (\d+) \| \d+ \| (\d+) \|", text)
    found = []
    for path in sorted(chapters.SOURCES.glob("*.ipynb")):
        source = "\n".join("".join(c["source"]) for c in json.loads(path.read_text())["cells"])
        minutes = re.search(r"\*\*Time\*\* (\d+) minutes", source)[1]
        exercises = re.findall(r"^\d+\. ", source.partition("## Exercises")[2], re.M)
        found.append((path.stem, minutes, str(len(exercises))))
    assert rows == found
