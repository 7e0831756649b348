"""Two processes train what one trains."""

import json
import os
import subprocess
import sys

import pytest
from processes import train_all
from safetensors.torch import load_file
from short import short_options

from lowrank_lab import METHODS, InputError, RunConfig, train
from lowrank_lab.formulas import optimizer_state_bytes
from lowrank_lab.methods import build_model, resolve
from lowrank_lab.sharded import check_shards

# Rounding is another in another order of sums, and steep learning rates amplify it step by step
# (one process in two pieces instead of one shows as much): these are small enough not to.
SMALL = {"model": "tiny", "corpus": "markov", "batch": 8, "sequence_length": 32, "device": "cpu"}
SMALL |= {"eval_tokens": 1000, "test_tokens": 2000, "checkpoint_every": 50, "lr": 3e-4}


def fields_of(method, steps=50):
    """A run in which everything rare that the method has happens."""
    found = SMALL | {"method": method, "steps": steps, "method_options": short_options(method, 12)}
    if METHODS[method].uses_rank:
        found["rank"] = METHODS[method].rank or 4
    if METHODS[method].layers:
        found |= {"refactor_every": 15}
    if METHODS[method].layers == "low-rank":
        found["init"] = "spectral"  # two Kaiming-uniform factors amplify rounding a thousandfold
    if "merge_every" not in METHODS[method].options:
        found |= {"reset_every": 20}
    return found


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def differences(one, two):
    """The largest differences of training loss, of validation loss and of the test loss."""
    pairs = list(zip(rows_of(one), rows_of(two), strict=True))
    ends = [json.loads((f / "result.json").read_text())["test_loss"] for f in (one, two)]
    valid = [
        abs(a["validation_loss"] - b["validation_loss"]) for a, b in pairs if "validation_loss" in a
    ]
    assert [a["events"] for a, _ in pairs] == [b["events"] for _, b in pairs]
    return max(abs(a["loss"] - b["loss"]) for a, b in pairs), max(valid), abs(ends[0] - ends[1])


def compared(names, folder, **changes):
    """Rows of a table: each method with one process and with two."""
    jobs = {name: fields_of(name) | changes for name in names}
    errors = train_all(jobs.items(), folder / "two")
    found = {}
    for name, fields in jobs.items():
        one = {k: v for k, v in fields.items() if k != "parallel"}
        train(RunConfig(**one), folder / "one" / name)
        pieces = train(RunConfig(**one | {"gradient_accumulation": 2}), folder / "pieces" / name)
        assert not [e for e in errors if e.startswith(f"{name}.")], errors
        ours = differences(folder / "one" / name, folder / "two" / name)
        found[name] = (*ours, differences(folder / "one" / name, pieces.folder)[0])
    return found


def table(title, found):
    lines = [f"{title}: largest |one process − two| over 50 steps"]
    lines += [f"{'method':12} training validation    test  one in two pieces"]
    lines += [f"{name:12}" + "".join(f" {v:8.1e} " for v in row) for name, row in found.items()]
    sys.stdout.write("\n" + "\n".join(lines) + "\n")


@pytest.mark.slow
def test_every_method_trains_the_same_with_two_processes(tmp_path):
    found = compared(METHODS, tmp_path)
    table("ddp", found)
    assert {name: row for name, row in found.items() if max(row[:3]) > 1e-5} == {}


@pytest.mark.slow
def test_every_method_but_relora_trains_the_same_in_shards(tmp_path):
    found = compared([name for name in METHODS if name != "relora"], tmp_path, parallel="fsdp2")
    table("fsdp2", found)
    assert {name: row for name, row in found.items() if max(row[:3]) > 1e-5} == {}


def interrupted(folder, **fields):
    """The losses of a run, and of one that was broken off after a checkpoint and went on."""
    fields = SMALL | {"steps": 14, "checkpoint_every": 5, "clip": 0.5} | fields
    jobs = [("whole", fields), ("cut", fields | {"stop": 12}), ("cut", fields)]
    assert train_all(jobs, folder) == {}
    return [[row["loss"] for row in rows_of(folder / name)] for name in ("whole", "cut")]


def test_a_run_of_two_processes_goes_on_from_its_checkpoint(tmp_path):
    whole, cut = interrupted(tmp_path, method="low-rank", refactor_every=4, gradient_accumulation=2)
    assert (len(cut), cut) == (14, whole)
    files = {p.name for p in (tmp_path / "cut").iterdir()}
    kept = {"config.json", "memory.json", "metrics.jsonl", "spectra.jsonl", "result.json"}
    assert files == kept | {"model.safetensors"}


@pytest.mark.parametrize("method", ["full-rank", "low-rank", "galore"])
def test_a_run_in_shards_goes_on_from_its_checkpoint(tmp_path, method):
    rare = {"refactor_every": 4, "on_refactor": "transport"} if method == "low-rank" else {}
    whole, cut = interrupted(
        tmp_path, method=method, parallel="fsdp2", gradient_accumulation=2, **rare
    )
    assert (len(cut), cut) == (14, whole)
    train(RunConfig(**SMALL, steps=14, clip=0.5, method=method, **rare), tmp_path / "one")
    assert max(differences(tmp_path / "one", tmp_path / "cut")) < 1e-5
    one, two = (load_file(tmp_path / f / "model.safetensors") for f in ("one", "cut"))
    assert all((one[name] - two[name]).abs().max() < 1e-4 for name in one)
    spectra = [(tmp_path / f / "spectra.jsonl").read_text().splitlines() for f in ("one", "cut")]
    assert [json.loads(r).keys() for r in spectra[0]] == [json.loads(r).keys() for r in spectra[1]]


def test_a_run_can_go_on_in_shards_and_in_whole_models_again(tmp_path):
    fields = SMALL | {"steps": 14, "checkpoint_every": 3, "method": "galore", "rank": 4}
    sharded = fields | {"parallel": "fsdp2"}
    jobs = [("run", fields | {"stop": 4}), ("run", sharded | {"stop": 10}), ("run", fields)]
    assert train_all(jobs, tmp_path / "two") == {}
    train(RunConfig(**fields), tmp_path / "one")
    assert max(differences(tmp_path / "one", tmp_path / "two" / "run")) < 1e-5


@pytest.mark.parametrize("method", ["full-rank", "low-rank", "galore"])
def test_bytes_of_a_process_are_those_of_its_shards(tmp_path, method):
    fields = SMALL | {"method": method, "steps": 2, "parallel": "fsdp2"}
    assert train_all([("run", fields)], tmp_path) == {}
    config = resolve(RunConfig(**fields))
    model = build_model(config)
    shards = sum(-(-p.shape[0] // 2) * p[0].numel() * 4 for p in model.parameters())
    found = json.loads((tmp_path / "run" / "memory.json").read_text())
    assert (found["weights"], found["gradients"]) == (shards, shards)
    whole = optimizer_state_bytes(config)
    if method == "galore":  # by layers: as even as these are
        assert found["optimizer_states"] == pytest.approx(whole / 2, rel=0.1)
    else:
        steps = 4 * len(list(model.parameters()))  # torch's own counters
        assert found["optimizer_states"] == 2 * shards + steps


@pytest.mark.parametrize(
    ("fields", "refusal"),
    [
        ({"method": "relora"}, "method: 'relora'"),
        ({"per_layer": True, "clip": 0.0}, "per_layer: True"),
        ({"compile": True}, "compile: True"),
        ({"reset_every": 10, "reset_how": "magnitude"}, "reset_how: 'magnitude'"),
    ],
)
def test_what_is_not_sound_in_shards_is_refused(fields, refusal):
    config = resolve(RunConfig(**SMALL, parallel="fsdp2", **fields))
    with pytest.raises(InputError, match=f"{refusal} is not allowed"):
        check_shards(config)


def test_what_two_processes_cannot_share_is_refused_in_one_line(tmp_path):
    pieces = {"gradient_accumulation": 4, "batch": 4}
    errors = train_all([("uneven", SMALL | {"batch": 3}), ("pieces", SMALL | pieces)], tmp_path)
    assert errors == {
        f"{name}.{rank}": f"InputError: batch: {batch} is not allowed; 2 processes × "
        f"gradient_accumulation {pieces} must divide it"
        for name, batch, pieces in (("uneven", 3, 1), ("pieces", 4, 4))
        for rank in range(2)
    }
    assert not (tmp_path / "uneven").exists()


def test_per_layer_averages_each_gradient_as_it_comes(tmp_path):
    fields = SMALL | {"method": "galore", "rank": 4, "steps": 12, "per_layer": True, "clip": 0}
    assert train_all([("two", fields)], tmp_path) == {}
    train(RunConfig(**fields), tmp_path / "one")
    assert max(differences(tmp_path / "one", tmp_path / "two")) < 1e-5


def test_the_command_line_trains_under_torchrun(tmp_path):
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in (SMALL | {"steps": 3}).items()]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command = [*torchrun, "--standalone", "-m", "lowrank_lab", "train", *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*command, f"--out={tmp_path / 'run'}"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert (done.returncode, done.stdout.count("test loss")) == (0, 1), done.stderr
    assert len(rows_of(tmp_path / "run")) == 3
    facts = json.loads((tmp_path / "run" / "config.json").read_text())
    assert facts["ran_on"]["processes"] == 2


def test_how_processes_share_the_work_does_not_change_the_run_id():
    runs = [resolve(RunConfig(parallel=parallel)) for parallel in ("ddp", "fsdp2")]
    assert runs[0].run_id == runs[1].run_id


def test_shards_without_torchrun_are_refused():
    with pytest.raises(InputError, match="parallel: 'fsdp2' is not allowed"):
        train(RunConfig(**SMALL, parallel="fsdp2"))
