"""Subspaces for GPUs: nearly exact for any spectrum, in stacks, with few kernels and waits."""

import math
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from benchmarks.kernels import KernelCount
from benchmarks.subspaces import SPECTRA, captured, with_spectrum
from lowrank_lab.device import cuda_path
from lowrank_lab.layers.balance import gram
from lowrank_lab.optim import Apollo, Fira, GaLore, GoLore, projection
from lowrank_lab.optim.projection import new_projections, refresh_on
from lowrank_lab.optim.subspace_iteration import orthonormal, subspace_iteration
from lowrank_lab.optim.subspaces import iterated_subspaces, leading_subspaces, sides

RANKED = {"rank": 4, "proj_type": "std", "refresh": "auto"}
refreshes = pytest.mark.parametrize("refresh", ["svd", "subspace", "randomized", "gram"])


def orthonormal_error(P):
    return (P.mT @ P - torch.eye(P.shape[-1])).abs().max()


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize(("m", "n", "rank"), [(64, 176, 16), (96, 96, 6), (48, 96, 1), (9, 9, 9)])
def test_iterated_subspaces_have_the_energy_of_exact_ones_whatever_the_spectrum(name, m, n, rank):
    G, other = (with_spectrum(name, m, n, rank, seed=i) for i in range(2))
    exact = leading_subspaces(G, rank, (True, True))
    for old in ((None, None), leading_subspaces(other, rank, (True, True))):
        found = iterated_subspaces(G, rank, (True, True), seed=3, old=old)
        for i in range(2):
            pair, best = ([None, None] for _ in range(2))
            pair[i], best[i] = found[i], exact[i]
            assert captured(G, pair) >= 0.985 * captured(G, best)
            assert orthonormal_error(found[i]) <= 2e-6


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_they_do_not_depend_on_the_size_of_the_gradient(size):
    G = with_spectrum("slow", 24, 40, 5, seed=0)
    left, _ = iterated_subspaces(G * size, 5, (True, False))
    exact, _ = leading_subspaces(G, 5, (True, False))
    assert (left.T @ exact).square().sum() >= 5 * 0.999


def test_they_are_ordered_and_keep_the_signs_of_the_old_ones():
    G = with_spectrum("fast", 32, 20, 6, seed=1)
    old, _ = iterated_subspaces(G, 6, (True, False))
    energies = (old.T @ G).square().sum(1)
    assert (energies.diff() <= 0).all()
    flips = torch.tensor([1.0, -1, 1, -1, -1, 1])
    new, _ = iterated_subspaces(G, 6, (True, False), seed=9, old=(old * flips, None))
    assert ((new * old).sum(0) * flips > 0.99).all()


@pytest.mark.parametrize("rank", [1, 3, 7])
@pytest.mark.parametrize("make", [torch.zeros, torch.ones, lambda m, n: torch.eye(m)[:, :n]])
def test_gradients_of_a_lower_rank_have_orthonormal_projections_too(make, rank):
    for P in iterated_subspaces(make(9, 7), rank, (True, True)):
        assert orthonormal_error(P) <= 2e-6


@pytest.mark.parametrize("columns", [1, 5, 12])
@pytest.mark.parametrize("dependent", [False, True])
def test_choleskyqr_spans_what_qr_spans_and_completes_dependent_columns(columns, dependent):
    torch.manual_seed(0)
    Y = torch.randn(3, 12, columns) * torch.logspace(0, -4, columns)
    Y[1, :, columns // 2 :] = Y[1, :, :1] if dependent else Y[1, :, columns // 2 :]
    Y[2] = 0 if dependent else Y[2]
    Q = orthonormal(Y)
    assert orthonormal_error(Q) <= 1e-6
    assert torch.allclose(Q @ (Q.mT @ Y), Y, atol=1e-5)


@refreshes
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "full"])
def test_a_stack_is_decomposed_as_its_matrices_are_also_in_pieces(refresh, proj_type, monkeypatch):
    torch.manual_seed(0)
    G, other = torch.randn(2, 5, 12, 8).unbind()
    group = {"rank": 3, "proj_type": proj_type, "refresh": refresh}
    old = leading_subspaces(other, 3, sides(proj_type, (12, 8)))
    one_by_one = [
        new_projections(G[i], tuple(P if P is None else P[i] for P in old), 7, group)
        for i in range(5)
    ]
    for bytes_at_once in (projection.STACK_BYTES, 2 * 4 * 12 * 8):
        monkeypatch.setattr(projection, "STACK_BYTES", bytes_at_once)
        for side, P in enumerate(new_projections(G, old, 7, group)):
            assert (P is None) == (old[side] is None)
            if P is not None:
                assert torch.allclose(
                    P, torch.stack([pair[side] for pair in one_by_one]), atol=1e-4
                )


def test_auto_is_an_exact_svd_on_a_cpu_and_iterates_on_a_gpu():
    G = torch.randn(10, 6)
    assert refresh_on(G, RANKED) == "svd"
    exact = leading_subspaces(G, 4, (False, True))[1]
    assert torch.equal(new_projections(G, (None, None), 0, RANKED)[1], exact)
    with cuda_path():
        assert refresh_on(G, RANKED) == "subspace"
        assert refresh_on(G, RANKED | {"refresh": "svd"}) == "svd"
        assert refresh_on(G, RANKED | {"refresh": "randomized"}) == "randomized"


@pytest.mark.parametrize("method", [GaLore, Fira, GoLore])
def test_a_saved_state_keeps_the_refresh_with_which_it_was_trained(method):
    def made(**keys):
        W = nn.Parameter(torch.zeros(6, 5))
        return method([{"params": [W], "rank": 2, **keys}], lr=0.1)

    saved, now = made(refresh="svd").state_dict(), made()
    assert now.param_groups[0]["refresh"] == "auto"
    now.load_state_dict(saved)
    assert now.param_groups[0]["refresh"] == "svd"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("refresh", ["auto", "svd", "subspace", "randomized", "gram"])
def test_on_a_gpu_too_a_gradient_that_is_not_finite_is_named(refresh, bad):
    W, V = (nn.Parameter(torch.zeros(6, 5)) for _ in range(2))
    groups = [{"params": [W, V], "param_names": ["w", "v"], "rank": 2, "refresh": refresh}]
    optimizer = GaLore(groups, lr=0.1)
    for p in (W, V):
        p.grad = torch.ones(6, 5)
    V.grad[1, 2] = bad
    with cuda_path(), pytest.raises(RuntimeError, match=r"gradient of parameter 1 \(v\) is not"):
        optimizer.step()


def test_a_solver_that_returns_nan_without_an_error_is_noticed(monkeypatch):
    def silent(A):
        return A[..., 0], A * torch.nan

    monkeypatch.setattr(torch.linalg, "eigh", silent)
    with pytest.raises(torch.linalg.LinAlgError, match="not finite"):
        new_projections(torch.randn(6, 5), (None, None), 0, RANKED | {"refresh": "subspace"})


def test_a_refresh_of_a_stack_has_few_kernels_and_waits_for_one_solver():
    G = torch.empty(32, 512, 512, device="meta")
    old = (None, torch.empty(32, 512, 128, device="meta"))
    group = {"rank": 128, "proj_type": "std", "refresh": "auto"}
    with cuda_path(), KernelCount() as count:
        new_projections(G, old, 200, group)
    solvers = {n: k for n, k in count.kernels.items() if n in ("_linalg_eigh", "_linalg_svd")}
    assert solvers == {"_linalg_eigh": 1}
    assert not any("qr" in name for name in count.kernels)
    assert count.total <= 200


def test_a_gram_matrix_alone_is_enough():
    G = with_spectrum("flat", 20, 30, 4, seed=0)
    P = subspace_iteration(gram(G.T.double()), 4)
    exact, _ = leading_subspaces(G, 4, (True, False))
    assert captured(G, (P, None)) >= 0.999 * captured(G, (exact, None))


@pytest.mark.parametrize(
    ("method", "keys"),
    [
        (GaLore, {"refresh": "subspace"}),
        (Fira, {"refresh": "subspace", "spread_refresh": True}),
        (GoLore, {"refresh": "subspace", "switch": 10}),
        (Apollo, {"proj": "subspace"}),
    ],
)
def test_matrices_of_a_shape_are_refreshed_together_as_one_by_one(method, keys, monkeypatch):
    keys = {"rank": 2, "update_proj_gap": 3, **keys}
    shapes = [(6, 9)] * 3 + [(9, 6)] * 2 + [(5, 5)]

    def trained(path):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
        optimizer = method([{"params": params, **keys}], lr=0.1)
        with path():
            for _ in range(5):
                for p in params:
                    p.grad = torch.randn(p.shape)
                optimizer.step()
        assert not optimizer.refreshed
        for p in params:  # no view of a stack
            for name, P in optimizer.state[p].items():
                if name.startswith("projection"):
                    assert P.untyped_storage().nbytes() == 4 * P.numel()
        return params

    sizes = []
    whole = projection.new_projections

    def noted(G, *args):
        sizes.append(tuple(G.shape))
        return whole(G, *args)

    monkeypatch.setattr(projection, "new_projections", noted)
    alone = trained(nullcontext)
    sizes.clear()
    together = trained(cuda_path)
    assert set(sizes[:3]) == {
        (3, 6, 9), (2, 9, 6), (1, 5, 5)
    }  # fmt: skip
    for p, q in zip(together, alone, strict=True):
        assert torch.allclose(p, q, atol=1e-4)
