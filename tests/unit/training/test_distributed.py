"""What processes cannot share is refused; torchrun starts them. What they train: tests/slow."""

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
