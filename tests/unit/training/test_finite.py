"""A step that isn't finite changes nothing, and on CUDA's path the host reads that late."""

import math
from functools import partial

import pytest
import torch
from finite_steps import QUEUED_FIRST, HostReads, late_and_not, order_of_step, spoiled
from interruptions import STEPS, assert_same, config_of, rows_of
from torch import nn

from lowrank_lab import TrainingError, train
from lowrank_lab.device import cuda_path
from lowrank_lab.methods.build import build
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.training import step as stepping
from lowrank_lab.training.finite import FiniteCheck, StatesBefore, checks_on_device, off_where
from lowrank_lab.training.gradients import clip_
from lowrank_lab.training.kinds import kind_of
from lowrank_lab.training.preflight import check
from lowrank_lab.training.schedule import events
from lowrank_lab.training.trainer import Trainer

FUSED = ["full-rank", "low-rank", "lora", "relora", "sltrain"]
OURS = [
    "galore", "golore", "fira", "apollo", "apollo-mini", "spam", "stable-spam", "loro", "muon",
    "scale", "normuon", "spectron",
    "frugal", "ldadam",
]  # fmt: skip
VARIANTS = {
    "decay": {"weight_decay": 0.1},
    "random rounding": {"precision": "bf16", "stochastic_rounding": True, "weight_decay": 0.1},
    "float32 averages": {"precision": "bf16", "state_precision": "fp32"},
}
PRECISE = ["galore", "golore", "fira", "apollo", "apollo-mini"]  # they have the last two


def variants():
    """Methods with further fields of a run."""
    yield from (pytest.param(name, {}, id=name) for name in (*FUSED, *OURS))
    for label, values in VARIANTS.items():
        for name in OURS if label == "decay" else PRECISE:
            yield pytest.param(name, values, id=f"{name}, {label}")


@pytest.mark.parametrize(
    ("method", "where"),
    [*((n, "gradient") for n in (*FUSED, *OURS)), ("low-rank", "loss"), ("lora", "overflow")],
)
def test_the_device_skips_what_the_host_would_skip(method, where, tmp_path, monkeypatch):
    # The first, two in a row, one before events, refreshes, one before a checkpoint, and the last.
    bad = {1, 3, 4, 5, 8, 9, 12, STEPS}
    options = {"method_options": {"merge_every": 6}} if method == "relora" else {}
    config = config_of(method, on_nonfinite="skip", checkpoint_every=8, **options)
    runs = late_and_not(monkeypatch, tmp_path, config, bad, where)
    assert_same(*runs, but=["peak_memory_bytes"])  # the flag's 4 bytes, and those of the update


def test_the_device_skips_steps_of_torchao_s_8_bit_moments(tmp_path, monkeypatch):
    pytest.importorskip("torchao")
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # which takes minutes
    config = config_of("adamw-8bit", on_nonfinite="skip", hidden_size=64, steps=5, reset_every=0)
    runs = late_and_not(monkeypatch, tmp_path, config, {1, 3, 5}, "gradient")
    assert_same(*runs, but=["peak_memory_bytes"])


def test_a_first_step_that_is_not_finite_leaves_the_weights_alone(tmp_path, monkeypatch):
    config = config_of(steps=6, on_nonfinite="skip", reset_every=0, recovery_steps=0)
    late, early = late_and_not(monkeypatch, tmp_path, config, {1, 2}, "loss")
    assert [row["loss"] for row in rows_of(late)] == [row["loss"] for row in rows_of(early)]
    assert [row["loss"] for row in rows_of(late)][:2] == [None, None]


def test_the_bytes_of_optimizer_states_are_known_after_a_skipped_first_step(tmp_path, monkeypatch):
    short = {"steps": 6, "reset_every": 0, "recovery_steps": 0}
    usual = train(config_of(**short), tmp_path / "usual")
    spoiled(monkeypatch, {1}, "loss")
    run = train(config_of(on_nonfinite="skip", **short), tmp_path / "skipped")
    rows, usual_rows = rows_of(run), rows_of(usual)
    assert rows[0]["loss"] is None
    assert rows[-1]["optimizer_state_bytes"] == usual_rows[-1]["optimizer_state_bytes"] > 0


def test_the_device_stops_where_the_host_would_stop(tmp_path, monkeypatch):
    said = []
    for late in (True, False):
        with monkeypatch.context() as patch, cuda_path():
            spoiled(patch, {9}, "loss")
            if not late:
                patch.setattr(stepping, "checks_on_device", lambda *_: False)
            with pytest.raises(TrainingError) as caught:
                train(config_of("low-rank"), tmp_path / str(late))
        said.append(str(caught.value).replace(str(tmp_path / str(late)), ""))
    assert said[0] == said[1]
    assert "the loss of step 9 is nan; the last good state is kept in" in said[0]
    with cuda_path():  # both go on with the same weights
        assert_same(*(train(config_of("low-rank"), tmp_path / str(late)) for late in (True, False)))


@pytest.mark.parametrize(("method", "values"), [*variants()])
def test_the_host_reads_nothing_of_a_step_until_its_update_is_queued(method, values):
    """Of any kind of step: the first, refreshes, exact steps and resets of SPAM among them."""
    config = resolve(config_of(method, clip=1.0, **values))
    model, optimizer = build(config)
    tokens = torch.zeros(2, config.sequence_length, dtype=torch.long)
    kinds = set()
    for at in range(9):
        kinds.add(kind_of(config, at))
        take = partial(stepping.take_step_, model, optimizer, [(tokens, tokens)], config, at)
        found = order_of_step(lambda check, take=take: take(check=check), (optimizer, "step"))
        assert found[:5] == QUEUED_FIRST
        assert not found[5:] or events(at + 1, config)  # a refactorization reads
    assert {"first", "next"} <= kinds


@pytest.mark.parametrize("method", ["low-rank", "galore", "fira"])
def test_in_a_whole_step_the_host_reads_once(method, tmp_path):
    """Data, update, clock and records included."""
    rare = {"eval_every": STEPS, "spectra_every": STEPS, "checkpoint_every": STEPS}
    config, corpus = check(config_of(method, reset_every=0, refactor_every=0, **rare))
    found = []
    with cuda_path():
        trainer = Trainer(config, corpus, tmp_path / "run")
        trainer.resume()
        for _ in range(3):
            with HostReads(found):
                trainer.advance()
    assert found == 3 * ["tolist"]


@pytest.mark.parametrize("name", HostReads.METHODS)
def test_a_read_without_an_operator_is_seen(name):
    found = []
    with HostReads(found):
        getattr(torch.ones(2), name)()
    assert name in found
    found.clear()
    getattr(torch.ones(2), name)()
    assert not found  # the methods are torch's own again


def test_8_bit_moments_of_torchao_are_queued_as_well(monkeypatch):
    pytest.importorskip("torchao")
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    config = resolve(config_of("adamw-8bit", hidden_size=64))
    model, optimizer = build(config)
    tokens = torch.zeros(2, config.sequence_length, dtype=torch.long)
    for at in range(3):
        take = partial(stepping.take_step_, model, optimizer, [(tokens, tokens)], config, at)
        found = order_of_step(lambda check, take=take: take(check=check), (optimizer, "step"))
        assert found[:5] == QUEUED_FIRST


@pytest.mark.parametrize("method", FUSED)
def test_a_step_without_values_is_queued_whole(method):
    """Of tensors of the meta device nothing can be read: it raises."""
    config = resolve(config_of(method))
    model, optimizer = build(config)
    model.to("meta")
    for p in model.parameters():
        p.grad = torch.empty_like(p) if p.requires_grad else None
    finite = FiniteCheck(lambda *_: None)
    finite.start(*torch.empty(2, device="meta"))
    with off_where(optimizer, finite.found_inf()):
        optimizer.step()


@pytest.mark.parametrize(
    ("optimizer", "known"),
    [
        (lambda p: torch.optim.AdamW(p, fused=True), True),
        (lambda p: torch.optim.AdamW(p), False),
        (lambda p: torch.optim.Muon(p), False),
    ],
)
def test_optimizers_that_do_not_know_the_flag_wait(optimizer, known):
    made = optimizer([nn.Parameter(torch.ones(2, 2))])
    assert not checks_on_device(made, torch.zeros(()))  # a CPU gains nothing
    with cuda_path():
        assert checks_on_device(made, torch.zeros(())) == known


def test_momenta_that_torch_does_not_fill_in_a_skipped_step_are_dropped():
    p = nn.Parameter(torch.ones(4))
    p.grad = torch.full((4,), math.nan)
    optimizer = torch.optim.SGD([p], lr=0.1, momentum=0.9, fused=True)
    before = StatesBefore(optimizer)
    with off_where(optimizer, torch.ones(())):
        optimizer.step()
    before.restore_()
    assert not optimizer.state
    assert torch.equal(p, torch.ones(4))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_the_flag_is_one_for_any_number_that_is_not_finite(value, which):
    finite = FiniteCheck(lambda *numbers: numbers if all(map(torch.isfinite, numbers)) else None)
    for bad in (False, True, False):
        numbers = torch.ones(2, dtype=torch.bfloat16)
        numbers[which] = value if bad else 1.0
        finite.start(*numbers)
        assert finite.found_inf() == bad
        assert finite.values() == (None if bad else (1, 1))


def test_the_flag_is_gone_after_the_step():
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(2))], fused=True)
    before = dict(vars(optimizer))
    with pytest.raises(KeyboardInterrupt), off_where(optimizer, torch.ones(())):
        raise KeyboardInterrupt
    assert vars(optimizer) == before


def test_a_norm_without_clipping_leaves_the_gradients_as_they_are():
    p = nn.Parameter(torch.tensor([3.0, 4.0]))
    p.grad = torch.tensor([3.0, 4.0])
    given = p.grad
    assert clip_([p, nn.Parameter(torch.ones(1))], 0.0) == 5
    assert given._version == 0
    assert torch.equal(given, torch.tensor([3.0, 4.0]))
    assert clip_([p], 1.0) == 5
    assert given.norm() == pytest.approx(1.0, abs=1e-6)


def test_a_run_that_stops_saves_the_states_of_its_last_good_step(tmp_path, monkeypatch):
    """Python numbers among them, which the update that was off has advanced."""
    with cuda_path():
        with monkeypatch.context() as patch:
            spoiled(patch, {10}, "loss")
            with pytest.raises(TrainingError):
                train(config_of("galore", checkpoint_every=100), tmp_path / "stopped")
        resumed = train(config_of("galore", checkpoint_every=100), tmp_path / "stopped")
        assert_same(resumed, train(config_of("galore", checkpoint_every=100), tmp_path / "whole"))
