"""Singular values against float64, and the ranks they summarise to."""

import math

import pytest
import torch
from torch import nn

from lowrank_lab import factorize
from lowrank_lab.layers import LowRankLinear
from lowrank_lab.spectra import effective_rank, singular_values, stable_rank, weight_spectra

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


def test_spectra_of_a_model_are_those_of_the_layers_that_match():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 3))
    factorize(net, rank=2, target="^2$")
    spectra = weight_spectra(net, "^[02]$")
    assert list(spectra) == ["0", "2"]
    assert spectra["0"] == singular_values(net[0]).tolist()
    assert [len(values) for values in spectra.values()] == [4, 2]
    assert weight_spectra(net, "nothing") == {}


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
