"""SPAM and Stable-SPAM: defaults, clipping, masks and resets."""

import copy

import pytest
import pytorch_optimizer
import torch
from equations import stable_spam
from small_matrices import spiky_gradients as gradients
from small_matrices import start as initial
from torch import nn

from lowrank_lab.optim.spam import Spam, clip_spikes, random_mask, warmup_factor
from lowrank_lab.optim.stable_spam import StableSpam, clip_and_normalize
from lowrank_lab.techniques import reset_momentum_

PACKAGE = {Spam: pytorch_optimizer.SPAM, StableSpam: pytorch_optimizer.StableSPAM}
LR, GAP, STEPS = 0.01, 25, 80  # three resets
SHAPES = [(16, 16), (24, 10), (10, 24), (1, 7), (7, 1), (9,), (), (3, 4, 2)]

both = pytest.mark.parametrize("method", [Spam, StableSpam])


def start(shape, dtype=torch.float32):
    return initial(shape, dtype)[0]


def options(method, **more):
    """Keys of ours; `theirs` translates them."""
    few = {"update_proj_gap": GAP}
    if method is Spam:
        few |= {"warmup": 10, "grad_accu_steps": 5, "threshold": 100}
    return few | more


def theirs(**ours):
    return {"warmup_epoch" if k == "warmup" else k: v for k, v in ours.items()}


def advance(W, optimizer, grads):
    for G in grads:
        W.grad = G.clone()
        optimizer.step()


def trained(cls, shape, *, dtype=torch.float32, steps=STEPS, **keys):
    W = nn.Parameter(start(shape, dtype))
    advance(W, cls([W], lr=LR, **keys), gradients(shape, steps, dtype))
    return W.detach().double()


def error_of_update(W, reference, shape, dtype=torch.float32):
    W0 = start(shape, dtype).double()
    return ((W - reference).norm() / (reference - W0).norm()).item()


# Equality


@both
def test_the_defaults_are_those_of_the_published_package(method):
    """Over 60 steps, so for SPAM with its clipping but before its first reset."""
    keys = {} if method is StableSpam else {"warmup_epoch": 150}
    W, their_W = (
        trained(method, (24, 10), steps=60),
        trained(PACKAGE[method], (24, 10), steps=60, **keys),
    )
    assert error_of_update(W, their_W, (24, 10)) <= 1e-5


def test_between_resets_a_density_below_one_equals_the_package_with_the_same_mask():
    """At a reset it zeroes the moments that its new mask has just kept, so not across one."""
    W, their_W = nn.Parameter(start((24, 10))), nn.Parameter(start((24, 10)))
    ours = Spam([W], lr=LR, density=0.3, weight_decay=0.1, **options(Spam))
    published = PACKAGE[Spam](
        [their_W], lr=LR, density=0.3, weight_decay=0.1, **theirs(**options(Spam))
    )
    advance(W, ours, gradients((24, 10))[:1])
    published.state[their_W]["mask"] = ours.state[W]["mask"]
    advance(W, ours, gradients((24, 10))[1 : GAP - 1])
    advance(their_W, published, gradients((24, 10))[: GAP - 1])
    assert error_of_update(W.detach().double(), their_W.detach().double(), (24, 10)) <= 1e-5


@pytest.mark.parametrize("warmup", [0, 1, 10, 150])
def test_the_warmup_factor_equals_the_packages(warmup):
    decay = pytorch_optimizer.optimizer.spam.CosineDecay(0.99, warmup)
    for k in range(warmup + 5):
        assert warmup_factor(k, warmup) == pytest.approx(1 - decay.get_death_rate(k), abs=1e-12)


def test_the_warmup_rises_from_a_hundredth_to_one():
    factors = [warmup_factor(k, 150) for k in range(200)]
    assert 0.01 < factors[0] < 0.011
    assert factors == sorted(factors)
    assert factors[150:] == [1.0] * 50


# Properties


def test_clipping_leaves_small_gradients_alone_and_keeps_signs():
    g, v = torch.tensor([1.0, -1.0, 3.0, -3.0, 2.0]), torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])
    assert torch.equal(clip_spikes(g, v, 4.0), torch.tensor([1.0, -1.0, 2.0, -2.0, 0.0]))


@both
def test_the_gradient_itself_is_not_changed(method):
    W = nn.Parameter(start((24, 10)))
    optimizer = method([W], lr=LR, **options(method))
    for G in gradients((24, 10)):
        advance(W, optimizer, [G])
        assert torch.equal(W.grad, G)


def test_spam_clips_only_from_grad_accu_steps_after_a_reset_on():
    W = nn.Parameter(torch.zeros(5))
    optimizer = Spam([W], lr=LR, update_proj_gap=20, grad_accu_steps=7, threshold=1.0)
    clipped = []
    for t in range(1, 60):
        before = optimizer.state[W].get("exp_avg_sq", torch.zeros(5)).clone() * (t % 20 > 0)
        advance(W, optimizer, [torch.full((5,), 10.0 * t)])
        after = optimizer.state[W]["exp_avg_sq"]
        if not torch.allclose(after, 0.999 * before + 0.001 * (10.0 * t) ** 2):
            clipped.append(t)
    assert clipped == [t for t in range(1, 60) if t % 20 >= 7]


def test_after_a_spike_clipped_training_goes_on_and_unclipped_training_stalls():
    moved = {}
    for threshold in (0, 5000):
        W = nn.Parameter(torch.zeros(1))
        optimizer = Spam([W], lr=LR, threshold=threshold)
        advance(W, optimizer, [torch.ones(1)] * 100 + [torch.full((1,), 1e6)])
        advance(W, optimizer, [torch.ones(1)] * 150)
        before = W.item()
        advance(W, optimizer, [torch.ones(1)])
        moved[threshold] = before - W.item()
    assert 0.3 * LR < moved[5000] < LR
    assert moved[0] < 1e-3 * LR


@both
def test_a_spike_of_a_million_hardly_changes_the_second_moments(method):
    W = nn.Parameter(torch.zeros(100))
    optimizer = method([W], lr=LR)
    grads = torch.randn(40, 100, generator=torch.Generator().manual_seed(3))
    advance(W, optimizer, grads)
    usual = optimizer.state[W]["exp_avg_sq"].max().item()
    advance(W, optimizer, [grads[0] + 1e6 * (torch.arange(100) == 5)])
    bound = 6.0 * usual if method is Spam else 60 * usual
    assert optimizer.state[W]["exp_avg_sq"].max().item() <= bound


def test_adagn_makes_the_norm_of_the_gradient_its_running_mean():
    chance = torch.Generator().manual_seed(3)
    state, group = {}, StableSpam([torch.zeros(1)]).defaults
    for T in range(1, 50):
        G = torch.randn(50, generator=chance) * (1 + T % 5)
        g = clip_and_normalize(G, state, T, group)
        n = state["norm_average"] / (1 - 0.7**T)
        s = state["norm_sq_average"] / (1 - 0.9**T)
        assert g.norm().item() == pytest.approx((n / s.sqrt()).item(), rel=1e-5)
        assert (g * G >= 0).all()


def test_entries_outside_the_mask_do_not_move_and_all_are_reached_in_the_end():
    W = nn.Parameter(start((24, 10)))
    optimizer = Spam([W], lr=LR, density=0.4, update_proj_gap=3, weight_decay=0.1)
    ever = torch.zeros(24, 10, dtype=torch.bool)
    for G in gradients((24, 10)):
        before = W.detach().clone()
        advance(W, optimizer, [G])
        mask = optimizer.state[W]["mask"]
        assert mask.sum() == 96
        assert torch.equal(before[~mask], W.detach()[~mask])
        ever |= mask
    assert ever.all()


def test_moments_of_entries_in_both_masks_are_kept_at_a_reset():
    W = nn.Parameter(start((24, 10)))
    optimizer = Spam([W], lr=0.0, density=0.5, update_proj_gap=10)
    advance(W, optimizer, gradients((24, 10))[:9])
    state = copy.deepcopy(optimizer.state[W])
    advance(W, optimizer, [torch.zeros(24, 10)])
    old, new = (torch.zeros(24, 10) for _ in range(2))
    old[state["mask"]] = 0.9 * state["exp_avg"]
    new[optimizer.state[W]["mask"]] = optimizer.state[W]["exp_avg"]
    shared = state["mask"] & optimizer.state[W]["mask"]
    assert 0 < shared.sum() < 120
    assert torch.allclose(new, old * shared)


def test_masks_differ_between_parameters_and_leave_the_global_generator_alone():
    W, U, b = (nn.Parameter(torch.zeros(s)) for s in ((24, 10), (24, 10), (5,)))
    optimizer = Spam([W, U, b], density=0.5)
    for p in (W, U, b):
        p.grad = torch.ones_like(p)
    before = torch.get_rng_state()
    optimizer.step()
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(optimizer.state[W]["mask"], optimizer.state[U]["mask"])
    assert "mask" not in optimizer.state[b]
    assert optimizer.state[W]["exp_avg"].shape == (120,)


def test_a_mask_is_drawn_by_its_seed_alone_and_has_at_least_one_entry():
    like = torch.zeros(6, 4)
    assert torch.equal(random_mask(like, 0.5, seed=3), random_mask(like, 0.5, seed=3))
    assert not torch.equal(random_mask(like, 0.5, seed=3), random_mask(like, 0.5, seed=4))
    assert random_mask(like, 1e-9, seed=0).sum() == 1


def test_density_and_threshold_can_differ_between_groups():
    W, table = nn.Parameter(start((24, 10))), nn.Parameter(start((24, 10)))
    groups = [{"params": [W], "density": 0.5}, {"params": [table], "threshold": 0}]
    optimizer = Spam(groups, grad_accu_steps=1)
    table.grad, W.grad = torch.zeros(24, 10), torch.ones(24, 10)
    optimizer.step()
    table.grad[3] = 1.0  # a token seen for the first time, after clipping has begun
    optimizer.step()
    assert "mask" in optimizer.state[W]
    assert "mask" not in optimizer.state[table]
    assert (optimizer.state[table]["exp_avg_sq"][3] > 0).all()


# Resets


@both
def test_a_reset_clears_the_very_buffers_that_are_updated_next(method):
    W = nn.Parameter(start((24, 10)))
    optimizer = method([W], lr=LR, **options(method))
    grads = gradients((24, 10))
    advance(W, optimizer, grads[: GAP - 1])
    state = optimizer.state[W]
    m, v = state["exp_avg"], state["exp_avg_sq"]
    advance(W, optimizer, [grads[GAP - 1]])
    assert state["exp_avg"] is m
    assert state["exp_avg_sq"] is v
    g = grads[GAP - 1] if method is Spam else (m / 0.1)
    assert torch.allclose(m, 0.1 * g)
    assert torch.allclose(v, 0.001 * g**2)


def test_spams_own_reset_keeps_the_bias_correction_and_the_technique_restarts_it():
    W = nn.Parameter(start((24, 10)))
    optimizer = Spam([W], lr=LR, **options(Spam))
    advance(W, optimizer, gradients((24, 10))[:GAP])
    state = optimizer.state[W]
    assert state["exp_avg_weight"] == pytest.approx(1 - 0.9**GAP)
    assert reset_momentum_(optimizer) == 1
    assert (state["exp_avg_weight"], state["exp_avg_sq_weight"], state["step"]) == (0.0, 0.0, GAP)
    assert not state["exp_avg"].any()


def test_the_technique_and_stable_spams_own_reset_are_the_same():
    shape, grads, ends = (24, 10), gradients((24, 10)), []
    for gap in (GAP, 1000):
        W = nn.Parameter(start(shape))
        optimizer = StableSpam([W], lr=LR, update_proj_gap=gap)
        advance(W, optimizer, grads[: GAP - 1])
        if gap == 1000:
            reset_momentum_(optimizer)
        advance(W, optimizer, grads[GAP - 1 : 40])
        ends.append(W.detach().clone())
    assert torch.equal(*ends)


@pytest.mark.parametrize("density", [1.0, 0.5])
def test_a_full_reset_by_the_technique_restarts_spams_adam(density):
    """Before SPAM's first reset and without clipping: two restarts from the same weights agree."""
    shape, grads = (24, 10), gradients((24, 10))
    W = nn.Parameter(start(shape))
    optimizer = Spam([W], lr=LR, density=density, threshold=0)
    advance(W, optimizer, grads[:10])
    reset_momentum_(optimizer)
    U = nn.Parameter(W.detach().clone())
    fresh = Spam([U], lr=LR, density=density, threshold=0)
    advance(W, optimizer, grads[10:30])
    advance(U, fresh, grads[10:30])
    assert torch.equal(W, U)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_parameter_that_is_one_number_is_updated(method, dtype):
    W = nn.Parameter(torch.ones((), dtype=dtype))
    advance(W, method([W], lr=0.1), [torch.ones((), dtype=dtype)] * 3)
    assert W < 1


# Behaviour


@pytest.mark.parametrize(("method", "density"), [(Spam, 1.0), (Spam, 0.5), (StableSpam, 1.0)])
def test_linear_regression_with_spikes_converges(method, density):
    chance = torch.Generator().manual_seed(3)
    solution, X = torch.randn(8, 3, generator=chance), torch.randn(50, 8, generator=chance)
    W = nn.Parameter(torch.zeros(8, 3))
    keys = {"density": density, "warmup": 5} if method is Spam else {}
    optimizer = method([W], update_proj_gap=50, **keys)
    losses = []
    for i in range(600):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - i / 600)
        loss = (X @ (W - solution)).square().mean()
        losses.append(loss.item())
        (W.grad,) = torch.autograd.grad(loss, W)
        W.grad *= 100.0 if i % 97 == 30 else 1.0
        optimizer.step()
    assert losses[-1] < 1e-3 * losses[0]


def test_stable_spam_takes_a_zero_gradient_for_a_gradient_and_the_package_does_not():
    shape, zero = (24, 10), torch.zeros(24, 10)
    grads = [G if i % 4 else zero for i, G in enumerate(gradients(shape, 60))]
    ends = []
    for cls in (StableSpam, PACKAGE[StableSpam]):
        W = nn.Parameter(start(shape))
        advance(W, cls([W], lr=LR, update_proj_gap=GAP), grads)
        ends.append(W.detach().double())
    exact = stable_spam(start(shape).double(), grads, None, update_proj_gap=GAP)
    assert error_of_update(ends[0], exact, shape) <= 1e-5
    assert error_of_update(ends[1], exact, shape) > 1e-3
