"""Which optimizers' moments follow a refactorization, and that all others are refused unchanged."""

import copy

import pytest
import pytorch_optimizer
import torch
from torch import nn

from lowrank_lab import factorize, optim, refactorize_
from lowrank_lab.layers import FactorizedLinear
from lowrank_lab.techniques import prune_moments_, reset_momentum_
from lowrank_lab.techniques.layouts import short_name


def combined(p):
    rest = torch.optim.NAdam(p[1::2], lr=0.0)
    return optim.Combined(torch.optim.SGD(p[::2], lr=0.0, momentum=0.9), rest)


LINEAR = {  # with a learning rate of 0, so that the factors stay
    "SGD": lambda p: torch.optim.SGD(p, lr=0.0, momentum=0.9),
    "dampened SGD": lambda p: torch.optim.SGD(p, lr=0.0, momentum=0.8, dampening=0.3),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.0, momentum=0.9, nesterov=True),
    "Muon": lambda p: torch.optim.Muon(p, lr=0.0, weight_decay=0.0),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.0),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.0),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.0),
    "centered RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.0, centered=True),
    "ours": lambda p: optim.GaLore(p, lr=0.0),
    "Lion": lambda p: pytorch_optimizer.Lion(p, lr=0.0, weight_decay=0.0),
    "Tiger": lambda p: pytorch_optimizer.Tiger(p, lr=0.0, weight_decay=0.0),
    "SignSGD": lambda p: pytorch_optimizer.SignSGD(p, lr=0.0),
    "Combined": lambda p: combined(list(p)),
}
FIRST = ("exp_avg", "momentum_buffer", "grad_avg")
LOST = {
    "Adamax": lambda p: torch.optim.Adamax(p),
    "RMSprop with momentum": lambda p: torch.optim.RMSprop(p, momentum=0.9),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "Adafactor": lambda p: torch.optim.Adafactor(p),
    "ASGD": lambda p: torch.optim.ASGD(p),
    "Rprop": lambda p: torch.optim.Rprop(p),
    "LBFGS": lambda p: torch.optim.LBFGS(p),
    "AdamP": lambda p: pytorch_optimizer.AdamP(p),
    "Lookahead": lambda p: pytorch_optimizer.Lookahead(torch.optim.SGD(p, lr=0.1, momentum=0.9)),
    "ScheduleFreeAdamW": lambda p: pytorch_optimizer.ScheduleFreeAdamW(p),
    "Ranger21": lambda p: pytorch_optimizer.Ranger21(p, num_iterations=100),
}
CASES = [(1, 1, 1), (9, 5, 1), (7, 7, 7), (12, 5, 5), (5, 12, 5), (24, 16, 6)]


def net(m=12, n=8, r=3, bias=False):
    """A nonlinear model of two factorised layers, whose factors are unbalanced, in float64."""
    torch.manual_seed(m + n + r)
    model = nn.Sequential(nn.Linear(n, m, bias=bias), nn.Tanh(), nn.Linear(m, n, bias=bias))
    factorize(model, rank=r, target=".").double()
    sizes = torch.logspace(0, -1, r, dtype=torch.float64)
    for layer in layers(model):
        layer.B.data.mul_(sizes)
        layer.A.data.mul_(sizes.flip(0)[:, None])
    return model


def layers(model):
    return [layer for layer in model.modules() if isinstance(layer, FactorizedLinear)]


def train(model, optimizer, steps=4):
    for step in range(steps):
        chance = torch.Generator().manual_seed(step)
        X = torch.randn(16, model[0].in_features, generator=chance, dtype=torch.float64)

        def closure(X=X, scale=step + 1):
            optimizer.zero_grad()
            loss = scale * (model(X) - X.flip(1)).square().sum()
            loss.backward()
            return loss

        closure()
        optimizer.step(closure if isinstance(optimizer, torch.optim.LBFGS) else None)


def relative(ours, reference):
    return float((ours - reference).norm() / reference.norm().clamp(min=1e-300))


@pytest.mark.parametrize(("m", "n", "r"), CASES)
@pytest.mark.parametrize("make", LINEAR.values(), ids=LINEAR)
def test_first_moments_become_those_of_an_optimizer_that_always_had_the_new_factors(make, m, n, r):
    """Moments are linear in gradients, whose transformation autograd computes here."""
    model = net(m, n, r)
    optimizer = make(model.parameters())
    train(model, optimizer)
    assert refactorize_(model, optimizer, "transport").changed == ["0", "2"]
    other = copy.deepcopy(model)
    reference = make(other.parameters())
    train(other, reference)
    found = 0
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        for name in set(FIRST) & optimizer.state[p].keys():
            found += 1
            assert relative(optimizer.state[p][name], reference.state[q][name]) < 1e-9
    assert found == 4


@pytest.mark.parametrize("on_refactor", ["transport", "reset"])
@pytest.mark.parametrize("name", LOST)
def test_states_that_cannot_follow_are_refused_and_nothing_changes(name, on_refactor):
    model = net()
    optimizer = LOST[name](list(model.parameters()))
    train(model, optimizer)
    before, states = copy.deepcopy(model.state_dict()), str(dict(optimizer.state))
    if (
        on_refactor == "reset"
        and short_name(type(optimizer)).startswith("torch.")
        and name != "LBFGS"
    ):
        assert "0" in refactorize_(model, optimizer, on_refactor).changed
        return
    with pytest.raises(
        ValueError, match=r"^(on_refactor|optimizer|params): .+ is not allowed; .+$"
    ):
        refactorize_(model, optimizer, on_refactor)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert str(dict(optimizer.state)) == states


@pytest.mark.parametrize("on_refactor", ["transport", "reset"])
def test_an_optimizer_of_other_parameters_is_refused_and_nothing_changes(on_refactor):
    model, other = net(), net(9, 5, 2)
    optimizer = torch.optim.AdamW(other.parameters())
    train(other, optimizer)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=r"AdamW is not allowed; it doesn't hold [24] of the trainable"
    ):
        refactorize_(model, optimizer, on_refactor)
    half = torch.optim.AdamW([layer.B for layer in layers(model)])
    with pytest.raises(ValueError, match=r"it doesn't hold [12] of the trainable"):
        refactorize_(model, half, on_refactor)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for layer in layers(model):
        layer.A.requires_grad_(False)
    assert refactorize_(model, half, on_refactor).changed == ["0", "2"]  # A has no moments


@pytest.mark.parametrize("name", ["ScheduleFreeAdamW", "ASGD", "Ranger21"])
def test_copies_of_old_factors_are_not_kept(name):
    model = net()
    optimizer = LOST[name](list(model.parameters()))
    train(model, optimizer)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"'keep' is not allowed; .* belongs to the old factors"):
        refactorize_(model, optimizer, "keep")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("factor", ["A", "B"])
@pytest.mark.parametrize("basis", ["singular", "nearest"])
def test_a_factor_that_is_not_finite_is_refused_by_the_name_of_its_layer(basis, factor, value):
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer)
    getattr(model[2], factor).data[0, 0] = value
    before, moments = copy.deepcopy(model.state_dict()), str(dict(optimizer.state))
    with pytest.raises(
        ValueError, match=r"^module: '2' is not allowed; its factors are not finite$"
    ):
        refactorize_(model, optimizer, "transport", basis, above=0.1)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight.nan_to_num(7.0), before[name].nan_to_num(7.0))
    assert str(dict(optimizer.state)) == moments


def test_second_moments_of_any_name_follow_by_squares():
    model = net()
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.0)
    train(model, optimizer)
    before = {p: state["sum"].clone() for p, state in optimizer.state.items()}
    B = model[0].B.detach().clone()
    refactorize_(model, optimizer, "transport")
    T = torch.linalg.lstsq(B, model[0].B.detach()).solution
    inverse = torch.linalg.inv(T)
    expected = before[model[0].B] @ inverse.T.square()
    assert relative(optimizer.state[model[0].B]["sum"], expected) < 1e-9
    expected = T.T.square() @ before[model[0].A]
    assert relative(optimizer.state[model[0].A]["sum"], expected) < 1e-9


@pytest.mark.parametrize("make", [LINEAR["SGD"], LINEAR["Muon"], LINEAR["Combined"]])
def test_momentum_buffers_are_scaled_and_pruned(make):
    model = net()
    optimizer = make(model.parameters())
    train(model, optimizer)
    assert prune_moments_(optimizer, list(model.parameters()), 0.25) == 4
    for p in model.parameters():
        name = next(n for n in FIRST if n in optimizer.state[p])
        assert optimizer.state[p][name].count_nonzero() == round(0.25 * p.numel())
    sgd = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    train(model, sgd)
    before = {p: state["momentum_buffer"].clone() for p, state in sgd.state.items()}
    assert reset_momentum_(sgd, 0.25) == 4
    for p, moment in before.items():
        assert torch.equal(sgd.state[p]["momentum_buffer"], 0.75 * moment)
