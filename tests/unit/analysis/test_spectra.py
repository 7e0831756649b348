"""Singular values against float64, and the ranks they summarise to."""

import copy
import math

import pytest
import torch
from torch import nn

from lowrank_lab import RunConfig, factorize, refactorize_, reset_momentum_, train
from lowrank_lab.analysis.spectra import (
    captured_energy,
    effective_rank,
    energy_in_top,
    factor_health,
    gradient_singular_values,
    low_rank_shares,
    singular_values,
    stable_rank,
    subspace_overlap,
    update_singular_values,
)
from lowrank_lab.analysis.spectra_recorder import SpectraRecorder
from lowrank_lab.config import TARGETS
from lowrank_lab.layers import LowRankLinear
from lowrank_lab.methods.build import build
from lowrank_lab.methods.resolve import resolve

SHAPES = [(7, 7), (9, 4), (4, 9), (1, 6), (6, 1)]
both_ranks = pytest.mark.parametrize("rank_of", [effective_rank, stable_rank])


def dense(W):
    layer = nn.Linear(W.shape[1], W.shape[0], bias=False, dtype=W.dtype)
    layer.weight.data.copy_(W)
    return layer


def random(m, n, seed=0):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_spectrum(values, W, tolerance=1e-6):
    """The leading singular values of W, descending, by a full SVD in float64."""
    exact = torch.linalg.svdvals(W.detach().double())[: len(values)]
    assert values.dtype == torch.float32
    assert not values.requires_grad
    assert (values.double() - exact).abs().max() <= tolerance * exact[0] + 1e-30
    assert (values.diff() <= 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_a_dense_layer_has_the_singular_values_of_its_weight(m, n, dtype):
    layer = dense(random(m, n).to(dtype))
    values = singular_values(layer)
    assert len(values) == min(m, n)
    assert_spectrum(values, layer.weight)


@pytest.mark.parametrize("alpha", [None, 1.0, -3.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("m", "n", "rank"), [(9, 4, 1), (9, 4, 4), (4, 9, 3), (7, 7, 7), (1, 6, 1)]
)
def test_a_factorised_layer_has_those_of_its_product_scale_included(m, n, rank, dtype, alpha):
    layer = LowRankLinear(dense(random(m, n).to(dtype)), rank, alpha=alpha)
    values = singular_values(layer)
    assert len(values) == rank
    assert_spectrum(values, layer.scale * layer.B.double() @ layer.A.double())


DEGENERATE = {
    "zero": torch.zeros(6, 4),
    "rank one": torch.ones(6, 4),
    "repeated": 2 * torch.eye(6, 4),
    "a zero column": random(6, 4).float() * torch.tensor([1.0, 0.0, 1.0, 1.0]),
    "steep": torch.logspace(0, -12, 4).diag(),
}


@pytest.mark.parametrize("kind", DEGENERATE)
def test_degenerate_weights_have_exact_spectra_too(kind):
    W = DEGENERATE[kind]
    assert_spectrum(singular_values(dense(W)), W)
    layer = LowRankLinear(dense(W), 4, alpha=4)
    layer.B.data.copy_(W)
    layer.A.data.copy_(torch.eye(4))
    assert_spectrum(singular_values(layer), W)


def test_a_row_for_each_layer_that_matches():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 3))
    factorize(net, rank=2, target="^2$")
    optimizer = torch.optim.Adam(net.parameters())
    rows = SpectraRecorder(net, optimizer, "^[02]$").rows(7)
    assert [(row["step"], row["layer"]) for row in rows] == [(7, "0"), (7, "2")]
    assert rows[0]["singular_values"] == pytest.approx(singular_values(net[0]).tolist(), rel=1e-6)
    assert [len(row["singular_values"]) for row in rows] == [4, 2]
    assert max(rows[0]["update"]) == 0
    assert ["imbalance" in row for row in rows] == [False, True]
    assert SpectraRecorder(net, optimizer, "nothing").rows(0) == []


# Updates and gradients


def layer_of(kind, m, n, rank, dtype=torch.float64):
    net = nn.Sequential(dense(random(m, n).to(dtype)))
    if kind != "dense":
        factorize(net, kind, rank=rank, target="0")
        layer = net[0]
        with torch.no_grad():  # nothing in it stays zero
            for p in layer.parameters():
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    return net[0]


def weight_of(layer):
    wide = copy.deepcopy(layer).double()
    return (wide.dense_weight() if hasattr(wide, "factors") else wide.weight).detach()


KINDS = ["dense", "low-rank", "lora", "sltrain"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "n", "rank"), [(9, 5, 2), (5, 9, 5), (6, 6, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_updates_have_the_singular_values_of_the_difference(kind, m, n, rank, dtype):
    layer = layer_of(kind, m, n, rank, dtype)
    start = {k: v.clone() for k, v in layer.state_dict().items()}
    before = weight_of(layer)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(4)).to(p))
    after = {k: v.clone() for k, v in layer.state_dict().items()}
    values = update_singular_values(layer, start)
    exact = torch.linalg.svdvals(weight_of(layer) - before)[: len(values)]
    assert (values.double() - exact).abs().max() <= 1e-6 * weight_of(layer).norm()
    for name, value in layer.state_dict().items():  # looking at the past changes nothing
        assert torch.equal(value, after[name])


def test_the_update_of_a_layer_that_did_not_move_is_zero():
    for kind in KINDS:
        layer = layer_of(kind, 7, 5, 2)
        values = update_singular_values(layer, dict(layer.state_dict()))
        assert values.max() <= 1e-7 * weight_of(layer).norm()


@pytest.mark.parametrize(("m", "n", "rank"), [(9, 5, 2), (5, 9, 5), (6, 6, 1)])
def test_gradients_of_factors_are_those_of_the_weight_s_movement(m, n, rank):
    layer = layer_of("low-rank", m, n, rank)
    layer(random(4, n, 5)).square().sum().backward()
    B, A = layer.factors()
    moved = layer.scale * (B.grad @ A + B @ A.grad)
    values = gradient_singular_values(layer)
    exact = torch.linalg.svdvals(moved.detach())[: len(values)]
    assert (values.double() - exact).abs().max() <= 1e-6 * exact[0]


def test_gradients_of_dense_weights_are_their_own_and_without_any_there_are_none():
    layer = layer_of("dense", 4, 6, 0)
    assert gradient_singular_values(layer) is None
    layer(random(3, 6, 1)).sum().backward()
    assert_spectrum(gradient_singular_values(layer), layer.weight.grad)


# Factors


def test_refactorized_factors_are_balanced_and_share_their_condition():
    layer = layer_of("low-rank", 12, 9, 4)
    with torch.no_grad():
        layer.B.mul_(100)
    before = factor_health(layer)
    refactorize_(layer)
    after = factor_health(layer)
    assert before.imbalance > 0.9
    assert after.imbalance < 1e-12
    assert after.condition_B == pytest.approx(after.condition_A, rel=1e-9)
    values = singular_values(layer)
    assert after.condition_B == pytest.approx(float((values[0] / values[-1]).sqrt()), rel=1e-5)


def test_a_deficient_factor_has_no_finite_condition():
    layer = layer_of("lora", 6, 5, 2)
    layer.B.data.zero_()
    assert factor_health(layer).condition_B == math.inf
    assert factor_health(layer).imbalance == pytest.approx(1.0)
    recorder = SpectraRecorder(nn.Sequential(layer), torch.optim.SGD(layer.parameters()), "0")
    assert recorder.rows(0)[0]["condition_B"] is None  # JSON knows no infinity


def test_shares_of_low_rank_and_sparse_parts_add_up_and_are_one_without_a_sparse_part():
    layer = layer_of("sltrain", 12, 9, 3)
    shares = low_rank_shares(layer).double()
    U, S, Vh = torch.linalg.svd(weight_of(layer), full_matrices=False)
    sparse = weight_of(layer) - layer.scale * (layer.B @ layer.A).detach().double()
    of_sparse = ((U.T @ sparse) * Vh).sum(1) / S
    there = 1e-9 * S[0] < S
    assert (shares + of_sparse - 1)[there].abs().max() < 1e-6
    assert shares[~there].isnan().all()  # nothing to share
    layer.values.data.zero_()
    assert (low_rank_shares(layer)[:3] - 1).abs().max() < 1e-6


# Subspaces


def test_a_space_overlaps_with_itself_fully_and_with_its_complement_not_at_all():
    Q = torch.linalg.qr(random(8, 8))[0]
    rotated = Q[:, :3] @ torch.linalg.qr(random(3, 3, 1))[0]
    assert float(subspace_overlap(Q[:, :3], rotated)) == pytest.approx(1)
    assert float(subspace_overlap(Q[:, :3], Q[:, 3:6])) == pytest.approx(0, abs=1e-12)
    assert float(subspace_overlap(Q[:, :2], Q[:, 1:3])) == pytest.approx(0.5)


def test_captured_energy_is_that_of_the_projected_gradient():
    G, Q = random(6, 4), torch.linalg.qr(random(6, 6, 1))[0]
    seen = captured_energy(G, Q[:, :2], None)
    assert float(seen) == pytest.approx(float((Q[:, :2].T @ G).square().sum() / G.square().sum()))
    assert float(captured_energy(G, Q, None)) == pytest.approx(1)
    assert float(captured_energy(0 * G, Q, None)) == 0


def test_energy_and_overlap_are_of_spaces_whatever_their_bases():
    G, P, Q = random(6, 4), random(6, 2, 1), random(4, 2, 2)
    A, B = torch.linalg.qr(P)[0], torch.linalg.qr(Q)[0]
    mix = torch.tensor([[3.0, 1.0], [0.0, 0.01]], dtype=P.dtype)
    inside = (A.T @ G @ B).square().sum() / G.square().sum()
    assert float(captured_energy(G, P @ mix, Q @ mix)) == pytest.approx(float(inside))
    assert float(subspace_overlap(P @ mix, P)) == pytest.approx(1)
    assert float(subspace_overlap(P @ mix, A)) == pytest.approx(1)


def test_energy_in_the_top_is_of_squares_and_reaches_one():
    values = torch.tensor([3.0, 4.0, 0.0])
    assert float(energy_in_top(values, 1)) == pytest.approx(16 / 25)
    assert float(energy_in_top(values, 3)) == 1
    assert float(energy_in_top(torch.zeros(3), 1)) == 0


# Momentum


def trained(method, steps=1, **fields):
    config = RunConfig(model="tiny", method=method, batch=2, sequence_length=16, **fields)
    config = resolve(config)
    model, optimizer = build(config)
    for step in range(steps):
        tokens = torch.randint(100, (2, 17), generator=torch.Generator().manual_seed(step))
        model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.mark.parametrize("method", ["full-rank", "galore", "low-rank", "sltrain", "muon"])
def test_momentum_that_nothing_happened_to_keeps_its_direction_and_length(method):
    model, optimizer = trained(method)
    recorder = SpectraRecorder(model, optimizer, TARGETS)
    recorder.note_momentum()
    rows = recorder.momentum_rows(1, "nothing")
    assert len(rows) == 7  # one layer of each kind
    for row in rows:
        assert row["momentum_cosine"] == pytest.approx(1, abs=1e-5)
        assert row["momentum_ratio"] == pytest.approx(1, abs=1e-5)


def test_a_full_reset_leaves_no_momentum_and_half_a_reset_half():
    for strength, left in ((1.0, 0.0), (0.5, 0.5)):
        model, optimizer = trained("galore")
        recorder = SpectraRecorder(model, optimizer, TARGETS)
        recorder.note_momentum()
        reset_momentum_(optimizer, strength)
        for row in recorder.momentum_rows(1, "reset"):
            assert row["momentum_ratio"] == pytest.approx(left, abs=1e-5)
            assert row["momentum_cosine"] == pytest.approx(float(left > 0), abs=1e-5)


def test_transported_momentum_keeps_its_direction_where_kept_momentum_does_not():
    cosines = {}
    for how in ("keep", "transport"):
        model, optimizer = trained("low-rank", steps=4)
        recorder = SpectraRecorder(model, optimizer, TARGETS)
        recorder.note_momentum()
        refactorize_(model, optimizer, how)
        rows = recorder.momentum_rows(1, "refactor")
        cosines[how] = sum(row["momentum_cosine"] for row in rows) / len(rows)
    assert cosines["transport"] > cosines["keep"]


# Runs


@pytest.mark.parametrize("method", ["apollo", "apollo-mini", "golore"])
def test_no_projection_sees_more_of_a_gradient_than_there_is(tmp_path, method):
    config = RunConfig(
        model="tiny", method=method, rank=4, corpus="markov", vocab_size=64, steps=2, batch=2,
        sequence_length=32, spectra_every=1, eval_tokens=64, test_tokens=64,
    )  # fmt: skip
    facts = train(config, tmp_path / "run").layer_facts
    seen = facts[["captured_energy", "overlap"]].dropna()
    assert len(seen) > 2
    assert seen.stack().between(0, 0.999).all()


def test_a_run_records_updates_gradients_subspaces_and_momentum(tmp_path):
    config = RunConfig(
        model="tiny", method="galore", rank=4, corpus="markov", vocab_size=64, steps=8, batch=2,
        sequence_length=32, spectra_every=4, eval_tokens=64, test_tokens=64,
        method_options={"update_proj_gap": 3},
    )  # fmt: skip
    run = train(config, tmp_path / "run")
    assert sorted(set(run.spectra["step"])) == [0, 4, 8]
    assert sorted(set(run.spectra_of("update")["step"])) == [0, 4, 8]
    assert sorted(set(run.spectra_of("gradient")["step"])) == [4, 8]
    facts = run.layer_facts.set_index("step").loc[[4, 8]]
    assert facts["captured_energy"].between(0, 1).all()
    assert facts["overlap"].between(0, 1).all()
    assert sorted(set(run.momentum["step"])) == [4, 7]  # the fourth and the seventh step refresh
    assert set(run.momentum["event"]) == {"refresh"}


# Ranks


@both_ranks
@pytest.mark.parametrize("count", [1, 2, 7])
def test_equal_singular_values_have_their_number_as_rank(rank_of, count):
    values = torch.cat([torch.full((count,), 0.3), torch.zeros(4)])
    assert rank_of(values).item() == pytest.approx(count, rel=1e-6)


@both_ranks
def test_zeros_have_rank_zero(rank_of):
    assert rank_of(torch.zeros(5)).item() == 0
    assert torch.equal(rank_of(torch.zeros(2, 5)), torch.zeros(2))


@both_ranks
@pytest.mark.parametrize("size", [1e-30, 1e-10, 1e10, 1e30])
def test_ranks_do_not_depend_on_the_size_of_the_weights(rank_of, size):
    values = torch.tensor([3.0, 1.0, 0.5])
    assert rank_of(size * values).item() == pytest.approx(rank_of(values).item(), rel=1e-5)


@both_ranks
def test_ranks_lie_between_one_and_the_number_of_values(rank_of):
    values = random(50, 6).abs().float()
    ranks = rank_of(values)
    assert ((ranks >= 1) & (ranks <= 6)).all()
    assert ranks.std() > 0.1


@both_ranks
def test_ranks_are_taken_over_the_last_dimension(rank_of):
    values = random(12, 5).abs().reshape(3, 4, 5)
    ranks = rank_of(values)
    assert ranks.shape == (3, 4)
    assert ranks[1, 2].item() == pytest.approx(rank_of(values[1, 2]).item(), rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_effective_rank_is_the_exponential_of_the_entropy(seed):
    values = random(1, 8, seed)[0].abs()
    shares = (values / values.sum()).tolist()
    entropy = -sum(p * math.log(p) for p in shares)
    assert effective_rank(values).item() == pytest.approx(math.exp(entropy), rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_stable_rank_is_the_squared_frobenius_norm_over_the_squared_spectral_norm(seed):
    W = random(6, 9, seed)
    values = torch.linalg.svdvals(W)
    expected = (torch.linalg.matrix_norm(W) / torch.linalg.matrix_norm(W, 2)).square()
    assert stable_rank(values).item() == pytest.approx(expected.item(), rel=1e-12)
