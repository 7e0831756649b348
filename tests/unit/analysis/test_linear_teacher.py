"""The linear teacher's loss, floor and students are what theory and the library say."""

import pytest
import torch
from torch.testing import assert_close

from lowrank_lab.analysis.linear_teacher import start, teacher, train
from lowrank_lab.layers import LowRankLinear
from lowrank_lab.layers.balance import balance, imbalance, stacked_balance
from lowrank_lab.techniques import refactorize_

T = teacher(6, 8, seeds=3)


def invariant(B, A):
    return B.mT @ B - A @ A.mT


def test_the_loss_is_the_mean_squared_error_over_inputs_of_the_covariance():
    root = torch.linalg.cholesky(T.C[1])
    W = torch.ones(6, 8, dtype=torch.float64)
    # columns of √n · root are inputs with exactly this covariance
    x = 8**0.5 * root
    error = ((W - T.W[1]) @ x).square().sum(0).mean()
    assert_close(T.loss(W)[1], error)
    assert_close(T.loss(0 * T.W), torch.ones(3, dtype=torch.float64))


def test_the_gradient_is_that_of_half_the_loss():
    W = torch.ones(6, 8, dtype=torch.float64, requires_grad=True)
    (T.loss(W)[0] / 2).backward()
    assert_close(W.grad, T.gradient(W.detach())[0])


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_the_floor_is_the_loss_of_the_best_student(rank):
    root = torch.linalg.cholesky(T.C[0])
    U, S, Vh = torch.linalg.svd(T.W[0] @ root, full_matrices=False)
    best = (U[:, :rank] * S[:rank]) @ Vh[:rank] @ torch.linalg.inv(root)
    assert float(T.loss(best)[0]) == pytest.approx(T.floor(rank), abs=1e-12)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_stacked_balances_are_those_of_each_pair(rank):
    B, A = start(T, rank, 50.0)
    found = stacked_balance(B, A)
    for seed in range(3):
        one = balance(B[seed], A[seed])
        assert_close(found.S[seed], one.S)
        assert_close(found.T[seed], one.T, rtol=1e-6, atol=1e-8)
    assert_close(found.T @ found.T_inverse, torch.eye(rank).double().expand(3, -1, -1))


def test_factors_start_balanced_and_a_stretch_keeps_their_product():
    (B, A), (stretched, squeezed) = start(T, 3), start(T, 3, 100.0)
    assert_close(invariant(B, A), torch.zeros(3, 3, 3).double(), rtol=0, atol=1e-12)
    assert_close(B @ A, stretched @ squeezed)
    assert imbalance(stretched[0], squeezed[0]) > 0.5


@pytest.mark.parametrize("how", ["reset", "transport"])
def test_a_student_is_a_layer_trained_by_torch_and_the_library(how):
    B, A = start(T, 3, 10.0)
    layer = LowRankLinear(torch.nn.Linear(8, 6, bias=False), 3, alpha=3).double()
    layer.load_state_dict({"B": B[2], "A": A[2]})
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    for step in range(12):
        if step and step % 5 == 0:
            refactorize_(layer, optimizer, how)
        optimizer.zero_grad()
        (T.loss(layer.B @ layer.A)[2] / 2).backward()
        optimizer.step()
    student = train(T, B, A, 0.02, 12, period=5, how=how)
    assert_close((student.B @ student.A)[2], (layer.B @ layer.A).detach(), rtol=1e-6, atol=1e-8)
    assert_close(student.losses[-1], T.loss(student.B @ student.A))


def test_a_step_of_sgd_changes_the_invariant_by_the_square_of_its_rate():
    B, A = start(T, 3, 10.0)
    done = train(T, B, A, 0.1, 1, method="sgd", keep_gradients=True)
    ((G_B, G_A),) = done.gradients
    assert_close(done.invariant(), invariant(B, A) + 0.01 * (G_B.mT @ G_B - G_A @ G_A.mT))


def test_refactorization_of_balanced_factors_changes_no_later_step_of_sgd():
    B, A = start(T, 3)
    found = stacked_balance(B, A)
    plain = train(T, B, A, 0.1, 20, method="sgd")
    turned = train(T, B @ found.T, found.T_inverse @ A, 0.1, 20, method="sgd")
    assert_close(plain.losses, turned.losses)


def test_momentum_is_the_average_of_gradients():
    done = train(T, *start(T, 3), 0.1, 2, method="momentum", keep_gradients=True)
    (first, _), (second, _) = done.gradients
    assert_close(done.m[0], 0.09 * first + 0.1 * second)


def test_a_student_that_diverges_does_not_stop_the_others():
    rates = torch.tensor([0.1, 1e9], dtype=torch.float64)[:, None, None, None]
    B, A = (X.expand(2, *X.shape) for X in start(T, 3))
    done = train(T, B, A, rates, 20, method="sgd", period=5, how="keep")
    alone = train(T, *start(T, 3), 0.1, 20, method="sgd", period=5, how="keep")
    assert_close(done.losses[:, 0], alone.losses)
    assert not done.losses[-1, 1].isfinite().any()


def test_a_refactorized_copy_leaves_its_original_alone():
    done = train(T, *start(T, 3, 10.0), 0.02, 5)
    before = done.B.clone()
    copy = done.balanced()
    assert_close(done.B, before)
    assert_close(copy.B @ copy.A, done.B @ done.A)
    assert_close(copy.invariant(), torch.zeros(3, 3, 3).double(), rtol=0, atol=1e-12)
