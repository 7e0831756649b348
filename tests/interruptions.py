"""Short runs that are to be killed, stopped or damaged, and how two of them are compared."""

import multiprocessing
import os

import torch
from safetensors.torch import load_file
from short import reset_of, short_options

from lowrank_lab import METHODS, RunConfig, train
from lowrank_lab.runs.files import read_jsonl

fork = multiprocessing.get_context("fork")
STEPS = 24
TIMES = ("seconds", "tokens_per_second")


def config_of(method="full-rank", **values):
    """A short run with techniques and refreshes, that saves its state at every step."""
    given = {
        "model": "tiny", "num_layers": 1, "corpus": "markov", "vocab_size": 64, "steps": STEPS,
        "sequence_length": 16, "batch": 4, "eval_tokens": 160, "test_tokens": 320, "eval_every": 6,
        "spectra_every": 8, "checkpoint_every": 1, "reset_every": 5, "recovery_steps": 3,
        "method": method, "method_options": short_options(method, 4),
    }  # fmt: skip
    given |= {"refactor_every": 3} if METHODS[method].has_products else {}
    given |= reset_of(method)
    return RunConfig(**given | values)


def in_child(config, folder, before=lambda: None):
    """Train in a forked child; the child."""

    def work():
        before()
        train(config, folder)
        os._exit(0)

    child = fork.Process(target=work)
    child.start()
    return child


def rows_of(run, but=()):
    """The rows of metrics.jsonl but for times, other given fields, and what tells of damage."""
    rows = read_jsonl(run.folder / "metrics.jsonl")
    for row in rows:
        row["events"] = [event for event in row["events"] if event["event"] != "damage"]
    return [{k: v for k, v in row.items() if k not in (*TIMES, *but)} for row in rows]


def assert_same(ours, theirs, but=()):
    """Two finished runs with the same weights, bit for bit, and records, given fields apart."""
    weights, others = (load_file(run.folder / "model.safetensors") for run in (ours, theirs))
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert [row["step"] for row in rows_of(ours)] == list(range(1, ours.config.total_steps + 1))
    for row, other in zip(rows_of(ours, but), rows_of(theirs, but), strict=True):
        assert row == other
    spectra, other_spectra = (read_jsonl(r.folder / "spectra.jsonl") for r in (ours, theirs))
    assert spectra == other_spectra
