"""A run killed at any moment ends as if nothing had happened."""

import os
import random
import signal
import time

import pytest
from interruptions import assert_same, config_of, in_child

from lowrank_lab import train
from lowrank_lab.runs.files import read_jsonl
from lowrank_lab.training import checkpoint

KILLED = ("low-rank", "galore", "relora", "sltrain", "apollo")


@pytest.mark.parametrize("method", KILLED)
def test_a_run_killed_at_random_moments_ends_as_if_undisturbed(
    method, tmp_path, undisturbed, record_property
):
    chance = random.Random(f"{method} is killed")
    config, run = config_of(method, steps=60), tmp_path / "run"
    moments, steps = [], []
    for last in (12, 24, 36, 48):  # each time it comes a little further
        moments.append((chance.randint(last - 11, last), round(chance.uniform(0, 0.05), 4)))
        child = in_child(config, run)
        while child.is_alive() and len(read_jsonl(run / "metrics.jsonl")) < moments[-1][0]:
            time.sleep(0.001)
        time.sleep(moments[-1][1])
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        found = checkpoint.all_checkpoints(run / "checkpoints")
        steps.append(int(found[-1].name[-8:]) if found else 0)
    record_property("kills", f"at (rows, seconds) {moments}; checkpoints {steps}")
    assert_same(train(config, run), undisturbed(config))


@pytest.mark.parametrize("write", range(8))
def test_a_run_killed_inside_a_checkpoint_write_ends_as_if_undisturbed(
    write, tmp_path, monkeypatch, undisturbed
):
    """Killed at each of the moments at which a checkpoint's files reach the disk."""
    config, calls, fsync = config_of("low-rank"), [], checkpoint._fsync

    def dies(path):
        calls.append(path)
        if len(calls) == 30 + write:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(path)

    child = in_child(config, tmp_path, lambda: monkeypatch.setattr(checkpoint, "_fsync", dies))
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert not (tmp_path / "result.json").exists()
    assert_same(train(config, tmp_path), undisturbed(config))
    assert not list(tmp_path.rglob(".partial*"))
