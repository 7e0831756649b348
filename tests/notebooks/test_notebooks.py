"""Every notebook runs headless under papermill, and leaves no widget state."""

import ast
import itertools
import json
import os
import re
import subprocess
import sys

import pytest
from paths import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SOLUTIONS = sorted((ROOT / "notebooks" / "solutions").glob("*.ipynb"))
SHORT = {
    "solutions/05_spectra": {
        "corpus": f"text:{ROOT / 'lowrank_lab'}",
        "folder": "{tmp}/runs",
        "steps": 80,
    },
    "solutions/06_memory": {"model": "60m", "card": "1GB"},
    "00_start_here": {"steps": 60, "corpus": f"text:{ROOT / 'lowrank_lab'}"},
    "02_run": {"steps": 20, "corpus": "markov", "model": "tiny"},
    "03_compare": {"out": "{tmp}/compared"},
    "06_memory": {"model": "9m", "rank": 16, "measured": "tiny", "card": "300MB"},
    "08_your_own_method": {
        "steps": 20,
        "corpus": f"text:{ROOT / 'lowrank_lab'}",
        "folder": "{tmp}/runs",
    },
}


@pytest.mark.parametrize(
    "path",
    [*NOTEBOOKS, *(pytest.param(p, marks=pytest.mark.slow) for p in SOLUTIONS)],
    ids=lambda p: f"{p.parent.name}/{p.stem}",
)
def test_a_notebook_runs_headless(path, tmp_path):
    own = f"solutions/{path.stem}" if path in SOLUTIONS else path.stem
    given = SHORT.get(own, {})
    values = [
        part
        for name, value in given.items()
        for part in ("-p", name, str(value).format(tmp=tmp_path))
    ]
    out = tmp_path / "out.ipynb"
    done = subprocess.run(
        [sys.executable, "-m", "papermill", str(path), str(out), *values, "--log-level", "ERROR"],
        cwd=path.parent, capture_output=True, text=True, timeout=900,
        env=os.environ | {"LOWRANK_LAB_DATA": str(tmp_path / "data"), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    notebook = json.loads(out.read_text())
    assert "widgets" not in notebook["metadata"]
    outputs = [o for cell in notebook["cells"] for o in cell.get("outputs", [])]
    assert not [o for o in outputs if o["output_type"] == "error"]
    assert any(
        "image/png" in o.get("data", {}) or "text/html" in o.get("data", {}) for o in outputs
    )


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
def test_a_notebook_has_no_logic_of_its_own(path):
    for kind, source in cells_of(path):
        if kind == "code":
            nodes = ast.walk(ast.parse(source))
            assert not [n for n in nodes if isinstance(n, LOGIC)], source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_exercise_has_an_answer(path):
    text = "\n".join(source for kind, source in cells_of(path) if kind == "markdown")
    exercises = re.findall(r"^(\d+)\. ", text.partition("## Exercises")[2], re.M)
    solution = path.parent / "solutions" / path.name
    assert bool(exercises) == solution.exists()
    if exercises:
        answers = "\n".join(source for _, source in cells_of(solution))
        assert re.findall(r"^## (\d+)\. ", answers, re.M) == exercises
        assert f"`solutions/{path.name}`" in text


LOGIC = ast.FunctionDef | ast.ClassDef | ast.Lambda | ast.While | ast.IfExp | ast.If


def shows(source):
    """Whether a cell of code ends in something that the notebook displays."""
    last = ast.parse(source).body[-1]
    return isinstance(last, ast.Expr)
