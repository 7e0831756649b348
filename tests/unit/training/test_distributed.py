"""What processes cannot share is refused; torchrun starts them. What they train: tests/slow."""

import json
import socket
from functools import partial

import pytest
import torch
from finite_steps import QUEUED_FIRST, late_and_not, order_of_step
from interruptions import assert_same, config_of

from lowrank_lab import InputError, RunConfig, distributed, train
from lowrank_lab.device import cuda_path
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.training import step as stepping
from lowrank_lab.training.fsdp import ShardedModel
from lowrank_lab.training.fsdp_layout import check_fsdp
from lowrank_lab.training.schedule import events

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


def test_a_flag_of_any_process_is_known_without_waiting_for_cuda(launched):
    cpu = torch.device("cpu")
    with distributed.process_group(cpu):
        assert [distributed.AnyRank(cpu)(flag) for flag in (False, True)] == [False, True]
        with cuda_path():
            ask = distributed.AnyRank(cpu)
            answers = [ask(flag) for flag in (True, False, False)]
    assert answers == [False, True, False]  # of the call before


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


SHARDED = [
    "full-rank", "low-rank", "lora", "sltrain", "cola", "galore", "golore", "fira", "apollo",
    "spam", "stable-spam", "loro", "muon", "scale", "normuon", "spectron", "frugal", "ldadam",
]  # fmt: skip


@pytest.mark.parametrize("method", SHARDED)
def test_the_host_reads_nothing_of_a_step_in_shards_until_its_update_is_queued(method, launched):
    config = resolve(config_of(method, parallel="fsdp2", clip=1.0))
    tokens = torch.zeros(2, config.sequence_length, dtype=torch.long)
    with distributed.process_group(torch.device("cpu")):
        shards = ShardedModel(config, torch.device("cpu"))
        given = shards.model, shards.optimizer, [(tokens, tokens)], config
        for at in range(3):
            take = partial(stepping.take_step_, *given, at, shards=shards)
            found = order_of_step(lambda check, take=take: take(check=check), (shards, "step_"))
            assert found[:5] == QUEUED_FIRST
            assert not found[5:] or events(at + 1, config)  # a refactorization reads


@pytest.mark.parametrize("method", ["full-rank", "galore", "fira", "muon", "loro", "relora"])
def test_the_device_skips_steps_in_shards_that_the_host_would_skip(
    method, launched, tmp_path, monkeypatch
):
    options = {"method_options": {"merge_every": 6}} if method == "relora" else {}
    config = config_of(
        method, parallel="fsdp2", steps=12, on_nonfinite="skip", checkpoint_every=8, **options
    )
    runs = late_and_not(monkeypatch, tmp_path, config, {1, 3, 4, 8, 9, 12}, "gradient")
    assert_same(*runs, but=["peak_memory_bytes"])


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
