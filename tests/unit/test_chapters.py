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


def test_answers_unfold_below_the_exercises_of_their_chapter(one_notebook, tmp_path):
    path = one_notebook("n")
    exercises = "## Exercises\n\n1. What is n?\n2. And 2n?"
    given = new_code_cell("n = 1", metadata={"tags": ["parameters"]})
    texts = ("# One", exercises, "3. Why?", "## More")
    cells = [*(new_markdown_cell(text) for text in texts), given]
    nbformat.write(new_notebook(cells=cells), tmp_path / "notebooks" / "one.ipynb")
    (tmp_path / "notebooks" / "solutions").mkdir()
    answers = [
        new_markdown_cell("# Answers"), given,
        new_markdown_cell("## 1. The <first>\n\nIt is one."), new_code_cell("n"),
        new_markdown_cell("## 2. The second"), new_code_cell("2 * n"),
    ]  # fmt: skip
    nbformat.write(new_notebook(cells=answers), tmp_path / "notebooks" / "solutions" / "one.ipynb")
    assert chapters.main() == 0
    made = nbformat.read(path, as_version=4)
    nbformat.validate(made)
    sources = [cell.source.strip() for cell in made.cells]
    start, end = sources.index("3. Why?") + 1, sources.index("## More")
    opens = '<details class="answer"><summary>{}</summary>'.format
    assert sources[start:end] == [
        opens("What the answers share"), "n = 1", "</details>",
        opens("1. The &lt;first&gt;"), "It is one.", "n", "</details>",
        opens("2. The second"), "2 * n", "</details>",
    ]  # fmt: skip
    assert made.cells[start + 5].outputs[0]["data"]["text/plain"] == "1"
