"""Whole runs with `compile`: one graph for each compiled part, whatever happens in the run.

The backend "eager" runs each graph as torch traced it: graphs are counted without a C++ compiler.
"""

import pytest
import torch
from compiling import counting
from short import short_options, usual_rate
from torch._dynamo.utils import counters

from lowrank_lab import METHODS, InputError, RunConfig
from lowrank_lab.device import cuda_path
from lowrank_lab.kernels import operators
from lowrank_lab.models import compiled
from lowrank_lab.runs.files import read_jsonl
from lowrank_lab.training import run_state
from lowrank_lab.training.loop import train

# each layer kind, with all that its methods do to it, and a projected optimizer
METHODS_HERE = ("full-rank", "low-rank", "lora", "relora", "sltrain", "cola", "loro", "galore")
# graphs of chains; of the others, an update is products and fused kernels
CHAINS = {
    "fira": 1, "apollo": 1, "apollo-mini": 1, "spam": 1, "stable-spam": 1, "scale": 1, "normuon": 2,
} | dict.fromkeys(("galore", "golore", "frugal", "ldadam", "muon", "spectron"), 0)  # fmt: skip
SENSITIVE = ("frugal", "spectron")  # to rounding: a sign; and steps as large as the weights
ALIKE = ("spam", "stable-spam", "scale")  # whose resets act on all parameters here
PARTS = 3  # the block, the last norm and the loss, each with gradients and without


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    with counting(monkeypatch, "eager"):
        yield


def eventful(text_corpus, method, **values):
    """A run with every event, whose evaluations end with a shorter batch, of one window or more."""
    return RunConfig(
        model="tiny", num_layers=3, corpus=text_corpus, vocab_size="byte", steps=12, batch=4,
        sequence_length=16, eval_tokens=9 * 16, test_tokens=11 * 16, eval_every=4,
        spectra_every=6, checkpoint_every=4, method=method, lr=usual_rate(method),
        method_options=short_options(method, 4), reset_every=5, recovery_steps=3,
        **({"refactor_every": 3} if METHODS[method].has_products else {}), **values,
    )  # fmt: skip


def losses_of(run):
    """Of each step, of each evaluation and of the end."""
    rows = read_jsonl(run.folder / "metrics.jsonl")
    found = [row[key] for row in rows for key in ("loss", "validation_loss") if key in row]
    return [*found, run.result["test_loss"]]


@pytest.mark.parametrize("method", [*METHODS_HERE, "cola-m"])
def test_a_run_compiles_each_part_once_with_gradients_and_once_without(
    method, text_corpus, tmp_path
):
    plain = eventful(text_corpus, method.removesuffix("-m"))
    if method == "cola-m":
        plain = plain.replace(method_options={"recompute": True})
    run = train(plain.model_copy(update={"compile": True}), tmp_path / "compiled")
    assert counters["stats"]["unique_graphs"] == 2 * PARTS
    assert not counters["graph_break"]
    reference = train(plain, tmp_path / "plain")
    assert losses_of(run) == pytest.approx(losses_of(reference), rel=1e-4)


@pytest.mark.parametrize(
    "values",
    [
        {"precision": "amp-bf16"},
        {"precision": "bf16"},
        {"activation_checkpointing": True},
        {"gradient_accumulation": 2},
        {"method": "galore", "per_layer": True, "clip": 0},
    ],
    ids=["amp-bf16", "bf16", "checkpointing", "accumulation", "per_layer"],
)
def test_options_of_a_run_add_no_graph(values, text_corpus, tmp_path):
    values = {"method": "low-rank", "compile": True} | values
    train(eventful(text_corpus, **values), tmp_path / "run")
    assert counters["stats"]["unique_graphs"] == 2 * PARTS
    assert not counters["graph_break"]


@pytest.mark.parametrize(("method", "chains"), CHAINS.items())
def test_on_cudas_path_chains_of_the_optimizer_are_graphs_that_no_event_compiles_again(
    method, chains, text_corpus, tmp_path
):
    config = eventful(text_corpus, method, compile=True, weight_decay=0.1, warmup=3)
    if method == "spam":  # it clips so many steps after a reset
        config = config.replace(method_options=config.method_options | {"grad_accu_steps": 2})
    if method in ALIKE:
        config = config.replace(reset_params="all")
    with cuda_path():
        run = train(config, tmp_path / "compiled")
        assert counters["stats"]["unique_graphs"] == 2 * PARTS + chains
        assert not counters["graph_break"]
        plain = train(config.model_copy(update={"compile": False}), tmp_path / "plain")
    error = 1e-3 if method in SENSITIVE else 1e-4
    assert losses_of(run) == pytest.approx(losses_of(plain), rel=error)


def test_resets_of_the_targets_alone_part_the_stacks_once(text_corpus, tmp_path):
    """All together, then targets and the rest, until Adam restarts on all of them."""
    with cuda_path():
        train(eventful(text_corpus, "stable-spam", compile=True), tmp_path / "run")
    assert counters["stats"]["unique_graphs"] == 2 * PARTS + 3


def test_a_resumed_run_compiles_each_part_and_each_chain_once(text_corpus, tmp_path):
    config = eventful(text_corpus, "fira", compile=True)

    def stop(row):
        if row["step"] == 7:
            raise KeyboardInterrupt

    with cuda_path():
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "run", on_step=stop)
        counters.clear()
        train(config, tmp_path / "run")
    assert counters["stats"]["unique_graphs"] == 2 * PARTS + CHAINS["fira"]


def test_kernels_of_a_cpu_break_no_graph_and_replace_that_of_the_loss(
    monkeypatch, text_corpus, tmp_path
):
    monkeypatch.undo()
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    if not operators.available():
        pytest.skip("no C++ compiler")
    train(eventful(text_corpus, "sltrain", compile=True), tmp_path / "run")
    assert counters["stats"]["unique_graphs"] == 2 * (PARTS - 1)
    assert not counters["graph_break"]


def test_the_second_run_of_a_process_compiles_for_itself(text_corpus, tmp_path):
    for number in range(3):
        train(eventful(text_corpus, "full-rank", compile=True, seed=number), tmp_path / str(number))
    assert counters["stats"]["unique_graphs"] == 3 * 2 * PARTS


def test_the_end_of_a_warm_start_compiles_the_blocks_again(text_corpus, tmp_path):
    config = eventful(text_corpus, "relora", compile=True)
    options = config.method_options | {"warm_start": 4}
    with torch._dynamo.config.patch(error_on_recompile=False):
        train(config.model_copy(update={"method_options": options}), tmp_path / "run")
    # the first evaluation comes when it has ended
    assert counters["stats"]["unique_graphs"] == 2 * PARTS + 1


def test_different_blocks_compile_for_themselves(text_corpus, tmp_path):
    values = {"target": r"layers\.[02]\..*_proj", "compile": True}
    train(eventful(text_corpus, "low-rank", **values), tmp_path / "run")
    assert counters["stats"]["unique_graphs"] == 2 * (PARTS + 1)


class Untraceable(torch.nn.Linear):
    def forward(self, x):
        assert x.sum().item() < 1e9
        return super().forward(x)


def test_a_layer_that_breaks_the_graph_is_refused_in_one_line(monkeypatch, text_corpus, tmp_path):
    def build(*args, **kwargs):
        model, optimizer = state_build(*args, **kwargs)
        model.model.layers[1].mlp.up_proj.__class__ = Untraceable
        return model, optimizer

    state_build = run_state.build
    monkeypatch.setattr(run_state, "build", build)
    with pytest.raises(InputError, match=r"compile: True is not allowed; .*; False"):
        train(eventful(text_corpus, "full-rank", compile=True), tmp_path / "run")
