"""LORO (ICLR 2025, openreview i0zzO7Hslk): Adam on two factors, periodically an exact step of B A.

Shapes in this file: W = B A is m×n, B is m×r, A is r×n; d in the paper's r/d is m. A scale in front
of the product is unknown to the optimizer: the gradients contain it.

The exact step moves W in the tangent space of the rank-r matrices and retracts it to rank r. With W
= U S Vᵀ (U m×r, V n×r, both orthonormal) and W's gradient G (m×n), G's tangent part is

    T = U Uᵀ G + (I − U Uᵀ) G V Vᵀ,

and the factors' gradients give both products without G, since D_A = Bᵀ G and D_B = G Aᵀ:

    B = Q_B R_B  ⇒  Uᵀ G = R_B⁻ᵀ D_A =: X_A (r×n)      with U = Q_B
    Aᵀ = Q_A R_A ⇒  G V  = D_B R_A⁻¹ =: X_B (m×r)      with V = Q_A

LORO replaces D_A and D_B by Adam's directions, which no single G produces. The core Uᵀ G V then has
two values, X_A Q_A and Q_Bᵀ X_B, which differ widely. T above uses all of X_A, but only the part of
X_B outside of U: the core is that of A, as in the published code. With Y = (I − U Uᵀ) X_B the step
is

    W − lr·T = [Q_B | Y] · [[R_B R_Aᵀ, −lr·I], [−lr·I, 0]] · [Q_A | X_Aᵀ]ᵀ.

Two QR decompositions, [Q_B | Y] = Q_L L and [Q_A | X_Aᵀ] = Q_R R, leave a matrix of at most 2r×2r,
whose truncated SVD is the best rank-r approximation of W − lr·T. The derivation's R_b′ is the lower
right block of L; the published code uses R_b instead, with an error larger than the step.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank_lab.distributed.dtensors import ANY_DIM, local_part
from lowrank_lab.layers.balance import RANK_TOLERANCE
from lowrank_lab.optim.adam import (
    Four,
    adam_direction,
    adam_moments,
    adam_update_,
    bias_corrected_lr,
    eps_after_correction,
    restart_adam_,
)
from lowrank_lab.optim.base import ProjectedAdamW
from lowrank_lab.optim.checks import require, require_int
from lowrank_lab.optim.found_inf import decay_, old_if_off, zero_if_off_
from lowrank_lab.optim.matrix_updates import undone_on_error

Factor = tuple[Tensor, Tensor, dict[str, Any]]  # W, G and state of B or A


class Loro(ProjectedAdamW):
    """LORO on pairs of factors, and AdamW on everything else.

    The parameters of a group with `rank` are factors in the order B1, A1, B2, A2, … (B m×r, A r×n).
    Other keys of the group (default):

    * `update_k` (500, as in the authors' scripts): K, steps between two exact steps.
    * `scale` (None, the paper's r/d = r/m): factor of the learning rate between exact steps.

    Steps K, 2K, … of a pair are exact, with the full learning rate. The factors are then balanced,
    BᵀB = AAᵀ, and Adam restarts on them: moments and bias corrections are zero.

    ε is added to √v̂ *after* the bias correction, in all groups, as in torch's AdamW and unlike in
    the other projected optimizers of this package. Weight decay is decoupled and applied to each
    factor after the update.

    A pair is skipped if one of its factors has no gradient. Where a factor is rank-deficient (B = 0
    at the start of LoRA), the exact step uses pseudo-inverses: T = (B⁺)ᵀ D_A + (I − B B⁺) D_B
    (A⁺)ᵀ. Where W − lr·T itself has a rank below r, the pair takes an approximate step.

    Args:
        params: groups of pairs with `rank`; groups without it are plain AdamW.
        lr: learning rate, absolute.
        betas: decay rates of the first and second moment.
        eps: added to √v̂ after bias correction.
        weight_decay: decoupled, applied after the update with lr · weight_decay.

    Raises:
        ValueError: a hyperparameter out of range, an unknown key, parameters that are not pairs.
    """

    loads_from: ClassVar[tuple[str, ...]] = ("torch",)
    eps_after: ClassVar[bool] = True
    group_defaults: ClassVar[dict[str, Any]] = {"update_k": 500, "scale": None}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay)

    def check_group(self, group: dict[str, Any]) -> None:
        rank, period, scale, params = (group[k] for k in ("rank", "update_k", "scale", "params"))
        require_int("rank", rank, 1)
        require_int("update_k", period, 1)
        for key, only in (("state_precision", "same"), ("stochastic_rounding", False)):
            require(key, group[key], group[key] == only, f"LORO supports only {only}")
        require("scale", scale, scale is None or scale > 0, "None (r/m) or above 0")
        require("params", len(params), len(params) % 2 == 0, "pairs of factors: B1, A1, B2, A2, …")
        for B, A in _pairs(params):
            shapes = (tuple(B.shape), tuple(A.shape))
            factors = B.ndim == A.ndim == 2 and B.shape[1] == A.shape[0] == rank
            require("params", shapes, factors, f"each B m×{rank}, followed by its A {rank}×n")
            fits = rank <= min(B.shape[0], A.shape[1])
            require("rank", rank, fits, f"at most min(m, n) of each pair, not {shapes}")

    def shard_dim(self, group: dict[str, Any], shape: torch.Size) -> int | None:
        return ANY_DIM  # exact steps, which gather the factors, are rare

    @torch.no_grad()
    def step_group_(self, params: list[Tensor], group: dict[str, Any]) -> None:
        if "rank" not in group:
            super().step_group_(params, group)
            return
        pairs = [
            (B, A) for B, A in _pairs(group["params"]) if B.grad is not None and A.grad is not None
        ]
        exact = [self._is_exact(B, group) for B, _ in pairs]
        for pair, is_exact in zip(pairs, exact, strict=True):
            if is_exact:
                self._step_exactly_(*pair, group)
        self._step_together_([pair for pair, e in zip(pairs, exact, strict=True) if not e], group)
        if group["weight_decay"] > 0 and pairs:
            factors = [local_part(p) for pair in pairs for p in pair]
            decay_(factors, group["lr"] * group["weight_decay"])

    def _is_exact(self, B: Tensor, group: dict[str, Any]) -> bool:
        """Whether the next step of a pair is exact, as every update_k-th is."""
        return bool((self.state[B].get("step", 0) + 1) % group["update_k"] == 0)

    def _step_exactly_(self, B: Tensor, A: Tensor, group: dict[str, Any]) -> None:
        """An exact step of B (m×r) and A (r×n)."""
        with undone_on_error(self.state[B], self.state[A]):
            states = self._advanced_state(B, group), self._advanced_state(A, group)
            with self.plain_parts(B, None) as of_B, self.plain_parts(A, None) as of_A:
                _exact_((of_B, of_A), group, _scale(B, group))
        for state in states:
            state["step"] += 1

    def _step_together_(self, pairs: list[tuple[Tensor, Tensor]], group: dict[str, Any]) -> None:
        """B ← B − lr · r/d · Adam(G_B);  A ← A − lr · r/d · Adam(G_A) of many pairs, fused."""
        together: dict[Any, list[Four]] = {}
        states = [self.state[p] for pair in pairs for p in pair]
        with undone_on_error(*states), ExitStack() as parts:
            for B, A in pairs:
                for p in (B, A):
                    state = self._advanced_state(p, group)
                    X, G, own = parts.enter_context(self.plain_parts(p, ANY_DIM))
                    step_size = _scale(B, group) * bias_corrected_lr(state, group)
                    key = (X.dtype, X.device, step_size, eps_after_correction(state, group))
                    together.setdefault(key, []).append((X, G, *adam_moments(own, X)))
            for (_, _, step_size, eps), fours in together.items():
                lists = map(list, zip(*fours, strict=True))
                adam_update_(*lists, step_size=step_size, betas=group["betas"], eps=eps)
        for state in states:  # only now: parts of DTensors carry their numbers back
            state["step"] += 1


def _pairs(params: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(params[::2], params[1::2], strict=True))


def _scale(B: Tensor, group: dict[str, Any]) -> float:
    """The factor of the learning rate between exact steps: r/m by default."""
    return float(group["rank"] / B.shape[0] if group["scale"] is None else group["scale"])


def _exact_(factors: tuple[Factor, Factor], group: dict[str, Any], scale: float) -> None:
    """The retraction of W − lr·T, then a restart of Adam on both factors, in place.

    Where W − lr·T has a rank below r, its balanced factors would have a zero column and row, which
    get no gradient ever again: the pair takes an approximate step instead.
    """
    lr, directions = group["lr"], []
    for _, G, state in factors:
        N = adam_direction(
            zero_if_off_(G), state, group["betas"], eps_after_correction(state, group)
        )
        # m̂ / (√v̂ + ε) = √w₂/w₁ · N
        directions.append(N.double() * bias_corrected_lr(state, {**group, "lr": 1.0}))
        restart_adam_(state)
    (B, _, _), (A, _, _) = factors
    new_B, new_A, full_rank = retraction(B, A, directions[0], directions[1], lr)
    for X, D, new in zip((B, A), directions, (new_B, new_A), strict=True):
        X.copy_(old_if_off(torch.where(full_rank, new, X - lr * scale * D), X))


def retraction(
    B: Tensor, A: Tensor, D_B: Tensor, D_A: Tensor, lr: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Balanced factors of the best rank-r approximation of W − lr·T, without an m×n matrix.

    Args:
        B, A: the factors, m×r and r×n.
        D_B, D_A: Adam's directions of the factors, m×r and r×n.
        lr: step size along T.

    Returns:
        B (m×r) and A (r×n) in float64, with BᵀB = AAᵀ = Σ, diagonal and descending; and whether the
        approximation has the full rank r, as a 0-dimensional boolean tensor.
    """
    tolerance, r = RANK_TOLERANCE[B.dtype], B.shape[1]
    Q_B, R_B, R_B_inverse = _qr_with_inverse(B.double(), tolerance)
    Q_A, R_A, R_A_inverse = _qr_with_inverse(A.T.double(), tolerance)
    # X_A = R_B⁻ᵀ D_A (r×n);  X_B = D_B R_A⁻¹ (m×r);  Y = (I − B B⁺) X_B
    X_A, X_B = R_B_inverse.T @ D_A.double(), D_B.double() @ R_A_inverse
    Y = X_B - Q_B @ (R_B @ (R_B_inverse @ (Q_B.T @ X_B)))
    # One QR of both blocks, not of Y alone: where Y is rank-deficient (2r > m, or A is deficient),
    # QR completes Y with columns that are not orthogonal to Q_B.
    Q_L, L = torch.linalg.qr(torch.cat([Q_B, Y], 1))  # m×p and p×2r, p = min(m, 2r)
    Q_R, R = torch.linalg.qr(torch.cat([Q_A, X_A.T], 1))  # n×q and q×2r, q = min(n, 2r)
    # W − lr·T = Q_B R_B R_Aᵀ Q_Aᵀ − lr · (Q_B X_A + Y Q_Aᵀ) = Q_L (L · core · Rᵀ) Q_Rᵀ
    step = -lr * torch.eye(r, dtype=L.dtype, device=L.device)
    core = torch.cat([torch.cat([R_B @ R_A.T, step], 1), torch.cat([step, 0 * step], 1)])
    U, S, Vh = torch.linalg.svd(L @ core @ R.T, full_matrices=False)
    root = S[:r].sqrt()
    full_rank = S[r - 1] > tolerance * S[0]
    return Q_L @ (U[:, :r] * root), (root[:, None] * Vh[:r]) @ Q_R.T, full_rank


def _qr_with_inverse(X: Tensor, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    """Q (m×r) and R (r×r) of X = Q R, and R's pseudo-inverse (r×r)."""
    Q, R = torch.linalg.qr(X)
    U, S, Vh = torch.linalg.svd(R)
    inverse = torch.where(tolerance * S[0] < S, 1 / S, 0.0)
    return Q, R, (Vh.T * inverse) @ U.T
