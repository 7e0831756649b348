"""Notebooks keep to their form: text before outputs, short cells, answered exercises."""

import ast
import importlib.util
import itertools
import json
import re

import pytest
from paths import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SOLUTIONS = sorted((ROOT / "notebooks" / "solutions").glob("*.ipynb"))
LOGIC = ast.ClassDef | ast.Lambda | ast.While


def cells_of(path):
    return [
        (cell["cell_type"], "".join(cell["source"]))
        for cell in json.loads(path.read_text())["cells"]
    ]


every_notebook = pytest.mark.parametrize(
    "path", NOTEBOOKS + SOLUTIONS, ids=lambda p: f"{p.parent.name}/{p.stem}"
)


@every_notebook
def test_there_are_about_two_cells_of_text_to_one_of_code(path):
    kinds = [kind for kind, _ in cells_of(path)]
    assert 1.5 <= kinds.count("markdown") / kinds.count("code") <= 2.75


@every_notebook
def test_no_cell_has_more_than_twelve_lines(path):
    long = [source for _, source in cells_of(path) if len(source.splitlines()) > 12]
    assert not long


@every_notebook
def test_what_a_cell_shows_has_been_announced(path):
    """Text stands between two code cells, unless the first only prepares the second."""
    cells = cells_of(path)
    for (kind, source), (following, _) in itertools.pairwise(cells):
        if kind == following == "code":
            assert not shows(source), source


@every_notebook
def test_its_pictures_are_there_and_have_alternative_texts(path):
    for _, source in cells_of(path):
        assert not re.search(r"!\[.*?\]\(\.\./", source)  # at which Voilà hangs
        for alt, target in re.findall(r'<img alt="(.*?)" src="(.*?)"', source):
            assert len(alt) > 30
            assert (path.parent / target).is_file()


def test_a_code_host_shows_what_the_ideas_look_like():
    shown = {path.stem for path in NOTEBOOKS if 'src="../figures/' in cells_of(path)[0][1]}
    assert {"00_start_here", "01_one_matrix", "03_compare", "05_spectra", "09_why_reset"} <= shown


@every_notebook
def test_no_line_of_a_formula_begins_like_a_list_item(path):
    """Markdown ends the formula there: `$a` and `- b$` on two lines become text and a bullet."""
    for kind, source in cells_of(path):
        within = False
        for line in source.splitlines() if kind == "markdown" else ():
            assert not (within and re.match(r"([-+*]|\d+\.)\s", line)), source
            within = bool(line.strip()) and within != bool(line.count("$") % 2)


@every_notebook
def test_no_sentence_is_broken_where_its_next_line_looks_like_a_list_item(path):
    """Markdown begins a list there: "even above" and "1. Right after" on the next line."""
    texts = [source for kind, source in cells_of(path) if kind == "markdown"]
    for paragraph in re.split(r"\n\s*\n", "\n\n".join(texts)):
        first, *lines = paragraph.strip().splitlines() or [""]
        if not re.match(r"(#|[-+*]\s|\d+[.)]\s)", first):
            assert not [line for line in lines if re.match(r"([-+*]|1[.)])\s", line)], paragraph


def test_what_notebooks_and_their_files_import_exists():
    code = [
        source
        for path in NOTEBOOKS + SOLUTIONS
        for kind, source in cells_of(path)
        if kind == "code"
    ]
    code += [path.read_text() for path in (ROOT / "notebooks").glob("*.py")]
    found = {
        (node.module, name.name)
        for source in code
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("lowrank_lab")
        for name in node.names
    }
    assert len(found) > 40
    for module, name in sorted(found):
        whole = importlib.import_module(module)
        assert hasattr(whole, name) or importlib.util.find_spec(f"{module}.{name}"), (module, name)


@every_notebook
def test_a_notebook_builds_ideas_not_programs(path):
    for kind, source in cells_of(path):
        if kind == "code":
            nodes = ast.walk(ast.parse(source))
            assert not [n for n in nodes if isinstance(n, LOGIC)], source


def functions_of(source):
    """Names of the functions that a piece of code defines outside classes."""
    return [node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]


def test_no_notebook_defines_a_function_that_another_file_needs_too():
    sources = [
        (path, source)
        for path in NOTEBOOKS + SOLUTIONS
        for kind, source in cells_of(path)
        if kind == "code"
    ]
    sources += [(path, path.read_text()) for path in (ROOT / "lowrank_lab").rglob("*.py")]
    homes = {}
    for path, source in sources:
        for name in functions_of(source):
            homes.setdefault(name, set()).add(path)
    shared = {name: places for name, places in homes.items() if len(places) > 1}
    in_notebooks = {n: p for n, p in shared.items() if any(q.suffix == ".ipynb" for q in p)}
    assert not in_notebooks


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_says_what_one_learns_how_long_it_takes_and_what_it_needs(path):
    """Its first cell says so; a summary and exercises close it."""
    title, *_ = texts = [source for kind, source in cells_of(path) if kind == "markdown"]
    assert re.search(r"^\*\*You will learn\*\* ", title, re.M)
    assert re.search(r"\*\*Time\*\* \d+ minutes", title)
    assert "**You need**" in title
    text = "\n".join(texts)
    assert 0 < text.find("\n## Summary") < text.find("\n## Exercises")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_exercise_has_an_answer(path):
    text = "\n".join(source for kind, source in cells_of(path) if kind == "markdown")
    exercises = re.findall(r"^(\d+)\. ", text.partition("## Exercises")[2], re.M)
    solution = path.parent / "solutions" / path.name
    assert bool(exercises) == solution.exists()
    if exercises:
        answers = "\n".join(source for _, source in cells_of(solution))
        assert re.findall(r"^## (\d+)\. ", answers, re.M) == exercises
        assert f"[`solutions/{path.name}`](solutions/{path.name})" in text


def shows(source):
    """Whether a cell of code ends in something that the notebook displays."""
    last = ast.parse(source).body[-1]
    return isinstance(last, ast.Expr)
