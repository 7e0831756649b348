"""Refactorization and momentum reset: against float64 references, and what they leave alone."""

import copy
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowrank_lab import factorize, refactorize_, reset_momentum_
from lowrank_lab.distributed.placements import Replicated
from lowrank_lab.layers import LowRankLinear
from lowrank_lab.optim import Fira, GaLore
from lowrank_lab.techniques.refactorization import balance_factors_

SHAPES = [
    (64, 48, 1),
    (64, 48, 8),
    (48, 64, 8),
    (40, 40, 40),
    (24, 60, 24),
    (60, 24, 24),
    (1, 1, 1),
]
BOTH_MOMENTS = ("exp_avg", "exp_avg_sq")


class Recorder(TorchDispatchMode):
    """The most elements that any operation's output has."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        numels = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.largest = max([self.largest, *numels])
        return out


def layer_of(B, A, **options):
    """A low-rank layer with these factors."""
    linear = nn.Linear(A.shape[1], B.shape[0], bias=False, dtype=B.dtype)
    layer = LowRankLinear(linear, B.shape[1], **options)
    layer.B.data.copy_(B)
    layer.A.data.copy_(A)
    return layer


def random_factors(m, n, r, dtype=torch.float64, seed=0):
    chance = torch.Generator().manual_seed(seed)
    B = torch.randn(m, r, generator=chance, dtype=torch.float64)
    A = torch.randn(r, n, generator=chance, dtype=torch.float64)
    return B.to(dtype), A.to(dtype)


def unbalanced(condition, m=64, n=48, r=8):
    """Factors B·T and T⁻¹·A, T of this condition number: their product is as easy as B·A."""
    B, A = random_factors(m, n, r)
    Q = torch.linalg.qr(random_factors(r, r, r, seed=1)[0])[0]
    T = (Q * torch.logspace(0, -math.log10(condition), r, dtype=torch.float64)) @ Q.T
    return (B @ T).float(), (torch.linalg.inv(T) @ A).float()


def relative(ours, reference):
    return ((ours - reference).norm() / reference.norm()).item()


def assert_balanced(layer, B, A, tolerance):
    """The layer holds √Σ-balanced factors of the product B·A, by a full SVD in float64."""
    product, r = B.double() @ A.double(), B.shape[1]
    S = torch.linalg.svdvals(product)[:r]
    new_B, new_A = layer.B.detach().double(), layer.A.detach().double()
    assert relative(new_B @ new_A, product) <= tolerance
    assert relative(new_B.T @ new_B, S.diag()) <= tolerance
    assert relative(new_A @ new_A.T, S.diag()) <= tolerance
    diagonal = (new_B.T @ new_B).diagonal()
    assert (diagonal.diff() <= tolerance * S[0]).all()


# Refactorization


@pytest.mark.parametrize(("m", "n", "r"), SHAPES)
def test_factors_are_balanced_and_the_product_is_kept(m, n, r):
    B, A = random_factors(m, n, r, torch.float32)
    layer = layer_of(B, A)
    assert refactorize_(layer).changed == [""]
    assert_balanced(layer, B, A, 1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize(("m", "n", "r"), SHAPES[:3])
def test_other_precisions_are_balanced_to_their_rounding(m, n, r, dtype, tolerance):
    B, A = random_factors(m, n, r, dtype)
    layer = layer_of(B, A)
    refactorize_(layer)
    assert_balanced(layer, B, A, tolerance)


@pytest.mark.parametrize("condition", [10, 100, 1000, 1e4])
def test_ill_conditioned_factors_of_a_good_product_keep_it(condition):
    B, A = unbalanced(condition)
    layer = layer_of(B, A)
    assert refactorize_(layer).changed == [""]
    assert_balanced(layer, B, A, 1e-6)


class InThreads(Replicated):
    """A placement whose shards are in threads: each writes its own and reads those of all."""

    dim = 0

    def __init__(self, place, places, barrier):
        self.place, self.places, self.barrier = place, places, barrier

    def exchanged(self, t):
        self.barrier.wait()
        self.places[self.place] = t.clone()
        self.barrier.wait()
        return list(self.places)

    def all_reduce_sum_(self, t):
        return t.copy_(sum(self.exchanged(t)))

    def global_norm(self, t):
        return sum(x.square() for x in self.exchanged(t)).sqrt()

    def broadcast(self, t):
        return self.exchanged(t)[0]

    def all_gather(self, t, dim=0, length=None):
        return torch.cat(self.exchanged(t), dim)


def in_shards(B, A, count):
    """The factors after a refactorization by threads that hold rows of B and columns of A."""
    places, barrier = [None] * count, threading.Barrier(count, timeout=60)
    cuts = zip(B.tensor_split(count), A.tensor_split(count, 1), strict=True)
    layers = [layer_of(B, A) for _ in range(count)]
    for layer, (b, a) in zip(layers, cuts, strict=True):
        layer.B, layer.A = nn.Parameter(b.clone()), nn.Parameter(a.clone())

    def run(i):
        with torch.no_grad():
            factors = layers[i].B, layers[i].A
            return balance_factors_(*factors, "singular", 0.0, InThreads(i, places, barrier))[1]

    with ThreadPoolExecutor(count) as pool:
        done = list(pool.map(run, range(count)))
    assert all(d == done[0] for d in done)
    return torch.cat([x.B for x in layers]), torch.cat([x.A for x in layers], 1), done[0]


@pytest.mark.parametrize("count", [2, 5])  # in five, a shard has fewer than r rows and columns
@pytest.mark.parametrize("case", ["good", "unbalanced", "ill-conditioned", "deficient"])
def test_shards_are_refactorized_as_the_whole_is(case, count):
    B, A = random_factors(30, 20, 7, torch.float32)
    if case == "unbalanced":
        B, A = B * 1e-6, A * 1e6
    elif case == "ill-conditioned":  # too much so for Gram matrices: by triangles
        B = (B.double() * torch.logspace(0, -5, 7, dtype=torch.float64)).float()
    elif case == "deficient":
        B[:, -1] = 0
    whole = layer_of(B.clone(), A.clone())
    expected = refactorize_(whole)
    new_B, new_A, done = in_shards(B, A, count)
    assert done == ("rank_deficient" if case == "deficient" else "")
    assert bool(expected.rank_deficient) == (case == "deficient")
    assert relative(new_B @ new_A, B.double() @ A.double()) < 1e-6
    signs = (new_A * whole.A).sum(1).sign()
    assert relative(new_B * signs, whole.B) < 1e-4
    assert relative(signs[:, None] * new_A, whole.A) < 1e-4


@pytest.mark.parametrize("size", [1e-15, 1e15])
def test_the_size_of_the_factors_does_not_matter(size):
    B, A = (size * X.float() for X in random_factors(64, 48, 8))
    layer = layer_of(B, A)
    assert refactorize_(layer).changed == [""]
    assert_balanced(layer, B, A, 1e-6)


def test_a_second_refactorization_changes_nothing_but_rounding():
    layer = layer_of(*random_factors(64, 48, 8, torch.float32))
    refactorize_(layer)
    B, A = layer.B.detach().clone(), layer.A.detach().clone()
    refactorize_(layer)
    signs = (B * layer.B.detach()).sum(0).sign()
    assert relative(layer.B.detach() * signs, B) <= 1e-5
    assert relative(layer.A.detach() * signs[:, None], A) <= 1e-5


@pytest.mark.parametrize("alpha", [1.0, 32.0, -2.0])
def test_the_scale_in_front_and_the_outputs_stay(alpha):
    layer = layer_of(*random_factors(20, 30, 4, torch.float32), alpha=alpha)
    x = torch.randn(5, 30)
    before = layer(x)
    refactorize_(layer)
    assert layer.scale == alpha / 4
    assert relative(layer(x), before) <= 1e-5


def test_parameters_stay_the_same_objects_and_the_same_memory():
    layer = layer_of(*random_factors(20, 30, 4, torch.float32))
    parameters = {name: (p, p.data_ptr()) for name, p in layer.named_parameters()}
    refactorize_(layer)
    for name, (p, address) in parameters.items():
        assert getattr(layer, name) is p
        assert p.data_ptr() == address
        assert p.requires_grad
        assert p.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "n", "r"), [(64, 48, 4), (48, 64, 1), (40, 40, 8)])
def test_no_tensor_as_large_as_the_product_is_ever_made(m, n, r, dtype):
    layer = layer_of(*random_factors(m, n, r, dtype))
    with Recorder() as recorder:
        refactorize_(layer)
    assert 0 < recorder.largest <= max(m, n) * r < m * n
    with Recorder() as recorder:
        layer.dense_weight()
    assert recorder.largest == m * n  # the recorder sees products


def spoiled(kind, r=4, dtype=torch.float32):
    B, A = random_factors(20, 30, r, dtype)
    if kind == "B = 0":
        B.zero_()
    elif kind == "A = 0":
        A.zero_()
    elif kind == "both 0":
        B.zero_(), A.zero_()
    elif kind == "zero column":
        B[:, 1] = 0
    elif kind == "zero row":
        A[2] = 0
    else:  # two equal columns
        B[:, 1] = B[:, 0]
    return B, A


DEFICIENT = ["B = 0", "A = 0", "both 0", "zero column", "zero row", "equal columns"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", DEFICIENT)
def test_a_rank_deficient_layer_is_left_alone_and_named(kind, dtype):
    net = nn.Sequential()
    net.good = layer_of(*random_factors(20, 30, 4, dtype))
    net.bad = layer_of(*spoiled(kind, dtype=dtype))
    good, bad = (copy.deepcopy(layer.state_dict()) for layer in (net.good, net.bad))
    done = refactorize_(net)
    assert done.changed == ["good"]
    assert done.rank_deficient == ["bad"]
    assert all(torch.equal(bad[name], value) for name, value in net.bad.state_dict().items())
    assert not torch.equal(good["B"], net.good.B)


def test_a_rank_one_layer_of_zeros_is_named_as_deficient():
    layer = layer_of(torch.zeros(5, 1), torch.ones(1, 7))
    assert refactorize_(layer) == ([], [""], [])
    assert torch.equal(layer.A, torch.ones(1, 7))


def test_a_model_without_factors_is_left_alone():
    net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    before = copy.deepcopy(net.state_dict())
    assert refactorize_(net) == ([], [], [])
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_every_factorised_layer_of_a_model_is_changed_and_nothing_else():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(9, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 7)), nn.Linear(7, 3))
    factorize(net, rank=2, target=r"^(0|2\.0)$")
    before = copy.deepcopy(net.state_dict())
    assert refactorize_(net).changed == ["0", "2.0"]
    changed = {k for k, v in net.state_dict().items() if not torch.equal(before[k], v)}
    assert changed == {"0.A", "0.B", "2.0.A", "2.0.B"}


# Momentum reset

GAP = 5


def gradients(steps, seed=0, shape=(12, 8), dtype=torch.float32):
    chance = torch.Generator().manual_seed(seed)
    return [
        (1 + i % 3) * torch.randn(*shape, generator=chance, dtype=torch.float64).to(dtype)
        for i in range(steps)
    ]


def torch_adamw(parameters, **options):
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1, fused=True, **options)


def torch_adam(parameters, **options):
    return torch.optim.Adam(parameters, lr=0.01, **options)


def torch_radam(parameters, **options):
    return torch.optim.RAdam(parameters, lr=0.01, **options)


def plain(parameters, **options):
    return GaLore(parameters, lr=0.01, weight_decay=0.1, **options)


def galore(parameters, **options):
    keys = {"rank": 3, "update_proj_gap": GAP, "scale": 1.0}
    return GaLore([{"params": list(parameters), **keys}], lr=0.01, **options)


def fira(parameters, **options):
    return Fira(
        [{"params": list(parameters), "rank": 3, "update_proj_gap": GAP}], lr=0.01, **options
    )


OURS = [plain, galore, fira]
ALL = [torch_adamw, torch_adam, *OURS]


def advance(W, optimizer, grads):
    for G in grads:
        W.grad = G.clone()
        optimizer.step()


def trained(make, steps=2 * GAP, **options):
    W = nn.Parameter(torch.zeros(12, 8))
    optimizer = make([W], **options)
    advance(W, optimizer, gradients(steps))
    return W, optimizer


@pytest.mark.parametrize("make", ALL)
def test_a_reset_of_strength_one_equals_a_fresh_optimizer(make):
    W, optimizer = trained(make)
    assert reset_momentum_(optimizer) == 1
    fresh_W = nn.Parameter(W.detach().clone())
    fresh = make([fresh_W])
    for G in gradients(12, seed=1):
        advance(W, optimizer, [G])
        advance(fresh_W, fresh, [G])
        assert torch.equal(W, fresh_W)


@pytest.mark.parametrize("make", ALL)
def test_a_reset_of_strength_zero_changes_nothing(make):
    optimizer = trained(make)[1]
    before = copy.deepcopy(optimizer.state_dict()["state"][0])
    assert reset_momentum_(optimizer, 0.0) == 0
    after = optimizer.state_dict()["state"][0]
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(after[name])), name


def reference_adam(grads, resets, *, P=None, eps=1e-6, moments=BOTH_MOMENTS):
    """methods.md in float64: m, v and the weights of the averages, each times 1 − s at a reset.

    `resets` maps a step count to the strength of the reset after it; P projects from the right.
    """
    W, m, v, w1, w2 = torch.zeros(12, 8, dtype=torch.float64), 0.0, 0.0, 0.0, 0.0
    P = torch.eye(8, dtype=torch.float64) if P is None else P.double()
    for t, G in enumerate(grads, 1):
        R = G.double() @ P
        m, w1 = 0.9 * m + 0.1 * R, 0.9 * w1 + 0.1
        v, w2 = 0.999 * v + 0.001 * R**2, 0.999 * w2 + 0.001
        W = W - 0.01 * math.sqrt(w2) / w1 * m / (v.sqrt() + eps) @ P.T
        keep = 1 - resets.get(t, 0.0)
        if "exp_avg" in moments:
            m, w1 = keep * m, keep * w1
        if "exp_avg_sq" in moments:
            v, w2 = keep * v, keep * w2
    return W


@pytest.mark.parametrize("ranked", [False, True])
@pytest.mark.parametrize("moments", [BOTH_MOMENTS, ("exp_avg",), ("exp_avg_sq",)])
@pytest.mark.parametrize("strength", [0.1, 0.5, 0.9, 0.999, 1.0])
def test_partial_resets_follow_the_weights_of_averages(strength, moments, ranked):
    W, grads, P = nn.Parameter(torch.zeros(12, 8)), gradients(40), None
    group = {"rank": 3, "update_proj_gap": 100, "scale": 1.0} if ranked else {}
    optimizer = GaLore([{"params": [W], **group}], lr=0.01)
    for t, G in enumerate(grads, 1):
        advance(W, optimizer, [G])
        if t in (10, 25):
            assert reset_momentum_(optimizer, strength, moments) == 1
    if ranked:
        P = torch.linalg.svd(grads[0], full_matrices=False)[2][:3].T
    exact = reference_adam(grads, {10: strength, 25: strength}, P=P, moments=moments)
    assert relative(W.detach().double(), exact) <= 1e-5
    assert relative(exact, reference_adam(grads, {}, P=P)) > 1e-3  # the resets mattered


@pytest.mark.parametrize("make", OURS)
def test_resetting_one_moment_leaves_the_other_alone(make):
    W, optimizer = trained(make)
    before = copy.deepcopy(optimizer.state[W])
    reset_momentum_(optimizer, 0.25, moments=("exp_avg",))
    state = optimizer.state[W]
    assert torch.equal(state["exp_avg"], 0.75 * before["exp_avg"])
    assert state["exp_avg_weight"] == 0.75 * before["exp_avg_weight"]
    assert torch.equal(state["exp_avg_sq"], before["exp_avg_sq"])
    assert state["exp_avg_sq_weight"] == before["exp_avg_sq_weight"]


@pytest.mark.parametrize("make", [torch_adamw, torch_adam, torch_radam])
@pytest.mark.parametrize("strength", [0.01, 0.5, 0.99])
@pytest.mark.parametrize("steps", [1, 10, 300])
def test_torch_s_step_count_is_mapped_as_the_docstring_says(make, strength, steps):
    W, optimizer = trained(make, steps)
    before = copy.deepcopy(optimizer.state[W])
    reset_momentum_(optimizer, strength)
    state, t, keep = optimizer.state[W], float(before["step"]), 1 - strength
    new_t = float(state["step"])
    assert 1 - 0.999**new_t == pytest.approx(keep * (1 - 0.999**t), rel=1e-4)
    assert relative(state["exp_avg_sq"], keep * before["exp_avg_sq"]) <= 1e-6
    corrected = before["exp_avg"] / (1 - 0.9**t)
    assert relative(state["exp_avg"] / (1 - 0.9**new_t), corrected) <= 1e-5
    advance(W, optimizer, gradients(3, seed=1))
    assert W.isfinite().all()
    assert float(state["step"]) == pytest.approx(new_t + 3)


@pytest.mark.parametrize("make", [torch_adamw, torch_adam])
@pytest.mark.parametrize("moments", [("exp_avg",), ("exp_avg_sq",)])
def test_torch_s_optimizers_refuse_to_reset_one_moment_alone(make, moments):
    W, optimizer = trained(make)
    before = copy.deepcopy(optimizer.state[W])
    with pytest.raises(ValueError, match=r"^moments: "):
        reset_momentum_(optimizer, 0.5, moments=moments)
    assert all(torch.equal(value, optimizer.state[W][name]) for name, value in before.items())


@pytest.mark.parametrize("make", ALL)
def test_only_the_chosen_parameters_are_reset(make):
    chosen, other, idle = (nn.Parameter(torch.zeros(12, 8)) for _ in range(3))
    optimizer = make([chosen, other, idle])
    for G in gradients(3):
        chosen.grad, other.grad = G.clone(), G.clone()
        optimizer.step()
    before = copy.deepcopy(optimizer.state[other])
    assert reset_momentum_(optimizer, params=[chosen, idle]) == 1  # idle has no moments yet
    assert not optimizer.state[chosen]["exp_avg"].any()
    assert not optimizer.state[chosen]["exp_avg_sq"].any()
    for name in BOTH_MOMENTS:
        assert torch.equal(optimizer.state[other][name], before[name])
    assert optimizer.state[other]["step"] == before["step"]
    assert reset_momentum_(optimizer, params=[]) == 0
    assert reset_momentum_(optimizer, params=iter([other])) == 1


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_after_a_reset_the_very_tensors_of_the_state_go_on(make, strength):
    W, optimizer = trained(make)
    held = {name: optimizer.state[W][name] for name in BOTH_MOMENTS}
    reset_momentum_(optimizer, strength)
    after_reset = {name: value.clone() for name, value in held.items()}
    advance(W, optimizer, gradients(1, seed=1))
    for name, value in held.items():
        assert optimizer.state[W][name] is value
        assert not torch.equal(value, after_reset[name])


@pytest.mark.parametrize("make", ALL)
def test_a_full_reset_clears_nan_and_inf(make):
    W, optimizer = trained(make)
    optimizer.state[W]["exp_avg"].fill_(float("nan"))
    optimizer.state[W]["exp_avg_sq"].fill_(float("inf"))
    reset_momentum_(optimizer)
    advance(W, optimizer, gradients(2, seed=1))
    assert W.isfinite().all()
    assert all(optimizer.state[W][name].isfinite().all() for name in BOTH_MOMENTS)


@pytest.mark.parametrize("make", [galore, fira])
def test_a_reset_leaves_projections_and_their_schedule_alone(make):
    W, optimizer = trained(make, steps=GAP + 2)
    before = copy.deepcopy(optimizer.state[W])
    reset_momentum_(optimizer)
    assert torch.equal(optimizer.state[W]["projection_right"], before["projection_right"])
    assert optimizer.state[W]["step"] == before["step"]


@pytest.mark.parametrize("make", ALL)
def test_an_optimizer_that_has_not_stepped_yet_can_be_reset(make):
    W = nn.Parameter(torch.zeros(12, 8))
    optimizer = make([W])
    assert reset_momentum_(optimizer) == 0
    advance(W, optimizer, gradients(1))
    assert W.isfinite().all()


def test_two_resets_of_one_half_equal_one_of_three_quarters():
    (W, optimizer), (other_W, other) = trained(galore), trained(galore)
    reset_momentum_(optimizer, 0.5)
    reset_momentum_(optimizer, 0.5)
    reset_momentum_(other, 0.75)
    advance(W, optimizer, gradients(12, seed=1))
    advance(other_W, other, gradients(12, seed=1))
    assert torch.equal(W, other_W)


@pytest.mark.parametrize("make", [torch_adamw, plain])
@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan"), float("inf")])
def test_a_strength_outside_zero_to_one_is_refused(make, strength):
    with pytest.raises(ValueError, match=r"^strength: "):
        reset_momentum_(trained(make, 1)[1], strength)


@pytest.mark.parametrize("moments", [(), ("exp_avg", "momentum"), ("step",), "exp_avg"])
def test_unknown_moments_are_refused(moments):
    with pytest.raises(ValueError, match=r"^moments: "):
        reset_momentum_(trained(plain, 1)[1], moments=moments)


def test_amsgrad_s_maximum_is_part_of_a_full_reset():
    def make(parameters):
        return torch_adamw(parameters, amsgrad=True)

    W, optimizer = trained(make)
    reset_momentum_(optimizer)
    fresh_W = nn.Parameter(W.detach().clone())
    advance(W, optimizer, gradients(5, seed=1))
    advance(fresh_W, make([fresh_W]), gradients(5, seed=1))
    assert torch.equal(W, fresh_W)


def test_a_state_saved_right_after_a_reset_loads_and_goes_on_as_a_fresh_optimizer():
    def made():
        W = nn.Parameter(torch.eye(6)[:, :4].clone())
        return W, Fira([{"params": [W], "rank": 2, "update_proj_gap": 1}], lr=0.1)

    (W, saved), (V, loaded), (U, fresh) = made(), made(), made()
    W.grad = torch.ones(6, 4)
    saved.step()
    reset_momentum_(saved)
    loaded.load_state_dict(saved.state_dict())
    for p, optimizer in ((V, loaded), (U, fresh)):
        p.grad = torch.arange(24.0).view(6, 4).sin() * 1e3  # the growth limiter would act
        optimizer.step()
    assert torch.equal(V, U)
