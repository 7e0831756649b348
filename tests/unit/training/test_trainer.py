"""Training end to end: records, evaluation, resuming after any interruption, and clear failures."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from short import QUICK, high_rate, reset_of, short_options, usual_rate

from lowrank_lab import METHODS, InputError, RunConfig, TrainingError
from lowrank_lab.data.prepare import prepare
from lowrank_lab.methods.build import build
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.models.llama import Llama
from lowrank_lab.runs.files import read_jsonl
from lowrank_lab.runs.generate import sample
from lowrank_lab.runs.run import Run
from lowrank_lab.training import checkpoint, preflight, records, trainer
from lowrank_lab.training import step as stepping
from lowrank_lab.training.evaluate import evaluate
from lowrank_lab.training.loop import train
from lowrank_lab.training.schedule import learning_rate

STEPS = 12
TIMES = ("seconds", "tokens_per_second")
TECHNIQUES = {"reset_every": 5, "recovery_steps": 3}


@pytest.fixture(scope="module")
def config(text_corpus):
    """Makes a tiny run of 12 steps, of any method, with techniques, refreshes and checkpoints."""

    def make(method="full-rank", **values):
        row = METHODS[method]
        options = short_options(method, 4)
        return RunConfig(
            **{
                **{"model": "tiny", "corpus": text_corpus, "vocab_size": "byte", "steps": STEPS},
                **{"sequence_length": 16, "batch": 4, "eval_tokens": 160, "test_tokens": 320},
                **{"eval_every": 6, "spectra_every": 6, "checkpoint_every": 4, "num_layers": 1},
                **{"method": method, "method_options": options, **TECHNIQUES},
                **({"refactor_every": 3} if row.has_products else {}),
                **reset_of(method),
                **values,
            }
        )

    return make


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Trains a configuration without disturbance, once; the run is only to be read."""
    runs = {}

    def of(config):
        run_id = resolve(config).run_id
        if run_id not in runs:
            runs[run_id] = train(config, tmp_path_factory.mktemp("run") / "whole")
        return runs[run_id]

    return of


@pytest.fixture(scope="module")
def finished(config, trained):
    """A finished run of the paper's method."""
    return trained(config("low-rank"))


def rows_of(folder, times=False):
    """Rows of metrics.jsonl, without what a clock decides."""
    rows = read_jsonl(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if times or k not in TIMES} for row in rows]


def results_of(folder):
    """All a finished run leaves, without times."""
    result = json.loads((folder / "result.json").read_text())
    del result["seconds"]
    return {
        "metrics": rows_of(folder),
        "result": result,
        "spectra": read_jsonl(folder / "spectra.jsonl"),
        "memory": json.loads((folder / "memory.json").read_text()),
        "files": sorted(path.name for path in folder.iterdir()),
    }


def assert_same_run(ours, theirs):
    assert results_of(ours) == results_of(theirs)
    first, second = (load_file(folder / "model.safetensors") for folder in (ours, theirs))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


class Interrupted(BaseException):
    """What stops a run from outside, like Ctrl-C."""


def interrupt_at(step):
    def on_step(row):
        if row["step"] == step:
            raise Interrupted

    return on_step


def interrupted(config, folder, step):
    with pytest.raises(Interrupted):
        train(config, folder, on_step=interrupt_at(step))
    return folder


def mean_loss(model, corpus, split, length, count):
    """Mean of −log p over `count` windows spread over a split, one by one, in float64."""
    tokens = torch.from_numpy(corpus.tokens(split)[:].astype("int64"))
    losses, every = [], (len(tokens) - 1) // length
    for window in (i * every // count for i in range(count)):
        piece = tokens[window * length : (window + 1) * length + 1]
        with torch.no_grad():
            p = model(piece[None, :-1])[0].double().log_softmax(-1)
        losses.append(-p.gather(1, piece[1:, None]))
    return torch.cat(losses).mean().item()


# Records


def test_each_step_has_one_row_with_what_figures_need(finished):
    rows = rows_of(finished.folder, times=True)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row in rows:
        assert 0 < row["loss"] < 2 * math.log(257)
        assert row["tokens_seen"] == row["step"] * 4 * 16
        assert row["lr"] == learning_rate(row["step"] - 1, finished.config)
        assert row["grad_norm"] > 0
        assert row["tokens_per_second"] > 0
        assert row["peak_memory_bytes"] is None or row["peak_memory_bytes"] > 0
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds)


def test_evaluations_and_events_are_in_the_rows_of_their_steps(finished):
    rows = rows_of(finished.folder)
    assert [row["step"] for row in rows if "validation_loss" in row] == [6, 12]
    events = {row["step"]: [e["event"] for e in row["events"]] for row in rows if row["events"]}
    assert events == {
        3: ["refactor"],
        5: ["reset"],
        6: ["refactor"],
        9: ["refactor"],
        10: ["reset"],
    }
    refactor, reset = rows[2]["events"][0], rows[4]["events"][0]
    assert (refactor["layers"], refactor["rank_deficient"]) == (7, [])
    assert (reset["strength"], reset["parameters"]) == (1.0, 14)


def test_bytes_are_those_of_weights_gradients_and_states(config, trained):
    run = trained(config())
    parameters = list(build(resolve(config()))[0].parameters())
    elements = sum(p.numel() for p in parameters)
    states = 8 * elements + 4 * len(parameters)  # two averages, and AdamW's step counter
    for row in rows_of(run.folder):
        assert row["weight_bytes"] == row["gradient_bytes"] == 4 * elements
        assert row["optimizer_state_bytes"] == states
    assert run.memory["weights"] == run.result["weight_bytes"] == 4 * elements
    assert run.memory["optimizer_states"] == run.result["optimizer_state_bytes"] == states
    assert run.memory["activations"] > 0
    assert run.result["parameters"] == elements
    assert run.result["parameters_without_embeddings"] == elements - 2 * 257 * 32


def test_a_finished_folder_holds_its_records_and_nothing_else(finished):
    assert sorted(path.name for path in finished.folder.iterdir()) == [
        "config.json", "memory.json", "metrics.jsonl", "model.safetensors", "result.json",
        "spectra.jsonl", "tokenizer.json",
    ]  # fmt: skip
    result = finished.result
    assert (result["steps"], result["tokens_seen"]) == (STEPS, STEPS * 64)
    assert result["validation_perplexity"] == math.exp(result["validation_loss"])
    assert finished.config == resolve(finished.config)


def test_spectra_are_recorded_at_the_start_in_between_and_at_the_end(config, trained):
    run = trained(config())
    rows = [r for r in read_jsonl(run.folder / "spectra.jsonl") if "singular_values" in r]
    names = [f"model.layers.0.{n}" for n in ("self_attn.q_proj", "mlp.down_proj")]
    steps = [row["step"] for row in rows if row["layer"] in names]
    assert steps == [0, 0, 6, 6, 12, 12]
    weights = load_file(run.folder / "model.safetensors")
    for row in rows[-7:]:
        expected = torch.linalg.svdvals(weights[f"{row['layer']}.weight"].double())
        assert torch.tensor(row["singular_values"]).double() == pytest.approx(expected, rel=1e-4)


def test_callbacks_get_the_rows_of_the_file(config, tmp_path):
    seen = []
    run = train(config(), tmp_path, label="my variant", on_step=seen.append)
    assert seen == rows_of(run.folder, times=True)
    assert run.label == "my variant"


def test_a_run_without_a_folder_goes_to_the_data_folder(config, data):
    run = train(config(steps=1, reset_every=0))
    assert run.folder == data / "runs" / resolve(config(steps=1, reset_every=0)).run_id
    assert [row["step"] for row in rows_of(run.folder)] == [1]
    assert "validation_loss" in rows_of(run.folder)[0]


# What is computed


def test_the_first_row_is_the_loss_and_gradient_of_the_initial_model(config, tmp_path):
    run = train(config(steps=1, reset_every=0), tmp_path)
    inputs, targets = prepare(run.config).batch("train", 0, batch=4, sequence_length=16, seed=0)
    model = build(run.config)[0]
    logits = model(inputs).flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, targets.flatten())
    loss.backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters()))
    (row,) = rows_of(run.folder)
    assert (row["loss"], row["grad_norm"]) == pytest.approx((loss.item(), norm), rel=1e-5)


@pytest.mark.parametrize("method", QUICK)
def test_loss_falls(config, tmp_path, method):
    run = train(
        config(method, steps=40, lr=high_rate(method), reset_every=0, checkpoint_every=40), tmp_path
    )
    losses = [row["loss"] for row in rows_of(run.folder)]
    assert losses[0] == pytest.approx(math.log(257), rel=0.03)
    assert sum(losses[-5:]) / 5 < losses[0] - 1
    assert run.result["test_loss"] < losses[0] - 1


@pytest.mark.parametrize(
    ("tokens", "windows"), [(16 * 11, 11), (16 * 3 + 15, 3), (1, 1), (10**9, None)]
)
def test_evaluation_weighs_tokens_in_a_ragged_last_batch_too(config, tokens, windows):
    given = resolve(config(initializer_range=0.3, batch=5))
    model, corpus = build(given)[0], prepare(given)
    windows = windows or corpus.num_windows("test", 16)
    assert windows % 5, "the last batch must be ragged"
    expected = mean_loss(build(given)[0], corpus, "test", 16, windows)
    assert evaluate(model, corpus, "test", tokens, given).loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_the_model_as_it_was(config, training):
    given = resolve(config())
    model = build(given)[0].train(training)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    evaluate(model, prepare(given), "validation", 64, given)
    assert model.training is training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_result_is_the_loss_of_the_saved_model(finished):
    corpus = prepare(finished.config)
    for split in ("validation", "test"):
        expected = mean_loss(finished.model, corpus, split, 16, 320 // 16)
        assert finished.result[f"{split}_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("method", QUICK)
def test_a_run_is_decided_by_its_configuration_alone(config, trained, tmp_path, method):
    whole = trained(config(method))
    torch.manual_seed(time.monotonic_ns())
    assert_same_run(train(config(method), tmp_path / "again").folder, whole.folder)


def test_another_seed_gives_other_losses(config, trained):
    runs = [trained(config(seed=seed)) for seed in (0, 1)]
    assert rows_of(runs[0].folder)[0]["loss"] != rows_of(runs[1].folder)[0]["loss"]


FRUGAL = [
    {"activation_checkpointing": True},
    {"gradient_accumulation": 2},
    {"activation_checkpointing": True, "gradient_accumulation": 4},
]


@pytest.mark.parametrize("method", QUICK)
@pytest.mark.parametrize("change", FRUGAL, ids=str)
def test_ways_to_save_memory_do_not_change_the_losses(config, trained, method, change):
    exact = {"lr": usual_rate(method), "method_options": short_options(method, 4)}
    if "ns_precision" in METHODS[method].options:  # in bfloat16, rounding would grow
        exact["method_options"] |= {"ns_precision": "fp32"}
    if method == "frugal":  # the sign of a gradient that is 0 up to rounding is a whole step of it
        exact["method_options"] |= {"inactive_lr_scale": 0.01}
    runs = (trained(config(method, **exact, **how)) for how in ({}, change))
    losses = [[row["loss"] for row in rows_of(run.folder)] for run in runs]
    # SLTrain's B starts at zero, where Adam divides rounding by rounding
    assert losses[1] == pytest.approx(losses[0], rel=3e-5 if method == "sltrain" else 1e-5)


def test_activation_checkpointing_saves_activations(config, trained):
    plain, frugal = trained(config()), trained(config(activation_checkpointing=True))
    assert 0 < frugal.memory["activations"] < 0.8 * plain.memory["activations"]


@pytest.mark.parametrize("pieces", [2, 4])
def test_a_batch_in_pieces_keeps_the_activations_of_one_piece(config, trained, pieces):
    in_pieces = trained(config(gradient_accumulation=pieces)).memory["activations"]
    one_piece = trained(config(batch=4 // pieces)).memory["activations"]
    assert in_pieces == pytest.approx(one_piece, rel=0.01)


@pytest.mark.parametrize("method", QUICK)
@pytest.mark.parametrize(
    ("precision", "dtype"), [("amp-bf16", torch.float32), ("bf16", torch.bfloat16)]
)
def test_lower_precisions_train_as_the_full_one_does(config, trained, method, precision, dtype):
    rate = high_rate(method)
    full = trained(config(method, lr=rate)).result["test_loss"]
    low = trained(config(method, lr=rate, precision=precision))
    assert low.result["test_loss"] == pytest.approx(full, rel=0.03)
    assert full < math.log(257) - 0.5
    weights = load_file(low.folder / "model.safetensors").values()
    assert {w.dtype for w in weights if w.is_floating_point()} == {dtype}


# Going on


@pytest.mark.parametrize("at", [2, 5, 8, 11])  # before a checkpoint, after a reset, on one, late
@pytest.mark.parametrize("method", QUICK)
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(
    config, trained, tmp_path, method, at
):
    whole = trained(config(method))
    folder = interrupted(config(method), tmp_path / "interrupted", at)
    assert not Run(folder).finished
    assert_same_run(train(config(method), folder).folder, whole.folder)


def test_a_run_interrupted_again_and_again_is_still_the_same_run(config, trained, tmp_path):
    whole = trained(config("fira"))
    for step in (1, 5, 6, 10, 12):
        folder = interrupted(config("fira"), tmp_path / "interrupted", step)
    assert_same_run(train(config("fira"), folder).folder, whole.folder)


def test_a_run_may_go_on_with_other_checkpoints(config, trained, tmp_path):
    whole = trained(config("galore"))
    folder = interrupted(config("galore"), tmp_path / "interrupted", 5)
    train(config("galore", checkpoint_every=1), folder)
    assert_same_run(folder, whole.folder)


def test_a_torn_last_line_is_written_again(config, trained, tmp_path):
    whole = trained(config())
    folder = interrupted(config(), tmp_path / "interrupted", 6)
    for name in ("metrics.jsonl", "spectra.jsonl"):
        with (folder / name).open("a") as file:
            file.write('{"step": 7, "loss": 5.1')
    assert_same_run(train(config(), folder).folder, whole.folder)


@pytest.mark.parametrize("file", ["model.safetensors", "result.json"])
def test_a_run_interrupted_while_it_ends_ends_again(config, trained, tmp_path, monkeypatch, file):
    whole = trained(config())
    folder, write = tmp_path / "interrupted", records.write_json

    def stops(path, value):
        if path.name == "result.json":
            if file == "model.safetensors":
                (path.parent / file).unlink()
            raise Interrupted
        write(path, value)

    monkeypatch.setattr(records, "write_json", stops)
    with pytest.raises(Interrupted):
        train(config(), folder)
    monkeypatch.undo()
    assert_same_run(train(config(), folder).folder, whole.folder)


KILLED = """
import sys, torch
from lowrank_lab import RunConfig, train
torch.set_num_threads(1)
train(RunConfig.model_validate_json(sys.argv[1]), sys.argv[2])
"""


def test_a_run_killed_in_the_middle_goes_on_bit_for_bit(config, tmp_path):
    given = config("low-rank", steps=150, refactor_every=7, checkpoint_every=10, eval_every=25)
    given = RunConfig(**given.model_dump())
    whole, folder = train(given, tmp_path / "whole"), tmp_path / "killed"
    program = [sys.executable, "-c", KILLED, given.model_dump_json(), str(folder)]
    process = subprocess.Popen(program, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 60
    while len(read_jsonl(folder / "metrics.jsonl")) < 47:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not Run(folder).finished
    assert_same_run(train(given, folder).folder, whole.folder)


def test_a_finished_run_is_returned_at_once(finished, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in finished.folder.iterdir()}
    monkeypatch.delattr(trainer, "Trainer")
    again = train(finished.config, finished.folder, on_step=interrupt_at(1))
    assert again.result == finished.result
    assert {path: path.stat().st_mtime_ns for path in finished.folder.iterdir()} == before


# Refusals, before anything is written


def refusal(config, folder):
    """The one line a run is refused with, its folder being left as it was."""
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    existed = folder.exists()
    with pytest.raises(InputError) as caught:
        train(config, folder)
    assert folder.exists() == existed
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"lr": 2e-3}, "lr"), ({"seed": 5}, "seed"), ({"lr": 2e-3, "batch": 8}, "batch, lr")],
)
def test_another_configuration_is_refused_by_the_fields_that_differ(finished, change, named):
    message = refusal(finished.config.replace(**change), finished.folder)
    assert message.startswith("out: ")
    assert message.endswith(f"differs in {named}")


def test_a_field_that_may_differ_is_not_blamed(finished):
    message = refusal(finished.config.replace(lr=2e-3, checkpoint_every=2), finished.folder)
    assert message.endswith("differs in lr")


def test_a_folder_with_other_files_is_refused(config, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    assert "not a run" in refusal(config(), tmp_path)


def test_a_file_in_place_of_a_folder_is_refused(config, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="it is a file"):
        train(config(), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"method": "nothing"}, "method: "),
        ({"method": "low-rank", "rank": 33}, "rank: "),
        ({"steps": 10**6}, "steps: "),
        ({"steps": None, "tokens": 10**9}, "tokens: "),
        ({"sequence_length": 1 << 18, "batch": 1, "repeat": True}, "sequence_length: "),
        ({"corpus": "text:/nowhere"}, "corpus: "),
    ],
)
def test_a_wrong_configuration_leaves_no_folder(config, tmp_path, change, said):
    assert refusal(config().replace(**change), tmp_path / "run").startswith(said)


def test_no_test_computes_on_a_card():
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert not torch.cuda.is_available()


def test_a_device_that_is_not_there_is_refused(config, tmp_path):
    assert refusal(config(device="cuda"), tmp_path / "run").startswith("device: 'cuda'")


def test_a_corpus_is_seen_once_to_its_last_window_unless_repeated(config, tmp_path):
    windows = prepare(config()).num_windows("train", 1024)
    long = {"sequence_length": 1024, "batch": 1, "reset_every": 0}
    preflight.check(config(steps=windows, **long))
    assert str(windows * 1024) in refusal(config(steps=windows + 1, **long), tmp_path / "run")
    preflight.check(config(steps=windows + 1, repeat=True, **long))


# Failures of what is computed


def failure(config, folder):
    """The one line a run fails with."""
    with pytest.raises(TrainingError) as caught:
        train(config, folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def kept_weights(config, folder):
    model, optimizer = build(resolve(config))
    step, _ = checkpoint.load(folder / "checkpoints", model, optimizer)
    return step, model.state_dict()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("index", "what"), [(0, "loss"), (1, "gradient norm")])
@pytest.mark.parametrize("at", [1, 7])
def test_a_loss_that_is_not_finite_stops_the_run_in_one_line(
    config, trained, tmp_path, monkeypatch, value, index, what, at
):
    given, calls, gradients = config("low-rank"), [], stepping.gradients

    def spoiled(*arguments):
        calls.append(1)
        values = list(gradients(*arguments))
        if len(calls) == at:
            values[index] = torch.tensor(value)
        return tuple(values)

    monkeypatch.setattr(stepping, "gradients", spoiled)
    message = failure(given, tmp_path / "run")
    assert f"the {what} of step {at} is {value}" in message
    step, weights = kept_weights(given, tmp_path / "run")
    assert step == at - 1
    assert all(w.isfinite().all() for w in weights.values())
    monkeypatch.undo()  # what is kept is good: the run can go on from it
    whole = trained(given)
    assert_same_run(train(given, tmp_path / "run").folder, whole.folder)


@pytest.mark.parametrize("method", ["full-rank", "low-rank"])
@pytest.mark.parametrize("at", [3, 4, 6, 12])  # plain, checkpointed, evaluated, last
def test_weights_that_are_not_finite_stop_the_run_and_are_not_kept(
    config, tmp_path, monkeypatch, method, at
):
    finish_step_ = stepping.finish_step_

    def spoiled(model, optimizer, given, step, *rest):
        done = finish_step_(model, optimizer, given, step, *rest)
        if step + 1 == at:
            with torch.no_grad():
                next(p for n, p in model.named_parameters() if "up_proj" in n)[0, 0] = math.nan
        return done

    monkeypatch.setattr(stepping, "finish_step_", spoiled)
    failure(config(method), tmp_path)
    step, weights = kept_weights(config(method), tmp_path)
    assert step < at
    assert all(w.isfinite().all() for w in weights.values())
    assert not Run(tmp_path).finished


@pytest.mark.parametrize(
    "wild",
    [
        {"lr": 100},
        {"lr": 100, "precision": "bf16"},
        {"lr": 100, "clip": 0, "weight_decay": 10, "initializer_range": 10},
        {"lr": 100, "checkpoint_every": 1, "eval_every": 1, "weight_decay": 10},
    ],
    ids=str,
)
@pytest.mark.parametrize("method", QUICK)
def test_a_run_that_blows_up_ends_as_a_result_or_in_one_line(config, tmp_path, method, wild):
    try:
        run = train(config(method, **wild), tmp_path)
    except TrainingError as error:
        lines = str(error).splitlines()
    else:
        lines = [str(run.result["test_loss"])]
    assert len(lines) == 1


# Samples


def test_a_sample_is_decided_by_its_seed(finished):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = sample(finished, "the model", tokens=30, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert first == sample(Run(finished.folder), "the model", tokens=30, seed=3)
    assert first != sample(finished, "the model", tokens=30, seed=4)
    assert first.startswith("the model")


def test_a_sample_without_temperature_takes_the_likeliest_token(finished):
    text = sample(finished, "the model", tokens=3, temperature=0)
    assert text == sample(finished, "the model", tokens=3, temperature=0, seed=9)
    tokenizer = prepare(finished.config).tokenizer
    ids = tokenizer.encode("the model").ids
    for _ in range(3):
        ids.append(int(finished.model(torch.tensor([ids]))[0, -1].argmax()))
    assert text == tokenizer.decode(ids)


@pytest.mark.parametrize("prompt", ["", "x" * 500])
def test_a_prompt_may_be_empty_or_longer_than_a_sequence(finished, prompt):
    text = sample(finished, prompt, tokens=5)
    assert text.startswith(prompt or "\n")


def test_a_trained_model_is_a_plain_llama(finished):
    assert isinstance(finished.model, Llama)
    assert not finished.model.training


def test_each_batch_is_fetched_once_ahead_of_the_numbers_of_the_step_before(
    config, tmp_path, monkeypatch
):
    """So that the copy to a device and its computing overlap: nothing waits for the batch."""
    order, asked = [], trainer.Corpus.batch
    real_finite = trainer.Trainer._finite

    def batch(self, split, step, **rest):
        order.append(("batch", step))
        return asked(self, split, step, **rest)

    def finite(self, loss, norm):
        done = real_finite(self, loss, norm)
        order.append(("numbers", self.updates))
        return done

    monkeypatch.setattr(trainer.Corpus, "batch", batch)
    monkeypatch.setattr(trainer.Trainer, "_finite", finite)
    train(config(steps=4, reset_every=0), tmp_path)
    ahead = [("batch", 1), ("numbers", 0), ("batch", 2), ("numbers", 1), ("batch", 3)]
    assert order == [("batch", 0), *ahead, ("numbers", 2), ("numbers", 3)]
