"""Nothing is lost: stopped, crowded, damaged and full runs end as if nothing had happened.

Killed runs: tests/slow.
"""

import errno
import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from interruptions import STEPS, assert_same, config_of, fork, rows_of
from safetensors.torch import load_file

from lowrank_lab import InputError, TrainingError, train
from lowrank_lab.runs.files import locked, read_jsonl
from lowrank_lab.runs.run import Run
from lowrank_lab.training import checkpoint, trainer
from lowrank_lab.training.errors import Terminated
from lowrank_lab.training.evaluate import Evaluation
from lowrank_lab.training.monitor import ENOUGH, LossWatch, asked_to_stop


def reported(run, event):
    return [e for row in read_jsonl(run.folder / "metrics.jsonl")
            for e in row["events"] if e["event"] == event]  # fmt: skip


def test_sigterm_finishes_the_step_saves_and_exits_143(tmp_path, data):
    fields = {
        "model": "tiny", "num-layers": 1, "corpus": "markov", "vocab-size": 64, "steps": 20_000,
        "sequence-length": 16, "batch": 4, "checkpoint-every": 20_000, "eval-every": 20_000,
        "spectra-every": 20_000, "out": tmp_path,
    }  # fmt: skip
    flags = [f"--{name}={value}" for name, value in fields.items()]
    command = [sys.executable, "-m", "lowrank_lab.cli", "train", *flags, "--repeat"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
                               env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True)  # fmt: skip
    metrics = tmp_path / "metrics.jsonl"
    while process.poll() is None and (not metrics.exists() or metrics.stat().st_size < 1000):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 143
    last = read_jsonl(metrics)[-1]["step"]
    assert error.splitlines()[-1] == (
        f"stopped after step {last}; started again, it goes on from there"
    )
    (kept,) = checkpoint.all_checkpoints(tmp_path / "checkpoints")
    assert kept.name == f"step-{last:08d}"


def test_a_run_that_was_asked_to_stop_goes_on_as_if_undisturbed(tmp_path, undisturbed):
    config = config_of("galore", checkpoint_every=STEPS)

    def stop(row):
        if row["step"] == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Terminated, match="stopped after step 7;"):
        train(config, tmp_path, on_step=stop)
    assert_same(train(config, tmp_path), undisturbed(config))


def test_outside_a_run_sigterm_does_what_it_did_before(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with asked_to_stop() as stop:
        assert not stop()
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_folder_in_which_another_process_trains_is_refused(tmp_path):
    config = config_of()
    with locked(tmp_path), pytest.raises(InputError, match=f"trains in it: {os.getpid()} on"):
        train(config, tmp_path)
    assert not (tmp_path / "config.json").exists()
    assert train(config, tmp_path).finished  # and is free again
    assert not (tmp_path / ".lock").exists()


def test_a_lock_leaves_nothing_where_nothing_was_written(tmp_path):
    with pytest.raises(KeyboardInterrupt), locked(tmp_path / "run"):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_the_folder_of_a_killed_process_is_free(tmp_path):
    def hold():
        with locked(tmp_path):
            os.kill(os.getpid(), signal.SIGKILL)

    child = fork.Process(target=hold)
    child.start()
    child.join()
    assert (tmp_path / ".lock").exists()
    with locked(tmp_path):
        pass


@contextmanager
def small_disk(folder, size="", options="rw"):
    """A file system of its own, mounted there; a skip where that is not allowed."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size or '1m'},{options}", "tmpfs", str(folder)],
        capture_output=True, check=False,
    ) if os.geteuid() == 0 else None  # fmt: skip
    if done is None or done.returncode:
        pytest.skip("a file system can't be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("size", ["64k", "128k", "320k"])
def test_on_a_full_disk_a_run_stops_in_one_line_and_goes_on_when_there_is_room(
    size, tmp_path, undisturbed
):
    config = config_of("low-rank")
    with small_disk(tmp_path / "disk", size) as disk:
        with pytest.raises(TrainingError, match=os.strerror(errno.ENOSPC)) as caught:
            train(config, disk / "run")
        assert "\n" not in str(caught.value)
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        assert_same(train(config, disk / "run"), undisturbed(config))


def test_where_files_may_not_grow_a_run_stops_in_one_line(tmp_path, undisturbed):
    config = config_of("low-rank")

    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
        try:
            train(config, tmp_path)
        except TrainingError as error:
            os._exit(7 if os.strerror(errno.EFBIG) in str(error) else 8)
        os._exit(9)

    child = fork.Process(target=work)
    child.start()
    child.join()
    assert child.exitcode == 7
    assert_same(train(config, tmp_path), undisturbed(config))


def test_a_read_only_folder_is_refused_before_any_work(tmp_path):
    with small_disk(tmp_path / "disk", options="ro") as disk:
        with pytest.raises(InputError, match="nothing can be written there: Read-only"):
            train(config_of(), disk)
        assert not list(disk.iterdir())


def test_a_clock_that_jumps_changes_nothing(tmp_path, monkeypatch, undisturbed):
    jumps = iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: 1e9 * math.sin(next(jumps)))
    run = train(config_of("galore"), tmp_path)
    assert_same(run, undisturbed(config_of("galore")))
    assert (run.metrics["seconds"].diff().dropna() > 0).all()


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "flipped": lambda path: path.write_bytes(
        (b := path.read_bytes())[: len(b) // 2] + bytes([b[len(b) // 2] ^ 1]) + b[len(b) // 2 + 1 :]
    ),
    "missing": lambda path: path.unlink(),
}
PARTS = (
    "model-00001-of-00001.safetensors", "model.safetensors.index.json", "state.json", "SHA256SUMS",
)  # fmt: skip


def interrupted(config, folder, after=9):
    """A run that was stopped after so many steps."""

    def stop(row):
        if row["step"] == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, folder, on_step=stop)
    return checkpoint.all_checkpoints(folder / "checkpoints")


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("part", PARTS)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    part, damage, tmp_path, undisturbed
):
    config = config_of("low-rank")
    newest = interrupted(config, tmp_path)[-1]
    assert sorted(p.name for p in newest.iterdir()) == sorted(PARTS)
    DAMAGES[damage](newest / part)
    with pytest.warns(UserWarning, match=newest.name) as warned:
        run = train(config, tmp_path)
    assert_same(run, undisturbed(config))
    (event,) = reported(run, "damage")
    assert event["what"] == str(warned[0].message)
    assert f"{newest} is damaged: " in event["what"]
    assert part in event["what"] or part == "SHA256SUMS"


def test_a_run_whose_checkpoints_are_all_damaged_is_refused_and_kept(tmp_path):
    config = config_of()
    for folder in (found := interrupted(config, tmp_path)):
        (folder / "state.json").write_text("{}")
    with (
        pytest.warns(UserWarning, match="is damaged"),
        pytest.raises(InputError, match="all of them are damaged"),
    ):
        train(config, tmp_path)
    assert checkpoint.all_checkpoints(tmp_path / "checkpoints") == found


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["progress.json", "checkpoints/best.json", "spectra.jsonl"])
def test_other_damaged_records_do_not_stop_a_run(name, damage, tmp_path, undisturbed):
    config = config_of("low-rank")
    interrupted(config, tmp_path)
    DAMAGES[damage](tmp_path / name)
    run = train(config, tmp_path)
    weights, others = (
        load_file(r.folder / "model.safetensors") for r in (run, undisturbed(config))
    )
    assert all(torch.equal(weights[n], others[n]) for n in weights)
    assert rows_of(run) == rows_of(undisturbed(config))


@pytest.mark.parametrize("damage", [*DAMAGES])
def test_lost_rows_of_metrics_are_reported(damage, tmp_path):
    config = config_of("low-rank")
    interrupted(config, tmp_path)
    metrics = tmp_path / "metrics.jsonl"
    if damage == "flipped":  # where it shows: in a brace
        rows = metrics.read_text().splitlines(keepends=True)
        metrics.write_text("".join([*rows[:4], "z" + rows[4][1:], *rows[5:]]))
    else:
        DAMAGES[damage](metrics)
    with pytest.warns(UserWarning, match=r"rows \d to 9 of metrics.jsonl can't be read"):
        run = train(config, tmp_path)
    (event,) = reported(run, "damage")
    assert "training goes on without them" in event["what"]


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_folder_without_a_readable_configuration_is_refused_and_kept(damage, tmp_path):
    config = config_of()
    found = interrupted(config, tmp_path)
    DAMAGES[damage](tmp_path / "config.json")
    with pytest.raises(InputError, match=r"damaged|not a run"):
        train(config, tmp_path)
    assert checkpoint.all_checkpoints(tmp_path / "checkpoints") == found


def test_the_best_checkpoint_is_marked_and_stays(tmp_path, monkeypatch):
    losses = iter([3.0, 1.0, 2.0, 4.0])
    real = trainer.evaluate
    monkeypatch.setattr(
        trainer, "evaluate",
        lambda model, corpus, split, tokens, config, **asked: (
            Evaluation(np.array([[next(losses)]]))
            if split == "validation" and tokens == config.eval_tokens
            else real(model, corpus, split, tokens, config, **asked)
        ),
    )  # fmt: skip
    config = config_of(keep_latest=3, keep_after_finish=True, reset_every=0)
    run = train(config, tmp_path)
    names = [p.name for p in checkpoint.all_checkpoints(tmp_path / "checkpoints")]
    assert names == [f"step-{n:08d}" for n in (12, 22, 23, 24)]
    best = json.loads((tmp_path / "checkpoints" / "best.json").read_text())
    assert best == {"checkpoint": "step-00000012", "validation_loss": 1.0}
    assert (run.result["best_validation_loss"], run.result["best_step"]) == (1.0, 12)


def spoiled(monkeypatch, steps):
    """Make the loss of these steps (from 1) NaN; it is what the gradients come from, too."""
    take, calls = trainer.take_step_, []

    def spoiling(model, optimizer, batches, config, step, **rest):
        start = rest["check"].start
        calls.append(step)
        with monkeypatch.context() as patch:
            if step + 1 in steps:
                patch.setattr(
                    rest["check"], "start", lambda loss, *norm: start(loss * math.nan, *norm)
                )
            return take(model, optimizer, batches, config, step, **rest)

    monkeypatch.setattr(trainer, "take_step_", spoiling)


def test_an_update_that_is_not_finite_is_skipped_and_logged_by_choice(tmp_path, monkeypatch):
    spoiled(monkeypatch, {5, 6, 11})
    run = train(config_of("low-rank", on_nonfinite="skip"), tmp_path)
    assert [e["what"] for e in reported(run, "skipped")] == [
        f"the loss of step {n} is nan" for n in (5, 6, 11)
    ]
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows if row["loss"] is None] == [5, 6, 11]
    assert [e["event"] for e in rows[5]["events"]] == ["skipped", "refactor"]  # still on time
    assert all(w.isfinite().all() for w in load_file(tmp_path / "model.safetensors").values())


def test_a_skipped_update_leaves_weights_and_states_alone(tmp_path, monkeypatch):
    spoiled(monkeypatch, {5})
    config = config_of(on_nonfinite="skip", reset_every=0, keep_after_finish=True,
                       keep_latest=STEPS)  # fmt: skip
    train(config, tmp_path)
    before, after = (
        load_file(tmp_path / "checkpoints" / f"step-{n:08d}" / PARTS[0]) for n in (4, 5)
    )
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_too_many_skipped_updates_in_a_row_stop_the_run(tmp_path, monkeypatch):
    spoiled(monkeypatch, set(range(3, STEPS)))
    with pytest.raises(TrainingError, match="the loss of step 23 is nan; the last good state"):
        train(config_of(on_nonfinite="skip"), tmp_path)
    assert not Run(tmp_path).finished


def test_skipping_updates_and_updating_per_layer_exclude_each_other():
    with pytest.raises(InputError, match="on_nonfinite: 'skip' is not allowed; with per_layer"):
        config_of(on_nonfinite="skip", per_layer=True, clip=0)


def test_a_loss_far_above_the_last_ones_is_an_event():
    watch = LossWatch()
    chance = random.Random(0)
    quiet = [watch.observe(3 + chance.gauss(0, 0.05) - i / 100) for i in range(60)]
    assert not any(quiet)
    (spike,) = watch.observe(4.5)
    assert (spike["event"], spike["loss"]) == ("loss-spike", 4.5)
    assert 2.3 < spike["median"] < 2.9
    assert not watch.observe(2.5)


def test_nothing_stands_out_before_there_is_enough_to_compare_with():
    watch = LossWatch([1.0] * (ENOUGH - 1))
    assert not watch.observe(100.0)
    assert watch.observe(100.0)
