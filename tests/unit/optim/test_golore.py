"""GoLore: against its equations in float64, GaLore before the switch, and ugly input.

No package on a registry has it. The published code isn't compared with: it drops the carried moment
after one step, and its random right projections come from the inverse root of a singular matrix.
"""

import copy
import io
import itertools

import pytest
import torch
from small_matrices import (
    GAP,
    LR,
    ONE_SIDED,
    SQUARE,
    TALL,
    WIDE,
    advance,
    assert_equal_states,
    error_of_update,
    gradients,
    is_left,
    is_right,
    readable,
    relative,
    start,
)
from torch import nn
from torch._subclasses import FakeTensorMode

from lowrank_lab.optim import GaLore
from lowrank_lab.optim.golore import GoLore, carry_moment, random_orthonormal

NEVER = 10**9  # a switch that isn't reached
PROJ_TYPES = (*ONE_SIDED, "full")

shapes = pytest.mark.parametrize("shape", [SQUARE, TALL, WIDE], ids=readable)
proj_types = pytest.mark.parametrize("proj_type", PROJ_TYPES)
precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
switches = pytest.mark.parametrize("switch", [0, 15, NEVER])


def made(shape, rank, *, method=GoLore, dtype=torch.float32, betas=(0.9, 0.999), **keys):
    """An optimizer of one ranked matrix and, in a plain group, one vector."""
    W, b = (nn.Parameter(x) for x in start(shape, dtype))
    keys = {"update_proj_gap": GAP, "scale": 1.0} | keys
    weight_decay = keys.pop("weight_decay", 0.0)
    groups = [{"params": [W], "rank": rank, **keys}, {"params": [b]}]
    return W, b, method(groups, lr=LR, betas=betas, weight_decay=weight_decay)


def trained(shape, rank, *, dtype=torch.float32, **options):
    """The matrix after all steps."""
    W, b, optimizer = made(shape, rank, dtype=dtype, **options)
    advance(W, b, optimizer, gradients(shape, dtype=dtype))
    return W.detach().double()


def sides_of(state, shape):
    """L and R in float64, an identity where a side isn't projected."""
    pair = zip(("projection_left", "projection_right"), shape, strict=True)
    return [
        state[name].double().clone() if name in state else torch.eye(side, dtype=torch.float64)
        for name, side in pair
    ]


def with_equations(shape, rank, *, dtype=torch.float32, scale=1.0, weight_decay=0.0, **keys):
    """The matrix after all steps, by the optimizer and by 2410.11289 in float64 with its P."""
    W, b, optimizer = made(shape, rank, dtype=dtype, scale=scale, weight_decay=weight_decay, **keys)
    exact, m, v, old = W.detach().double(), 0.0, 0.0, None
    for t, G in enumerate(gradients(shape, dtype=dtype), 1):
        advance(W, b, optimizer, [G])
        L, R = sides_of(optimizer.state[W], shape)
        if old is not None and t % GAP == 1:
            m = L.T @ old[0] @ m @ old[1].T @ R
        g, old = L.T @ G.double() @ R, (L, R)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        N = m / (v.sqrt() + 1e-6)
        exact = exact - LR * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t) * scale * L @ N @ R.T
        exact = exact - LR * weight_decay * exact
    return W.detach().double(), exact


# Equality


# Not `full` by SVD: at a refresh its off-diagonal entries are rounding noise, blown up by Adam.
@pytest.mark.parametrize(
    ("shape", "rank", "proj_type", "switch"),
    [
        (shape, rank, proj_type, switch)
        for shape in (SQUARE, TALL, WIDE)
        for rank in (1, 4, min(shape))
        for proj_type, switch in itertools.product(PROJ_TYPES, (0, 15, NEVER))
        if proj_type != "full" or switch == 0
    ],
    ids=readable,
)
def test_the_update_follows_the_equations_in_float64(shape, rank, proj_type, switch):
    W, exact = with_equations(shape, rank, proj_type=proj_type, switch=switch)
    assert error_of_update(W, exact, shape) <= 1e-5


@shapes
@pytest.mark.parametrize("keys", [{"scale": 0.25}, {"scale": 2.0}, {"weight_decay": 0.1}])
def test_scale_and_weight_decay_follow_the_equations(shape, keys):
    W, exact = with_equations(shape, 4, switch=15, **keys)
    assert error_of_update(W, exact, shape) <= 1e-5


@shapes
@pytest.mark.parametrize("rank", [1, 4, 10])
@pytest.mark.parametrize("switch", [0, 15])
def test_bfloat16_strays_at_most_twice_as_far_with_refreshes_as_without(shape, rank, switch):
    half = {"dtype": torch.bfloat16, "switch": switch}
    errors = [
        error_of_update(
            *with_equations(shape, rank, update_proj_gap=gap, **half), shape, half["dtype"]
        )
        for gap in (GAP, NEVER)
    ]
    assert errors[0] <= 2 * errors[1]


@shapes
@proj_types
@pytest.mark.parametrize("refresh", ["svd", "randomized", "gram"])
@pytest.mark.parametrize("rank", [1, 4, 10])
def test_before_the_first_refresh_it_is_galore_bit_for_bit(shape, proj_type, refresh, rank):
    ends = []
    for method, keys in ((GaLore, {}), (GoLore, {"switch": NEVER})):
        W, b, optimizer = made(
            shape, rank, method=method, proj_type=proj_type, refresh=refresh, **keys
        )
        advance(W, b, optimizer, gradients(shape, GAP))
        ends.append(W.detach())
    assert torch.equal(*ends)


@shapes
@proj_types
@pytest.mark.parametrize("refresh", ["svd", "randomized", "gram"])
def test_without_momentum_it_is_galore_up_to_the_switch_bit_for_bit(shape, proj_type, refresh):
    keys = {"proj_type": proj_type, "refresh": refresh, "betas": (0.0, 0.999)}
    galore = trained(shape, 4, method=GaLore, **keys)
    assert torch.equal(trained(shape, 4, switch=NEVER, **keys), galore)
    assert not torch.equal(trained(shape, 4, switch=15, **keys), galore)


def test_with_momentum_it_differs_from_galore_by_the_carried_moment():
    assert relative(trained(TALL, 4, switch=NEVER), trained(TALL, 4, method=GaLore)) > 0.01


# The carried moment


@shapes
@proj_types
@pytest.mark.parametrize("switch", [0, GAP, NEVER])
def test_a_refresh_stores_the_carried_moment_and_keeps_the_second(shape, proj_type, switch):
    W, b, optimizer = made(shape, 4, proj_type=proj_type, switch=switch)
    advance(W, b, optimizer, gradients(shape, GAP))
    before, old = copy.deepcopy(optimizer.state[W]), sides_of(optimizer.state[W], shape)
    advance(W, b, optimizer, [torch.zeros(shape)] if switch == 0 else gradients(shape, 1))
    state, new = optimizer.state[W], sides_of(optimizer.state[W], shape)
    G = torch.zeros(shape) if switch == 0 else gradients(shape, 1)[0]
    g = new[0].T @ G.double() @ new[1]
    m = new[0].T @ old[0] @ before["exp_avg"].double() @ old[1].T @ new[1]
    v = before["exp_avg_sq"].double()
    assert relative(state["exp_avg"].double(), 0.9 * m + 0.1 * g) <= 1e-5
    assert relative(state["exp_avg_sq"].double(), 0.999 * v + 0.001 * g**2) <= 1e-5


@pytest.mark.parametrize("which", [(True, False), (False, True), (True, True)])
def test_at_full_rank_a_carried_moment_comes_back_unchanged(which):
    P = [random_orthonormal(torch.zeros(0), 6, 6, (i,)) for i in range(4)]
    old = tuple(p if used else None for p, used in zip(P[:2], which, strict=True))
    new = tuple(p if used else None for p, used in zip(P[2:], which, strict=True))
    m = gradients((6, 6), 1)[0]
    moved = carry_moment(m, old, new)
    assert relative(moved, m) > 0.1
    assert relative(carry_moment(moved, new, old), m) <= 1e-6


@shapes
@proj_types
def test_carrying_never_lengthens_a_moment_and_equal_subspaces_keep_it(shape, proj_type):
    W, b, optimizer = made(shape, 4, proj_type=proj_type)
    advance(W, b, optimizer, gradients(shape, GAP))
    state = optimizer.state[W]
    old, m = (state.get("projection_left"), state.get("projection_right")), state["exp_avg"]
    assert relative(carry_moment(m, old, old), m) <= 1e-6
    advance(W, b, optimizer, gradients(shape, 1))
    new = state.get("projection_left"), state.get("projection_right")
    assert carry_moment(m, old, new).norm() <= (1 + 1e-6) * m.norm()


# Projections


@shapes
@proj_types
@pytest.mark.parametrize("rank", [1, 4, 10])
def test_random_projections_are_orthonormal_and_of_the_right_side(shape, proj_type, rank):
    W, b, optimizer = made(shape, rank, proj_type=proj_type)
    advance(W, b, optimizer, gradients(shape, 1))
    state, used = optimizer.state[W], 0
    for name, side, is_used in (
        ("projection_left", shape[0], is_left(proj_type, shape)),
        ("projection_right", shape[1], is_right(proj_type, shape)),
    ):
        assert (name in state) == is_used
        if is_used:
            assert state[name].shape == (side, rank)
            assert torch.allclose(state[name].T @ state[name], torch.eye(rank), atol=1e-6)
            used += 1
    assert used == (2 if proj_type == "full" else 1)


def test_random_projections_are_uniform():
    drawn = torch.stack([random_orthonormal(torch.zeros(0), 6, 2, (i,)) for i in range(4000)])
    assert drawn.mean(0).abs().max() < 0.03  # LAPACK's signs alone would bias it
    covered = (drawn @ drawn.mT).mean(0)
    assert torch.allclose(covered, torch.eye(6) * 2 / 6, atol=0.03)


def test_random_projections_differ_by_seed_parameter_step_and_side():
    def first(seed=0, position=0, steps=1, name="projection_left"):
        weights = [nn.Parameter(torch.ones(8, 8)) for _ in range(2)]
        keys = {"rank": 3, "proj_type": "full", "update_proj_gap": 1, "seed": seed}
        optimizer = GoLore([{"params": weights, **keys}])
        for _ in range(steps):
            for W in weights:
                W.grad = torch.ones(8, 8)
            optimizer.step()
        return optimizer.state[weights[position]][name]

    drawn = [first(), first(1), first(position=1), first(steps=2), first(name="projection_right")]
    assert torch.equal(drawn[0], first())
    assert all((a - b).norm() > 0.1 for a, b in itertools.combinations(drawn, 2))


@pytest.mark.parametrize(("switch", "first_random"), [(0, 0), (1, 10), (10, 10), (11, 20)])
def test_the_first_projection_due_at_or_after_the_switch_is_the_first_random_one(
    switch, first_random
):
    W, b, optimizer = made(WIDE, 3, switch=switch)
    seen, leading = [], []
    for G in gradients(WIDE, 31):
        advance(W, b, optimizer, [G])
        seen.append(optimizer.state[W]["projection_left"].clone())
        leading.append(torch.equal(seen[-1], torch.linalg.svd(G)[0][:, :3]))
    assert [i for i in range(1, 31) if not torch.equal(seen[i - 1], seen[i])] == [10, 20, 30]
    assert [i for i in (0, 10, 20, 30) if not leading[i]] == list(range(first_random, 31, 10))


# Behaviour


def noisy_run(switch, steps=3000):
    """The share of the error that is left in a block whose gradient is smaller than the noise."""
    chance = torch.Generator().manual_seed(5)
    W, solution = nn.Parameter(torch.zeros(16, 20)), torch.randn(8, 10, generator=chance)
    keys = {"rank": 4, "update_proj_gap": 10, "scale": 1.0, "switch": switch}
    optimizer = GoLore([{"params": [W], **keys}])
    for i in range(steps):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - i / steps)
        noise = 20 * torch.randn(8, 10, generator=chance)
        W.grad = torch.block_diag(W.detach()[:8, :10] - solution, noise)
        optimizer.step()
    return relative(W.detach()[:8, :10], solution)


def test_it_converges_where_noise_keeps_galore_from_ever_seeing_the_gradient():
    assert noisy_run(NEVER) == pytest.approx(1, abs=1e-4)
    assert noisy_run(0) < 1e-4


@pytest.mark.parametrize("shape", [TALL, WIDE], ids=readable)
@pytest.mark.parametrize("switch", [0, 200])
def test_low_rank_regression_converges(shape, switch):
    chance, (m, n) = torch.Generator().manual_seed(3), shape
    solution = torch.randn(m, 3, generator=chance) @ torch.randn(3, n, generator=chance)
    X = torch.randn(50, max(shape), generator=chance)
    W = nn.Parameter(torch.zeros(m, n))
    keys = {"rank": 5, "update_proj_gap": 20, "scale": 1.0, "switch": switch}
    optimizer, losses = GoLore([{"params": [W], **keys}]), []
    for i in range(800):
        optimizer.param_groups[0]["lr"] = 0.3 * (1 - i / 800)
        error = W - solution
        loss = (X @ (error if m > n else error.T)).square().mean()
        (W.grad,) = torch.autograd.grad(loss, W)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 1e-6 * losses[0]


@switches
@pytest.mark.parametrize("refresh", ["svd", "randomized", "gram"])
def test_equal_runs_are_equal_and_leave_the_global_generator_alone(switch, refresh):
    first = trained(TALL, 4, switch=switch, refresh=refresh)
    torch.manual_seed(17)
    before = torch.get_rng_state()
    assert torch.equal(trained(TALL, 4, switch=switch, refresh=refresh), first)
    assert torch.equal(torch.get_rng_state(), before)


@switches
@precisions
@proj_types
@pytest.mark.parametrize("rank", [1, 10])
def test_zero_gradients_leave_finite_weights_and_states_of_final_shape(
    switch, dtype, proj_type, rank
):
    W, b, optimizer = made(TALL, rank, dtype=dtype, proj_type=proj_type, switch=switch)
    W0 = W.detach().clone()
    advance(W, b, optimizer, [torch.zeros(TALL, dtype=dtype)])
    shapes = {k: v.shape for k, v in optimizer.state[W].items() if isinstance(v, torch.Tensor)}
    assert torch.equal(W, W0)
    advance(W, b, optimizer, [*gradients(TALL, 9, dtype), torch.zeros(TALL, dtype=dtype)] * 3)
    assert W.isfinite().all()
    assert not torch.equal(W, W0)
    state = optimizer.state[W].items()
    assert {k: v.shape for k, v in state if isinstance(v, torch.Tensor)} == shapes


def test_a_parameter_without_gradient_is_left_alone():
    W, _, optimizer = made(TALL, 4)
    W0 = W.detach().clone()
    optimizer.step()
    assert torch.equal(W, W0)
    assert not optimizer.state[W]


@proj_types
@pytest.mark.parametrize("switch", [0, 3, NEVER])
def test_a_step_runs_on_fake_tensors_across_a_refresh(proj_type, switch):
    keys = {"proj_type": proj_type, "switch": switch}
    with FakeTensorMode():
        W, b, optimizer = made(TALL, 4, update_proj_gap=2, **keys)
        advance(W, b, optimizer, [torch.randn(TALL) for _ in range(5)])
        fake = {k: v.shape for k, v in optimizer.state[W].items() if isinstance(v, torch.Tensor)}
    W, b, optimizer = made(TALL, 4, **keys)
    advance(W, b, optimizer, gradients(TALL, 1))
    real = {k: v.shape for k, v in optimizer.state[W].items() if isinstance(v, torch.Tensor)}
    assert fake == real


@shapes
@proj_types
@pytest.mark.parametrize("rank", [1, 4, 10])
def test_states_are_those_of_galore_and_hold_no_more_memory_than_their_elements(
    shape, proj_type, rank
):
    layouts = []
    for method in (GoLore, GaLore):
        W, b, optimizer = made(shape, rank, method=method, proj_type=proj_type)
        advance(W, b, optimizer, gradients(shape, GAP + 1))
        state = optimizer.state[W]
        layouts.append({k: getattr(v, "shape", None) for k, v in state.items()})
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                assert value.untyped_storage().nbytes() == value.numel() * 4, name
    assert layouts[0] == layouts[1]


# Saving and continuing


@switches
@precisions
@proj_types
@pytest.mark.parametrize("stop", [GAP - 1, GAP, 17])
def test_a_fresh_instance_continues_bit_for_bit_across_a_refresh(switch, dtype, proj_type, stop):
    grads, keys = gradients(WIDE, dtype=dtype), {"proj_type": proj_type, "switch": switch}
    W, b, optimizer = made(WIDE, 4, dtype=dtype, **keys)
    advance(W, b, optimizer, grads[:stop])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    new_W, new_b, fresh = made(WIDE, 4, dtype=dtype, **keys)
    new_W.data.copy_(W.data)
    new_b.data.copy_(b.data)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    advance(W, b, optimizer, grads[stop:])
    advance(new_W, new_b, fresh, grads[stop:])
    assert torch.equal(W, new_W)
    assert_equal_states(optimizer.state[W], fresh.state[new_W])


@switches
def test_the_same_instance_goes_back_bit_for_bit(switch):
    grads = gradients(TALL)
    W, b, optimizer = made(TALL, 4, switch=switch)
    advance(W, b, optimizer, grads[:7])
    saved = copy.deepcopy((W.data, optimizer.state_dict()))
    advance(W, b, optimizer, grads[7:])
    end, state = W.detach().clone(), copy.deepcopy(optimizer.state[W])
    W.data.copy_(saved[0])
    optimizer.load_state_dict(saved[1])
    advance(W, b, optimizer, grads[7:])
    assert torch.equal(W, end)
    assert_equal_states(optimizer.state[W], state)


# Refusals


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"switch": -1}, "switch: -1"),
        ({"switch": 0.8}, "switch: 0.8"),
        ({"switch": True}, "switch: True"),
        ({"seed": -1}, "seed: -1"),
        ({"seed": None}, "seed: None"),
        ({"proj_type": "diagonal"}, "proj_type: 'diagonal'"),
        ({"refresh": "qr"}, "refresh: 'qr'"),
        ({"update_proj_gap": 0}, "update_proj_gap: 0"),
        ({"rank": 5}, "rank: 5"),
        ({"alpha": 1.0}, "alpha: 1.0"),
    ],
)
def test_a_bad_ranked_group_is_refused_in_one_line_and_changes_nothing(keys, message):
    optimizer = GoLore([nn.Parameter(torch.zeros(3))])
    with pytest.raises(ValueError, match=f"^{message} is not allowed; ") as refusal:
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(6, 4))], "rank": 2} | keys)
    assert "\n" not in str(refusal.value)
    assert len(optimizer.param_groups) == 1
