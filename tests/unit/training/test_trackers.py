"""Metrics mirrored to trackers: what they are given, resumed runs, and trackers that fail."""

import sys
import types
import warnings

import pytest
from accelerate.tracking import TensorBoardTracker
from click.testing import CliRunner
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lowrank_lab import InputError, RunConfig
from lowrank_lab.cli import main
from lowrank_lab.runs.run import Run
from lowrank_lab.training.loop import train
from lowrank_lab.training.trackers import VARIABLE

METRICS = ("loss", "lr", "grad_norm", "validation_loss", "optimizer_state_bytes")


@pytest.fixture
def config(text_corpus):
    return RunConfig(
        model="tiny", corpus=text_corpus, vocab_size="byte", num_layers=1, sequence_length=16,
        batch=4, eval_tokens=160, test_tokens=320, method="low-rank", rank=4, steps=6,
        eval_every=3, reset_every=4, recovery_steps=2, checkpoint_every=2,
    )  # fmt: skip


class Notes:
    """A tracker that keeps what it is given."""

    def __init__(self, fails_at=None):
        self.configuration, self.logged, self.finished, self.fails_at = {}, [], 0, fails_at

    def store_init_configuration(self, values):
        self.configuration = values

    def log(self, values, step):
        if step == self.fails_at:
            raise ConnectionError("the server is gone\nand more lines")
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


def scalars(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def expected(run, name):
    rows = run.metrics.dropna(subset=[name]) if name in run.metrics else []
    return [(row["step"], pytest.approx(row[name], rel=1e-6)) for _, row in rows.iterrows()]


def test_tensorboard_has_the_numbers_of_metrics_and_result(config, tmp_path):
    run = train(config, tmp_path / "run", trackers=["tensorboard"])
    found = scalars(run.folder / "tensorboard")
    for name in METRICS:
        assert found[name] == expected(run, name)
        assert len(found[name]) == (2 if name == "validation_loss" else 6)
    assert found["event/reset"] == [(4, 1.0)]
    assert found["final_test_loss"] == [(6, pytest.approx(run.result["test_loss"], rel=1e-6))]


def test_a_resumed_run_has_each_step_once_in_tensorboard(config, tmp_path):
    def stop(row):
        if row["step"] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run", on_step=stop, trackers=["tensorboard"])
    run = train(config, tmp_path / "run", trackers=["tensorboard"])
    assert scalars(run.folder / "tensorboard")["loss"] == expected(run, "loss")


def test_an_own_tracker_gets_configuration_rows_result_and_an_end(config, tmp_path):
    notes = Notes()
    run = train(config, tmp_path / "run", trackers=[notes])
    assert notes.configuration["run"] == "run"
    assert notes.configuration["method"] == "low-rank"
    assert all(isinstance(v, int | float | str | None) for v in notes.configuration.values())
    steps, rows = zip(*notes.logged, strict=True)
    assert steps == (1, 2, 3, 4, 5, 6, 6)
    assert [row["loss"] for row in rows[:-1]] == run.metrics["loss"].tolist()
    assert rows[-1]["final_validation_loss"] == run.result["validation_loss"]
    assert notes.finished == 1


def test_an_interrupted_run_ends_its_trackers(config, tmp_path):
    def stop(row):
        raise KeyboardInterrupt

    notes = Notes()
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run", on_step=stop, trackers=[notes])
    assert notes.finished == 1


def test_trackers_of_accelerate_work_as_they_are(config, tmp_path):
    run = train(config, tmp_path / "run", trackers=[TensorBoardTracker("mine", tmp_path / "logs")])
    assert scalars(tmp_path / "logs" / "mine")["loss"] == expected(run, "loss")


def test_a_class_is_named_by_its_path_in_the_environment_too(config, tmp_path, monkeypatch):
    made = []
    module = types.ModuleType("my_trackers")
    module.Mine = type("Mine", (Notes,), {"__init__": lambda self, run: made.append((self, run))})
    module.Mine.log = module.Mine.store_init_configuration = lambda self, *args, **keys: None
    module.Mine.finish = lambda self: None
    monkeypatch.setitem(sys.modules, "my_trackers", module)
    monkeypatch.setenv(VARIABLE, "tensorboard, my_trackers.Mine")
    run = train(config, tmp_path / "run")
    assert [name for _, name in made] == ["run"]
    assert scalars(run.folder / "tensorboard")["loss"] == expected(run, "loss")


@pytest.mark.parametrize("fails_at", [1, 4])
def test_a_tracker_that_fails_is_dropped_with_one_warning_and_loses_nothing(
    config, tmp_path, fails_at
):
    bad, good = Notes(fails_at), Notes()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = train(config, tmp_path / "run", trackers=[bad, good])
    lines = [str(w.message) for w in caught if "dropped" in str(w.message)]
    assert lines == ["trackers: one is dropped: ConnectionError: the server is gone"]
    assert len(run.metrics) == 6
    assert (len(bad.logged), len(good.logged)) == (fails_at - 1, 7)


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ("wandb", "tensorboard, or module.Class"),
        ("no_such_module.Class", "can't be imported: No module named"),
        ("json.JSONDecoder", "no store_init_configuration"),
        (object(), "no store_init_configuration"),
    ],
)
def test_what_is_no_tracker_is_refused_before_anything_is_written(config, tmp_path, asked, why):
    with pytest.raises(InputError, match=why) as refused:
        train(config, tmp_path / "run", trackers=[asked])
    assert refused.value.field == "trackers"
    assert not (tmp_path / "run").exists()


def test_the_command_line_names_trackers(config, tmp_path):
    folder = tmp_path / "run"
    given = {**config.model_dump(exclude_unset=True), "out": folder, "tracker": "tensorboard"}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    result = CliRunner().invoke(main, ["train", *flags])
    assert result.exit_code == 0, result.output
    assert scalars(folder / "tensorboard")["loss"] == expected(Run(folder), "loss")
    refused = CliRunner().invoke(main, ["train", *flags, "--tracker=none", f"--out={folder}2"])
    assert refused.exit_code == 2
    assert "trackers: 'none'" in refused.output
