"""Held-out losses by token, position and document, the copying probe, and the rate of the rest."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from short import QUICK, short_options
from torch.nn import functional as F

from lowrank_lab import METHODS, RunConfig, register_method
from lowrank_lab.config import InputError
from lowrank_lab.data.prepare import prepare
from lowrank_lab.methods.build import build, partition
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.runs.kept import write_study
from lowrank_lab.runs.run import Run, load_runs
from lowrank_lab.training.evaluate import (
    Evaluation,
    copying_loss,
    evaluate,
    evaluated_windows,
    position_starts,
)
from lowrank_lab.training.loop import train
from lowrank_lab.training.schedule import learning_rate
from lowrank_lab.training.step import set_learning_rate


@pytest.fixture
def config(text_corpus):
    def make(**values):
        small = {"model": "tiny", "vocab_size": "byte", "sequence_length": 16, "batch": 4}
        held_out = {"eval_tokens": 160, "test_tokens": 640, "steps": 4}
        return RunConfig(**{**small, **held_out, "corpus": text_corpus, **values})

    return make


@pytest.mark.parametrize("values", [{}, {"precision": "amp-bf16"}, {"precision": "bf16"}])
def test_the_loss_of_each_token_is_that_of_its_logits_and_their_mean_is_the_loss(config, values):
    given = resolve(config(initializer_range=0.3, eval_windows="first", **values))
    model, corpus = build(given)[0], prepare(given)
    found = evaluate(model, corpus, "test", 100, given)
    tokens, targets = corpus.windows("test", np.arange(6), 16)
    with torch.autocast("cpu", torch.bfloat16, enabled=given.precision == "amp-bf16"):
        logits, loss = model(tokens).float(), model.loss(tokens, targets)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    assert found.losses.shape == (6, 16)
    torch.testing.assert_close(
        torch.tensor(found.losses).float(), expected.view(6, 16), rtol=1e-5, atol=1e-5
    )
    assert found.loss == pytest.approx(loss.item(), rel=1e-6)


def test_spread_windows_lie_at_equal_distances_over_the_whole_split(config):
    corpus = prepare(resolve(config()))
    every = corpus.num_windows("test", 16)
    first = evaluated_windows(corpus, "test", 16 * 5, resolve(config(eval_windows="first")))
    spread = evaluated_windows(corpus, "test", 16 * 5, resolve(config()))
    assert first.tolist() == [0, 1, 2, 3, 4]
    assert spread[0] == 0
    assert every - every // 5 - 1 <= spread[-1] < every
    assert set(np.diff(spread)) <= {every // 5, every // 5 + 1}
    whole = evaluated_windows(corpus, "test", 10**9, resolve(config()))
    assert whole.tolist() == list(range(every))


@pytest.mark.parametrize("length", [2, 3, 16, 100])
def test_positions_are_grouped_by_powers_of_two(length):
    losses = np.arange(3 * length, dtype=float).reshape(3, length)
    starts = [*position_starts(length), length]
    assert starts[:3] == [0, 1, min(3, length)][: len(starts[:3])]
    means = [losses[:, a:b].mean() for a, b in itertools.pairwise(starts)]
    assert Evaluation(losses).by_position == pytest.approx(means, rel=1e-6)


def test_documents_are_those_that_end_of_text_tokens_separate(config):
    given = resolve(config())
    corpus = prepare(given)
    found = evaluate(build(given)[0], corpus, "test", 640, given, documents=True)
    tokens = corpus.tokens("test")
    number, of_token = 0, []
    for token in tokens.tolist():
        of_token.append(number)
        number += token == 0  # END_OF_TEXT of the byte tokenizer
    windows = evaluated_windows(corpus, "test", 640, given)
    expected = [[of_token[w * 16 + 1 + t] for t in range(16)] for w in windows]
    assert found.documents.tolist() == expected
    columns = found.by_document
    assert len(columns["documents"]) > 1
    assert sum(columns["document_tokens"]) == found.losses.size
    weighted = np.dot(columns["document_tokens"], columns["document_losses"]) / found.losses.size
    assert weighted == pytest.approx(found.loss, rel=1e-6)


def test_a_corpus_of_numbers_has_no_documents(config):
    given = resolve(config(corpus="markov", vocab_size=16))
    corpus = prepare(given)
    found = evaluate(build(given)[0], corpus, "test", 64, given, documents=True)
    assert found.by_document == {}


class Copier(torch.nn.Module):
    """Gives the token that followed the last occurrence of the current one almost all mass."""

    def __init__(self, vocabulary, copies):
        super().__init__()
        self.vocabulary, self.copies = vocabulary, copies
        self.anchor = torch.nn.Parameter(torch.zeros(()))

    def token_losses(self, tokens, targets):
        logits = torch.zeros(*targets.shape, self.vocabulary)
        half = tokens.shape[1] // 2
        if self.copies:
            logits[:, half:].scatter_(2, tokens.roll(half - 1, 1)[:, half:, None], 50.0)
        flat = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return flat.view(targets.shape)


@pytest.mark.parametrize("length", [2, 3, 16, 33])
def test_the_copying_probe_is_nothing_for_a_copier_and_ln_v_for_a_uniform_guess(config, length):
    given = resolve(config(sequence_length=length))
    uniform = copying_loss(Copier(257, copies=False), 257, given)
    assert uniform == pytest.approx(math.log(257), rel=1e-6)
    if length % 2 == 0 and length > 2:  # then every second occurrence lies half a window back
        assert copying_loss(Copier(257, copies=True), 257, given) < 1e-6


def test_a_run_records_positions_copying_and_documents_and_a_kept_study_keeps_them(
    config, tmp_path
):
    run = train(config(seed=3), folder=tmp_path / "run")
    row = [row for row in run.records.metrics if "validation_loss" in row][-1]
    assert len(row["validation_loss_by_position"]) == 4
    assert 0 < row["copying_loss"] < 12
    write_study(tmp_path / "kept", {"run": run.records})
    for found in (run, Run(tmp_path / "kept" / "run")):
        assert found.result["copying_loss"] == row["copying_loss"]
        documents = found.documents
        assert documents["tokens"].sum() == 640
        weighted = (documents["tokens"] * documents["loss"]).sum() / 640
        assert weighted == pytest.approx(found.result["test_loss"], rel=1e-6)
        assert found.by_position["position"].tolist()[-4:] == [1, 2, 4, 8]
    assert not [c for c in load_runs(tmp_path / "kept") if "document" in c]
    assert json.dumps(run.result)


# The learning rate of what is no target layer


@pytest.mark.parametrize("method", QUICK)
def test_the_rest_has_its_own_rate_with_every_method(config, method):
    short = {"method_options": short_options(method, 3)}
    given = resolve(config(method=method, rest_lr=1e-4, lr=1e-2, schedule="constant", **short))
    model, optimizer = build(given)
    targets, rest = partition(model, given.target)
    for step in range(3):
        set_learning_rate(optimizer, given, step)
        rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
        scheduled = learning_rate(step, given)
        assert {rates[id(p)] for p in targets if id(p) in rates} <= {scheduled}
        assert all(rates[id(p)] == pytest.approx(scheduled / 100) for p in rest)
        for p in (*targets, *rest):
            p.grad = torch.full_like(p, 0.01)
        optimizer.step()


def test_a_rest_rate_that_equals_the_rate_is_none_and_changes_no_id(config):
    same = resolve(config(lr=1e-2, rest_lr=1e-2))
    assert same == resolve(config(lr=1e-2))
    assert same.run_id == resolve(config(lr=1e-2)).run_id
    assert resolve(config(rest_lr=1e-3)).run_id != same.run_id


def test_a_method_with_one_group_for_all_refuses_a_rest_rate(config):
    def one_group(targets, rest, given):
        return torch.optim.SGD([*targets, *rest], lr=given.lr)

    register_method("one-group", optimizer=one_group)
    try:
        with pytest.raises(InputError, match=r"rest_lr: 0.5 is not allowed; one-group has"):
            build(resolve(config(method="one-group", rest_lr=0.5)))
    finally:
        METHODS.pop("one-group")
