"""LDAdam: the subspace of every step, the moments in it, and the error that is fed back."""

import copy

import pytest
import torch
from equations import ldadam, sides_of
from optimizer_rows import LDADAM
from optimizer_trial import Trial
from small_matrices import ONE_SIDED, SQUARE, TALL, WIDE, readable, relative

from lowrank_lab import RunConfig, reset_momentum_
from lowrank_lab.config import InputError
from lowrank_lab.device import cuda_path
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.optim.subspace_iteration import thin_q

forms = pytest.mark.parametrize("form", ["single", "stacked"], indirect=True)


@forms
@pytest.mark.parametrize("side", ONE_SIDED)
@pytest.mark.parametrize("shape", [SQUARE, TALL, WIDE], ids=readable)
@pytest.mark.parametrize("feedback", [True, False])
def test_in_float64_it_follows_the_equations_with_power_iterations_of_their_own(
    side, shape, feedback, form
):
    keys = {"proj_type": side, "error_feedback": feedback}
    grads = LDADAM.gradients(shape, 12, torch.float64)
    trial = Trial(LDADAM, shape, 3, torch.float64, **keys)
    before = trial.result()
    exact = ldadam(before, grads, [], rank=3, **keys)
    assert relative(trial.advance(grads).result() - before, exact - before) <= 1e-9


@pytest.mark.parametrize("shape", [TALL, WIDE], ids=readable)
def test_the_error_is_what_the_projections_of_gradients_and_moments_have_lost(shape):
    grads = LDADAM.gradients(shape, 9, torch.float64)
    trial = Trial(LDADAM, shape, 2, torch.float64)
    for G in grads:
        before = trial.states[0].get("error", torch.zeros(shape)).clone()
        m = in_full(trial) if trial.states[0] else 0.0
        trial.advance([G])
        # β₁/(1−β₁) P m + G + e = β₁/(1−β₁) P′m′ + P′R + e′, and the new moment is β₁ m′ + (1−β₁) R
        b1 = 0.908
        into = G + before + b1 / (1 - b1) * m
        out = in_full(trial) / (1 - b1) + trial.states[0]["error"]
        assert relative(out, into) <= 1e-10


def in_full(trial):
    """P m: the first moment as a matrix shaped like the weight."""
    state = trial.states[0]
    L, R = sides_of(state, trial.matrices[0].shape)
    return L @ state["exp_avg"].double() @ R.T


@forms
def test_after_a_full_reset_the_next_steps_are_those_of_new_moments_in_the_old_subspace(form):
    trial = Trial(LDADAM, TALL, 4).advance(LDADAM.gradients(TALL, 6))
    reset_momentum_(trial.optimizer)
    assert not trial.states[0]["error"].any()
    twin = copy.deepcopy(trial)
    grads = LDADAM.gradients(TALL, 9)[6:]
    trial.advance(grads)
    assert trial.matrices[0].isfinite().all()
    for name, value in trial.states[0].items():
        if torch.is_tensor(value):
            assert value.isfinite().all(), name
    assert trial.states[0]["exp_avg_weight"] == pytest.approx(1 - 0.908**3)
    assert twin.states[0]["exp_avg_weight"] == 0


@pytest.mark.parametrize(("p", "r"), [(40, 8), (9, 9), (12, 1), (300, 64)])
def test_products_and_cholesky_give_the_q_of_reflections(p, r):
    chance = torch.Generator().manual_seed(p)
    Y = torch.randn(3, p, r, generator=chance) * torch.logspace(0, -4, r)
    with cuda_path():
        Q = thin_q(Y)
    exact = torch.linalg.qr(Y.double())[0].float()
    signs = (Q * exact).sum(-2, keepdim=True).sign()
    assert (Q * signs - exact).abs().max() <= 1e-5
    assert torch.allclose(Q.mT @ Q, torch.eye(r), atol=1e-6)


@pytest.mark.parametrize("zeros", [0, 2, 8])
def test_columns_that_depend_on_others_are_completed(zeros):
    Y = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    Y[:, 8 - zeros :] = 0
    Y[:, 3] = Y[:, 1]
    with cuda_path():
        Q = thin_q(Y[None])[0]
    assert torch.allclose(Q.T @ Q, torch.eye(8), atol=1e-6)
    assert relative(Q @ (Q.T @ Y), Y) <= 1e-5 if zeros < 8 else True


def test_a_gradient_that_is_not_finite_is_named_and_changes_nothing():
    trial = Trial(LDADAM, TALL, 4).advance(LDADAM.gradients(TALL, 3))
    before = copy.deepcopy(trial.states[0])
    W = trial.result()
    with pytest.raises(RuntimeError, match="the gradient of parameter 1 is not finite"):
        trial.advance([torch.full(TALL, torch.nan)])
    for name, value in trial.states[0].items():
        same = torch.equal(value, before[name]) if torch.is_tensor(value) else value == before[name]
        assert same, name
    assert torch.equal(trial.result(), W)


def test_error_feedback_excludes_per_layer_updates_in_one_line():
    given = {"model": "tiny", "corpus": "markov", "method": "ldadam", "rank": 4, "steps": 5,
             "per_layer": True, "clip": 0}  # fmt: skip
    with pytest.raises(InputError, match=r"^per_layer: True is not allowed; .*error_feedback"):
        resolve(RunConfig(**given))
    for off in (False, "no"):
        assert resolve(RunConfig(**given, method_options={"error_feedback": off})).per_layer
