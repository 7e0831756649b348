"""Studies and notebooks that come with the library: by name, and copied."""

import json
import re

import pytest
from click.testing import CliRunner
from paths import NOTEBOOKS
from studies import PARAMETERS, write_notebook

from lowrank_lab.cli import main
from lowrank_lab.config import InputError
from lowrank_lab.studies import study_file as reading
from lowrank_lab.studies.shipped import copy_notebooks, find_study, shipped_studies
from lowrank_lab.studies.study_file import load_study


def refusal(*arguments):
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    return line


def test_a_study_of_the_library_is_found_by_its_name():
    assert find_study("quick") == NOTEBOOKS / "studies" / "quick.yaml"
    assert set(shipped_studies()) == {path.stem for path in (NOTEBOOKS / "studies").glob("*.yaml")}


def test_a_file_goes_before_a_study_of_the_library(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quick").mkdir()  # a folder is no file
    assert find_study("quick") == NOTEBOOKS / "studies" / "quick.yaml"
    (tmp_path / "main").write_text("base: {}")
    assert str(find_study("main")) == "main"


@pytest.mark.parametrize("given", [(), ("quik",), ("quick.yaml",), ("notebooks/none.yaml",)])
def test_a_study_that_is_missing_is_answered_with_the_names(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = refusal("study", *given)
    assert all(name in line for name in shipped_studies())


def test_a_missing_notebook_is_reported_before_a_corpus_is_prepared(study_file, monkeypatch):
    monkeypatch.setattr(reading, "check", lambda config: pytest.fail("a corpus was prepared"))
    for key in ("notebook", "compare"):
        path = study_file(**{key: "02_rum"})
        assert f"mine.yaml: {key}: '02_rum' is not allowed; no such notebook" in refusal(
            "study", path
        )


def test_an_error_in_any_run_is_reported_before_a_corpus_is_prepared(study_file, monkeypatch):
    monkeypatch.setattr(reading, "check", lambda config: pytest.fail("a corpus was prepared"))
    with pytest.raises(InputError, match="b: method: 'galor' is not allowed"):
        load_study(study_file(variants={"a": {}, "b": {"method": "galor"}}))


def test_a_comparison_that_lacks_a_parameter_is_reported_before_the_first_run(study_file):
    path = study_file("1")
    write_notebook(path.parent.parent / "empty.ipynb", "folder = ''", "1")
    assert "empty.ipynb: title" in refusal("study", path)


def test_a_notebook_is_looked_for_beside_the_file_then_above_it_then_in_the_library(
    study_file, tmp_path
):
    path = study_file()
    beside, above = path.parent / "02_run.ipynb", path.parent.parent / "02_run.ipynb"
    assert load_study(path, corpora=False).notebook == above
    write_notebook(beside, PARAMETERS, "1")
    assert load_study(path, corpora=False).notebook == beside
    alone = tmp_path / "elsewhere" / "alone" / "mine.yaml"
    alone.parent.mkdir(parents=True)
    alone.write_text(path.read_text())
    assert load_study(alone, corpora=False).notebook == NOTEBOOKS / "02_run.ipynb"


def test_notebooks_are_copied_with_all_that_they_use(tmp_path):
    result = CliRunner().invoke(main, ["notebooks", "copy", str(tmp_path / "mine")])
    assert result.exit_code == 0, result.output
    copied = {str(p.relative_to(tmp_path / "mine")) for p in (tmp_path / "mine").rglob("*.*")}
    assert {"00_start_here.ipynb", "own_method.py", "solutions/05_spectra.ipynb"} <= copied
    assert len([name for name in copied if name[0] == "0"]) == 10
    assert "studies/quick.yaml" in copied
    for name in copied:
        mine, source = ((place / name).read_text() for place in (tmp_path / "mine", NOTEBOOKS))
        if name.endswith(".ipynb"):
            assert "../figures/" not in mine  # pictures of the checkout, which a copy has not
            source = re.sub(r'    "<img .*?>\\n",\n    "\\n",\n', "", source)
        assert mine == source


def test_a_file_that_is_there_is_not_overwritten_and_nothing_is_copied(tmp_path):
    (tmp_path / "own_method.py").write_text("mine")
    assert "own_method.py already" in refusal("notebooks", "copy", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["own_method.py"]
    assert (tmp_path / "own_method.py").read_text() == "mine"
    assert "is not a folder" in refusal("notebooks", "copy", tmp_path / "own_method.py")


def test_the_notebooks_of_an_installed_library_share_the_data_folder_of_the_command_line(
    tmp_path, monkeypatch
):
    from lowrank_lab import paths

    package = tmp_path / "site-packages" / "lowrank_lab"
    (package / "shipped").mkdir(parents=True)
    (package / "shipped" / "notebooks").symlink_to(NOTEBOOKS)
    monkeypatch.setattr(paths, "PACKAGE", package)
    monkeypatch.delenv("LOWRANK_LAB_DATA")
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    inside = copy_notebooks(paths.Path("notebooks"))
    elsewhere = copy_notebooks(tmp_path / "elsewhere")
    assert inside.data.resolve() == tmp_path / "mine" / "data"
    assert elsewhere.data == tmp_path / "elsewhere" / "data"
    for copied in (inside, elsewhere):
        monkeypatch.chdir(copied.files[-1].parent)  # where a kernel of studies/ would work
        assert paths.data_folder() == copied.data.resolve()
        monkeypatch.chdir(tmp_path / "mine")


def test_notebooks_are_listed_with_their_titles():
    listed = json.loads(CliRunner().invoke(main, ["notebooks", "list", "--json"]).stdout)
    assert [row["name"] for row in listed] == sorted(p.stem for p in NOTEBOOKS.glob("*.ipynb"))
    assert listed[1] == {
        "name": "01_one_matrix",
        "title": "One matrix",
        "path": str(NOTEBOOKS / "01_one_matrix.ipynb"),
    }
    lines = CliRunner().invoke(main, ["notebooks", "list"]).stdout.splitlines()
    assert lines[1].split(maxsplit=1) == ["01_one_matrix", "One matrix"]
