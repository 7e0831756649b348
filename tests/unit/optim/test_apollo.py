"""APOLLO: scales, the growth limiter, seeds and stored projections."""

import itertools

import pytest
import torch
from apollo_torch import APOLLOAdamW
from apollo_torch.random_projector import next_seed as published_next_seed
from small_matrices import (
    GAP,
    LR,
    ONE_SIDED,
    SQUARE,
    TALL,
    WIDE,
    advance,
    error_of_update,
    gradients,
    growing,
    is_left,
    readable,
    relative,
    start,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank_lab.optim.apollo import Apollo, random_projection
from lowrank_lab.optim.subspaces import next_seed
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


# Equality


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


def test_another_seed_draws_other_projections():
    ends = [trained(TALL, 4, seed=seed)[0] for seed in (0, 1, 2**31)]
    assert all(relative(a, b) > 1e-3 for a, b in itertools.combinations(ends, 2))


# Ugly input


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


# Refusals
