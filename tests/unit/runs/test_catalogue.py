"""A catalogue lists every run of a folder with its state; damage is a state, and hides no other."""

import json
import math
import os
import platform

import pytest
from paths import ROOT

from benchmarks.many_runs import grow, write_many
from lowrank_lab.config import InputError
from lowrank_lab.runs import catalogue
from lowrank_lab.runs.catalogue import folders_with_runs, read_catalogue


@pytest.fixture
def many(tmp_path):
    return tmp_path, write_many(tmp_path, 6, steps=80)


def states(folder):
    return [entry.state for entry in read_catalogue(str(folder))]


def test_every_run_has_a_state_and_a_reason(many):
    entries = read_catalogue(str(many[0]))
    assert [entry.name for entry in entries] == [path.name for path in many[1]]
    assert [e.state for e in entries] == [
        "finished", "finished", "training", "stopped", "failed", "broken",
    ]  # fmt: skip
    assert [e.reason[:30] for e in entries] == [
        "", "", "", "", "loss is not finite", "config.json is damaged: Unterm",
    ]  # fmt: skip


def test_an_entry_has_the_last_step_loss_and_memory(many):
    finished, _, training, *_ = read_catalogue(str(many[0]))
    assert (finished.step, training.step) == (80, 40)
    rows = [json.loads(r) for r in (many[1][2] / "metrics.jsonl").read_text().splitlines()]
    assert training.loss == rows[-1]["validation_loss"]
    assert training.memory == 12e6  # weights and optimizer states
    grow(many[1][2], 60)
    assert read_catalogue(str(many[0]))[2].step == 60


def test_a_run_that_is_read_again_is_the_same_until_a_file_changes(many):
    before, again = (read_catalogue(str(many[0])) for _ in range(2))
    assert all(one is other for one, other in zip(before, again, strict=True))
    grow(many[1][2], 60)
    changed = [a is b for a, b in zip(before, read_catalogue(str(many[0])), strict=True)]
    assert changed == [True, True, False, True, True, True]


def test_a_run_whose_process_has_ended_is_stopped(many):
    lock = many[1][2] / ".lock"
    assert states(many[0])[2] == "training"
    lock.write_text(f"{2**22 + 1} on {platform.node()}\n")  # larger than any process id
    assert states(many[0])[2] == "stopped"
    lock.write_text("")
    assert states(many[0])[2] == "stopped"


def test_a_run_on_another_machine_trains_while_it_writes_steps(many):
    path = many[1][2]
    (path / ".lock").write_text("17 on another-machine\n")
    assert states(many[0])[2] == "training"
    os.utime(path / "metrics.jsonl", (0, 0))
    assert states(many[0])[2] == "stopped"


@pytest.mark.parametrize("text", ["", "[]", "{", '{"config": 3}', '{"config": {}}', "\x00"])
def test_a_damaged_config_breaks_one_run_alone(many, text):
    (many[1][0] / "config.json").write_text(text)
    assert states(many[0])[:2] == ["broken", "finished"]


@pytest.mark.parametrize("file", ["memory.json", "result.json"])
@pytest.mark.parametrize("text", ["", "[]", "{", "3", "\xff"])
def test_a_damaged_record_breaks_one_run_alone(many, file, text):
    (many[1][0] / file).write_bytes(text.encode("latin-1"))
    assert states(many[0])[:2] == ["broken", "finished"]


def test_a_failed_run_that_trains_again_is_training(many):
    (many[1][4] / ".lock").write_text(f"{os.getpid()} on {platform.node()}\n")
    assert states(many[0])[4] == "training"


def test_a_run_before_its_first_evaluation_has_no_loss(many):
    (many[1][2] / "metrics.jsonl").write_text('{"step": 3, "loss": 2.0}\n{"step": 4, "lo')
    entry = read_catalogue(str(many[0]))[2]
    assert entry.step == 3
    assert math.isnan(entry.loss)


def test_a_kept_study_with_a_damaged_table_hides_no_run_folder(many):
    (many[0] / "kept").mkdir()
    (many[0] / "kept" / "runs.parquet").write_bytes(b"PAR1")
    entries = read_catalogue(str(many[0]))
    assert next(e.name for e in entries if e.state == "broken") == many[1][5].name
    assert entries[-1].name == "kept/runs.parquet"
    assert "can't be read" in entries[-1].reason


def test_kept_runs_are_finished_and_have_their_losses():
    entries = read_catalogue(str(ROOT / "data" / "study" / "quick"))
    assert {entry.state for entry in entries} == {"finished"}
    assert all(math.isfinite(entry.loss) and entry.memory > 0 for entry in entries)
    one = read_catalogue(str(entries[0].folder))
    assert [entry.name for entry in one] == [entries[0].folder.name]


@pytest.mark.parametrize("name", ["nowhere", "empty", "file", "hidden"])
def test_a_folder_without_runs_is_refused(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    write_many(tmp_path / "hidden" / ".runs", 4, steps=40)
    with pytest.raises(InputError, match=r"holds no runs|there is no such folder"):
        read_catalogue(str(tmp_path / name))


def test_folders_to_choose_from_hold_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWRANK_LAB_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    write_many(tmp_path / "data" / "runs" / "mine", 4, steps=40)
    write_many(tmp_path / "here", 4, steps=40)
    (tmp_path / "data" / "runs" / "empty").mkdir()
    found = folders_with_runs()
    assert found[0] == "runs/mine"
    assert {"study/quick", "here"} < set(found)
    assert "runs/empty" not in found
    for folder in found:
        assert read_catalogue(folder)


def test_an_entry_is_read_only_once_for_a_stamp(many, monkeypatch):
    read_catalogue(str(many[0]))
    monkeypatch.setattr(catalogue, "Run", None)  # would fail
    assert len(read_catalogue(str(many[0]))) == 6


def test_a_folder_that_cannot_be_listed_is_broken_and_hides_no_run(many, monkeypatch):
    (many[0] / "closed").mkdir()
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    entries = {entry.name: entry for entry in read_catalogue(str(many[0]))}
    assert len(entries) == 7
    assert (entries["closed"].state, entries["closed"].reason) == ("broken", "Permission denied")
