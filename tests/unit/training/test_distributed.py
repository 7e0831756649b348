"""What processes cannot share is refused; torchrun starts them. What they train: tests/slow."""

import json
import socket

import pytest

from lowrank_lab import InputError, RunConfig, train
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.training.fsdp_layout import check_fsdp

SMALL = {"model": "tiny", "corpus": "markov", "batch": 8, "sequence_length": 32, "device": "cpu"}
SMALL |= {"eval_tokens": 1000, "test_tokens": 2000}


@pytest.mark.parametrize(
    ("fields", "refusal"),
    [
        (
            {"method": "relora", "steps": 9, "method_options": {"warm_start": 4}},
            "method_options.warm_start: 4",
        ),
        ({"per_layer": True, "clip": 0.0}, "per_layer: True"),
    ],
)
def test_what_is_not_sound_in_shards_is_refused(fields, refusal):
    config = resolve(RunConfig(**SMALL, parallel="fsdp2", **fields))
    with pytest.raises(InputError, match=f"{refusal} is not allowed"):
        check_fsdp(config)


def test_how_processes_share_the_work_does_not_change_the_run_id():
    runs = [resolve(RunConfig(parallel=parallel)) for parallel in ("ddp", "fsdp2")]
    assert runs[0].run_id == runs[1].run_id


def test_shards_without_torchrun_are_refused():
    with pytest.raises(InputError, match="parallel: 'fsdp2' is not allowed"):
        train(RunConfig(**SMALL, parallel="fsdp2"))


@pytest.fixture
def launched(monkeypatch):
    """torchrun's variables for one process."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MASTER_PORT", str(port))


def losses(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


METHODS = "full-rank lora relora galore muon scale normuon spectron".split()


@pytest.mark.parametrize("method", METHODS)
def test_the_only_shard_trains_as_a_whole_model_does_and_its_checkpoint_goes_on(
    method, launched, tmp_path
):
    more = {"method_options": {"merge_every": 2}} if method == "relora" else {}
    fields = SMALL | more | {"method": method, "steps": 4, "checkpoint_every": 2}
    train(RunConfig(**fields), tmp_path / "whole")
    sharded = RunConfig(**fields, parallel="fsdp2")

    def stop_after_three(row):
        if row["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(sharded, tmp_path / "shard", on_step=stop_after_three)
    train(sharded, tmp_path / "shard")
    assert losses(tmp_path / "shard") == pytest.approx(losses(tmp_path / "whole"), abs=1e-5)
