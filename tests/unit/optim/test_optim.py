"""GaLore and Fira: against the published packages, their equations in float64, and ugly input."""

import copy
import io
import itertools

import pytest
import torch
from fira import FiraAdamW
from galore_torch import GaLoreAdamW
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
    is_right,
    readable,
    relative,
    start,
)
from torch import nn
from torch._subclasses import FakeTensorMode

from lowrank_lab.optim import Fira, GaLore
from lowrank_lab.optim.projection import project, project_back_add_, sides
from lowrank_lab.optim.subspaces import gram_subspaces, leading_subspaces, randomized_subspaces

PACKAGE = {GaLore: GaLoreAdamW, Fira: FiraAdamW}
STRENGTH = {GaLore: "scale", Fira: "alpha"}  # what multiplies the step inside the subspace

both = pytest.mark.parametrize("method", [GaLore, Fira])
refreshes = pytest.mark.parametrize("refresh", ["svd", "randomized", "gram"])
precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def made(method, shape, rank, *, dtype=torch.float32, weight_decay=0.0, **keys):
    """An optimizer of one ranked matrix and, in a plain group, one vector."""
    W, b = (nn.Parameter(x) for x in start(shape, dtype))
    keys = {"update_proj_gap": GAP, "proj_type": "std", STRENGTH.get(method, "alpha"): 1.0} | keys
    groups = [{"params": [W], "rank": rank, **keys}, {"params": [b]}]
    return W, b, method(groups, lr=LR, weight_decay=weight_decay, no_deprecation_warning=True)


def trained(method, shape, rank, *, dtype=torch.float32, **options):
    """The matrix and the vector after STEPS steps."""
    W, b, optimizer = made(method, shape, rank, dtype=dtype, **options)
    advance(W, b, optimizer, gradients(shape, dtype=dtype))
    return W.detach().double(), b.detach().double()


def published(method, shape, rank, **options):
    """The same by the package."""
    if method is GaLore:
        options.setdefault("scale", 1.0)
    return trained(PACKAGE[method], shape, rank, **options)


def by_equations(
    method, shape, rank, proj_type="std", strength=1.0, dtype=torch.float32, weight_decay=0.0
):
    """The matrix after STEPS steps of 2403.03507 or 2410.01623 in float64; only P is float32's."""
    W, m, v, previous = start(shape, dtype)[0].double(), 0.0, 0.0, None
    for t, G in enumerate(gradients(shape, dtype=dtype), 1):
        if t % GAP == 1:
            U, _, Vh = torch.linalg.svd(G.float(), full_matrices=False)
            eye = [torch.eye(side, dtype=torch.float64) for side in shape]
            L = U[:, :rank].to(dtype).double() if is_left(proj_type, shape) else eye[0]
            Rt = Vh[:rank].to(dtype).double() if is_right(proj_type, shape) else eye[1]
        G = G.double()
        R = L.T @ G @ Rt.T
        m, v = 0.9 * m + 0.1 * R, 0.999 * v + 0.001 * R**2
        N = m / (v.sqrt() + 1e-6)
        update = strength * L @ N @ Rt
        if method is Fira:
            axis = 0 if is_left(proj_type, shape) else 1
            S = (G - strength * L @ R @ Rt) * N.norm(dim=axis, keepdim=True)
            S /= R.norm(dim=axis, keepdim=True) + 1e-8
            if previous is not None:
                S /= max(S.norm() / (previous + 1e-8), 1.01) / 1.01
            update, previous = update + S, S.norm()
        W = W - LR * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t) * update
        W = W - LR * weight_decay * W
    return W


def package_is_right(method, shape, rank, proj_type):
    """The packages guess the side from the projected shape, and miss where that is square."""
    if method is Fira and is_left(proj_type, shape) and rank == shape[1]:
        return False
    return (shape, rank, proj_type) != (WIDE, min(WIDE), "reverse_std")


def matrix_cases():
    for method, shape in itertools.product((GaLore, Fira), (SQUARE, TALL, WIDE)):
        for rank in (1, 4, min(shape)):
            for proj_type in (*ONE_SIDED, "full") if method is GaLore else ONE_SIDED:
                yield method, shape, rank, proj_type


# Equality


@pytest.mark.parametrize(
    ("method", "shape", "rank", "proj_type"),
    [c for c in matrix_cases() if package_is_right(*c)],
    ids=readable,
)
def test_the_update_equals_the_published_package(method, shape, rank, proj_type):
    W, b = trained(method, shape, rank, proj_type=proj_type)
    their_W, their_b = published(method, shape, rank, proj_type=proj_type)
    assert error_of_update(W, their_W, shape) <= 1e-5
    assert relative(b, their_b) <= 1e-6


# Not `full`: at a refresh its off-diagonal entries are rounding noise, which Adam blows up.
@pytest.mark.parametrize(
    ("method", "shape", "rank", "proj_type"),
    [c for c in matrix_cases() if c[3] != "full"],
    ids=readable,
)
def test_the_update_follows_the_equations_in_float64(method, shape, rank, proj_type):
    W, _ = trained(method, shape, rank, proj_type=proj_type)
    assert error_of_update(W, by_equations(method, shape, rank, proj_type), shape) <= 1e-5


@pytest.mark.parametrize("shape", [SQUARE, TALL, WIDE])
@pytest.mark.parametrize(
    ("method", "strength"), [(GaLore, 0.25), (GaLore, 2.0), (Fira, 0.5), (Fira, 2.0), (Fira, 3.0)]
)
def test_scale_and_alpha_mean_what_they_mean_in_the_package(method, strength, shape):
    options = {STRENGTH[method]: strength}
    W, _ = trained(method, shape, 4, **options)
    assert error_of_update(W, published(method, shape, 4, **options)[0], shape) <= 1e-5
    assert error_of_update(W, by_equations(method, shape, 4, strength=strength), shape) <= 1e-5


@both
@pytest.mark.parametrize("shape", [SQUARE, TALL, WIDE])
@pytest.mark.parametrize("rank", [1, 4, 10])
def test_weight_decay_equals_the_published_package(method, shape, rank):
    W, b = trained(method, shape, rank, weight_decay=0.1)
    their_W, their_b = published(method, shape, rank, weight_decay=0.1)
    assert error_of_update(W, their_W, shape) <= 1e-5
    assert relative(b, their_b) <= 1e-6
    exact = by_equations(method, shape, rank, weight_decay=0.1)
    assert error_of_update(W, exact, shape) <= 1e-5
    assert relative(trained(method, shape, rank)[0], W) > 0.003  # decay did something


@both
@pytest.mark.parametrize("shape", [SQUARE, TALL, WIDE])
@pytest.mark.parametrize("rank", [1, 4, 10])
def test_bfloat16_strays_no_further_from_the_equations_than_the_package(method, shape, rank):
    half = {"dtype": torch.bfloat16}
    W, b = trained(method, shape, rank, **half)
    their_W, their_b = published(method, shape, rank, **half)
    exact = by_equations(method, shape, rank, **half)
    theirs = error_of_update(their_W, exact, shape, **half)
    # Fira adds its two parts to W one after the other: two roundings where the package has one.
    assert error_of_update(W, exact, shape, **half) <= (2 if method is Fira else 1.2) * theirs
    assert relative(b, their_b) <= 2**-7


@both
def test_a_schedule_and_uncorrected_bias_equal_the_published_package(method):
    results = []
    for cls in (method, PACKAGE[method]):
        W, b, optimizer = made(cls, TALL, 4, **{STRENGTH[method]: 1.0})
        for i, G in enumerate(gradients(TALL)):
            for group in optimizer.param_groups:
                group.update(lr=LR * (1 - i / STEPS), correct_bias=i < 20)
            advance(W, b, optimizer, [G])
        results.append((W.detach().double(), b.detach().double()))
    (W, b), (their_W, their_b) = results
    assert error_of_update(W, their_W, TALL) <= 1e-5
    assert relative(b, their_b) <= 1e-6


@both
def test_a_parameter_that_joins_late_equals_the_published_package(method):
    results = []
    for cls in (method, PACKAGE[method]):
        W, b, optimizer = made(cls, TALL, 4, **{STRENGTH[method]: 1.0})
        for i, G in enumerate(gradients(TALL)):
            W.grad, b.grad = (G.clone() if i >= 13 else None), (G.sum(1) if i % 5 else None)
            optimizer.step()
        results.append((W.detach().double(), b.detach().double()))
    (W, b), (their_W, their_b) = results
    assert error_of_update(W, their_W, TALL) <= 1e-5
    assert relative(b, their_b) <= 1e-6


# Behaviour


@both
@refreshes
def test_equal_runs_are_equal_bit_for_bit(method, refresh):
    first = trained(method, TALL, 4, refresh=refresh)
    torch.manual_seed(17)  # the global generator has no say
    second = trained(method, TALL, 4, refresh=refresh)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@both
@refreshes
@pytest.mark.parametrize("shape", [TALL, WIDE])
def test_low_rank_regression_converges(method, refresh, shape):
    chance = torch.Generator().manual_seed(3)
    m, n = shape
    solution = torch.randn(m, 3, generator=chance) @ torch.randn(3, n, generator=chance)
    X = torch.randn(50, max(shape), generator=chance)
    W = nn.Parameter(torch.zeros(m, n))
    keys = {"rank": 3, "update_proj_gap": 20, "refresh": refresh, STRENGTH[method]: 1.0}
    optimizer = method([{"params": [W], **keys}])
    losses = []
    for i in range(400):
        optimizer.param_groups[0]["lr"] = 0.3 * (1 - i / 400)
        error = W - solution
        loss = (X @ (error if m > n else error.T)).square().mean()
        (W.grad,) = torch.autograd.grad(loss, W)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 1e-6 * losses[0]


@refreshes
@pytest.mark.parametrize("proj_type", [*ONE_SIDED, "full"])
@pytest.mark.parametrize("shape", [SQUARE, TALL, WIDE])
def test_galore_moves_weights_only_inside_its_subspace(shape, proj_type, refresh):
    W, b, optimizer = made(GaLore, shape, 3, proj_type=proj_type, refresh=refresh)
    W0 = W.detach().clone()
    advance(W, b, optimizer, gradients(shape, 7))
    state, moved = optimizer.state[W], W.detach() - W0
    L, R = state.get("projection_left"), state.get("projection_right")
    assert (L is not None, R is not None) == (is_left(proj_type, shape), is_right(proj_type, shape))
    inside = moved if L is None else L @ (L.T @ moved)
    inside = inside if R is None else inside @ R @ R.T
    assert relative(inside, moved) <= 1e-5
    assert torch.linalg.matrix_rank(moved, rtol=1e-4) <= 3


@pytest.mark.parametrize("shape", [SQUARE, TALL, WIDE])
def test_fira_moves_weights_outside_its_subspace_too(shape):
    W, b, optimizer = made(Fira, shape, 3)
    W0 = W.detach().clone()
    advance(W, b, optimizer, gradients(shape, 7))
    moved = W.detach() - W0
    L = optimizer.state[W].get("projection_left")
    R = optimizer.state[W].get("projection_right")
    inside = L @ (L.T @ moved) if R is None else moved @ R @ R.T
    assert (moved - inside).norm() > 0.01 * moved.norm()
    assert torch.linalg.matrix_rank(moved, rtol=1e-4) == min(shape)


def test_fira_lets_the_residual_grow_by_one_percent_a_step_at_most():
    W, b, optimizer = made(Fira, TALL, 3)
    norms = []
    for i, G in enumerate(gradients(TALL)):
        advance(W, b, optimizer, [G * 3.0**i])
        norms.append(float(optimizer.state[W]["residual_norm"]))
    growth = [after / before for before, after in itertools.pairwise(norms)]
    assert max(growth) == pytest.approx(1.01, rel=1e-5)


@both
@refreshes
@precisions
@pytest.mark.parametrize("rank", [1, 10])
def test_zero_gradients_leave_finite_weights_and_states_of_final_shape(
    method, refresh, dtype, rank
):
    W, b, optimizer = made(method, TALL, rank, dtype=dtype, refresh=refresh)
    W0, b0 = W.detach().clone(), b.detach().clone()
    advance(W, b, optimizer, [torch.zeros(TALL, dtype=dtype)])
    shapes = {k: v.shape for k, v in optimizer.state[W].items() if isinstance(v, torch.Tensor)}
    assert torch.equal(W, W0)
    assert torch.equal(b, b0)
    some = gradients(TALL, 4, dtype)
    advance(W, b, optimizer, [*some, torch.zeros(TALL, dtype=dtype)] * 3)
    assert W.isfinite().all()
    assert b.isfinite().all()
    assert not torch.equal(W, W0)
    state = optimizer.state[W].items()
    assert {k: v.shape for k, v in state if isinstance(v, torch.Tensor)} == shapes


@both
def test_a_parameter_without_gradient_is_left_alone(method):
    W, b, optimizer = made(method, TALL, 4, weight_decay=0.1)
    W0, b0 = W.detach().clone(), b.detach().clone()
    optimizer.step()
    assert torch.equal(W, W0)
    assert torch.equal(b, b0)
    assert not optimizer.state[W]


@both
def test_an_empty_parameter_is_no_obstacle(method):
    empty, W = nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.ones(2, 3))
    empty.grad, W.grad = torch.zeros(0, 3), torch.ones(2, 3)
    method([empty, W], lr=0.1).step()
    assert (W < 1).all()


@both
def test_the_closure_is_evaluated_with_gradients_and_its_loss_returned(method):
    W, _, optimizer = made(method, TALL, 4)

    def closure():
        loss = W.square().sum()
        (W.grad,) = torch.autograd.grad(loss, W)
        return loss

    before = float(W.detach().square().sum())
    assert optimizer.step(closure).item() == pytest.approx(before)
    assert float(W.detach().square().sum()) < before


@both
def test_any_module_trains_by_real_backward_passes(method):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Embedding(7, 6), nn.Conv1d(5, 4, 1), nn.Flatten(), nn.Linear(24, 9), nn.LayerNorm(9)
    )
    ranked = [net[0].weight, net[3].weight]
    rest = [p for p in net.parameters() if all(p is not q for q in ranked)]
    optimizer = method(
        [{"params": ranked, "rank": 2, "update_proj_gap": 5}, {"params": rest}], lr=0.02
    )
    tokens, targets = torch.randint(7, (9, 5)), torch.arange(9)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(tokens), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@both
@refreshes
def test_a_step_runs_on_fake_tensors_across_a_refresh(method, refresh):
    with FakeTensorMode():
        W, b, optimizer = made(
            method, TALL, 4, update_proj_gap=2, refresh=refresh, weight_decay=0.1
        )
        advance(W, b, optimizer, [torch.randn(TALL) for _ in range(5)])
        fake = {k: v.shape for k, v in optimizer.state[W].items() if isinstance(v, torch.Tensor)}
    W, b, optimizer = made(method, TALL, 4, refresh=refresh)
    advance(W, b, optimizer, gradients(TALL, 1))
    real = {k: v.shape for k, v in optimizer.state[W].items() if isinstance(v, torch.Tensor)}
    assert fake == real


@both
@pytest.mark.parametrize("rank", [1, 4, 10])
@pytest.mark.parametrize("shape", [SQUARE, TALL, WIDE])
@pytest.mark.parametrize("proj_type", ["std", "reverse_std"])
def test_states_hold_no_more_memory_than_their_elements(method, proj_type, shape, rank):
    W, b, optimizer = made(method, shape, rank, proj_type=proj_type)
    advance(W, b, optimizer, gradients(shape, 1))
    for name, value in optimizer.state[W].items():
        if isinstance(value, torch.Tensor):
            held = value.untyped_storage().nbytes()
            assert held == value.numel() * value.element_size(), name


# Saving and continuing


@both
@refreshes
@precisions
@pytest.mark.parametrize("shape", [TALL, WIDE])
def test_a_fresh_instance_continues_bit_for_bit(method, shape, dtype, refresh):
    grads = growing(shape, dtype)
    W, b, optimizer = made(method, shape, 4, dtype=dtype, refresh=refresh)
    advance(W, b, optimizer, grads[:7])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    new_W, new_b, fresh = made(method, shape, 4, dtype=dtype, refresh=refresh)
    new_W.data.copy_(W.data)
    new_b.data.copy_(b.data)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert_equal_states(optimizer.state[W], fresh.state[new_W])
    advance(W, b, optimizer, grads[7:])
    advance(new_W, new_b, fresh, grads[7:])
    assert torch.equal(W, new_W)
    assert torch.equal(b, new_b)
    assert_equal_states(optimizer.state[W], fresh.state[new_W])


@both
@precisions
def test_the_same_instance_goes_back_bit_for_bit(method, dtype):
    grads = growing(TALL, dtype)
    W, b, optimizer = made(method, TALL, 4, dtype=dtype)
    advance(W, b, optimizer, grads[:7])
    saved = copy.deepcopy((W.data, b.data, optimizer.state_dict()))
    advance(W, b, optimizer, grads[7:])
    end, state = W.detach().clone(), copy.deepcopy(optimizer.state[W])
    W.data.copy_(saved[0])
    b.data.copy_(saved[1])
    optimizer.load_state_dict(saved[2])
    advance(W, b, optimizer, grads[7:])
    assert torch.equal(W, end)
    assert_equal_states(optimizer.state[W], state)


@both
@pytest.mark.parametrize(("shape", "side"), [(TALL, "right"), (WIDE, "left")])
def test_the_state_dict_keeps_the_projection(method, shape, side):
    W, b, optimizer = made(method, shape, 4)
    advance(W, b, optimizer, gradients(shape, 3))
    stored = optimizer.state_dict()["state"][0]
    assert [name for name in stored if name.startswith("projection")] == [f"projection_{side}"]
    assert stored[f"projection_{side}"].shape == (10, 4)


# Projections


@precisions
@pytest.mark.parametrize("proj_type", [*ONE_SIDED, "full"])
@pytest.mark.parametrize("shape", [SQUARE, TALL, WIDE, (1, 7), (7, 1)])
def test_at_full_rank_projecting_and_lifting_gives_the_gradient_back(shape, proj_type, dtype):
    G = gradients(shape, 1, dtype)[0]
    left, right = leading_subspaces(G, min(shape), sides(proj_type, shape))
    left, right = (None if P is None else P.to(dtype) for P in (left, right))
    back = project_back_add_(torch.zeros_like(G), project(G, left, right), left, right, alpha=1.0)
    assert relative(back.double(), G.double()) <= (1e-6 if dtype == torch.float32 else 2**-6)


def decaying(spectrum, m, n):
    chance = torch.Generator().manual_seed(5)
    k = min(m, n)
    U = torch.linalg.qr(torch.randn(m, k, generator=chance))[0]
    V = torch.linalg.qr(torch.randn(n, k, generator=chance))[0]
    i = torch.arange(1, k + 1)
    S = {"slow": i**-0.5, "power": 1.0 / i, "fast": 0.8**i, "rank 3": (i <= 3) / i}[spectrum]
    return (U * S) @ V.T


spectra = pytest.mark.parametrize("spectrum", ["slow", "power", "fast", "rank 3"])
sizes = pytest.mark.parametrize(("m", "n", "rank"), [(64, 48, 8), (48, 96, 1), (32, 80, 32)])


@spectra
@sizes
def test_the_randomized_refresh_captures_the_energy_of_the_exact_one(spectrum, m, n, rank):
    G = decaying(spectrum, m, n)
    exact_left, exact_right = leading_subspaces(G, rank, (True, True))
    left, right = randomized_subspaces(G, rank, (True, True))
    assert (left.T @ G).square().sum() >= 0.98 * (exact_left.T @ G).square().sum()
    assert (G @ right).square().sum() >= 0.98 * (G @ exact_right).square().sum()


@spectra
@sizes
def test_randomized_projections_are_orthonormal_and_ordered(spectrum, m, n, rank):
    G = decaying(spectrum, m, n)
    left, right = randomized_subspaces(G, rank, (True, True))
    for P, R in ((left, left.T @ G), (right, (G @ right).T)):
        assert torch.allclose(P.T @ P, torch.eye(rank), atol=1e-5)
        energies = R.square().sum(1)
        assert (energies.diff() <= 1e-6 * energies[0]).all()
        off_diagonal = R @ R.T - energies.diag()
        assert off_diagonal.abs().max() <= 1e-5 * energies[0]


@sizes
def test_randomized_projections_keep_the_signs_of_the_old_ones(m, n, rank):
    G = decaying("fast", m, n)
    old = randomized_subspaces(G, rank, (True, True), seed=1)
    flips = torch.where(torch.arange(rank) % 2 == 0, -1.0, 1.0)
    for signs in (flips, -flips):
        before = tuple(P * signs for P in old)
        after = randomized_subspaces(G, rank, (True, True), seed=2, old=before)
        for P, P_old in zip(after, before, strict=True):
            agreement = (P * P_old).sum(0)
            assert (agreement >= 0).all()
            assert agreement[0] > 0.99


def test_the_randomized_refresh_is_deterministic_and_leaves_the_global_generator_alone():
    G = decaying("power", 64, 48)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = randomized_subspaces(G, 8, (True, True), seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = randomized_subspaces(G, 8, (True, True), seed=4)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], randomized_subspaces(G, 8, (True, True), seed=5)[0])


@sizes
@spectra
def test_the_eigenvectors_of_gram_matrices_are_the_exact_singular_vectors(spectrum, m, n, rank):
    G = decaying(spectrum, m, n)
    rank = min(rank, 3) if spectrum == "rank 3" else rank
    pairs = zip(
        gram_subspaces(G, rank, (True, True)),
        leading_subspaces(G, rank, (True, True)),
        strict=True,
    )
    for ours, exact in pairs:
        assert ours.dtype == torch.float32
        assert ours.is_contiguous()
        assert torch.allclose(ours @ ours.T, exact @ exact.T, atol=1e-4)  # the subspace
        assert torch.allclose((ours * exact).sum(0).abs(), torch.ones(rank), atol=1e-3)  # ordered


def test_gram_matrices_find_singular_vectors_far_below_the_rounding_of_their_squares():
    U, V = (torch.linalg.qr(torch.randn(40, 3))[0] for _ in range(2))
    G = (U * torch.tensor([1.0, 1e-3, 1e-5])) @ V.T  # 1e-10 once squared
    left, right = gram_subspaces(G, 3, (True, True))
    assert torch.allclose((left * U).sum(0).abs(), torch.ones(3), atol=1e-3)
    assert torch.allclose((right * V).sum(0).abs(), torch.ones(3), atol=1e-3)


@sizes
def test_eigenvectors_keep_the_signs_of_the_old_projections(m, n, rank):
    G = decaying("fast", m, n)
    old = gram_subspaces(G, rank, (True, True))
    for signs in (1, -1):
        before = tuple(signs * P for P in old)
        after = gram_subspaces(G, rank, (True, True), old=before)
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@both
def test_a_projection_changes_only_at_its_refresh(method):
    W, b, optimizer = made(method, TALL, 4)
    seen = []
    for G in gradients(TALL, 21):
        advance(W, b, optimizer, [G])
        seen.append(optimizer.state[W]["projection_right"].clone())
    changes = [i for i in range(1, 21) if not torch.equal(seen[i - 1], seen[i])]
    assert changes == [10, 20]


# Refusals

MATRIX = (6, 4)
REFUSED = [
    (GaLore, MATRIX, {"proj_type": "diagonal"}, "proj_type: 'diagonal'"),
    (Fira, MATRIX, {"proj_type": "full"}, "proj_type: 'full'"),
    (GaLore, MATRIX, {"refresh": "qr"}, "refresh: 'qr'"),
    (GaLore, MATRIX, {"rank": 0}, "rank: 0"),
    (Fira, MATRIX, {"rank": -1}, "rank: -1"),
    (GaLore, MATRIX, {"rank": 2.0}, "rank: 2.0"),
    (GaLore, MATRIX, {"rank": None}, "rank: None"),
    (GaLore, MATRIX, {"rank": 5}, "rank: 5"),
    (Fira, (4, 6), {"rank": 5}, "rank: 5"),
    (GaLore, (6,), {}, "rank: 2"),
    (Fira, (4, 4, 3), {}, "rank: 2"),
    (GaLore, MATRIX, {"update_proj_gap": 0}, "update_proj_gap: 0"),
    (Fira, MATRIX, {"update_proj_gap": 0.5}, "update_proj_gap: 0.5"),
]


@pytest.mark.parametrize(("method", "shape", "keys", "message"), REFUSED)
def test_a_bad_ranked_group_is_refused_in_one_line_and_changes_nothing(
    method, shape, keys, message
):
    optimizer = method([nn.Parameter(torch.zeros(3))])
    with pytest.raises(ValueError, match=f"^{message}") as refusal:
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(shape))], "rank": 2, **keys})
    assert "\n" not in str(refusal.value)
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("method", "key"), [(GaLore, "alpha"), (Fira, "scale"), (GaLore, "update_proj_gpa")]
)
def test_an_unknown_key_of_a_ranked_group_is_refused(method, key):
    group = {"params": [nn.Parameter(torch.zeros(MATRIX))], "rank": 2, key: 1}
    with pytest.raises(ValueError, match=key):
        method([group])


@both
@pytest.mark.parametrize(
    "options", [{"lr": -1.0}, {"betas": (1.0, 0.9)}, {"eps": -1e-9}, {"weight_decay": -0.1}]
)
def test_a_bad_hyperparameter_is_refused(method, options):
    (name,) = options
    with pytest.raises(ValueError, match=f"^{name}: "):
        method([nn.Parameter(torch.zeros(3))], **options)


@both
def test_sparse_gradients_are_refused(method):
    table = nn.Embedding(5, 4, sparse=True)
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        method(table.parameters()).step()
