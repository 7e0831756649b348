"""Kept studies: records as tables, which everything reads as it reads run folders."""

import json
import shutil

import pandas as pd
import pytest
from click.testing import CliRunner
from written_runs import write_run

import lowrank_lab as lab
from lowrank_lab import report
from lowrank_lab.analysis import grid
from lowrank_lab.cli import main
from lowrank_lab.config import InputError, RunConfig
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.runs.collect import copy_run, finished_run, merge
from lowrank_lab.runs.files import append_jsonl, write_json
from lowrank_lab.runs.kept import FILES, KeptStudy, open_study, write_study
from lowrank_lab.runs.parquet import decode, encode, read, to_bytes, without_nulls
from lowrank_lab.runs.records import FolderRecords
from lowrank_lab.runs.run import Run, find_runs, momentum_of, spectra_of
from lowrank_lab.studies.plan import plan_study
from lowrank_lab.studies.study_file import load_study
from lowrank_lab.widgets.run_plots import PLOTS, Choice
from lowrank_lab.widgets.run_view import load_view

ROWS = [
    {"step": 1, "loss": 0.1 + 0.2, "kept": True, "rank": 4, "name": "ä", "size": "byte",
     "values": []},
    {"step": 2, "loss": 5e-324, "kept": None, "rank": None, "name": "", "size": 512,
     "values": [0.2282125, None, 1.799665e-08], "events": [{"event": "reset", "strength": 0.5}]},
    {"step": 2**60 + 1, "loss": 3, "kept": False, "name": None, "size": None, "values": None},
]  # fmt: skip
EVENTS = [
    {"step": 40, "layer": name, "event": "reset", "momentum_cosine": cosine, "momentum_ratio": 0.1}
    for name, cosine in (("q", None), ("v", 0.5))
]


@pytest.fixture
def folder(tmp_path):
    """Run folders: two seeds, spectra of one layer, an event, and weights."""
    for seed in (0, 1):
        write_run(
            tmp_path / "runs" / f"a{seed}", "a", seed, 2 + seed / 3, method="low-rank", rank=4
        )
        write_run(tmp_path / "runs" / f"b{seed}", "b", seed, 3 + seed / 3)
        append_jsonl(tmp_path / "runs" / f"a{seed}" / "spectra.jsonl", EVENTS)
    return tmp_path / "runs"


@pytest.fixture
def kept(folder, tmp_path):
    report.keep(folder, tmp_path / "study" / "one")
    return tmp_path / "study" / "one"


def test_rows_come_back_from_a_table_as_they_were(tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_bytes(to_bytes(encode(ROWS)))
    found = decode(read(path))
    assert [{k: v for k, v in row.items() if v is not None} for row in found] == [
        {k: v for k, v in row.items() if v is not None} for row in ROWS
    ]
    assert "events" not in found[0]  # as it was missing
    assert found[1]["kept"] is None  # as it was there


def test_pandas_reads_a_table_with_its_types(tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_bytes(to_bytes(encode(ROWS)))
    table = pd.read_parquet(path)
    assert table["step"].tolist() == [1, 2, 2**60 + 1]
    assert str(table["rank"].dtype) == "Int64"  # not floats, for the null in it
    assert table["loss"].tolist() == [0.1 + 0.2, 5e-324, 3.0]
    assert table["values"][1].dtype == "float32"
    assert json.loads(table["size"][0]) == "byte"


@pytest.mark.parametrize(
    ("values", "kind"),
    [([0.2282125, 1.799665e-08, 0.0], "float"), ([0.1 + 0.2], "double"), ([1e300], "double")],
)
def test_lists_are_short_only_where_nothing_is_lost(values, kind):
    table = encode([{"values": values}])
    assert str(table.schema.field("values").type) == f"list<item: {kind}>"
    assert decode(table) == [{"values": values}]


def test_a_kept_study_is_read_as_the_run_folders_are(folder, tmp_path):
    write_study(tmp_path / "kept", {p.name: FolderRecords(p) for p in sorted(folder.iterdir())})
    ours, theirs = find_runs(tmp_path / "kept"), find_runs(folder)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.config, a.label, a.ran_on, a.result, a.memory, a.last_layers) == (
            b.config, b.label, b.ran_on, b.result, b.memory, b.last_layers,
        )  # fmt: skip
    pd.testing.assert_frame_equal(lab.load_runs(tmp_path / "kept"), lab.load_runs(folder))
    pd.testing.assert_frame_equal(grid.settings(tmp_path / "kept"), grid.settings(folder))
    for table in (spectra_of, momentum_of):
        pd.testing.assert_frame_equal(table(ours), table(theirs))
    assert len(momentum_of(ours)) == 4
    assert set(momentum_of(ours)["seed"]) == {run.config.seed for run in ours}


def test_layers_are_told_from_steps_by_one_column(kept):
    steps = pd.read_parquet(kept / "steps.parquet")
    metrics, spectra = steps[steps["layer"].isna()], steps[steps["layer"].notna()]
    assert len(metrics) == sum(len(run.records.metrics) for run in find_runs(kept))
    assert len(spectra) == sum(len(run.records.spectra) for run in find_runs(kept))
    assert metrics["loss"].notna().all()
    assert spectra["loss"].isna().all()


def test_of_further_seeds_the_spectra_of_the_last_step_are_kept(folder, tmp_path):
    later = [row | {"step": row["step"] + 100} for row in Run(folder / "a1").records.spectra
             if "event" not in row]  # fmt: skip
    for seed in (0, 1):
        append_jsonl(folder / f"a{seed}" / "spectra.jsonl", later)
    done = CliRunner().invoke(
        main, ["report", str(folder), "--keep", str(tmp_path / "k"), "--keep-spectra", "one-seed"]
    )
    assert done.exit_code == 0, done.output
    whole, last = (Run(tmp_path / "k" / name).records.spectra for name in ("a0", "a1"))
    recorded = FolderRecords(folder / "a0").spectra
    assert list(map(without_nulls, whole)) == list(map(without_nulls, recorded))
    assert [row for row in last if "event" not in row] == later[-1:]
    assert len([row for row in last if "event" in row]) == len(EVENTS)


def test_runs_without_layers_or_without_steps_are_kept(tmp_path):
    bare = {"config.json": {"label": "a", "config": {"seed": 0}}, "result.json": {"test_loss": 2.0}}
    for name, rows in (("steps", [{"step": 1, "loss": 3.0, "events": []}]), ("none", [])):
        place = tmp_path / "runs" / name
        place.mkdir(parents=True)
        for file, facts in bare.items():
            write_json(place / file, facts)
        append_jsonl(place / "metrics.jsonl", rows)
        write_study(tmp_path / name, {"a": FolderRecords(place)})
        found = KeptStudy(tmp_path / name)
        assert found.rows("a", of_layers=False) == rows
        assert found.rows("a", of_layers=True) == []


def test_one_run_of_a_kept_study_is_named_like_a_folder(kept, monkeypatch):
    run = Run(kept / "a1")
    assert (run.config.seed, run.finished) == (1, True)
    assert lab.load_runs(kept / "a1")["run"].unique().tolist() == ["a1"]
    monkeypatch.chdir(kept.parent)
    assert lab.load_runs("one/a1")["run"].unique().tolist() == ["a1"]
    assert load_view(Choice("one/a1")).known == ["a1"]
    with pytest.raises(InputError, match="it has no trained model"):
        lab.load(kept / "a1")
    with pytest.raises(InputError, match="not a run folder"):
        Run(kept / "a7")


def test_the_explorer_shows_a_kept_study(kept):
    views = [load_view(Choice(str(kept), plot=plot)) for plot in PLOTS]
    assert views[0].known == ["a0", "a1", "b0", "b1"]
    assert all(view.figure is not None for view in views)


def test_run_folders_that_were_kept_before_and_tables_are_read_together(kept, folder):
    shutil.copytree(folder / "a0", kept.parent / "old" / "c0")
    assert [str(run.folder.relative_to(kept.parent)) for run in find_runs(kept.parent)] == [
        "old/c0", "one/a0", "one/a1", "one/b0", "one/b1",
    ]  # fmt: skip


def test_a_run_that_studies_share_is_stored_once(kept, folder, tmp_path):
    facts = json.loads((folder / "a0" / "config.json").read_text())
    write_json(folder / "a0" / "config.json", facts | {"label": "renamed"})
    shutil.rmtree(folder / "b1")
    write_run(folder / "b1", "b", 1, 9.0)  # trained again, and it ended otherwise
    done = CliRunner().invoke(main, ["report", str(folder), "--keep", str(kept.parent / "two")])
    assert done.exit_code == 0, done.output
    assert "4 runs, 3 of them stored in one" in done.stdout
    two = kept.parent / "two"
    assert pd.read_parquet(two / "steps.parquet")["run"].unique().tolist() == ["b1"]
    assert [run.label for run in find_runs(two)] == ["renamed", "a", "b", "b"]
    rows = [Run(place / "a0").records.metrics for place in (kept, two)]
    assert rows[0] == rows[1] != []
    assert Run(two / "b1").metrics["loss"].unique() == [9.0]
    shutil.rmtree(kept)
    with pytest.raises(InputError, match="a0 is stored in one"):
        lab.load_runs(two)


def test_what_another_study_refers_to_is_not_changed(kept, folder):
    report.keep(folder, kept.parent / "two")
    before = {path: path.read_bytes() for path in kept.parent.rglob("*.parquet")}
    shutil.rmtree(folder / "a0")
    write_run(folder / "a0", "a", 0, 9.0)
    with pytest.raises(InputError, match="two refers to its a0"):
        report.keep(folder, kept)
    assert {path: path.read_bytes() for path in kept.parent.rglob("*") if path.is_file()} == before


def test_keeping_again_adds_and_replaces_runs(kept, folder):
    shutil.rmtree(folder)
    write_run(folder / "a0", "a", 0, 9.0)
    write_run(folder / "c0", "c")
    report.keep(folder, kept)
    ends = {run.folder.name: run.result["test_loss"] for run in find_runs(kept)}
    assert ends == {"a0": 9.0, "a1": 2 + 1 / 3, "b0": 3.0, "b1": 3 + 1 / 3, "c0": 2.0}


def test_tables_are_not_put_beside_run_folders(folder):
    before = sorted(folder.rglob("*"))
    with pytest.raises(InputError, match="it has run folders"):
        report.keep(folder, folder)
    assert sorted(folder.rglob("*")) == before


def test_two_runs_of_one_name_are_not_kept_as_one(folder, tmp_path):
    shutil.copytree(folder / "a0", folder / "again" / "a0")
    with pytest.raises(InputError, match="two of its runs have the name a0"):
        report.keep(folder, tmp_path / "kept")


@pytest.mark.parametrize("file", FILES)
def test_a_damaged_table_is_refused_in_one_line(kept, file):
    (kept / file).write_bytes(b"PAR1 no more")
    done = CliRunner().invoke(main, ["report", str(kept), "--out", str(kept / "out")])
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert file in line


def test_a_table_that_changed_is_read_again(kept, folder):
    assert open_study(kept) is open_study(kept)
    before = Run(kept / "a0").result["test_loss"]
    shutil.rmtree(folder / "a0")
    write_run(folder / "a0", "a", 0, 9.0)
    report.keep(folder, kept)
    assert (before, Run(kept / "a0").result["test_loss"]) == (2.0, 9.0)


def test_kept_runs_are_taken_over_and_merged_as_run_folders(folder, tmp_path):
    for path in sorted(folder.iterdir()):
        path.rename(folder / Run(path).config.run_id)
    report.keep(folder, tmp_path / "study" / "one", rows=10)
    run = find_runs(tmp_path / "study")[0]
    assert finished_run(run.folder.name, [tmp_path / "none", tmp_path / "study"]) == run.folder
    assert len(merge(tmp_path / "merged", [tmp_path / "study"]).copied) == 4
    copy = Run(tmp_path / "merged" / run.folder.name)
    assert (copy.config, copy.label, copy.result) == (run.config, run.label, run.result)
    pd.testing.assert_frame_equal(copy.metrics, run.metrics)
    pd.testing.assert_frame_equal(copy.spectra, run.spectra)


def test_a_study_chooses_from_a_kept_one(study_file, data, tmp_path):
    fields = {"model": "tiny", "vocab_size": 300, "steps": 10, "rank": 4, "method": "low-rank"}
    for loss, lr in ((3.0, 1e-3), (2.0, 2e-3)):
        place = tmp_path / "made" / f"{lr}"
        place.mkdir(parents=True)
        config = resolve(RunConfig(**fields, lr=lr)).model_dump()
        write_json(place / "config.json", {"config": config})
        write_json(place / "result.json", {"validation_loss": loss})
        append_jsonl(place / "metrics.jsonl", [{"step": 1, "loss": loss, "events": []}])
    report.keep(tmp_path / "made", data / "study" / "kept_tuning")
    select = {"from": "kept_tuning", "edges": "allow"}
    path = study_file(select=select, variants={"a": {"method": "low-rank"}})
    assert [config.lr for _, config in load_study(path).runs.values()] == [2e-3]


def test_a_study_takes_over_the_kept_runs_of_another(study_file, data, tmp_path):
    path = study_file(base={"method": "low-rank", "rank": 4}, seeds=[0, 1])
    run_id, (_, config) = next(iter(load_study(path).runs.items()))
    write_run(tmp_path / "made" / run_id, "old name")
    facts = {"label": "old name", "config": config.model_dump()}
    write_json(tmp_path / "made" / run_id / "config.json", facts)
    report.keep(tmp_path / "made", data / "study" / "reused")
    first, second = plan_study(path, out=tmp_path / "out", reuse=True).jobs
    assert (first.source, second.source) == (data / "study" / "reused" / run_id, None)
    copy_run(first.source, first.folder, "new name")
    taken = Run(first.folder)
    assert (taken.label, taken.finished, taken.config.run_id) == ("new name", True, run_id)
