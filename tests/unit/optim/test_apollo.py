"""APOLLO: against the published package its equations in float64, and ugly input."""

import copy
import io
import itertools
import math

import pytest
import torch
from apollo_torch import APOLLOAdamW
from apollo_torch.random_projector import next_seed as published_next_seed
from small_matrices import (
    GAP,
    LR,
    ONE_SIDED,
    SQUARE,
    STEPS,
    TALL,
    WIDE,
    advance,
    assert_equal_states,
    error_of_update,
    gradients,
    growing,
    is_left,
    readable,
    relative,
    start,
)
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank_lab.optim.apollo import Apollo, next_seed, random_projection
from lowrank_lab.techniques import reset_momentum_

KEYS = {
    "update_proj_gap": GAP, "scale": 1.0, "proj": "random", "proj_type": "std",
    "scale_type": "channel",
}  # fmt: skip
MODES = {
    "random": {},
    "regenerated": {"store_projection": False},
    "svd": {"proj": "svd"},
    "mini": {"scale_type": "tensor", "scale": 128.0, "store_projection": False},
}
modes = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
shapes = pytest.mark.parametrize("shape", [SQUARE, TALL, WIDE], ids=readable)


def made(
    shape, rank, *, method=Apollo, dtype=torch.float32, weight_decay=0.0, options=None, **keys
):
    """An optimizer of one ranked matrix and, in a plain group, one vector."""
    W, b = (nn.Parameter(x) for x in start(shape, dtype))
    groups = [{"params": [b]}, {"params": [W], "rank": rank, **KEYS, **keys}]
    return W, b, method(groups, lr=LR, weight_decay=weight_decay, **(options or {}))


def trained(shape, rank, *, dtype=torch.float32, grads=None, **options):
    """The matrix and the vector after STEPS steps."""
    W, b, optimizer = made(shape, rank, dtype=dtype, **options)
    advance(W, b, optimizer, grads or gradients(shape, dtype=dtype))
    return W.detach().double(), b.detach().double()


def projections(shape, rank, *, dtype=torch.float32, **keys):
    """Our projection of each step, as it lies in the state."""
    W, b, optimizer = made(shape, rank, dtype=dtype, **keys)
    name = "projection_left" if is_left(keys.get("proj_type", "std"), shape) else "projection_right"
    for G in gradients(shape, dtype=dtype):
        advance(W, b, optimizer, [G])
        yield optimizer.state[W][name].double()


def by_equations(shape, rank, *, dtype=torch.float32, weight_decay=0.0, **keys):
    """The matrix after STEPS steps of 2412.05270 in float64; only P is the optimizer's."""
    chosen, m, v, previous = KEYS | keys, 0.0, 0.0, None
    left, W = is_left(chosen["proj_type"], shape), start(shape, dtype)[0].double()
    axis = (0, 1) if chosen["scale_type"] == "tensor" else 0 if left else 1
    steps = zip(
        gradients(shape, dtype=dtype),
        projections(shape, rank, dtype=dtype, **(keys | {"store_projection": True})),
        strict=True,
    )
    for t, (G, P) in enumerate(steps, 1):
        G = G.double()
        R = P.T @ G if left else G @ P
        m, v = 0.9 * m + 0.1 * R, 0.999 * v + 0.001 * R**2
        N = m / (v.sqrt() + 1e-6)
        S = G * N.norm(dim=axis, keepdim=True) / (R.norm(dim=axis, keepdim=True) + 1e-8)
        if previous is not None:
            S = S / (max(S.norm() / (previous + 1e-8), 1.01) / 1.01)
        previous = S.norm()
        W = W - LR * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t) * math.sqrt(chosen["scale"]) * S
        W = W - LR * weight_decay * W
    return W


def package_is_right(shape, scale_type, proj_type):
    """The package takes the longer side of G for the channels' axis, whatever it projects."""
    return scale_type == "tensor" or is_left(proj_type, shape) == (shape[0] < shape[1])


CASES = [
    (shape, rank, proj, scale_type, proj_type)
    for shape in (SQUARE, TALL, WIDE)
    for rank in (1, 4, min(shape))
    for proj, scale_type in itertools.product(("random", "svd"), ("channel", "tensor"))
    for proj_type in ONE_SIDED
]


# Equality


@pytest.mark.parametrize(
    ("shape", "rank", "proj", "scale_type", "proj_type"),
    [c for c in CASES if package_is_right(c[0], c[3], c[4])],
    ids=readable,
)
def test_the_update_equals_the_published_package_with_its_own_seeds(
    shape, rank, proj, scale_type, proj_type
):
    keys = {"proj": proj, "scale_type": scale_type, "proj_type": proj_type}
    W, b = trained(shape, rank, **keys)
    their_W, their_b = trained(shape, rank, method=APOLLOAdamW, **keys)
    assert error_of_update(W, their_W, shape) <= 1e-5
    assert relative(b, their_b) <= 1e-6


@pytest.mark.parametrize(("shape", "rank", "proj", "scale_type", "proj_type"), CASES, ids=readable)
def test_the_update_follows_the_equations_in_float64(shape, rank, proj, scale_type, proj_type):
    keys = {"proj": proj, "scale_type": scale_type, "proj_type": proj_type}
    W, _ = trained(shape, rank, **keys)
    assert error_of_update(W, by_equations(shape, rank, **keys), shape) <= 1e-5


@pytest.mark.parametrize(
    ("shape", "proj_type"), [(TALL, "left"), (TALL, "reverse_std"), (WIDE, "right")], ids=readable
)
def test_the_package_crashes_where_its_guess_of_the_side_is_wrong(shape, proj_type):
    with pytest.raises(RuntimeError, match="must match the size"):
        trained(shape, 4, method=APOLLOAdamW, proj_type=proj_type)


@shapes
@pytest.mark.parametrize("scale_front", [False, True])
@pytest.mark.parametrize(
    ("rank", "scale", "scale_type"),
    [(4, 0.25, "channel"), (4, 4.0, "tensor"), (1, 128.0, "tensor")],
)
def test_scale_and_scale_front_mean_what_they_mean_in_the_package(
    shape, rank, scale, scale_type, scale_front
):
    keys = {"scale": scale, "scale_type": scale_type}
    options = {"scale_front": scale_front}
    their_W, _ = trained(shape, rank, method=APOLLOAdamW, options=options, **keys)
    as_argument, _ = trained(shape, rank, options=options, **keys)
    as_key, _ = trained(shape, rank, **options, **keys)
    assert torch.equal(as_argument, as_key)
    assert error_of_update(as_key, their_W, shape) <= 1e-5


@pytest.mark.parametrize("scale_front", [False, True])
def test_a_scale_that_changes_meets_the_limiter_as_in_the_package(scale_front):
    results = []
    for method in (Apollo, APOLLOAdamW):
        W, b, optimizer = made(TALL, 4, method=method, options={"scale_front": scale_front})
        for i, G in enumerate(gradients(TALL)):
            optimizer.param_groups[1]["scale"] = 1.0 if i < 15 else 9.0
            advance(W, b, optimizer, [G])
        results.append(W.detach().double())
    assert error_of_update(*results, TALL) <= 1e-5


def test_without_the_limiter_the_update_equals_the_published_package():
    options, grads = {"disable_nl": True}, growing(TALL, torch.float32)
    W, _ = trained(TALL, 4, options=options, grads=grads)
    their_W, _ = trained(TALL, 4, method=APOLLOAdamW, options=options, grads=grads)
    assert error_of_update(W, their_W, TALL) <= 1e-5
    assert relative(trained(TALL, 4, grads=grads)[0], W) > 0.01  # the limiter does something


@shapes
@pytest.mark.parametrize("rank", [1, 4, 10])
def test_weight_decay_equals_the_published_package(shape, rank):
    W, b = trained(shape, rank, weight_decay=0.1)
    their_W, their_b = trained(shape, rank, method=APOLLOAdamW, weight_decay=0.1)
    assert error_of_update(W, their_W, shape) <= 1e-5
    assert error_of_update(W, by_equations(shape, rank, weight_decay=0.1), shape) <= 1e-5
    assert relative(b, their_b) <= 1e-6


@shapes
@pytest.mark.parametrize("rank", [1, 4, 10])
@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
def test_bfloat16_strays_no_further_from_the_equations_than_the_package(shape, rank, scale_type):
    half = {"dtype": torch.bfloat16, "scale_type": scale_type}
    W, b = trained(shape, rank, **half)
    their_W, their_b = trained(shape, rank, method=APOLLOAdamW, **half)
    exact = by_equations(shape, rank, **half)
    theirs = error_of_update(their_W, exact, shape, torch.bfloat16)
    assert error_of_update(W, exact, shape, torch.bfloat16) <= 1.2 * theirs
    assert relative(b, their_b) <= 2**-7


def test_a_parameter_that_joins_late_and_a_schedule_equal_the_published_package():
    results = []
    for method in (Apollo, APOLLOAdamW):
        W, b, optimizer = made(WIDE, 4, method=method)
        for i, G in enumerate(gradients(WIDE)):
            for group in optimizer.param_groups:
                group.update(lr=LR * (1 - i / STEPS), correct_bias=i < 20)
            W.grad, b.grad = (G.clone() if i >= 13 else None), (G.sum(1) if i % 5 else None)
            optimizer.step()
        results.append(W.detach().double())
    assert error_of_update(*results, WIDE) <= 1e-5


def test_several_matrices_get_the_matrices_of_the_package():
    ends = []
    for method in (Apollo, APOLLOAdamW):
        weights = [nn.Parameter(start(TALL)[0]) for _ in range(4)]
        groups = [{"params": [weights[0]]}, {"params": weights[1:3], "rank": 2, **KEYS}]
        optimizer = method([*groups, {"params": weights[3:], "rank": 1, **KEYS}], lr=LR)
        for G in gradients(TALL):
            for W in weights:
                W.grad = G.clone()
            optimizer.step()
        ends.append([W.detach().double() for W in weights])
    assert all(error_of_update(*pair, TALL) <= 1e-5 for pair in zip(*ends, strict=True))
    assert relative(ends[0][1], ends[0][2]) > 1e-3  # each parameter has its own projection


@pytest.mark.parametrize("seed", [0, 1, 7, 2**31, 2**32 - 1, 2**32, 2**63 - 1])
def test_the_sequence_of_seeds_is_the_published_one(seed):
    for _ in range(5):
        assert next_seed(seed) == published_next_seed(seed)
        seed = next_seed(seed)


# Properties


@shapes
@pytest.mark.parametrize("proj_type", ONE_SIDED)
@precisions
@pytest.mark.parametrize("rank", [1, 4])
def test_stored_and_regenerated_projections_agree_bit_for_bit(shape, proj_type, dtype, rank):
    results = []
    for store in (True, False):
        W, b, optimizer = made(
            shape, rank, dtype=dtype, proj_type=proj_type, store_projection=store
        )
        advance(W, b, optimizer, gradients(shape, dtype=dtype))
        results.append((W.detach(), optimizer.state[W]))
    (W, stored), (other_W, regenerated) = results
    assert torch.equal(W, other_W)
    (projection,) = stored.keys() - regenerated.keys()
    assert projection.startswith("projection_")
    assert isinstance(regenerated["seed"], int)


def test_storing_can_be_changed_at_any_step():
    W, b, optimizer = made(TALL, 4)
    for i, G in enumerate(gradients(TALL)):
        optimizer.param_groups[1]["store_projection"] = i % 3 > 0
        advance(W, b, optimizer, [G])
    assert torch.equal(W.detach().double(), trained(TALL, 4)[0])


@shapes
@precisions
@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("store", [True, False])
def test_the_bytes_of_the_state_are_those_of_the_formula(shape, dtype, rank, store):
    W, b, optimizer = made(shape, rank, dtype=dtype, store_projection=store)
    advance(W, b, optimizer, gradients(shape, 2, dtype))
    state = [x for x in optimizer.state[W].values() if isinstance(x, torch.Tensor)]
    long, short, size = max(shape), min(shape), dtype.itemsize
    formula = 2 * rank * long * size + 4 + (rank * short * size if store else 0)
    assert sum(x.untyped_storage().nbytes() for x in state) == formula


@shapes
@pytest.mark.parametrize("proj_type", ONE_SIDED)
@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
def test_a_step_scales_the_gradient_by_one_factor_a_channel_or_tensor(shape, proj_type, scale_type):
    W, b, optimizer = made(shape, 2, proj_type=proj_type, scale_type=scale_type)
    W.data.zero_()
    G = gradients(shape, 1)[0]
    advance(W, b, optimizer, [G])
    factors = -W.detach() / G
    axis = (0, 1) if scale_type == "tensor" else 0 if is_left(proj_type, shape) else 1
    assert torch.allclose(factors, factors.mean(axis, keepdim=True), rtol=1e-3)
    assert (factors > 0).all()


@modes
def test_a_step_without_refresh_takes_one_matrix_product(mode):
    class Counter(TorchDispatchMode):
        products = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.products += func._overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
            return func(*args, **(kwargs or {}))

    W, b, optimizer = made(TALL, 4, **mode)
    first, second = gradients(TALL, 2)
    advance(W, b, optimizer, [first])
    with Counter() as counter:
        advance(W, b, optimizer, [second])
    assert counter.products == 1


@pytest.mark.parametrize("scale_front", [False, True])
def test_the_update_grows_by_one_percent_a_step_at_most(scale_front):
    W, b, optimizer = made(TALL, 3, scale=4.0, scale_front=scale_front)
    optimizer.param_groups[1]["correct_bias"] = False
    moves = []
    for i, G in enumerate(gradients(TALL)):
        before = W.detach().double()
        advance(W, b, optimizer, [G * 3.0**i])
        moves.append((W.detach().double() - before).norm())
    growth = [float(after / before) for before, after in itertools.pairwise(moves)]
    assert max(growth) == pytest.approx(1.01, rel=1e-4)


def test_random_projections_keep_norms_on_average():
    G = torch.zeros(12, 8)
    for left, side in ((True, 12), (False, 8)):
        drawn = [random_projection(G, side, 3, left, seed) for seed in range(4000)]
        assert drawn[0].shape == (side, 3)
        assert drawn[0].is_contiguous()
        mean = sum(P @ P.T for P in drawn) / len(drawn)
        assert torch.allclose(mean, torch.eye(side), atol=0.06)


def test_a_projection_changes_only_at_its_refresh():
    seen = [P.clone() for P in itertools.islice(projections(TALL, 4), 21)]
    changes = [i for i in range(1, 21) if not torch.equal(seen[i - 1], seen[i])]
    assert changes == [10, 20]


@modes
def test_equal_runs_are_equal_and_leave_the_global_generator_alone(mode):
    first = trained(TALL, 4, **mode)
    torch.manual_seed(17)
    before = torch.get_rng_state()
    second = trained(TALL, 4, **mode)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_another_seed_draws_other_projections():
    ends = [trained(TALL, 4, seed=seed)[0] for seed in (0, 1, 2**31)]
    assert all(relative(a, b) > 1e-3 for a, b in itertools.combinations(ends, 2))


@modes
@pytest.mark.parametrize("shape", [TALL, WIDE], ids=readable)
def test_regression_converges(mode, shape):
    chance, (m, n) = torch.Generator().manual_seed(3), shape
    solution = torch.randn(m, 3, generator=chance) @ torch.randn(3, n, generator=chance)
    X = torch.randn(50, max(shape), generator=chance)
    W = nn.Parameter(torch.zeros(m, n))
    optimizer = Apollo([{"params": [W], "rank": 4, "update_proj_gap": 20, **mode}])
    losses, peak = [], 0.3 if mode.get("scale", 1) == 1 else 0.03
    for i in range(400):
        optimizer.param_groups[0]["lr"] = peak * (1 - i / 400)
        error = W - solution
        loss = (X @ (error if m > n else error.T)).square().mean()
        (W.grad,) = torch.autograd.grad(loss, W)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 1e-6 * losses[0]


# Ugly input


@modes
@precisions
@pytest.mark.parametrize("rank", [1, 10])
def test_zero_gradients_leave_finite_weights_and_states_of_final_shape(mode, dtype, rank):
    W, b, optimizer = made(TALL, rank, dtype=dtype, **mode)
    W0 = W.detach().clone()
    advance(W, b, optimizer, [torch.zeros(TALL, dtype=dtype)])
    shapes = {k: v.shape for k, v in optimizer.state[W].items() if isinstance(v, torch.Tensor)}
    assert torch.equal(W, W0)
    advance(W, b, optimizer, [*gradients(TALL, 4, dtype), torch.zeros(TALL, dtype=dtype)] * 3)
    assert W.isfinite().all()
    state = optimizer.state[W].items()
    assert {k: v.shape for k, v in state if isinstance(v, torch.Tensor)} == shapes


def test_a_zero_gradient_does_not_stop_the_training_as_in_the_package():
    grads = [*gradients(TALL, 5), torch.zeros(TALL), *gradients(TALL, 20)]
    W0 = start(TALL)[0].double()
    W, b, optimizer = made(TALL, 4)
    advance(W, b, optimizer, grads[:6])
    before = W.detach().clone()
    advance(W, b, optimizer, grads[6:])
    assert relative(W.detach(), before) > 0.1
    package, _ = trained(TALL, 4, method=APOLLOAdamW, grads=grads)
    stopped, _ = trained(TALL, 4, method=APOLLOAdamW, grads=grads[:6])
    assert relative(package, stopped) < 1e-6
    assert relative(stopped, W0) > 0.01


def test_a_full_momentum_reset_restarts_the_growth_limiter():
    W, b, optimizer = made(TALL, 4)
    advance(W, b, optimizer, gradients(TALL, 3))
    reset_momentum_(optimizer)
    before = W.detach().clone()
    advance(W, b, optimizer, [1e4 * gradients(TALL, 4)[3]])
    state = optimizer.state[W]
    assert state["exp_avg_weight"] == pytest.approx(0.1)
    assert relative(W.detach(), before) > 0.01


@modes
def test_float64_weights_train(mode):
    W, _ = trained(TALL, 4, dtype=torch.float64, **mode)
    single, _ = trained(TALL, 4, **mode)
    assert relative(single, W) <= 1e-5


@modes
def test_a_parameter_without_gradient_is_left_alone(mode):
    W, _, optimizer = made(TALL, 4, weight_decay=0.1, **mode)
    W0 = W.detach().clone()
    optimizer.step()
    assert torch.equal(W, W0)
    assert not optimizer.state[W]


@modes
def test_a_step_runs_on_fake_tensors_across_a_refresh(mode):
    with FakeTensorMode():
        W, b, optimizer = made(TALL, 4, weight_decay=0.1, **(mode | {"update_proj_gap": 2}))
        advance(W, b, optimizer, [torch.randn(TALL) for _ in range(5)])
        fake = {k: v.shape for k, v in optimizer.state[W].items() if isinstance(v, torch.Tensor)}
    W, b, optimizer = made(TALL, 4, **mode)
    advance(W, b, optimizer, gradients(TALL, 1))
    real = {k: v.shape for k, v in optimizer.state[W].items() if isinstance(v, torch.Tensor)}
    assert fake == real


# Saving and continuing


@modes
@precisions
@pytest.mark.parametrize("shape", [TALL, WIDE], ids=readable)
def test_a_fresh_instance_continues_bit_for_bit(mode, dtype, shape):
    grads = growing(shape, dtype)
    W, b, optimizer = made(shape, 4, dtype=dtype, **mode)
    advance(W, b, optimizer, grads[:7])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    new_W, new_b, fresh = made(shape, 4, dtype=dtype, **mode)
    new_W.data.copy_(W.data)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert_equal_states(optimizer.state[W], fresh.state[new_W])
    advance(W, b, optimizer, grads[7:])
    advance(new_W, new_b, fresh, grads[7:])
    assert torch.equal(W, new_W)
    assert_equal_states(optimizer.state[W], fresh.state[new_W])


@modes
def test_the_same_instance_goes_back_bit_for_bit(mode):
    grads = growing(TALL, torch.float32)
    W, b, optimizer = made(TALL, 4, **mode)
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
        ({"proj_type": "full"}, "proj_type: 'full'"),
        ({"proj": "randomized"}, "proj: 'randomized'"),
        ({"scale_type": "row"}, "scale_type: 'row'"),
        ({"scale": -1.0}, "scale: -1.0"),
        ({"scale": math.nan}, "scale: nan"),
        ({"scale": "big"}, "scale: 'big'"),
        ({"scale_front": 1}, "scale_front: 1"),
        ({"disable_nl": None}, "disable_nl: None"),
        ({"store_projection": "no"}, "store_projection: 'no'"),
        ({"store_projection": False, "proj": "svd"}, "store_projection: False"),
        ({"seed": -1}, "seed: -1"),
        ({"seed": 0.5}, "seed: 0.5"),
        ({"update_proj_gap": 0}, "update_proj_gap: 0"),
        ({"rank": 5}, "rank: 5"),
        ({"refresh": "svd"}, "refresh: 'svd'"),
    ],
)
def test_a_bad_ranked_group_is_refused_in_one_line_and_changes_nothing(keys, message):
    optimizer = Apollo([nn.Parameter(torch.zeros(3))])
    with pytest.raises(ValueError, match=f"^{message} is not allowed; ") as refusal:
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(6, 4))], "rank": 2} | keys)
    assert "\n" not in str(refusal.value)
    assert len(optimizer.param_groups) == 1
