"""Run folders become one tidy table, whole or not at all."""

import json
import math

import pandas as pd
import pytest
import torch
from written_runs import write_run

from lowrank_lab import InputError, RunConfig, train
from lowrank_lab.cpu.products import fast_products
from lowrank_lab.memory.formulas import embedding_bytes
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.runs.files import append_jsonl, cut_jsonl, read_jsonl, write_json
from lowrank_lab.runs.run import (
    DESCRIBES,
    Run,
    complete_runs,
    describe,
    final_table,
    finals_of,
    find_runs,
    load_runs,
    momentum_of,
    positions_of,
    spectra_of,
)
from lowrank_lab.training.preflight import check
from lowrank_lab.training.trainer import Trainer


@pytest.fixture(scope="module")
def config(text_corpus):
    return RunConfig(
        model="tiny", corpus=text_corpus, vocab_size="byte", steps=6, sequence_length=16, batch=2,
        num_layers=1, eval_tokens=64, test_tokens=64, eval_every=3, spectra_every=3,
    )  # fmt: skip


@pytest.fixture(scope="module")
def study(config, tmp_path_factory):
    """A folder of three finished runs: two seeds, and a low-rank one with a label."""
    folder = tmp_path_factory.mktemp("study")
    train(config, folder / "full-0")
    train(config.replace(seed=1), folder / "full-1")
    low_rank = config.replace(method="low-rank", refactor_every=2, init="spectral")
    train(low_rank, folder / "deep" / "low", label="the paper's")
    return folder


def pretend(folder, steps=3, finished=True, **values):
    """A run folder written by hand."""
    folder.mkdir(parents=True)
    config = resolve(RunConfig(model="tiny", corpus="markov", steps=steps, **values))
    write_json(folder / "config.json", {"label": None, "config": config.model_dump()})
    append_jsonl(folder / "metrics.jsonl", [{"step": s + 1, "loss": 2.0} for s in range(steps)])
    if finished:
        write_json(folder / "result.json", {"test_loss": 2.0, "steps": steps})
    return folder


# Tables


def test_the_table_has_one_row_for_each_step_of_each_run(study):
    table = load_runs(study)
    steps = table.groupby("run")["step"].apply(list).to_dict()
    assert len(steps) == 3
    assert all(found == [1, 2, 3, 4, 5, 6] for found in steps.values())
    assert table.index.is_unique
    assert table["step"].dtype.kind == "i"


def test_the_table_says_what_each_row_belongs_to(study, config):
    table = load_runs(study)
    assert {"run", "label", *DESCRIBES, "step", "loss", "lr", "tokens_seen"} <= set(table.columns)
    full, low = (table[table["method"] == name] for name in ("full-rank", "low-rank"))
    assert set(full["seed"]) == {0, 1}
    assert full["rank"].isna().all()
    assert set(low["rank"]) == {8}
    assert set(low["init"]) == {"spectral"}
    assert set(low["label"]) == {"the paper's"}
    assert set(full["label"]) == {"full-rank"}
    assert set(table["corpus"]) == {config.corpus}


def test_the_table_holds_what_the_files_hold(study):
    table = load_runs(study)
    table = table[(table["method"] == "full-rank") & (table["seed"] == 1)]
    rows = read_jsonl(study / "full-1" / "metrics.jsonl")
    for column in ("loss", "grad_norm", "tokens_seen", "optimizer_state_bytes"):
        assert table[column].tolist() == [row[column] for row in rows]
    evaluated = table.dropna(subset="validation_loss")
    assert evaluated["step"].tolist() == [3, 6]
    result = Run(study / "full-1").result
    assert set(table["final_test_loss"]) == {result["test_loss"]}
    assert evaluated["validation_loss"].iloc[-1] == result["validation_loss"]


def test_the_peak_and_the_current_learning_rate_are_both_in_the_table(study):
    table = load_runs(study / "full-1")
    columns = [table[column].tolist() for column in table.columns]
    rates = [row["lr"] for row in read_jsonl(study / "full-1" / "metrics.jsonl")]
    assert rates in columns
    assert [max(rates)] * 6 in columns


def test_the_final_table_has_one_row_for_each_run(study):
    table = final_table(load_runs(study))
    assert len(table) == 3
    assert list(table.columns[:2]) == ["run", "label"]
    assert not [column for column in table.columns if column.startswith("final_")]
    assert not {"step", "loss", "grad_norm", "events"} & set(table.columns)
    losses = dict(zip(table["seed"], table["test_loss"], strict=True))
    assert losses[1] == Run(study / "full-1").result["test_loss"]
    assert set(table["steps"]) == {6}


def test_runs_of_one_name_in_two_folders_stay_two_runs(tmp_path):
    pretend(tmp_path / "a" / "run")
    pretend(tmp_path / "b" / "run", seed=1)
    table = load_runs(tmp_path)
    assert table["run"].nunique() == 2
    assert sorted(final_table(table)["seed"]) == [0, 1]


def test_one_run_folder_is_a_table_too(study):
    assert load_runs(study / "full-0")["run"].nunique() == 1


def plain_table(folder):
    """The table of load_runs, read line by line and run by run."""
    tables = []
    for path in sorted(folder.rglob("metrics.jsonl")):
        rows = []
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
        if not rows:
            continue
        known = json.loads((path.parent / "config.json").read_text())
        config = RunConfig(**known["config"])
        facts = {"run": path.parent.relative_to(folder).as_posix()}
        facts["label"] = known["label"] or describe(config)
        facts |= {name: getattr(config, name) for name in DESCRIBES}
        if (result := path.with_name("result.json")).exists():
            ends = json.loads(result.read_text())
            held = [ends.get(f"{name}_bytes", math.nan) for name in ("weight", "optimizer_state")]
            ends["bytes_without_embeddings"] = float(sum(held) - embedding_bytes(config))
            facts |= {f"final_{k}": v for k, v in ends.items() if not isinstance(v, list)}
        tables.append(pd.DataFrame(rows).rename(columns={"lr": "lr_now"}).assign(**facts))
    return pd.concat(tables, ignore_index=True)


def uneven(folder):
    """Runs that differ in columns, in nulls, in types and in how their files end."""
    events = [{"event": "reset", "parameters": [1, {"deep": None}]}]
    pretend(folder / "a", method="low-rank", rank=4)
    cut = pretend(folder / "b", seed=1, finished=False)
    rows = [
        {"step": 4, "loss": 0.1 + 0.2, "lr": 1e-300, "events": events, "peak_memory_bytes": None},
        {"step": 5, "loss": 1, "lr": 0.1, "events": [], "validation_loss": 2.5, "name": "ü\u2028"},
    ]
    append_jsonl(cut / "metrics.jsonl", rows)
    with (cut / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "events": [{"event": "reset"}')
    append_jsonl(pretend(folder / "c" / "d", steps=2) / "metrics.jsonl", [{"step": 3, "lr": None}])
    result = {"test_loss": 1, "entropy": None, "steps": 2**40}
    write_json(folder / "c" / "d" / "result.json", result)
    empty = pretend(folder / "e", finished=False)
    (empty / "metrics.jsonl").write_text('{"step": 1')
    (pretend(folder / "f") / "metrics.jsonl").write_text('{"step": 1}\n\n{"step": 2}\n')
    (pretend(folder / "g") / "metrics.jsonl").write_text('{"step": 1}, {"step": 2}\n')
    (pretend(folder / "h") / "metrics.jsonl").write_text('{"step": 1, "events": [{}\n{}]}\n')


def test_the_table_is_that_of_a_plain_reading_row_by_row(study, tmp_path):
    pd.testing.assert_frame_equal(load_runs(study), plain_table(study), check_exact=True)
    uneven(tmp_path)
    table = load_runs(tmp_path, strict=False)
    pd.testing.assert_frame_equal(table, plain_table(tmp_path), check_exact=True)
    assert list(dict.fromkeys(table["run"])) == ["a", "b", "c/d", "f"]
    assert table.loc[table["run"] == "b", "step"].tolist() == [1, 2, 3, 4, 5]


def test_the_final_table_needs_no_metrics(study, tmp_path):
    uneven(tmp_path)
    for folder in (study, tmp_path):
        finals = finals_of(complete_runs(folder, strict=False), folder)
        expected = final_table(plain_table(folder)).reset_index(drop=True)
        pd.testing.assert_frame_equal(finals, expected, check_exact=True)


def test_a_strict_table_refuses_unfinished_runs_by_name(tmp_path):
    pretend(tmp_path / "done")
    pretend(tmp_path / "half", finished=False, seed=1)
    with pytest.raises(InputError, match=r"folder: .* not finished: .*half$") as caught:
        load_runs(tmp_path)
    assert "done" not in caught.value.allowed
    assert "\n" not in str(caught.value)


def test_a_live_table_takes_what_there_is(tmp_path):
    pretend(tmp_path / "done")
    pretend(tmp_path / "half", finished=False, seed=1, steps=2)
    table = load_runs(tmp_path, strict=False)
    assert table.groupby("seed").size().to_dict() == {0: 3, 1: 2}
    assert table.set_index("seed")["final_test_loss"].isna().to_dict() == {0: False, 1: True}


@pytest.mark.filterwarnings("error")
def test_a_run_that_has_just_begun_adds_no_rows(tmp_path):
    pretend(tmp_path / "done")
    begun = pretend(tmp_path / "begun", finished=False, seed=1)
    (begun / "metrics.jsonl").unlink()
    table = load_runs(tmp_path, strict=False)
    assert table["step"].tolist() == [1, 2, 3]
    assert table["step"].dtype.kind == "i"
    assert set(table["seed"]) == {0}


@pytest.mark.parametrize("strict", [True, False])
def test_a_folder_without_runs_is_refused(tmp_path, strict):
    with pytest.raises(InputError, match=r"folder: .* no such folder"):
        load_runs(tmp_path / "missing", strict)
    (tmp_path / "note.txt").write_text("nothing")
    with pytest.raises(InputError, match=r"folder: .* no runs"):
        load_runs(tmp_path, strict)


def test_runs_come_in_the_order_of_their_names_hidden_ones_left_out(tmp_path):
    for name in ("b", "a", "c/d", ".hidden", "c/.old"):
        pretend(tmp_path / name)
    found = [str(run.folder.relative_to(tmp_path)) for run in find_runs(tmp_path)]
    assert found == ["a", "b", "c/d"]


def test_a_folder_below_a_hidden_one_can_be_read(tmp_path):
    pretend(tmp_path / ".cache" / "runs" / "a")
    assert len(find_runs(tmp_path / ".cache" / "runs")) == 1


# One run


def test_a_run_gives_back_its_configuration(study, config):
    run = Run(study / "full-1")
    assert run.config == resolve(config.replace(seed=1))
    assert run.finished
    assert "full-1" in repr(run)
    assert "unfinished" not in repr(run)


def test_the_model_of_a_run_is_the_one_that_was_trained(config, tmp_path):
    given, corpus = check(config.replace(method="low-rank", refactor_every=2))
    trainer = Trainer(given, corpus, tmp_path / "by hand")
    trainer.resume()
    with fast_products():  # as `train` does
        for _ in range(6):
            trainer.advance()
    run = train(given, tmp_path / "run")
    tokens = torch.randint(257, (3, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        trained, loaded = trainer.model.eval()(tokens), run.model(tokens)
        initial = Trainer(given, corpus, tmp_path / "initial").model(tokens)
    assert torch.equal(trained, loaded)
    assert not torch.allclose(initial, loaded, atol=1e-3)


def test_the_model_of_a_bf16_run_keeps_its_dtype(config, tmp_path):
    run = train(config.replace(precision="bf16"), tmp_path)
    assert {p.dtype for p in run.model.parameters()} == {torch.bfloat16}


def test_spectra_are_one_row_for_each_singular_value(study):
    spectra = Run(study / "full-0").spectra
    assert list(spectra.columns) == ["step", "layer", "index", "singular_value"]
    assert len(spectra) == 3 * 7 * 32  # steps 0, 3 and 6, seven matrices, 32 values each
    for _, one in spectra.groupby(["step", "layer"]):
        assert one["index"].tolist() == list(range(32))
        assert one["singular_value"].is_monotonic_decreasing
    assert Run(study / "deep" / "low").spectra["index"].max() == 7


def test_memory_of_a_run_is_its_breakdown(study):
    memory = Run(study / "full-0").memory
    assert set(memory) >= {"weights", "gradients", "optimizer_states", "activations"}
    assert all(isinstance(value, int) for value in memory.values())


@pytest.mark.parametrize("what", ["result", "model"])
def test_an_unfinished_run_has_neither_result_nor_model(tmp_path, what):
    run = Run(pretend(tmp_path / "half", finished=False))
    assert "unfinished" in repr(run)
    with pytest.raises(InputError, match=r"^run: "):
        getattr(run, what)


def test_a_folder_without_a_configuration_is_no_run(tmp_path):
    with pytest.raises(InputError, match=r"run: .* not a run folder"):
        Run(tmp_path)


def test_a_run_without_rows_has_empty_tables(tmp_path):
    folder = pretend(tmp_path / "begun", finished=False)
    (folder / "metrics.jsonl").unlink()
    assert Run(folder).metrics.empty
    assert Run(folder).spectra.empty
    assert isinstance(Run(folder).metrics, pd.DataFrame)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({}, "full-rank"),
        ({"method": "galore", "reset_every": 20}, "galore + reset"),
        ({"method": "low-rank"}, "low-rank"),
        ({"method": "low-rank", "init": "spectral"}, "low-rank + spectral"),
        ({"method": "low-rank", "refactor_every": 20}, "low-rank + refactor"),
        (
            {"method": "low-rank", "init": "spectral", "refactor_every": 20, "reset_every": 20},
            "low-rank + spectral + refactor + reset",
        ),
    ],
)
def test_a_run_is_called_by_method_and_techniques(values, name):
    assert describe(resolve(RunConfig(**values))) == name


# Files


def test_rows_survive_a_round_trip(tmp_path):
    rows = [{"step": 1, "loss": 0.1 + 0.2, "x": None}, {"step": 2, "name": "ü\n", "e": [{}]}]
    append_jsonl(tmp_path / "a.jsonl", rows[:1])
    append_jsonl(tmp_path / "a.jsonl", rows[1:])
    assert read_jsonl(tmp_path / "a.jsonl") == rows
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 2


def test_rows_of_a_missing_or_empty_file_are_none(tmp_path):
    assert read_jsonl(tmp_path / "missing.jsonl") == []
    (tmp_path / "empty.jsonl").touch()
    assert read_jsonl(tmp_path / "empty.jsonl") == []


LINES = '{"step": 1, "loss": 1.5}\n{"step": 2, "loss": -2.25}\n'


@pytest.mark.parametrize("length", range(len(LINES) + 1))
def test_a_last_line_cut_off_anywhere_is_left_out(tmp_path, length):
    (tmp_path / "a.jsonl").write_text(LINES[:length])
    whole = LINES[:length].count("}")  # a line that lacks only its end is whole
    expected = [{"step": 1, "loss": 1.5}, {"step": 2, "loss": -2.25}][:whole]
    assert read_jsonl(tmp_path / "a.jsonl") == expected


@pytest.mark.parametrize("last", [0, 1, 2, 3, 9])
def test_cutting_drops_the_rows_after_a_step(tmp_path, last):
    rows = [{"step": step, "layer": name} for step in (1, 2, 3) for name in "ab"]
    append_jsonl(tmp_path / "a.jsonl", rows)
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('{"step": 1, "la')
    cut_jsonl(tmp_path / "a.jsonl", last)
    assert read_jsonl(tmp_path / "a.jsonl") == [row for row in rows if row["step"] <= last]
    append_jsonl(tmp_path / "a.jsonl", [{"step": 10}])
    assert read_jsonl(tmp_path / "a.jsonl")[-1] == {"step": 10}
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_cutting_a_missing_file_leaves_no_rows(tmp_path):
    cut_jsonl(tmp_path / "a.jsonl", 5)
    assert read_jsonl(tmp_path / "a.jsonl") == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object()])
def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path, value):
    write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises((ValueError, TypeError)):
        write_json(tmp_path / "a.json", {"new": value})
    assert json.loads((tmp_path / "a.json").read_text()) == {"old": 1}


def test_runs_are_found_by_a_relative_path_in_the_data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWRANK_LAB_DATA", str(tmp_path / "data"))
    write_run(tmp_path / "data" / "study" / "mine" / "a", "a", steps=400)
    assert load_runs("study/mine")["run"].unique().tolist() == ["a"]
    assert load_runs("study")["run"].unique().tolist() == ["mine/a"]


@pytest.mark.parametrize(
    ("table_of_runs", "column", "row"),
    [
        (momentum_of, "momentum_cosine", {"event": "reset", "momentum_cosine": 0.5}),
        (positions_of, "loss", {"validation_loss_by_position": [3.0, 2.0]}),
        (spectra_of, "singular_value", {"singular_values": [2.0, 1.0]}),
    ],
)
def test_runs_without_such_records_leave_the_numbers_of_the_others_numbers(
    table_of_runs, column, row, tmp_path
):
    for label in ("with", "without"):
        write_run(tmp_path / label, label)
        (tmp_path / label / "spectra.jsonl").write_text("")
    file = "metrics.jsonl" if "validation_loss_by_position" in row else "spectra.jsonl"
    append_jsonl(tmp_path / "with" / file, [{"step": 1000, "layer": "a", "events": [], **row}])
    runs = find_runs(tmp_path)
    table = table_of_runs(runs)
    assert set(table["label"]) == {"with"}
    assert table[column].dtype == float
    assert list(table_of_runs([runs[1]])) == list(table)
    assert table_of_runs([]).empty
