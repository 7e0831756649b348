"""A notebook becomes a chapter of the book: executed once, again when it changes, or refused."""

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from paths import docs_module

chapters = docs_module("chapters")


@pytest.fixture
def one_notebook(tmp_path, monkeypatch):
    """Writes the only notebook of a book of its own; returns a function from code to its job."""
    for name, folder in {"SOURCES": "notebooks", "CHAPTERS": "docs", "WORK": "work"}.items():
        monkeypatch.setattr(chapters, name, tmp_path / folder)
    (tmp_path / "notebooks").mkdir()

    def write(code):
        parameters = new_code_cell("n: int = 1  # of", metadata={"tags": ["parameters"]})
        cells = [new_markdown_cell("# One"), parameters, new_code_cell(code)]
        nbformat.write(new_notebook(cells=cells), tmp_path / "notebooks" / "one.ipynb")
        return tmp_path / "docs" / "one.ipynb"

    return write


def test_a_notebook_is_executed_once_until_it_changes(one_notebook, tmp_path):
    path = one_notebook(f"open({str(tmp_path / 'count')!r}, 'a').write('x')")
    assert (chapters.main(), chapters.main()) == (0, 0)
    assert (tmp_path / "count").read_text() == "x"
    assert "executed" in path.read_text()
    one_notebook(f"print(n); open({str(tmp_path / 'count')!r}, 'a').write('x')")
    assert chapters.main() == 0
    assert (tmp_path / "count").read_text() == "xx"


def test_a_failing_notebook_stops_the_book_in_one_line(one_notebook, capsys):
    path = one_notebook("n / 0")
    assert chapters.main() == 1
    assert "one: ZeroDivisionError: division by zero; see " in capsys.readouterr().err
    assert not path.exists()
