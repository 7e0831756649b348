"""Two processes train what one trains."""

import fcntl
import json
import os
import subprocess
import sys

import pytest
import torch
from processes import train_all
from safetensors.torch import load_file
from short import reset_of, short_options

from lowrank_lab import METHODS, RunConfig, train
from lowrank_lab.memory.formulas import by_formula, optimizer_state_bytes
from lowrank_lab.methods.build import build_model
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.runs.files import read_jsonl

# Rounding is another in another order of sums, and steep learning rates amplify it step by step
# (one process in two pieces instead of one shows as much): these are small enough not to.
SMALL = {"model": "tiny", "corpus": "markov", "batch": 8, "sequence_length": 32, "device": "cpu"}
SMALL |= {"eval_tokens": 1000, "test_tokens": 2000, "checkpoint_every": 50, "lr": 3e-4}


def fields_of(method, steps=50):
    """A run in which everything rare that the method has happens."""
    found = SMALL | {"method": method, "steps": steps, "method_options": short_options(method, 12)}
    if METHODS[method].uses_rank:
        found["rank"] = METHODS[method].rank or 4
    if METHODS[method].has_products:
        found |= {"refactor_every": 15}
    if METHODS[method].layers == "low-rank":
        found["init"] = "spectral"  # two Kaiming-uniform factors amplify rounding a thousandfold
    if "merge_every" not in METHODS[method].options:
        found |= {"reset_every": 20} | reset_of(method)
    if "ns_precision" in METHODS[method].options:
        found["method_options"] |= {"ns_precision": "fp32"}  # in bfloat16, rounding would grow
    return found


def changed(method, method_options=(), **changes):
    found = fields_of(method) | changes
    return found | {"method_options": found["method_options"] | dict(method_options)}


GRAM = {"refresh": "gram"}
# What is updated in shards without gathering a layer, or in another way than by default.
IN_SHARDS = {
    "galore gram": changed("galore", GRAM),
    "galore gram left": changed("galore", GRAM | {"proj_type": "left"}),
    "galore gram reverse": changed("galore", GRAM | {"proj_type": "reverse_std"}),
    "galore gram full": changed("galore", GRAM | {"proj_type": "full"}),  # is gathered
    "galore gram spread": changed("galore", GRAM | {"spread_refresh": True}),
    "fira gram": changed("fira", GRAM),
    "golore gram": changed("golore", GRAM | {"switch": 25, "update_proj_gap": 10}),
    "golore random": changed("golore", {"switch": 0}),
    "apollo seed": changed("apollo", {"store_projection": False}),
    "apollo gram": changed("apollo", {"proj": "gram"}),
    "apollo svd": changed("apollo", {"proj": "svd"}),
    "galore randomized": changed("galore", {"refresh": "randomized"}),
    "spam half": changed("spam", {"density": 0.5}),
    "low-rank sgd": changed("low-rank", optimizer="torch.optim.SGD", reset_every=0),
    "apollo-mini front": changed("apollo-mini", {"scale_front": True}),
    "keep": changed("low-rank", on_refactor="keep", reset_every=0),
    "reset": changed("low-rank", on_refactor="reset", reset_every=0),
    "transport": changed("low-rank", on_refactor="transport", reset_every=0),
    "sltrain transport": changed("sltrain", on_refactor="transport", reset_every=0),
    "frugal columns": changed("frugal", {"proj": "columns"}),
    "frugal random": changed("frugal", {"proj": "random"}),
    "ldadam alone": changed("ldadam", {"error_feedback": False}),
    "cola recompute": changed("cola", {"recompute": True}),
    "relora": changed("relora"),
    "relora part": changed("relora", {"merge_share": 0.9, "merge_every": 20}),
    "relora pruned": changed("relora", {"merge_share": 0.9, "merge_moments": "magnitude"}),
    "galore pruned": changed("galore", GRAM, reset_how="magnitude", reset_strength=0.9),
    "fira pruned": changed("fira", reset_how="random", reset_strength=0.9),
    "full-rank pruned": changed(
        "full-rank", reset_how="random", reset_strength=0.9, reset_params="all"
    ),
}


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


def compared(jobs, folder, *parallels, **changes):
    """Train each of the fields by name with one process, and with two in each of the ways.

    Rows that differ by more than rounding: (way, name) → the differences. All are printed.
    """
    jobs = {name: fields | changes for name, fields in jobs.items()}
    for name, fields in jobs.items():
        train(RunConfig(**fields), folder / "one" / name)
    found = {}
    for parallel in parallels:
        shared = {name: fields | {"parallel": parallel} for name, fields in jobs.items()}
        assert train_all(shared.items(), folder / parallel) == {}
        for name in jobs:
            found[parallel, name] = differences(folder / "one" / name, folder / parallel / name)
    sys.stdout.write(f"\n{'largest |one process − two|':28}training validation     test\n")
    for (parallel, name), row in found.items():
        sys.stdout.write(f"{parallel:6} {name:20}" + "".join(f" {v:9.1e} " for v in row) + "\n")
    return {key: row for key, row in found.items() if max(row) > 1e-5}


# Two parts of the longest tests, for two workers.
@pytest.mark.parametrize("part", [0, 1])
def test_every_method_trains_the_same_with_two_processes_and_in_shards(part, tmp_path):
    jobs = {name: fields_of(name) for name in [*METHODS][part::2]}
    assert compared(jobs, tmp_path, "ddp", "fsdp2") == {}


def test_compiled_blocks_train_the_same_with_two_processes_and_in_shards(tmp_path):
    # compiling is most of the time: every layer kind trains compiled in tests/unit/training
    for parallel, names in {"ddp": ["full-rank"], "fsdp2": ["low-rank", "sltrain"]}.items():
        jobs = {name: fields_of(name) for name in names}
        assert compared(jobs, tmp_path / parallel, parallel, compile=True) == {}


@pytest.mark.parametrize("part", [0, 1])
def test_what_gathers_no_layer_trains_the_same_in_shards(part, tmp_path):
    jobs = {name: IN_SHARDS[name] for name in [*IN_SHARDS][part::2]}
    assert compared(jobs, tmp_path, "fsdp2") == {}


def test_layers_that_cannot_be_cut_evenly_train_the_same(tmp_path):
    # Of three processes: 36 rows and columns can be cut, 88 can't.
    size = {"hidden_size": 36, "batch": 9, "steps": 22, "parallel": "fsdp2", "spectra_every": 5}
    names = (
        "galore gram",
        "galore randomized",
        "fira gram",
        "apollo-mini front",
        "transport",
        "relora",
    )
    jobs = {name: IN_SHARDS[name] | size for name in names}
    for fields in jobs.values():
        fields["method_options"] = fields["method_options"] | {
            key: 5 for key in ("update_proj_gap", "merge_every") if key in fields["method_options"]
        }
    jobs["transport"] |= {"refactor_every": 5}
    assert train_all(jobs.items(), tmp_path / "three", size=3) == {}
    for name, fields in jobs.items():
        train(RunConfig(**fields | {"parallel": "ddp"}), tmp_path / "one" / name)
        ours = differences(tmp_path / "one" / name, tmp_path / "three" / name)
        assert max(ours) < 1e-5, (name, ours)


def test_compiled_blocks_train_the_same_in_shards(tmp_path):
    jobs = {name: IN_SHARDS[name] for name in ("galore gram", "transport")}
    assert compared(jobs, tmp_path, "fsdp2", compile=True, steps=24) == {}


def test_weights_of_shards_are_rounded_at_random_as_those_of_one_process(tmp_path):
    # The other process computes the second piece of each batch: gradients have the same bits.
    rounded = {"precision": "bf16", "stochastic_rounding": True, "clip": 0.0, "steps": 24}
    jobs = {name: IN_SHARDS[name] | rounded for name in ("galore gram", "apollo seed")}
    two = {name: fields | {"parallel": "fsdp2"} for name, fields in jobs.items()}
    assert train_all(two.items(), tmp_path / "two") == {}
    for name, fields in jobs.items():
        one = train(RunConfig(**fields, gradient_accumulation=2), tmp_path / "one" / name)
        ours, theirs = (
            load_file(folder / "model.safetensors")
            for folder in (one.folder, tmp_path / "two" / name)
        )
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


SHORT = SMALL | {"steps": 14, "checkpoint_every": 3, "clip": 0.5, "gradient_accumulation": 2}
UNEVEN = {
    "uneven": {"batch": 3, "gradient_accumulation": 1},
    "pieces": {"gradient_accumulation": 4, "batch": 4},
}
RUNS = {
    "ddp": {"method": "low-rank", "refactor_every": 4},
    "full-rank": {"method": "full-rank", "parallel": "fsdp2"},
    "low-rank": {"method": "low-rank", "parallel": "fsdp2", "refactor_every": 4,
                 "on_refactor": "transport"},
    "galore": {"method": "galore", "rank": 4, "parallel": "fsdp2"},
    "fira": {"method": "fira", "rank": 4, "parallel": "fsdp2",
             "method_options": {"refresh": "gram", "update_proj_gap": 4}},
    "golore": {"method": "golore", "rank": 4, "parallel": "fsdp2",
               "method_options": {"refresh": "gram", "update_proj_gap": 4, "switch": 6}},
    "apollo": {"method": "apollo", "rank": 4, "parallel": "fsdp2",
               "method_options": {"update_proj_gap": 4}},
    "stable-spam": {"method": "stable-spam", "parallel": "fsdp2",
                    "method_options": {"update_proj_gap": 4}},
    "relora": {"method": "relora", "rank": 4, "parallel": "fsdp2",
               "method_options": {"merge_every": 4}},
}  # fmt: skip
SHARDED = [name for name in RUNS if name != "ddp"]
PER_LAYER = {
    "method": "galore",
    "rank": 4,
    "per_layer": True,
    "clip": 0,
    "gradient_accumulation": 1,
}


@pytest.fixture(scope="module")
def two(tmp_path_factory, worker_id):
    """The folder of `train_two`, and what its runs raised: once for all workers of pytest."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "two"
    raised = folder.with_suffix(".json")
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not raised.exists():
            raised.write_text(json.dumps(train_two(folder)))
    return folder, json.loads(raised.read_text())


def train_two(folder):
    """Runs of two processes: each of RUNS, and the same broken off at step 10 and gone on with."""
    jobs = [(name, SHORT | fields) for name, fields in RUNS.items()]
    cut = [(f"{name}-cut", fields) for name, fields in jobs]
    jobs = [(name, fields | {"sent": name in SHARDED}) for name, fields in jobs]
    jobs += [(n, fields | {"stop": 10}) for n, fields in cut] + cut
    jobs += [("per-layer", SHORT | PER_LAYER)]
    to_and_fro = [("ddp", 4), ("fsdp2", 10), ("ddp", None)]
    ways = [{"parallel": way, "stop": stop} for way, stop in to_and_fro]
    jobs += [("to-and-fro", SHORT | RUNS["galore"] | way) for way in ways]
    jobs += [(name, SHORT | fields) for name, fields in UNEVEN.items()]
    return train_all(jobs, folder)


def alone(fields, folder):
    """The folder of the same run in one process."""
    one = {k: v for k, v in (SHORT | fields).items() if k != "parallel"}
    return train(RunConfig(**one), folder / "one").folder


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_two_processes_goes_on_from_its_checkpoint(two, name):
    whole, cut = (rows_of(two[0] / n) for n in (name, f"{name}-cut"))
    assert [row["loss"] for row in cut] == [row["loss"] for row in whole]
    files = {p.name for p in (two[0] / f"{name}-cut").iterdir()}
    kept = {"config.json", "memory.json", "metrics.jsonl", "spectra.jsonl", "result.json"}
    assert files == kept | {"model.safetensors"}


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_write_what_one_writes(two, name, tmp_path):
    one, both = alone(RUNS[name], tmp_path), two[0] / f"{name}-cut"
    assert max(differences(one, both)) < 1e-5
    weights = [load_file(folder / "model.safetensors") for folder in (one, both)]
    assert weights[0].keys() == weights[1].keys()
    assert all((weights[0][key] - weights[1][key]).abs().max() < 1e-4 for key in weights[0])
    rows = [read_jsonl(folder / "spectra.jsonl") for folder in (one, both)]
    for a, b in zip(*rows, strict=True):
        assert a.keys() == b.keys()
        assert a.get("singular_values", 0) == pytest.approx(b.get("singular_values", 0), abs=1e-4)
        assert a.get("gradient", 0) == pytest.approx(b.get("gradient", 0), abs=1e-4)
        assert a.get("momentum_cosine") == pytest.approx(b.get("momentum_cosine"), abs=1e-3)


@pytest.mark.parametrize("name", ["per-layer", "to-and-fro"])
def test_gradients_one_at_a_time_and_changes_of_the_way_change_nothing(two, name, tmp_path):
    one = alone(PER_LAYER if name == "per-layer" else RUNS["galore"], tmp_path)
    assert max(differences(one, two[0] / name)) < 1e-5


@pytest.mark.parametrize("name", SHARDED)
def test_bytes_of_a_process_are_those_of_its_shards(two, name):
    config = resolve(RunConfig(**SHORT, **RUNS[name]))
    weights = list(build_model(config).parameters())
    trained = [p for p in weights if p.requires_grad]
    found = json.loads((two[0] / name / "memory.json").read_text())
    assert found["weights"] == 4 * sum(p.numel() for p in weights) / 2
    assert found["gradients"] == 4 * sum(p.numel() for p in trained) / 2
    states = optimizer_state_bytes(config)
    # All have torch's counters of steps, or the norms of the whole that limit updates.
    numbers = {"fira": 14, "apollo": 14, "golore": 0, "galore": 0, "stable-spam": 3 * len(trained)}
    assert found["optimizer_states"] == (states + 4 * numbers.get(name, len(trained))) / 2
    assert found["projections"] == by_formula(config).projections / 2


def sent(folder, name):
    """What steps and events exchanged: the method, then pairs of a collective and its entries."""
    return json.loads((folder / f"{name}.0.sent").read_text())


@pytest.mark.parametrize("name", ["fira", "golore", "apollo"])
def test_projections_and_gram_matrices_are_all_that_a_step_in_shards_exchanges(two, name):
    side, rank, layers = 32, 4, 14
    steps = [calls for kind, *calls in sent(two[0], name) if kind == "step_"]
    assert len(steps) == SHORT["steps"]
    for step, calls in enumerate(steps):
        solved = [n for kind, n in calls if kind == "_linalg_eigh"]
        calls = [call for call in calls if call[0] != "_linalg_eigh"]
        gram = step % 4 == 0 and not (name == "golore" and step >= 6) and name != "apollo"
        largest = {kind: max(n for k, n in calls if k == kind) for kind, _ in calls}
        assert largest.pop("allgather_") <= side * rank
        assert largest.pop("broadcast_", 0) == (side * rank if gram else 0)
        # norms of the whole; signs (rank numbers) or carried moments (rank² numbers)
        small = rank**2 if step % 4 == 0 else 1
        assert largest.pop("allreduce_", 0) <= (side**2 if gram else small)
        assert sum(n > small for k, n in calls if k == "allreduce_") == (layers if gram else 0)
        assert not largest
        assert solved == ([side**2] * (layers // 2) if gram else [])  # the others' are the other's


def test_stable_spam_exchanges_two_numbers_a_weight_in_a_step(two):
    trained = 2 * 9 + 3
    for _, *calls in sent(two[0], "stable-spam"):
        assert calls == [["allreduce_", 1]] * (2 * trained)


@pytest.mark.parametrize(("name", "event"), [("low-rank", "refactorize_"), ("relora", "merge_")])
def test_r_by_r_matrices_are_all_that_refactorization_exchanges_and_merges_a_factor(
    two, name, event
):
    rank = 8 if name == "low-rank" else 4
    calls = sent(two[0], name)
    assert {kind for kind, *exchanged in calls if exchanged} == {event}  # and steps nothing
    exchanged = [call for kind, *found in calls if kind == event for call in found]
    if event == "merge_":
        assert {kind for kind, _ in exchanged} == {"all_gather_into_tensor"}
        assert max(n for _, n in exchanged) <= 88 * rank
    else:
        assert {kind for kind, _ in exchanged} == {"_linalg_eigh", "allreduce_", "broadcast_"}
        assert max(n for _, n in exchanged) == 2 * rank**2


def test_what_two_processes_cannot_share_is_refused_in_one_line(two):
    folder, errors = two
    assert errors == {
        f"{name}.{rank}": f"InputError: batch: {batch} is not allowed; 2 processes × "
        f"gradient_accumulation {pieces} must divide it"
        for name, batch, pieces in (("uneven", 3, 1), ("pieces", 4, 4))
        for rank in range(2)
    }
    assert not (folder / "uneven").exists()


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
