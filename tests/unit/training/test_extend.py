"""A run with more steps in its folder is the run that had them from the start, bit for bit."""

import json
import shutil

import pytest
from interruptions import assert_same, config_of

from lowrank_lab import InputError, train
from lowrank_lab.config import RunConfig
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.optim.projection import REFRESHES
from lowrank_lab.runs.files import read_jsonl, write_json
from lowrank_lab.runs.run import Run
from lowrank_lab.training import checkpoint, extend, trainer
from lowrank_lab.training.extend import as_extension
from lowrank_lab.training.schedule import learning_rate

METHODS = ("low-rank", "galore", "relora", "spam", "muon")
SHORTER = [*((m, 20) for m in METHODS), *(("full-rank", n) for n in (16, 17, 18, 24))]


def constant(method="full-rank", **values):
    given = {"schedule": "constant", "warmup": 4, "keep_after_finish": True, "checkpoint_every": 2}
    return config_of(method, **{**given, **values})


@pytest.mark.parametrize(("method", "steps"), SHORTER)
def test_an_extended_run_is_one_that_was_never_shorter(method, steps, tmp_path, undisturbed):
    """Evaluations every 6, spectra every 8, resets every 5, refactorizations every 3 steps."""
    longer = constant(method, steps=28)
    train(constant(method, steps=steps), tmp_path)
    extended = train(longer, tmp_path)
    assert_same(extended, undisturbed(longer))
    assert extended.config.run_id == resolve(longer).run_id
    same = ("test_loss", "validation_loss", "best_validation_loss", "best_step", "steps")
    assert [extended.result[n] for n in same] == [undisturbed(longer).result[n] for n in same]
    before = json.loads((tmp_path / f"result.steps-{steps:08d}.json").read_text())
    assert before["steps"] == steps


def test_a_run_can_be_extended_again_and_only_forward(tmp_path, undisturbed):
    for steps in (12, 20, 28):
        run = train(constant(steps=steps), tmp_path)
    assert_same(run, undisturbed(constant(steps=28)))
    with pytest.raises(InputError, match="it has another run, which differs in steps"):
        train(constant(steps=20), tmp_path)
    assert Run(tmp_path).finished


def test_the_final_checkpoint_is_where_it_goes_on(tmp_path, monkeypatch):
    train(constant(steps=24, reset_every=7), tmp_path)
    taken, real = [], trainer.take_step_
    monkeypatch.setattr(trainer, "take_step_", lambda *a, **k: taken.append(a[4]) or real(*a, **k))
    train(constant(steps=28, reset_every=7), tmp_path)
    assert taken == [24, 25, 26, 27]


def test_an_unfinished_run_can_be_extended_too(tmp_path, undisturbed):
    def stop(row):
        if row["step"] == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(constant(steps=20), tmp_path, on_step=stop)
    assert_same(train(constant(steps=28), tmp_path), undisturbed(constant(steps=28)))


def test_an_extension_that_is_interrupted_goes_on(tmp_path, monkeypatch, undisturbed):
    train(constant(steps=20), tmp_path)

    def stop(*_):
        raise KeyboardInterrupt

    # before its configuration is written; before the first step
    for module, name in ((extend, "write_json"), (checkpoint, "newest")):
        monkeypatch.setattr(module, name, stop)
        with pytest.raises(KeyboardInterrupt):
            train(constant(steps=28), tmp_path)
        monkeypatch.undo()
    assert_same(train(constant(steps=28), tmp_path), undisturbed(constant(steps=28)))


def test_cadences_that_follow_from_the_steps_stay(tmp_path):
    free = {"eval_every": None, "spectra_every": None, "checkpoint_every": None}
    relora = {**free, "method_options": {}, "reset_every": 0}
    train(constant("relora", steps=20, **relora), tmp_path)
    run = train(constant("relora", steps=40, **relora), tmp_path)
    config = run.config
    assert (config.eval_every, config.spectra_every, config.steps) == (2, 4, 40)
    assert config.method_options["merge_every"] == 4
    evaluated = [
        r["step"] for r in read_jsonl(tmp_path / "metrics.jsonl") if "validation_loss" in r
    ]
    assert evaluated == list(range(2, 41, 2))


def test_a_warm_up_of_as_many_steps_is_the_same(tmp_path, undisturbed):
    train(constant(steps=20, warmup=0.2), tmp_path)
    with pytest.raises(InputError, match=r"warmup: 0.2 is not allowed; .* for 4 steps: give"):
        train(constant(steps=28, warmup=0.2), tmp_path)
    assert_same(train(constant(steps=28), tmp_path), undisturbed(constant(steps=28)))


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_schedule_that_depends_on_the_steps_is_refused_and_nothing_is_lost(schedule, tmp_path):
    run = train(constant(steps=12, schedule=schedule), tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(InputError, match=f"12 steps, on which its schedule {schedule} depends"):
        train(constant(steps=20, schedule=schedule), tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert run.finished


def test_a_decay_to_the_peak_is_constant(tmp_path, undisturbed):
    given = {"schedule": "cosine", "min_lr_ratio": 1.0}
    train(constant(steps=20, **given), tmp_path)
    longer = constant(steps=28, **given)
    assert_same(train(longer, tmp_path), undisturbed(longer))


@pytest.mark.parametrize("kept", [{"keep_after_finish": False}, {"keep_latest": 1}])
def test_without_a_checkpoint_to_go_on_from_it_is_refused(kept, tmp_path, monkeypatch):
    # with one checkpoint kept, it is of the last step, after which a reset would be due
    train(constant(steps=20, eval_every=40, **kept), tmp_path)
    if kept.get("keep_latest"):
        for found in checkpoint.all_checkpoints(tmp_path / "checkpoints")[:-1]:
            shutil.rmtree(found)
    with pytest.raises(InputError, match="no checkpoint to go on from; keep_after_finish"):
        train(constant(steps=28, eval_every=40, **kept), tmp_path)
    assert Run(tmp_path).finished


def test_another_run_is_not_extended(tmp_path):
    train(constant(steps=12), tmp_path)
    with pytest.raises(InputError, match=r"it has another run, which differs in .*seed"):
        train(constant(steps=20, seed=3), tmp_path)


@pytest.mark.parametrize("warmup", [1, 1.5, 2.5, 20, 21])
def test_a_warm_up_that_is_no_share_and_no_number_of_steps_is_refused(warmup):
    with pytest.raises(InputError, match=f"warmup: {warmup:.1f} is not allowed"):
        RunConfig(steps=20, warmup=warmup)


def test_a_warm_up_in_steps_takes_that_many():
    config = resolve(RunConfig(model="tiny", corpus="markov", steps=50, warmup=5, lr=1.0))
    rates = [learning_rate(step, config) for step in range(6)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_the_default_refresh_has_the_run_id_of_the_svd_that_it_is_on_a_cpu():
    given = {"method": "galore", "rank": 4, "model": "tiny", "corpus": "markov", "steps": 10}
    runs = {r: resolve(RunConfig(**given, method_options={"refresh": r})).run_id for r in REFRESHES}
    assert resolve(RunConfig(**given)).run_id == runs["auto"] == runs["svd"]
    assert len(set(runs.values())) == len(REFRESHES) - 1
    assert resolve(RunConfig(**given)).method_options["refresh"] == "auto"


def test_a_run_of_an_earlier_version_is_extended_with_its_svds(tmp_path):
    given = {"method": "galore", "rank": 4, "model": "tiny", "corpus": "markov", "warmup": 2,
             "schedule": "constant"}  # fmt: skip
    old = resolve(RunConfig(**given, steps=10, method_options={"refresh": "svd"}))
    write_json(tmp_path / "config.json", {"config": old.model_dump()})
    longer = as_extension(RunConfig(**given, steps=20), tmp_path)
    assert longer.method_options == {"refresh": "svd"}
    assert as_extension(RunConfig(**given | {"method": "fira"}, steps=20), tmp_path).steps == 20
