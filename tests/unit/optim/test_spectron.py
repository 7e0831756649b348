"""What Spectron alone has: the bound of its steps, its vectors, and events of its factors."""

import pytest
import torch
from optimizer_rows import SPECTRON
from optimizer_trial import Trial
from small_matrices import TALL, WIDE, noisy_gradients, relative
from torch import nn

import lowrank_lab as lab
from lowrank_lab import optim
from lowrank_lab.optim.power_iteration import power_step_, power_steps_
from lowrank_lab.techniques import prune_moments_


@pytest.mark.parametrize("shape", [TALL, WIDE])
def test_the_spectral_norm_of_a_step_is_at_most_about_the_learning_rate(shape):
    trial = Trial(SPECTRON, shape, 4, lr=0.5)
    for G in noisy_gradients(shape, 30):
        before = trial.result()
        trial.advance([G])
        step = torch.linalg.matrix_norm(trial.result() - before, 2)
        assert 0 < step <= 1.3 * 0.5  # the iteration's singular values are around 1


@pytest.mark.parametrize("shape", [(24, 4), (4, 24), (5, 5), (1, 3)])
def test_power_iteration_reaches_the_largest_singular_value(shape):
    X, u = torch.randn(shape, generator=torch.Generator().manual_seed(0)), torch.ones(shape)
    dim = 0 if shape[0] > shape[1] else 1
    u = u.select(1 - dim, 0).unsqueeze(1 - dim).contiguous()
    for _ in range(60):
        sigma = power_step_(X, u, dim)
    assert sigma == pytest.approx(torch.linalg.matrix_norm(X, 2).item(), rel=1e-4)
    assert u.norm() == pytest.approx(1, rel=1e-5)
    assert power_steps_([X], [u])[0] == pytest.approx(sigma.item(), rel=1e-5)


def test_a_factor_that_is_zero_has_no_singular_value_and_keeps_its_vector():
    u = torch.ones(6, 1) / 6**0.5
    for sigma in (power_step_(torch.zeros(6, 2), u, 0), power_steps_([torch.zeros(6, 2)], [u])[0]):
        assert sigma == 0
        torch.testing.assert_close(u, torch.ones(6, 1) / 6**0.5)


def lora_like():
    model = nn.Sequential(nn.Linear(12, 9, bias=False))
    return lab.factorize(model, rank=3, target=".", init="spectral")


@pytest.mark.parametrize("how", ["keep", "reset", "transport"])
def test_a_refactorization_keeps_the_product_and_training_goes_on(how):
    model = lora_like()
    group = {"params": list(model.parameters()), "rank": 3, "ns_precision": "fp32"}
    optimizer = optim.Spectron([group], lr=0.1)
    x, losses = torch.randn(20, 12, generator=torch.Generator().manual_seed(2)), []
    for step in range(60):
        loss = (model(x) - x[:, :9]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 20 == 9:
            before = model[0].dense_weight().detach().clone()
            momenta = [optimizer.state[p]["exp_avg"].clone() for p in model.parameters()]
            assert lab.refactorize_(model, optimizer, how).changed == ["0"]
            assert relative(model[0].dense_weight().detach(), before) < 1e-5
            after = [optimizer.state[p]["exp_avg"] for p in model.parameters()]
            same = all(torch.equal(m, n) for m, n in zip(momenta, after, strict=True))
            assert same == (how == "keep")
            assert any(m.any() for m in after) == (how != "reset")
    assert losses[-1] < 0.8 * losses[0]


def test_transported_momenta_are_those_of_the_new_factors():
    """The gradients of the new factors, averaged as before, are the transported averages."""
    torch.set_default_dtype(torch.float64)
    try:
        model = lora_like()
        optimizer = optim.Spectron([{"params": list(model.parameters()), "rank": 3}], lr=0.0)
        G = torch.randn(9, 12, generator=torch.Generator().manual_seed(2))
        B, A = model[0].factors()
        with torch.no_grad():
            A.mul_(3.0)
        B.grad, A.grad = G @ A.detach().T, B.detach().T @ G
        optimizer.step()
        lab.refactorize_(model, optimizer, "transport")
        expected = G @ A.detach().T, B.detach().T @ G
        for p, wanted in zip((B, A), expected, strict=True):
            assert relative(optimizer.state[p]["exp_avg"], 0.1 * wanted) < 1e-9
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("how", [prune_moments_, None])
def test_pruning_and_partial_resets_act_on_the_momenta_alone(how):
    trial = Trial(SPECTRON).advance(noisy_gradients(TALL, 5))
    before = [trial.optimizer.state[p] | {} for p in trial.matrices]
    vectors = [s["singular_vector"].clone() for s in before]
    momenta = [s["exp_avg"].clone() for s in before]
    if how is None:
        lab.reset_momentum_(trial.optimizer, 0.7)
    else:
        how(trial.optimizer, trial.matrices, 0.3)
    for p, u, M in zip(trial.matrices, vectors, momenta, strict=True):
        state = trial.optimizer.state[p]
        assert torch.equal(state["singular_vector"], u)
        if how is None:
            torch.testing.assert_close(state["exp_avg"], 0.3 * M)
        else:
            assert (state["exp_avg"] != 0).sum() == round(0.3 * M.numel())
