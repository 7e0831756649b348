"""GaLore and Fira: in which subspaces they move weights, and how these are found."""

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
    gradients,
    is_left,
    is_right,
    relative,
    start,
)
from torch import nn

from lowrank_lab.optim import Fira, GaLore
from lowrank_lab.optim.projecting import project, project_back_add_
from lowrank_lab.optim.subspaces import (
    gram_subspaces,
    leading_subspaces,
    randomized_subspaces,
    sides,
)

STRENGTH = {GaLore: "scale", Fira: "alpha"}  # what multiplies the step inside the subspace

both = pytest.mark.parametrize("method", [GaLore, Fira])
refreshes = pytest.mark.parametrize("refresh", ["svd", "subspace", "randomized", "gram"])
precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def made(method, shape, rank, *, dtype=torch.float32, weight_decay=0.0, **keys):
    """An optimizer of one ranked matrix and, in a plain group, one vector."""
    W, b = (nn.Parameter(x) for x in start(shape, dtype))
    keys = {"update_proj_gap": GAP, "proj_type": "std", STRENGTH.get(method, "alpha"): 1.0} | keys
    groups = [{"params": [W], "rank": rank, **keys}, {"params": [b]}]
    return W, b, method(groups, lr=LR, weight_decay=weight_decay, no_deprecation_warning=True)


# Behaviour


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


# Saving and continuing


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
