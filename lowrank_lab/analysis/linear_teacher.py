"""A linear teacher: y = W* x with x of covariance C. The loss and its gradients are exact.

W* = U diag(σ) Vᵀ and C = V diag(λ) Vᵀ, with σᵢ ∝ i^(−a) and λᵢ ∝ i^(−b) in the same order. A
student W has the loss E‖Wx − W*x‖² = ‖(W − W*) C^½‖²; at W = 0 it is Σ λᵢσᵢ² = 1. G = (W − W*) C
is the gradient of half of it. Everything is in float64, full-batch and deterministic; stacks train
together.

Shapes in this file: W is (…, m, n), B (…, m, r), A (…, r, n); the last leading dimension is the
seed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lowrank_lab.layers.balance import stacked_balance
from lowrank_lab.optim.carried import carried

BETAS, EPS = (0.9, 0.999), 1e-8
How = Literal["never", "keep", "reset", "transport"]


@dataclass(frozen=True)
class Teacher:
    """Teachers of one spectrum, one per seed: they differ by rotations of both sides.

    Attributes:
        W: W* (seeds, m, n).
        C: covariances (seeds, n, n).
        energies: λᵢσᵢ², descending, of sum 1.
    """

    W: Tensor
    C: Tensor
    energies: Tensor

    def loss(self, W: Tensor) -> Tensor:
        """‖(W − W*) C^½‖² of students (…, m, n)."""
        missing = W - self.W
        return ((missing @ self.C) * missing).sum((-2, -1))

    def gradient(self, W: Tensor) -> Tensor:
        """G = (W − W*) C, the gradient of half the loss."""
        return (W - self.W) @ self.C

    def floor(self, rank: int) -> float:
        """Σ_{i>r} λᵢσᵢ²: no student of rank r has a lower loss (Eckart and Young 1936)."""
        return float(self.energies[rank:].sum())


def teacher(
    rows: int = 24, columns: int = 32, a: float = 1.0, b: float = 1.0, seeds: int = 10
) -> Teacher:
    """Teachers with σᵢ ∝ i^(−a) and λᵢ = i^(−b), at random rotations."""
    draw = torch.Generator().manual_seed(0)
    r = min(rows, columns)
    U, V = (_rotations(seeds, side, draw) for side in (rows, columns))
    index = torch.arange(1, columns + 1, dtype=torch.float64)
    variances, values = index**-b, index[:r] ** -a
    values = values / (variances[:r] * values.square()).sum().sqrt()
    W = (U[..., :r] * values) @ V[..., :r].mT
    return Teacher(W, (V * variances) @ V.mT, variances[:r] * values.square())


def _rotations(seeds: int, side: int, draw: torch.Generator) -> Tensor:
    """Random orthogonal matrices (seeds, side, side)."""
    Q: Tensor = torch.linalg.qr(
        torch.randn(seeds, side, side, generator=draw, dtype=torch.float64)
    )[0]
    return Q


def start(
    teacher: Teacher, rank: int, imbalance: float = 1.0, size: float = 0.3
) -> tuple[Tensor, Tensor]:
    """Factors with a random product of norm `size`, balanced, then stretched.

    Column i of B is multiplied and row i of A divided by dᵢ, with max(d) / min(d) = imbalance; the
    product doesn't depend on it. With `imbalance` 1, BᵀB = AAᵀ.
    """
    draw = torch.Generator().manual_seed(1)
    seeds, m, n = teacher.W.shape
    B = torch.randn(seeds, m, rank, generator=draw, dtype=torch.float64)
    A = torch.randn(seeds, rank, n, generator=draw, dtype=torch.float64)
    found = stacked_balance(B, A)
    O = _rotations(seeds, rank, draw)  # noqa: E741
    root = (size / found.S.norm(dim=-1)).sqrt()[:, None, None]
    d = torch.logspace(-0.5, 0.5, rank, base=imbalance, dtype=torch.float64)
    return root * (B @ found.T @ O) * d, root * (O.mT @ found.T_inverse @ A) / d[:, None]


@dataclass
class Trained:
    """The result of `train`.

    Attributes:
        B, A: the factors at the end.
        losses: before each step, after its refactorization, and at the end (steps + 1, …).
        m, v: Adam's moments of B and of A; m without v for SGD with momentum.
        gradients: (G_B, G_A) of each step, if asked for.
    """

    B: Tensor
    A: Tensor
    losses: Tensor
    m: list[Tensor]
    v: list[Tensor]
    gradients: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def balanced(self) -> Trained:
        """A copy after a refactorization that keeps the moments; the original doesn't change."""
        B, A = self.B.clone(), self.A.clone()
        copy = Trained(B, A, self.losses, [*self.m], [*self.v])
        refactorize_(copy, "keep")
        return copy

    def invariant(self) -> Tensor:
        """BᵀB − AAᵀ (…, r, r), which gradient flow conserves."""
        return self.B.mT @ self.B - self.A @ self.A.mT


def train(
    teacher: Teacher,
    B: Tensor,
    A: Tensor,
    lr: float | Tensor,
    steps: int,
    *,
    method: Literal["sgd", "momentum", "adam"] = "adam",
    period: int = 0,
    how: How = "never",
    decay: bool = False,
    noise: float = 0.0,
    keep_gradients: bool = False,
) -> Trained:
    """Train factors on the exact gradients G Aᵀ and BᵀG of half the loss.

    Args:
        teacher: what to learn.
        B, A: initial factors; they don't change.
        lr: learning rate, or one per student (…, 1, 1).
        method: sgd | momentum (m ← 0.9 m + 0.1 g) | adam.
        period: steps between refactorizations; 0: none.
        how: never | keep | reset | transport: whether to refactorize, and what becomes of moments.
        decay: the rate falls linearly to 0.
        noise: standard deviation of Gaussian noise per entry of G; 0: the full batch.
        keep_gradients: keep the gradients of all steps.
    """
    B, A = B.clone(), A.clone()
    m, v = ([torch.zeros_like(B), torch.zeros_like(A)] for _ in range(2))
    done = Trained(B, A, torch.empty(0), m, v)
    draw, losses, since = torch.Generator().manual_seed(2), [], 0
    for step in range(steps):
        if how != "never" and period and step and step % period == 0:
            refactorize_(done, how)
            since = 0 if how == "reset" else since
        missing = B @ A - teacher.W
        G = missing @ teacher.C
        losses.append((G * missing).sum((-2, -1)))
        if noise:
            G = G + noise * torch.randn(G.shape, generator=draw, dtype=G.dtype)
        since += 1
        rate = lr * (1 - step / steps) if decay else lr
        gradients = G @ A.mT, B.mT @ G
        if keep_gradients:
            done.gradients.append(gradients)
        for i, X in enumerate((B, A)):
            X.sub_(rate * _direction(gradients[i], m[i], v[i], method, since))
    done.losses = torch.stack([*losses, teacher.loss(B @ A)])
    return done


def _direction(g: Tensor, m: Tensor, v: Tensor, method: str, t: int) -> Tensor:
    """The direction of step t since the last reset; m and v are updated in place."""
    if method == "sgd":
        return g
    m.lerp_(g, 1 - BETAS[0])
    if method == "momentum":
        return m
    v.lerp_(g.square(), 1 - BETAS[1])
    # m̂ / (√v̂ + ε)
    return m / (1 - BETAS[0] ** t) / ((v / (1 - BETAS[1] ** t)).sqrt() + EPS)


def refactorize_(done: Trained, how: How) -> None:
    """Balance the factors of every student in place, and treat their moments.

    Students that have diverged stay as they are.
    """
    finite = (done.B.isfinite().all((-2, -1)) & done.A.isfinite().all((-2, -1)))[..., None, None]
    B, A = torch.where(finite, done.B, 1.0), torch.where(finite, done.A, 1.0)
    found = stacked_balance(B, A)
    done.B.copy_(torch.where(finite, B @ found.T, done.B))
    done.A.copy_(torch.where(finite, found.T_inverse @ A, done.A))
    for moments, second in ((done.m, False), (done.v, True)):
        if how == "reset":
            for moment in moments:
                moment.zero_()
        elif how == "transport":
            moments[0].copy_(carried(moments[0], None, found.T_inverse.mT, second=second))
            moments[1].copy_(carried(moments[1], found.T.mT, None, second=second))
