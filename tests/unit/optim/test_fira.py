"""Fira's residual after a gradient of zero, or one inside the subspace."""

import pytest
import torch
from fira import FiraAdamW
from optimizer_rows import FIRA
from optimizer_trial import Trial
from small_matrices import TALL, gradients, relative

ZEROS_AT = (3, 7, 8)


def with_zeros(shape=TALL, steps=20):
    return [G * (i not in ZEROS_AT) for i, G in enumerate(gradients(shape, steps))]


def residual_norms(trial, grads):
    return [float(trial.advance([G]).states[0]["residual_norm"]) for G in grads]


def test_the_residual_is_back_one_step_after_a_zero_gradient():
    grads = with_zeros()
    norms = residual_norms(Trial(FIRA), grads)
    undisturbed = residual_norms(Trial(FIRA), gradients(TALL, 20))
    assert all((norm == 0) == (i in ZEROS_AT) for i, norm in enumerate(norms))
    assert min(norms[i] for i in (4, 9)) > 0.1 * min(undisturbed)


def test_by_the_published_rule_it_stays_near_zero():
    norms = residual_norms(Trial(FIRA, forgive_zero=False), with_zeros())
    assert max(norms[4:]) < 1e-6


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_the_published_rule_equals_the_package_on_zero_gradients(alpha):
    ours, theirs = (
        Trial(FIRA, alpha=alpha, cls=cls, **keys).advance(with_zeros())
        for cls, keys in ((None, {"forgive_zero": False}), (FiraAdamW, {}))
    )
    before = Trial(FIRA).result()
    assert relative(ours.result() - before, theirs.result() - before) <= 1e-5


def test_a_gradient_inside_the_subspace_is_forgiven_too():
    G, *rest = gradients(TALL, 6)
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    inside = U[:, :4] * S[:4] @ Vh[:4]
    norms = residual_norms(Trial(FIRA), [inside, *rest])
    assert norms[0] == 0
    assert min(norms[1:]) > 0.1


@pytest.mark.parametrize("tiny", [1e-30, 1e-20])
def test_so_is_a_gradient_below_every_epsilon(tiny):
    G, *rest = gradients(TALL, 6)
    norms = residual_norms(Trial(FIRA), [G, tiny * G, *rest])
    assert norms[1] < 1e-8
    assert min(norms[2:]) > 0.1
