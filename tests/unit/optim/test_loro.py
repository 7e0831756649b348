"""LORO: its retraction against the explicit m×n step, its steps in float64, and its resets."""

import pytest
import torch
from equations import loro, tangent
from small_matrices import factors_of, noisy_gradients
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank_lab.optim.loro import Loro, retraction
from lowrank_lab.techniques import reset_momentum_

LR, K, STEPS = 0.01, 10, 34  # three exact steps
# (m, n, r): square, tall, wide, rank 1, rank = min(m, n), 2r > min(m, n)
CASES = [(16, 16, 4), (24, 10, 3), (10, 24, 3), (12, 9, 1), (9, 6, 6), (6, 9, 6), (8, 8, 8)]
CASES += [(12, 30, 8), (30, 12, 8), (13, 13, 9), (1, 5, 1), (5, 1, 1), (1, 1, 1)]

cases = pytest.mark.parametrize(("m", "n", "r"), CASES)


def chance(seed):
    return torch.Generator().manual_seed(seed)


def factors(m, n, r, seed=1, dtype=torch.float32):
    return factors_of((m, n), r, dtype, seed)


def gradients(m, n, steps=STEPS, dtype=torch.float32):
    return noisy_gradients((m, n), steps, dtype)


def by_equations(m, n, r, grads=None, **keys):
    """The product after all steps, in float64 throughout."""
    grads = gradients(m, n) if grads is None else grads
    return loro(None, grads, None, factors=factors(m, n, r), update_k=K, **keys)


def relative(ours, theirs):
    return ((ours.double() - theirs).norm() / theirs.norm()).item()


def made(m, n, r, *, dtype=torch.float32, lr=LR, weight_decay=0.0, **keys):
    B, A = (nn.Parameter(X) for X in factors(m, n, r, dtype=dtype))
    group = {"params": [B, A], "rank": r, "update_k": K, **keys}
    return B, A, Loro([group], lr=lr, weight_decay=weight_decay)


def advance(B, A, optimizer, grads):
    """One step for each gradient of the product: a sign of a singular vector then changes none."""
    for G in grads:
        B.grad, A.grad = G @ A.detach().T, B.detach().T @ G
        optimizer.step()


def truncated(W, r):
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return (U[:, :r] * S[:r]) @ Vh[:r]


# The exact step


@cases
@pytest.mark.parametrize("lr", [1e-3, 0.1, 3.0])
def test_the_retraction_is_the_best_approximation_of_the_explicit_tangent_step(m, n, r, lr):
    B, A = factors(m, n, r)
    D_B, D_A = factors(m, n, r, seed=2)
    new_B, new_A, full = retraction(B, A, D_B, D_A, lr)
    W, T = B.double() @ A.double(), tangent(B, A, D_B, D_A)
    best = truncated(W - lr * T, r)
    assert full
    assert relative(new_B @ new_A, best) <= 1e-9
    assert relative(new_B.float() @ new_A.float(), best) <= 1e-6


def test_the_published_cores_r_b_misses_by_more_than_the_step_and_ours_by_rounding():
    """The core with R_b where the derivation has R_b′, the only difference."""
    B, A = (X.double() for X in factors(64, 48, 8))
    D_B, D_A = (X.double() for X in factors(64, 48, 8, seed=2))
    (Q_B, R_B), (Q_A, R_A) = torch.linalg.qr(B), torch.linalg.qr(A.T)
    X_A, X_B = torch.linalg.solve(R_B.T, D_A), D_B @ R_A.inverse()
    outside_B, outside_A = X_B - Q_B @ Q_B.T @ X_B, X_A.T - Q_A @ Q_A.T @ X_A.T
    (P_B, R_b), (P_A, R_a) = torch.linalg.qr(outside_B), torch.linalg.qr(outside_A)
    best, errors = truncated(B @ A - 0.1 * tangent(B, A, D_B, D_A), 8), []
    for corner in (R_b, R_B):
        top = torch.cat([R_B @ R_A.T - 0.1 * X_A @ Q_A, -0.1 * R_a.T], 1)
        core = torch.cat([top, torch.cat([-0.1 * corner, torch.zeros(8, 8)], 1)])
        W = torch.cat([Q_B, P_B], 1) @ truncated(core, 8) @ torch.cat([Q_A, P_A], 1).T
        errors.append(((W - best).norm() / (best - B @ A).norm()).item())
    assert errors[0] < 1e-12
    assert errors[1] > 1


@cases
def test_the_tangent_step_is_the_projected_gradient_where_there_is_one(m, n, r):
    """With D_A = BᵀG and D_B = GAᵀ: T = U Uᵀ G + G V Vᵀ − U Uᵀ G V Vᵀ."""
    B, A = (X.double() for X in factors(m, n, r))
    G = torch.randn(m, n, generator=chance(5)).double()
    U, V = torch.linalg.qr(B)[0], torch.linalg.qr(A.T)[0]
    T = U @ U.T @ G + G @ V @ V.T - U @ U.T @ G @ V @ V.T
    new_B, new_A, _ = retraction(B, A, G @ A.T, B.T @ G, 0.1)
    assert relative(new_B @ new_A, truncated(B @ A - 0.1 * T, r)) <= 1e-9


@cases
def test_the_factors_are_balanced_after_an_exact_step(m, n, r):
    B, A, optimizer = made(m, n, r)
    advance(B, A, optimizer, gradients(m, n, K))
    S = torch.linalg.svdvals((B @ A).double())[:r].float()
    for gram in (B.T @ B, A @ A.T):
        assert torch.allclose(gram, S.diag(), atol=1e-5 * S[0].item(), rtol=1e-4)
    assert (S.diff() <= 0).all()


def test_the_whole_core_comes_from_a():
    """What D_B says inside the range of B is the core's other version, and has no say."""
    B, A = (X.double() for X in factors(12, 10, 3))
    D_B, D_A = (X.double() for X in factors(12, 10, 3, seed=2))
    inside = B @ torch.randn(3, 3, generator=chance(3)).double()
    one, other = retraction(B, A, D_B, D_A, 0.1), retraction(B, A, D_B + inside, D_A, 0.1)
    assert relative(one[0] @ one[1], other[0] @ other[1]) <= 1e-12


@pytest.mark.parametrize("lacking", ["B", "A", "both"])
@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize(("m", "n", "r"), [(16, 16, 4), (9, 12, 6), (24, 10, 5)])
def test_rank_deficient_factors_take_the_step_that_pseudo_inverses_say(m, n, r, rank, lacking):
    B, A = (X.double() for X in factors(m, n, r))
    thin = torch.randn(r, rank, generator=chance(7)).double() @ torch.ones(rank, r).double().triu()
    B, A = (B @ thin if lacking != "A" else B), (thin.T @ A if lacking != "B" else A)
    D_B, D_A = (X.double() for X in factors(m, n, r, seed=2))
    new_B, new_A, _ = retraction(B, A, D_B, D_A, 0.1)
    W = B @ A - 0.1 * tangent(B, A, D_B, D_A, rtol=1e-12)
    assert new_B.isfinite().all()
    assert new_A.isfinite().all()
    assert (new_B @ new_A - truncated(W, r)).norm() <= 1e-9 * max(W.norm(), 1e-9)


def test_loras_zero_factor_survives_exact_steps_and_the_product_starts_to_move():
    B, A, optimizer = made(12, 10, 3, update_k=1)
    B.data.zero_()
    advance(B, A, optimizer, gradients(12, 10, 5))
    assert torch.linalg.matrix_rank(B.detach() @ A.detach(), rtol=1e-4) == 3


@pytest.mark.parametrize("update_k", [1, 2])
def test_a_product_without_full_rank_takes_an_approximate_step_and_loses_no_direction(update_k):
    B, A, optimizer = made(12, 10, 3, update_k=update_k)
    B.data.zero_()
    A0 = A.detach().clone()
    advance(B, A, optimizer, [torch.zeros(12, 10)] * 4)
    assert torch.equal(A, A0)
    assert not B.any()


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


def test_no_tensor_of_the_products_size_is_ever_formed():
    m, n, r = 60, 50, 3
    B, A, optimizer = made(m, n, r, update_k=2)
    grads = [(torch.randn(m, r), torch.randn(r, n)) for _ in range(4)]
    with Largest() as largest:
        for B.grad, A.grad in grads:
            optimizer.step()
    assert m * 2 * r <= largest.elements < m * n / 4


# Both kinds of steps


@cases
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_steps_across_exact_ones_follow_the_equations_in_float64(m, n, r, weight_decay):
    exact = by_equations(m, n, r, weight_decay=weight_decay)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-3)):
        B, A, optimizer = made(m, n, r, dtype=dtype, weight_decay=weight_decay)
        W0 = (B @ A).detach().double()
        advance(B, A, optimizer, gradients(m, n, dtype=dtype))
        assert relative((B @ A).detach() - W0, exact - W0) <= tolerance


@cases
def test_between_exact_steps_float32_follows_the_equations_to_its_rounding(m, n, r):
    B, A, optimizer = made(m, n, r)
    advance(B, A, optimizer, gradients(m, n, K - 1))
    W0 = torch.mm(*factors(m, n, r)).double()
    exact = by_equations(m, n, r, grads=gradients(m, n, K - 1))
    assert relative((B @ A).detach() - W0, exact - W0) <= 3e-5


@pytest.mark.parametrize("eps", [1e-8, 0.1])
def test_epsilon_is_added_after_the_bias_correction_as_in_torchs_adamw(eps):
    """Between exact steps the factors are torch's AdamW with lr · r/m, the others with lr."""
    ours, theirs = ([nn.Parameter(x) for x in (*factors(12, 10, 3), torch.ones(5))] for _ in "ab")
    optimizer = Loro([{"params": ours[:2], "rank": 3}, {"params": ours[2:]}], lr=LR, eps=eps)
    groups = [{"params": theirs[:2], "lr": LR * 3 / 12}, {"params": theirs[2:], "lr": LR}]
    adamw = torch.optim.AdamW(groups, eps=eps, weight_decay=0.0)
    for i in range(30):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=chance(i))
            q.grad = p.grad.clone()
        optimizer.step()
        adamw.step()
    for p, q in zip(ours, theirs, strict=True):
        assert torch.allclose(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
def test_scale_replaces_r_over_d_between_exact_steps(scale):
    B, A, optimizer = made(12, 10, 3, dtype=torch.float64, scale=scale)
    advance(B, A, optimizer, gradients(12, 10, dtype=torch.float64))
    W0 = torch.mm(*factors(12, 10, 3)).double()
    exact = by_equations(12, 10, 3, scale=scale)
    assert relative((B @ A).detach() - W0, exact - W0) <= 1e-10


@pytest.mark.parametrize(("m", "n", "r"), [(16, 16, 4), (24, 10, 3)])
def test_bfloat16_follows_the_equations_within_its_rounding(m, n, r):
    B, A, optimizer = made(m, n, r, dtype=torch.bfloat16)
    advance(B, A, optimizer, gradients(m, n, dtype=torch.bfloat16))
    assert relative((B @ A).detach(), by_equations(m, n, r)) <= 2e-2


# Resets


def test_an_exact_step_clears_the_very_moments_that_are_updated_next():
    B, A, optimizer = made(12, 10, 3)
    grads = gradients(12, 10, K + 1)
    advance(B, A, optimizer, grads[: K - 1])
    before = [(optimizer.state[X]["exp_avg"], optimizer.state[X]["exp_avg_sq"]) for X in (B, A)]
    advance(B, A, optimizer, grads[K - 1 : K])
    assert not any(moment.any() for pair in before for moment in pair)
    assert all(optimizer.state[X]["exp_avg_weight"] == 0 for X in (B, A))
    advance(B, A, optimizer, grads[K:])
    for X, (m, v) in zip((B, A), before, strict=True):
        assert optimizer.state[X]["exp_avg"] is m
        assert torch.allclose(m, 0.1 * X.grad)
        assert torch.allclose(v, 0.001 * X.grad**2)


def test_after_an_exact_step_training_is_that_of_a_fresh_optimizer():
    B, A, optimizer = made(12, 10, 3)
    advance(B, A, optimizer, gradients(12, 10, K))
    C, D = (nn.Parameter(X.detach().clone()) for X in (B, A))
    fresh = Loro([{"params": [C, D], "rank": 3, "update_k": K}], lr=LR)
    for pair, which in (((B, A), optimizer), ((C, D), fresh)):
        advance(*pair, which, gradients(12, 10, 2 * K))
    assert torch.equal(B, C)
    assert torch.equal(A, D)


def test_a_momentum_reset_of_one_factor_restarts_that_factor_alone():
    B, A, optimizer = made(12, 10, 3)
    advance(B, A, optimizer, gradients(12, 10, 4))
    assert reset_momentum_(optimizer, params=[B]) == 1
    advance(B, A, optimizer, gradients(12, 10, 1))
    assert optimizer.state[B]["exp_avg_weight"] == pytest.approx(0.1)
    assert optimizer.state[A]["exp_avg_weight"] == pytest.approx(1 - 0.9**5)
    assert B.isfinite().all()


# Behaviour


def test_several_pairs_are_stepped_each_for_itself():
    shapes = [(12, 10, 3), (7, 9, 3)]
    pairs = [[nn.Parameter(X) for X in factors(*shape)] for shape in shapes]
    together = Loro([{"params": [*pairs[0], *pairs[1]], "rank": 3, "update_k": 2}], lr=LR)
    for _ in range(5):
        for (B, A), (m, n, _) in zip(pairs, shapes, strict=True):
            G = torch.randn(m, n, generator=chance(m))
            B.grad, A.grad = G @ A.detach().T, B.detach().T @ G
        together.step()
    for (B, A), (m, n, r) in zip(pairs, shapes, strict=True):
        C, D, alone = made(m, n, r, update_k=2)
        advance(C, D, alone, [torch.randn(m, n, generator=chance(m))] * 5)
        assert torch.equal(B, C)
        assert torch.equal(A, D)


def test_a_pair_without_both_gradients_is_left_alone():
    _, A, optimizer = made(12, 10, 3, update_k=1, weight_decay=0.1)
    A.grad = torch.ones(3, 10)
    optimizer.step()
    assert torch.equal(A, factors(12, 10, 3)[1])
    assert not optimizer.state[A]


# Refusals

BAD = [
    ({"params": [nn.Parameter(torch.zeros(6, 3))]}, "params: 1 "),
    ({"params": [nn.Parameter(torch.zeros(3, 5)), nn.Parameter(torch.zeros(6, 3))]}, "params: "),
    ({"params": [nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(3, 5))]}, "rank: 3"),
    ({"params": [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3, 5))]}, "params: "),
]


@pytest.mark.parametrize(("bad", "message"), BAD)
def test_a_group_that_is_no_pair_of_factors_is_refused_and_changes_nothing(bad, message):
    optimizer = Loro([nn.Parameter(torch.zeros(3))])
    pair = [nn.Parameter(torch.zeros(6, 3)), nn.Parameter(torch.zeros(3, 5))]
    with pytest.raises(ValueError, match=f"^{message}") as refusal:
        optimizer.add_param_group({"params": pair, "rank": 3, **bad})
    assert "\n" not in str(refusal.value)
    assert len(optimizer.param_groups) == 1


@cases
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_float32_weights_follow_the_equations_across_exact_steps(m, n, r, weight_decay):
    B, A, optimizer = made(m, n, r, weight_decay=weight_decay)
    advance(B, A, optimizer, gradients(m, n))
    assert relative((B @ A).detach(), by_equations(m, n, r, weight_decay=weight_decay)) <= 1e-5
