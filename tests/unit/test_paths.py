"""The data folder, relative paths, and what the library ships."""

import pytest
from click.testing import CliRunner
from paths import ROOT
from written_runs import write_run

from lowrank_lab import paths
from lowrank_lab.cli import main
from lowrank_lab.paths import data_folder, kept_study, located, shipped_notebooks


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A library that lies where pip puts it, with a kept study; the working directory is empty."""
    package = tmp_path / "site-packages" / "lowrank_lab"
    (package / "shipped" / "data" / "study" / "quick").mkdir(parents=True)
    (package / "shipped" / "notebooks").mkdir()
    monkeypatch.setattr(paths, "PACKAGE", package)
    monkeypatch.delenv("LOWRANK_LAB_DATA")
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    return package


def test_the_data_folder_is_the_one_in_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("LOWRANK_LAB_DATA", str(tmp_path))
    assert data_folder() == tmp_path
    monkeypatch.setenv("LOWRANK_LAB_DATA", "")
    assert data_folder() == ROOT / "data"


def test_an_installed_library_works_in_the_nearest_folder_that_has_corpora(
    installed, tmp_path, monkeypatch
):
    mine = tmp_path / "mine"
    assert data_folder() == mine / "data"
    (tmp_path / "data").mkdir()  # of something else
    assert data_folder() == mine / "data"
    (mine / "data" / "corpora").mkdir(parents=True)
    (mine / "notebooks" / "solutions").mkdir(parents=True)
    monkeypatch.chdir(mine / "notebooks" / "solutions")
    assert data_folder() == mine / "data"


def test_a_path_is_taken_from_here_then_from_the_data_folder_then_from_what_is_shipped(
    installed, tmp_path
):
    mine, shipped = tmp_path / "mine", installed / "shipped" / "data"
    assert located("study/none") == mine / "data" / "study" / "none"
    assert located("study/quick") == shipped / "study" / "quick"
    for place in (mine / "data", mine):
        (place / "study" / "quick").mkdir(parents=True)
        assert located("study/quick").resolve() == place / "study" / "quick"
    assert located(tmp_path) == tmp_path


def test_a_kept_study_of_ones_own_goes_before_the_one_that_is_shipped(installed, tmp_path):
    assert kept_study("quick") == installed / "shipped" / "data" / "study" / "quick"
    own = tmp_path / "mine" / "data" / "study" / "quick"
    own.mkdir(parents=True)
    assert kept_study("quick") == own
    assert kept_study("none") == own.parent / "none"


def test_a_checkout_ships_its_own_folders():
    assert shipped_notebooks() == ROOT / "notebooks"


def test_a_report_on_a_shipped_study_is_written_to_the_data_folder(installed, tmp_path):
    kept = installed / "shipped" / "data" / "study" / "quick"
    write_run(kept / "a", "a", steps=400)
    before = sorted(installed.rglob("*"))
    result = CliRunner().invoke(main, ["report", "study/quick"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "mine" / "data" / "runs" / "kept" / "quick" / "report.html").exists()
    assert sorted(installed.rglob("*")) == before
