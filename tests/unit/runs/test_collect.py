"""Runs of several folders in one: what is copied, what is refused, what the report then says."""

import json

import pytest
from click.testing import CliRunner
from written_runs import write_run

from lowrank_lab import report
from lowrank_lab.cli import main
from lowrank_lab.config import InputError
from lowrank_lab.runs.collect import merge
from lowrank_lab.runs.files import write_json
from lowrank_lab.runs.run import Run, find_runs


def change(path, **values):
    write_json(path, json.loads(path.read_text()) | values)


@pytest.fixture
def two(tmp_path):
    """Folders of two machines: a seed of each, and one that both have."""
    for name, seeds in (("here", (0, 1)), ("there", (1, 2))):
        for seed in seeds:
            folder = tmp_path / name / f"run{seed}"
            write_run(folder, "a", seed, 2 + seed / 10)
            change(folder / "config.json", ran_on={"device": f"cpu of {name}", "torch": "2"})
    change(tmp_path / "there" / "run1" / "result.json", seconds=999)  # another machine's pace
    return tmp_path / "here", tmp_path / "there"


def test_each_run_is_copied_once_under_its_id_and_keeps_what_it_ran_on(two, tmp_path):
    merged = merge(tmp_path / "out", two)
    assert (len(merged.copied), len(merged.there)) == (3, 1)
    runs = {run.config.seed: run for run in find_runs(tmp_path / "out")}
    assert all(run.folder.name == run.config.run_id for run in runs.values())
    assert {s: run.ran_on["device"] for s, run in runs.items()} == {
        0: "cpu of here", 1: "cpu of here", 2: "cpu of there",
    }  # fmt: skip
    assert runs[2].result["test_loss"] == 2.2
    assert (runs[2].folder / "model.safetensors").read_bytes() == b"weights"


def test_merging_again_copies_nothing(two, tmp_path):
    merge(tmp_path / "out", two)
    merged = merge(tmp_path / "out", two)
    assert (len(merged.copied), len(merged.there)) == (0, 4)


def test_the_same_run_with_other_results_is_refused_and_nothing_is_copied(two, tmp_path):
    change(two[1] / "run1" / "result.json", test_loss=9.0)
    result = CliRunner().invoke(main, ["merge", str(tmp_path / "out"), *map(str, two)])
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert str(two[0] / "run1") in line
    assert "there/run1" in line
    assert "another test_loss" in line
    assert not (tmp_path / "out").exists()


def test_runs_that_have_not_finished_are_left_out_and_named(two, tmp_path):
    (two[1] / "run2" / "result.json").unlink()
    result = CliRunner().invoke(main, ["merge", str(tmp_path / "out"), *map(str, two)])
    assert result.exit_code == 0, result.output
    assert str(two[1] / "run2") in result.stderr
    assert "2 runs copied" in result.stdout


def test_a_run_in_progress_is_not_overwritten(two, tmp_path):
    unfinished = tmp_path / "out" / Run(two[0] / "run0").config.run_id
    write_run(unfinished, "a", 0)
    (unfinished / "result.json").unlink()
    with pytest.raises(InputError, match="no finished run"):
        merge(tmp_path / "out", two)


@pytest.mark.parametrize("folder", ["none", "empty"])
def test_a_folder_without_runs_is_refused(two, tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no such folder|holds no runs"):
        merge(tmp_path / "out", [two[0], tmp_path / folder])


def test_a_run_whose_id_leads_elsewhere_is_refused(two, tmp_path):
    facts = json.loads((two[0] / "run0" / "config.json").read_text())
    change(two[0] / "run0" / "config.json", config=facts["config"] | {"method": "/../../../x"})
    with pytest.raises(InputError, match="no folder can be named after"):
        merge(tmp_path / "deep" / "out", two)
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize(("name", "allowed"), [("result.json", False), ("metrics.jsonl", True)])
def test_links_are_not_followed(two, tmp_path, name, allowed):
    secret = tmp_path / "secret"
    (two[0] / "run0" / name).rename(secret)
    (two[0] / "run0" / name).symlink_to(secret)
    if allowed:  # the records are enough
        merge(tmp_path / "out", two)
        assert not list((tmp_path / "out").glob(f"*-s0-*/{name}"))
    else:
        with pytest.raises(InputError, match="links"):
            merge(tmp_path / "out", two)


def test_the_report_says_that_runs_come_from_different_machines(two, tmp_path):
    merge(tmp_path / "out", two)
    text = report.write_report(tmp_path / "out").read_text()
    assert "different machines or versions" in text
    assert "<li>device: cpu of here (2 runs); cpu of there (1 runs)</li>" in text
    assert "<li>torch" not in text  # the same everywhere
    assert report.origins(find_runs(two[0])) == {}


def test_seconds_of_different_machines_are_not_drawn_over_each_other(two, tmp_path):
    merge(tmp_path / "out", two)
    report.write_report(tmp_path / "out")
    report.write_report(two[0])
    assert (two[0] / "figures" / "loss_by_time.png").exists()
    assert not (tmp_path / "out" / "figures" / "loss_by_time.png").exists()
    assert "no figure over time" in (tmp_path / "out" / "report.html").read_text()
    assert "no figure over time" not in (two[0] / "report.html").read_text()


def test_what_runs_say_of_their_machines_is_escaped(two, tmp_path):
    change(two[0] / "run0" / "config.json", ran_on={"<script>": "<script>alert(1)</script>"})
    assert "<script" not in report.write_report(two[0]).read_text()
