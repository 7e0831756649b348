"""Moments that follow the factors through a refactorization, against gradients in float64."""

import copy
import math

import pytest
import torch
from torch import nn

from lowrank_lab import factorize, refactorize_
from lowrank_lab.layers import FactorizedLinear, LoRALinear, LowRankLinear, balance
from lowrank_lab.optim import Fira, GaLore
from lowrank_lab.techniques import transport_moments_

SHAPES = [(1, 1, 1), (9, 5, 1), (5, 9, 1), (7, 7, 7), (12, 5, 5), (5, 12, 5), (40, 24, 6)]
MOMENTS = ("exp_avg", "exp_avg_sq")


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def factors(m, n, r):
    """Factors whose columns and rows differ in size, so that T is far from orthogonal."""
    sizes = torch.logspace(0, -1, r, dtype=torch.float64)
    return normal(m, r) * sizes, normal(r, n, seed=1) * sizes.flip(0)[:, None]


def balanced(B, A):
    """The balanced factors by a full SVD, and T with B′ = B T."""
    r = B.shape[1]
    U, S, Vh = torch.linalg.svd(B @ A, full_matrices=False)
    # The signs of singular vectors are arbitrary: those of `balance` are taken.
    found = balance(B, A)
    signs = ((B @ found.T) * U[:, :r]).sum(0).sign()
    new_B, new_A = signs * U[:, :r] * S[:r].sqrt(), (signs * S[:r].sqrt())[:, None] * Vh[:r]
    return new_B, new_A, torch.linalg.lstsq(B, new_B).solution


def relative(ours, reference):
    return ((ours - reference).norm() / reference.norm().clamp(min=1e-300)).item()


def gradients(B, A, scale=1.0):
    """Autograd's gradients of a loss that is not linear in the product."""
    B, A = B.clone().requires_grad_(), A.clone().requires_grad_()
    X, Y = normal(A.shape[1], 11, seed=2), normal(B.shape[0], 11, seed=3)
    ((scale * B @ (A @ X)).tanh() - Y).square().sum().backward()
    return B.grad, A.grad


def states(m, n, r):
    """Positive second moments, and first ones of both signs, shaped like the factors."""
    state_B = {"exp_avg": normal(m, r, seed=4), "exp_avg_sq": normal(m, r, seed=5).square()}
    state_A = {"exp_avg": normal(r, n, seed=6), "exp_avg_sq": normal(r, n, seed=7).square()}
    return state_B, state_A


def net(kind="low-rank", dtype=torch.float32, rank=3, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 6), nn.LayerNorm(6))
    return factorize(model, kind, rank=rank, target="^[02]$", **options).to(dtype)


def train(model, optimizer, steps=5):
    for step in range(steps):
        X = normal(16, 8, seed=step).to(next(model.parameters()).dtype)
        model(X).pow(3).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def layers(model):
    return [m for m in model.modules() if isinstance(m, FactorizedLinear)]


def factor_set(model):
    return {id(p) for layer in layers(model) for p in layer.factors()}


def snapshot(optimizer):
    return copy.deepcopy({id(p): dict(s) for p, s in optimizer.state.items()})


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(
        torch.equal(v, theirs[k]) if torch.is_tensor(v) else v == theirs[k] for k, v in ours.items()
    )


def conditioned(condition, m=60, n=90, r=12):
    """Factors whose product's singular values fall by `condition`, each factor's by as much."""
    sizes = torch.logspace(0, -math.log10(condition) / 2, r, dtype=torch.float64)
    left = torch.linalg.qr(normal(m, r))[0] * sizes
    right = sizes[:, None] * torch.linalg.qr(normal(n, r, seed=1))[0].T
    mixed = normal(r, r, seed=2)
    return left @ mixed, torch.linalg.inv(mixed) @ right


# The formulas


@pytest.mark.parametrize("condition", [1e1, 1e3, 1e5, 1e8, 1e11])
def test_balance_is_right_where_gram_matrices_are_and_where_they_lose_digits(condition):
    B, A = conditioned(condition)
    found = balance(B, A)
    S = torch.linalg.svdvals(B @ A)[:12]
    assert relative(found.S, S) <= 1e-12
    assert ((found.S - S) / S).abs().max() <= 1e-7 * max(1, condition / 1e5)
    new_B, new_A = B @ found.T, found.T_inverse @ A
    assert relative(new_B @ new_A, B @ A) <= 1e-10
    assert relative(new_B.T @ new_B, S.diag()) <= 1e-6
    assert relative(new_A @ new_A.T, S.diag()) <= 1e-6


def test_float32_factors_are_balanced_to_rounding_where_terms_cancel_and_where_not():
    for condition in (10, 1e6):
        B, A = (X.float() for X in conditioned(condition))
        model = LowRankLinear(nn.Linear(90, 60, bias=False), 12, alpha=12)
        with torch.no_grad():
            model.B.copy_(B)
            model.A.copy_(A)
        exact = B.double() @ A.double()
        assert refactorize_(model).changed
        assert relative(model.B.detach().double() @ model.A.detach().double(), exact) <= 1e-6


@pytest.mark.parametrize("scale", [1.0, 32 / 6])
@pytest.mark.parametrize(("m", "n", "r"), SHAPES)
def test_transported_gradients_are_the_gradients_of_the_new_factors(m, n, r, scale):
    B, A = factors(m, n, r)
    G_B, G_A = gradients(B, A, scale)
    state_B, state_A = {"exp_avg": G_B}, {"exp_avg": G_A}
    transport_moments_(state_B, state_A, balance(B, A))
    new_B, new_A, _ = balanced(B, A)
    expected_B, expected_A = gradients(new_B, new_A, scale)
    assert relative(state_B["exp_avg"], expected_B) <= 1e-10
    assert relative(state_A["exp_avg"], expected_A) <= 1e-10


@pytest.mark.parametrize(("m", "n", "r"), SHAPES)
def test_moments_follow_by_the_inverse_of_t_and_second_ones_by_its_squares(m, n, r):
    B, A = factors(m, n, r)
    state_B, state_A = states(m, n, r)
    before_B, before_A = copy.deepcopy(state_B), copy.deepcopy(state_A)
    transport_moments_(state_B, state_A, balance(B, A))
    T = balanced(B, A)[2]
    inverse = torch.linalg.inv(T)
    expected = [
        (state_B["exp_avg"], before_B["exp_avg"] @ inverse.T),
        (state_B["exp_avg_sq"], before_B["exp_avg_sq"] @ inverse.T.square()),
        (state_A["exp_avg"], T.T @ before_A["exp_avg"]),
        (state_A["exp_avg_sq"], T.T.square() @ before_A["exp_avg_sq"]),
    ]
    assert max(relative(ours, reference) for ours, reference in expected) <= 1e-10


def test_second_moments_stay_positive_and_zero_moments_stay_zero():
    found = balance(*factors(40, 24, 6))
    state_B, state_A = states(40, 24, 6)
    transport_moments_(state_B, state_A, found)
    assert (state_B["exp_avg_sq"] > 0).all()
    assert (state_A["exp_avg_sq"] > 0).all()
    zeros = [{k: torch.zeros_like(v) for k, v in s.items()} for s in (state_B, state_A)]
    transport_moments_(*zeros, found)
    assert not any(v.any() for s in zeros for v in s.values())


def test_moments_of_balanced_factors_stay_what_they_are():
    B, A, _ = balanced(*factors(40, 24, 6))
    new_B = balanced(B, A)[0]
    signs = (new_B * B).sum(0).sign()
    state_B, state_A = states(40, 24, 6)
    before_B, before_A = copy.deepcopy(state_B), copy.deepcopy(state_A)
    transport_moments_(state_B, state_A, balance(B, A))
    assert relative(state_B["exp_avg"], before_B["exp_avg"] * signs) <= 1e-10
    assert relative(state_A["exp_avg"], signs[:, None] * before_A["exp_avg"]) <= 1e-10
    assert relative(state_B["exp_avg_sq"], before_B["exp_avg_sq"]) <= 1e-10


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
def test_lower_precisions_are_rounded_once(dtype, tolerance):
    found = balance(*factors(40, 24, 6))
    rounded = [{k: v.to(dtype) for k, v in s.items()} for s in states(40, 24, 6)]
    exact = [{k: v.double() for k, v in s.items()} for s in rounded]
    kept = [v for s in rounded for v in s.values()]
    transport_moments_(*rounded, found)
    transport_moments_(*exact, found)
    assert all(a is b for a, b in zip(kept, [v for s in rounded for v in s.values()], strict=True))
    for ours, reference in zip(rounded, exact, strict=True):
        assert {v.dtype for v in ours.values()} == {dtype}
        assert max(relative(ours[k].double(), reference[k]) for k in MOMENTS) <= tolerance


# Through refactorize_


OPTIMIZERS = {
    "torch": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
    "amsgrad": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, amsgrad=True),
    "ours": lambda model: GaLore(model.parameters(), lr=1e-2),
}


@pytest.fixture(params=OPTIMIZERS)
def trained(request):
    """A model in float64 with two factorised layers, and an optimizer that has taken 5 steps."""
    model = net(dtype=torch.float64)
    optimizer = OPTIMIZERS[request.param](model)
    train(model, optimizer)
    return model, optimizer


def test_transport_carries_the_moments_of_every_layer(trained):
    model, optimizer = trained
    before = snapshot(optimizer)
    old = [layer.B.detach().clone() for layer in layers(model)]
    done = refactorize_(model, optimizer, "transport")
    assert done.changed == ["0", "2"]
    for layer, B in zip(layers(model), old, strict=True):
        T = torch.linalg.lstsq(B, layer.B.detach()).solution
        inverse = torch.linalg.inv(T)
        m_B, m_A = (optimizer.state[f]["exp_avg"] for f in layer.factors())
        v_B, v_A = (optimizer.state[f]["exp_avg_sq"] for f in layer.factors())
        was_B, was_A = (before[id(f)] for f in layer.factors())
        assert relative(m_B, was_B["exp_avg"] @ inverse.T) <= 1e-9
        assert relative(m_A, T.T @ was_A["exp_avg"]) <= 1e-9
        assert relative(v_B, was_B["exp_avg_sq"] @ inverse.T.square()) <= 1e-9
        assert relative(v_A, T.T.square() @ was_A["exp_avg_sq"]) <= 1e-9


def test_transport_leaves_step_counts_and_all_other_parameters_alone(trained):
    model, optimizer = trained
    before, factor_ids = snapshot(optimizer), factor_set(model)
    refactorize_(model, optimizer, "transport")
    for p, state in optimizer.state.items():
        if id(p) in factor_ids:
            state = {k: v for k, v in state.items() if "exp_avg_sq" not in k and k != "exp_avg"}
            assert same(state, {k: before[id(p)][k] for k in state})
            assert not same(optimizer.state[p], before[id(p)])
        else:
            assert same(state, before[id(p)])


def test_amsgrad_s_maximum_goes_with_the_second_moments():
    model = net(dtype=torch.float64)
    optimizer = OPTIMIZERS["amsgrad"](model)
    train(model, optimizer)
    for state in optimizer.state.values():  # as when v has grown to its maximum
        state["max_exp_avg_sq"].copy_(state["exp_avg_sq"])
    refactorize_(model, optimizer, "transport")
    for state in optimizer.state.values():
        assert torch.equal(state["max_exp_avg_sq"], state["exp_avg_sq"])


def test_keep_leaves_all_moments(trained):
    model, optimizer = trained
    before = snapshot(optimizer)
    assert refactorize_(model, optimizer, "keep").changed == ["0", "2"]
    assert all(same(state, before[id(p)]) for p, state in optimizer.state.items())


def test_reset_restarts_the_factors_moments_and_no_others(trained):
    model, optimizer = trained
    before, factor_ids = snapshot(optimizer), factor_set(model)
    refactorize_(model, optimizer, "reset")
    assert len(factor_ids) == 4
    for p, state in optimizer.state.items():
        if id(p) in factor_ids:
            assert not state["exp_avg"].any()
            assert not state["exp_avg_sq"].any()
        else:
            assert same(state, before[id(p)])


def test_after_a_reset_the_factors_go_on_as_with_a_fresh_optimizer(trained):
    model, optimizer = trained
    refactorize_(model, optimizer, "reset")
    twin = copy.deepcopy(model)
    fresh = type(optimizer)(twin.parameters(), lr=1e-2)
    train(model, optimizer, steps=1)
    train(twin, fresh, steps=1)
    for ours, theirs in zip(layers(model), layers(twin), strict=True):
        assert torch.equal(ours.B, theirs.B)
        assert torch.equal(ours.A, theirs.A)


@pytest.mark.parametrize("on_refactor", ["reset", "transport"])
def test_acting_on_moments_needs_an_optimizer(on_refactor):
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"^optimizer: None is not allowed; "):
        refactorize_(model, None, on_refactor)
    assert same(model.state_dict(), before)


def test_an_unknown_way_is_refused_and_nothing_is_changed(trained):
    model, optimizer = trained
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="on_refactor: 'carry' is not allowed"):
        refactorize_(model, optimizer, "carry")
    assert same(model.state_dict(), before)


@pytest.mark.parametrize("on_refactor", ["keep", "reset", "transport"])
def test_an_optimizer_that_has_not_stepped_has_nothing_to_carry(on_refactor):
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    assert refactorize_(model, optimizer, on_refactor).changed == ["0", "2"]
    assert not any(optimizer.state[p] for p in model.parameters())


@pytest.mark.parametrize("rank", [2, 3])  # 3 is the factors' own: shapes can't tell
@pytest.mark.parametrize("proj_type", ["std", "reverse_std"])
@pytest.mark.parametrize("method", [GaLore, Fira])
def test_projected_moments_are_refused_and_nothing_is_changed(method, proj_type, rank):
    model = net()
    targets = [f for layer in layers(model) for f in layer.factors()]
    optimizer = method([{"params": targets, "rank": rank, "proj_type": proj_type}], lr=1e-2)
    train(model, optimizer)
    weights, moments = copy.deepcopy(model.state_dict()), snapshot(optimizer)
    with pytest.raises(ValueError, match="'transport' is not allowed"):
        refactorize_(model, optimizer, "transport")
    assert same(model.state_dict(), weights)
    assert all(same(state, moments[id(p)]) for p, state in optimizer.state.items())


@pytest.mark.parametrize("on_refactor", ["keep", "reset", "transport"])
def test_a_rank_deficient_layer_keeps_factors_and_moments(on_refactor):
    model = net(dtype=torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, optimizer)
    deficient = layers(model)[0]
    with torch.no_grad():
        deficient.B[:, 0] = deficient.B[:, 1]
    before, weights = snapshot(optimizer), copy.deepcopy(deficient.state_dict())
    done = refactorize_(model, optimizer, on_refactor)
    assert (done.changed, done.rank_deficient) == (["2"], ["0"])
    assert same(deficient.state_dict(), weights)
    assert all(same(optimizer.state[f], before[id(f)]) for f in deficient.factors())


def test_nothing_becomes_nan_at_the_edge_of_rank_deficiency():
    B, A = (X.float() for X in factors(12, 10, 4))
    for size in (1e-4, 1e-6, 1e-7, 0.0):
        layer = LowRankLinear(nn.Linear(10, 12, bias=False), 4)
        layer.B.data.copy_(B * torch.tensor([1, 1, 1, size]))
        layer.A.data.copy_(A)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
        layer(torch.ones(2, 10)).sum().backward()
        optimizer.step()
        refactorize_(layer, optimizer, "transport")
        values = [*layer.parameters(), *(s[k] for s in optimizer.state.values() for k in MOMENTS)]
        assert all(v.isfinite().all() for v in values)


@pytest.mark.parametrize("kind", ["lora", "sltrain"])
def test_what_stands_beside_the_product_keeps_its_moments(kind):
    model = net(kind, dtype=torch.float64)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    train(model, optimizer)
    before, factor_ids = snapshot(optimizer), factor_set(model)
    dense = [layer.dense_weight() for layer in layers(model)]
    assert refactorize_(model, optimizer, "transport").changed == ["0", "2"]
    assert all(
        same(s, before[id(p)]) for p, s in optimizer.state.items() if id(p) not in factor_ids
    )
    for layer, W in zip(layers(model), dense, strict=True):
        assert relative(layer.dense_weight(), W) <= 1e-12
        frozen = layer.base_weight if isinstance(layer, LoRALinear) else layer.indices
        assert frozen not in optimizer.state


def test_the_change_of_loss_that_gradients_promise_a_step_is_kept():
    B, A = factors(12, 10, 4)
    G_B, G_A = gradients(B, A)
    step_B, step_A = normal(12, 4, seed=8), normal(4, 10, seed=9)
    before = (G_B * step_B).sum() + (G_A * step_A).sum()
    T = balanced(B, A)[2]
    moments = {"exp_avg": G_B}, {"exp_avg": G_A}
    transport_moments_(*moments, balance(B, A))
    after = (moments[0]["exp_avg"] * (step_B @ T)).sum()
    after += (moments[1]["exp_avg"] * (torch.linalg.inv(T) @ step_A)).sum()
    assert after.item() == pytest.approx(before.item(), rel=1e-10)
