"""Refactorization of minimal rotation, and only where factors have become unbalanced."""

import sys

import pytest
import torch
from torch import nn

from lowrank_lab import RunConfig, factorize, refactorize_, train
from lowrank_lab.layers import balance, imbalance
from lowrank_lab.layers.balance import value_of

SHAPES = [(1, 1, 1), (9, 5, 1), (7, 7, 7), (12, 5, 5), (5, 12, 5), (40, 24, 6)]


def stretched(m, n, r, dtype=torch.float64):
    """A layer whose columns of B and rows of A differ in size."""
    torch.manual_seed(m + n + r)
    layer = factorize(nn.Sequential(nn.Linear(n, m, bias=False)), rank=r, target=".")[0].to(dtype)
    sizes = torch.logspace(0, -1, r, dtype=dtype)
    with torch.no_grad():
        layer.B.mul_(sizes * 3)
        layer.A.mul_(sizes.flip(0)[:, None])
    return layer


def power(X, p):
    """Of a symmetric positive matrix."""
    values, vectors = torch.linalg.eigh(X)
    return vectors * values**p @ vectors.T


@pytest.mark.parametrize(("m", "n", "r"), SHAPES)
def test_the_nearest_balance_is_the_geometric_mean_of_the_gram_matrices(m, n, r):
    layer = stretched(m, n, r)
    B, A = (t.detach().clone() for t in layer.factors())
    X, Y = B.T @ B, A @ A.T
    # T positive with T X T = T⁻¹ Y T⁻¹: T² is the geometric mean of X⁻¹ and Y.
    root = power(X, 0.5)
    T = power(power(X, -0.5) @ power(root @ Y @ root, 0.5) @ power(X, -0.5), 0.5)
    refactorize_(layer, basis="nearest")
    torch.testing.assert_close(layer.B.detach(), B @ T, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(layer.A.detach(), torch.linalg.solve(T, A), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_nearest_balance_keeps_the_product_and_balances(dtype):
    layer = stretched(40, 24, 6, dtype)
    before = layer.B.detach().double() @ layer.A.detach().double()
    refactorize_(layer, basis="nearest")
    after = layer.B.detach().double() @ layer.A.detach().double()
    rounding = 40 * torch.finfo(dtype).eps
    assert (after - before).norm() <= rounding * before.norm()
    assert imbalance(layer.B, layer.A).item() <= rounding


def test_the_nearest_balance_leaves_balanced_factors_where_they_are():
    layer = stretched(40, 24, 6)
    torch.manual_seed(1)
    turn = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    refactorize_(layer)
    with torch.no_grad():  # balanced, but not in singular vectors
        layer.B.copy_(layer.B @ turn)
        layer.A.copy_(turn.T @ layer.A)
    B, A = (t.detach().clone() for t in layer.factors())
    refactorize_(layer, basis="nearest")
    torch.testing.assert_close(layer.B.detach(), B)
    torch.testing.assert_close(layer.A.detach(), A)
    refactorize_(layer, basis="singular")
    assert (layer.B.detach() - B).norm() > 0.5 * B.norm()


@pytest.mark.parametrize("by", ["Gram matrices", "QR"])
@pytest.mark.parametrize(("m", "n", "r"), [(40, 24, 6), (24, 40, 24), (5, 7, 1)])
def test_factors_in_singular_vectors_keep_their_signs(m, n, r, by, monkeypatch):
    if by == "QR":
        found_in = sys.modules["lowrank_lab.layers.balance"]
        monkeypatch.setattr(found_in, "_from_grams", lambda *grams: None)
    layer = stretched(m, n, r)
    refactorize_(layer)
    B, A = (t.detach().clone() for t in layer.factors())
    for sign in (1, -1):
        with torch.no_grad():
            layer.B.copy_(sign * B * 1.1)
            layer.A.copy_(sign * A / 1.1)
        refactorize_(layer)
        torch.testing.assert_close(layer.B.detach(), sign * B)
        torch.testing.assert_close(layer.A.detach(), sign * A)


def test_kept_momentum_still_points_the_same_way_after_the_nearest_balance():
    """Its direction in W, m_B A + B m_A, is what `singular` loses and `nearest` keeps."""
    kept = {}
    for basis in ("singular", "nearest"):
        layer = stretched(40, 24, 6)
        refactorize_(layer)
        torch.manual_seed(2)
        with torch.no_grad():
            turn = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
            layer.B.copy_(layer.B @ turn * 1.3)
            layer.A.copy_(turn.T @ layer.A)
            m_B, m_A = torch.randn_like(layer.B), torch.randn_like(layer.A)
            before = m_B @ layer.A + layer.B @ m_A
            refactorize_(layer, basis=basis)
            after = m_B @ layer.A + layer.B @ m_A
        kept[basis] = float((before * after).sum() / before.norm() / after.norm())
    assert kept["nearest"] > 0.95
    assert abs(kept["singular"]) < 0.7


@pytest.mark.parametrize("on_refactor", ["keep", "transport"])
def test_moments_are_carried_into_the_nearest_balance_as_well(on_refactor):
    layer = stretched(12, 9, 4)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
    layer(torch.randn(5, 9, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    moment = optimizer.state[layer.B]["exp_avg"].clone()
    T_inverse = balance(*layer.factors()).minimal_rotation().T_inverse
    refactorize_(layer, optimizer, on_refactor, basis="nearest")
    expected = moment @ T_inverse.T if on_refactor == "transport" else moment
    torch.testing.assert_close(optimizer.state[layer.B]["exp_avg"], expected)


def test_layers_that_are_still_balanced_are_left_alone_and_named():
    model = factorize(nn.Sequential(nn.Linear(9, 12), nn.Linear(12, 7)), rank=3, target=".")
    refactorize_(model)
    with torch.no_grad():
        model[1].B.mul_(4)
    before = [p.clone() for p in model[0].parameters()]
    done = refactorize_(model, above=0.1)
    assert (done.changed, done.balanced, done.rank_deficient) == (["1"], ["0"], [])
    assert all(torch.equal(p, q) for p, q in zip(model[0].parameters(), before, strict=True))
    assert refactorize_(model, above=0.1).balanced == ["0", "1"]


@pytest.mark.parametrize(
    ("b", "a", "expected"), [(1.0, 0.0, 1.0), (0.0, 0.0, 0.0), (2.0, 2.0, 0.0)]
)
def test_imbalance_is_one_for_one_sided_and_nothing_for_equal_or_no_factors(b, a, expected):
    eye = torch.eye(5, dtype=torch.float64)
    assert value_of(imbalance(b * eye, a * eye), usually=0) == pytest.approx(expected)


def test_a_basis_that_is_none_is_refused():
    with pytest.raises(ValueError, match="basis: 'polar' is not allowed; singular or nearest"):
        refactorize_(stretched(5, 4, 2), basis="polar")


def test_a_run_with_the_nearest_balance_says_what_it_left_alone(text_corpus, tmp_path):
    config = RunConfig(
        model="tiny", vocab_size=300, corpus=text_corpus, batch=2, sequence_length=16, steps=6,
        eval_tokens=64, test_tokens=64,
        method="low-rank", rank=4, refactor_every=2, refactor_basis="nearest", refactor_above=0.999,
    )  # fmt: skip
    run = train(config, tmp_path / "run")
    events = [event for row in run.metrics["events"].dropna() for event in row]
    assert [(e["layers"], e["balanced"]) for e in events] == [(0, 14)] * len(events)
    assert events
