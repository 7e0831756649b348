"""SPAM and Stable-SPAM: against pytorch_optimizer, their equations in float64, and ugly input."""

import copy
import io
import math

import pytest
import pytorch_optimizer
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from lowrank_lab.optim.spam import Spam, clip_spikes, random_mask, warmup_factor
from lowrank_lab.optim.stable_spam import StableSpam, clip_and_normalize
from lowrank_lab.techniques import reset_momentum_

PACKAGE = {Spam: pytorch_optimizer.SPAM, StableSpam: pytorch_optimizer.StableSPAM}
LR, GAP, STEPS = 0.01, 25, 80  # three resets
SHAPES = [(16, 16), (24, 10), (10, 24), (1, 7), (7, 1), (9,), (), (3, 4, 2)]

both = pytest.mark.parametrize("method", [Spam, StableSpam])
precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def gradients(shape, steps=STEPS, dtype=torch.float32):
    """Noise of changing size with a spike in single entries now and then."""
    chance = torch.Generator().manual_seed(0)
    noise = torch.randn((steps, *shape), generator=chance)
    spikes = torch.rand((steps, *shape), generator=chance) < 0.01
    sizes = torch.rand((steps, *[1] * len(shape)), generator=chance) + 0.1
    return (noise * sizes * torch.where(spikes, 2000.0, 1.0)).to(dtype).unbind(0)


def start(shape, dtype=torch.float32):
    return (0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(1))).to(dtype)


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


def spam_by_equations(shape, masks=None, dtype=torch.float32, weight_decay=0.0):
    """2501.06842 in float64; `masks` gives the mask of each round of GAP steps."""
    W, m, v = start(shape, dtype).double(), torch.zeros(shape).double(), torch.zeros(shape).double()
    mask = torch.ones(shape, dtype=torch.bool) if masks is None else masks[0]
    for t, G in enumerate(gradients(shape, dtype=dtype), 1):
        k, factor = t % GAP, 1.0
        if k == 0:
            new = ~mask if masks is None else masks[t // GAP]
            kept = torch.zeros_like(mask) if masks is None else mask & new
            m, v, mask = m * kept, v * kept, mask if masks is None else new
        if t >= GAP and k < 10:
            factor = 1 - 0.99 * (1 + math.cos(math.pi * (k + 1) / 11)) / 2
        g = G.double() * mask
        if k >= 5:
            g = torch.where(g**2 > 100 * v, g.sign() * (100 * v).sqrt(), g)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        size = LR * factor * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t)
        W = W - size * m / (v.sqrt() + 1e-6)
        W = torch.where(mask, W * (1 - LR * weight_decay), W)
    return W


def stable_spam_by_equations(shape, dtype=torch.float32, weight_decay=0.0, grads=None):
    """2502.17055 in float64."""
    W, m, v, k = start(shape, dtype).double(), 0.0, 0.0, 0
    peak = norm = square = torch.zeros(()).double()
    for T, G in enumerate(gradients(shape, dtype=dtype) if grads is None else grads, 1):
        if T % GAP == 0:
            m, v, k = 0.0, 0.0, 0
        k, g = k + 1, G.double()
        peak = 0.999 * peak + 0.001 * g.abs().max()
        limit = peak / (1 - 0.999**T)
        g = torch.where(g.abs() > limit, g * limit / g.abs().max(), g)
        norm, square = 0.7 * norm + 0.3 * g.norm(), 0.9 * square + 0.1 * g.norm() ** 2
        size = norm / (1 - 0.7**T) / ((square / (1 - 0.9**T)).sqrt() + 1e-8)
        g = g / g.norm() * size if g.norm() > 0 else g
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        W = W * (1 - LR * weight_decay)
        W = W - LR * m / (1 - 0.9**k) / ((v / (1 - 0.999**k)).sqrt() + 1e-8)
    return W


EQUATIONS = {Spam: spam_by_equations, StableSpam: stable_spam_by_equations}


# Equality


@both
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_update_equals_the_published_package_across_resets(method, shape, weight_decay):
    keys = options(method, weight_decay=weight_decay)
    W = trained(method, shape, **keys)
    their_W = trained(PACKAGE[method], shape, **theirs(**keys))
    assert error_of_update(W, their_W, shape) <= 1e-5


@both
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_update_follows_the_equations_in_float64(method, shape, weight_decay):
    W = trained(method, shape, **options(method, weight_decay=weight_decay))
    exact = EQUATIONS[method](shape, weight_decay=weight_decay)
    assert error_of_update(W, exact, shape) <= 1e-5


@both
def test_the_defaults_are_those_of_the_published_package(method):
    """Over 60 steps, so for SPAM with its clipping but before its first reset."""
    keys = {} if method is StableSpam else {"warmup_epoch": 150}
    W, their_W = (
        trained(method, (24, 10), steps=60),
        trained(PACKAGE[method], (24, 10), steps=60, **keys),
    )
    assert error_of_update(W, their_W, (24, 10)) <= 1e-5


@both
@pytest.mark.parametrize("shape", [(24, 10), (9,)], ids=str)
def test_bfloat16_strays_no_further_from_the_equations_than_the_package(method, shape):
    half, keys = {"dtype": torch.bfloat16}, options(method)
    exact = EQUATIONS[method](shape, **half)
    ours = error_of_update(trained(method, shape, **half, **keys), exact, shape, **half)
    their_W = trained(PACKAGE[method], shape, **half, **theirs(**keys))
    assert ours <= 1.2 * error_of_update(their_W, exact, shape, **half)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("density", [0.05, 0.5, 0.99])
@pytest.mark.parametrize("shape", [(16, 16), (24, 10), (10, 24), (1, 7), (7, 1)], ids=str)
def test_a_density_below_one_follows_the_equations_with_the_same_masks(
    shape, density, weight_decay
):
    W = nn.Parameter(start(shape))
    optimizer = Spam([W], lr=LR, weight_decay=weight_decay, density=density, **options(Spam))
    masks = {}
    for t, G in enumerate(gradients(shape), 1):
        advance(W, optimizer, [G])
        masks[t // GAP] = optimizer.state[W]["mask"].clone()
    exact = spam_by_equations(shape, masks, weight_decay=weight_decay)
    assert error_of_update(W.detach().double(), exact, shape) <= 1e-5


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
    scalars, group = [torch.zeros(()) for _ in range(3)], StableSpam([torch.zeros(1)]).defaults
    for T in range(1, 50):
        G = torch.randn(50, generator=chance) * (1 + T % 5)
        g = clip_and_normalize(G, scalars, T, group)
        n = scalars[1] / (1 - 0.7**T)
        s = scalars[2] / (1 - 0.9**T)
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


# Behaviour


@both
def test_equal_runs_are_equal_bit_for_bit(method):
    keys = options(method) | ({"density": 0.5} if method is Spam else {})
    first = trained(method, (24, 10), **keys)
    torch.manual_seed(17)  # the global generator has no say
    assert torch.equal(first, trained(method, (24, 10), **keys))


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


@both
@precisions
def test_zero_gradients_leave_finite_weights_and_states_of_final_shape(method, dtype):
    for keys in ({}, {"density": 0.5}) if method is Spam else ({},):
        W = nn.Parameter(start((24, 10), dtype))
        optimizer = method([W], lr=LR, **options(method, **keys))
        zero = torch.zeros(24, 10, dtype=dtype)
        advance(W, optimizer, [zero])
        assert torch.equal(W, start((24, 10), dtype))
        shapes = {k: getattr(v, "shape", None) for k, v in optimizer.state[W].items()}
        advance(W, optimizer, [*gradients((24, 10), 20, dtype), zero] * 3)
        assert W.isfinite().all()
        assert shapes == {k: getattr(v, "shape", None) for k, v in optimizer.state[W].items()}


def test_stable_spam_takes_a_zero_gradient_for_a_gradient_and_the_package_does_not():
    shape, zero = (24, 10), torch.zeros(24, 10)
    grads = [G if i % 4 else zero for i, G in enumerate(gradients(shape, 60))]
    ends = []
    for cls in (StableSpam, PACKAGE[StableSpam]):
        W = nn.Parameter(start(shape))
        advance(W, cls([W], lr=LR, update_proj_gap=GAP), grads)
        ends.append(W.detach().double())
    exact = stable_spam_by_equations(shape, grads=grads)
    assert error_of_update(ends[0], exact, shape) <= 1e-5
    assert error_of_update(ends[1], exact, shape) > 1e-3


@both
def test_parameters_without_gradient_or_without_elements_are_left_alone(method):
    W, empty = nn.Parameter(start((4, 3))), nn.Parameter(torch.zeros(0, 3))
    empty.grad = torch.zeros(0, 3)
    optimizer = method([W, empty], weight_decay=0.1)
    optimizer.step()
    assert torch.equal(W, start((4, 3)))
    assert not optimizer.state[W]


@both
def test_the_closure_is_evaluated_with_gradients_and_its_loss_returned(method):
    W = nn.Parameter(torch.ones(3))
    optimizer = method([W])

    def closure():
        loss = W.square().sum()
        (W.grad,) = torch.autograd.grad(loss, W)
        return loss

    assert optimizer.step(closure).item() == 3.0
    assert (W < 1).all()


@both
def test_a_step_runs_on_fake_tensors_across_a_reset(method):
    keys = options(method, update_proj_gap=7) | ({"density": 0.5} if method is Spam else {})
    with FakeTensorMode():
        W, b = nn.Parameter(torch.randn(24, 10)), nn.Parameter(torch.randn(5))
        optimizer = method([W, b], lr=LR, weight_decay=0.1, **keys)
        for _ in range(15):
            W.grad, b.grad = torch.randn(24, 10), torch.randn(5)
            optimizer.step()
        fake = {k: v.shape for k, v in optimizer.state[W].items() if isinstance(v, torch.Tensor)}
    W = nn.Parameter(torch.randn(24, 10))
    optimizer = method([W], **keys)
    advance(W, optimizer, gradients((24, 10), 1))
    real = {k: v.shape for k, v in optimizer.state[W].items() if isinstance(v, torch.Tensor)}
    assert fake == real


@both
def test_states_hold_no_more_memory_than_their_elements(method):
    W = nn.Parameter(start((24, 10)))
    optimizer = method([W], **({"density": 0.5} if method is Spam else {}))
    advance(W, optimizer, gradients((24, 10), 1))
    for name, value in optimizer.state[W].items():
        if isinstance(value, torch.Tensor):
            assert value.untyped_storage().nbytes() == value.numel() * value.element_size(), name


@both
@precisions
@pytest.mark.parametrize("density", [1.0, 0.5])
def test_a_fresh_instance_continues_bit_for_bit(method, dtype, density):
    keys = options(method) | ({"density": density} if method is Spam else {})
    grads, W = gradients((24, 10), dtype=dtype), nn.Parameter(start((24, 10), dtype))
    optimizer = method([W], lr=LR, **keys)
    advance(W, optimizer, grads[:20])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    U = nn.Parameter(W.detach().clone())
    fresh = method([U], lr=1.0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    advance(W, optimizer, grads[20:])
    advance(U, fresh, grads[20:])
    assert torch.equal(W, U)
    for name, value in optimizer.state[W].items():
        other = fresh.state[U][name]
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(other)), name
        assert torch.as_tensor(value).dtype == torch.as_tensor(other).dtype, name


# Refusals

BAD = [
    (Spam, {"lr": -1.0}), (Spam, {"betas": (1.0, 0.9)}), (Spam, {"eps": -1e-9}),
    (Spam, {"weight_decay": -0.1}), (Spam, {"threshold": -1}), (Spam, {"update_proj_gap": 0}),
    (Spam, {"update_proj_gap": 2.5}), (Spam, {"warmup": -1}), (Spam, {"warmup": 1.5}),
    (Spam, {"grad_accu_steps": -1}), (Spam, {"density": 0.0}), (Spam, {"density": 1.1}),
    (StableSpam, {"lr": -1.0}), (StableSpam, {"gamma1": 1.0}), (StableSpam, {"gamma2": -0.1}),
    (StableSpam, {"theta": 1.0}), (StableSpam, {"update_proj_gap": 0}),
]  # fmt: skip


@pytest.mark.parametrize(("method", "bad"), BAD)
def test_a_bad_value_is_refused_in_one_line_and_changes_nothing(method, bad):
    ((key, value),) = bad.items()
    with pytest.raises(ValueError, match=f"^{key}: ") as refusal:
        method([nn.Parameter(torch.zeros(3))], **bad)
    assert "\n" not in str(refusal.value)
    optimizer = method([nn.Parameter(torch.zeros(3))])
    with pytest.raises(ValueError, match=f"^{key}: "):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))], key: value})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("method", "key"), [(Spam, "gamma1"), (Spam, "rank"), (StableSpam, "density")]
)
def test_an_unknown_key_of_a_group_is_refused(method, key):
    with pytest.raises(ValueError, match=f"^{key}: 1 is not allowed; no such key"):
        method([{"params": [nn.Parameter(torch.zeros(3))], key: 1}])


@both
def test_sparse_gradients_are_refused(method):
    table = nn.Embedding(5, 4, sparse=True)
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        method(table.parameters()).step()
