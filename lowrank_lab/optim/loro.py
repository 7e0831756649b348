"""LORO (ICLR 2025, openreview i0zzO7Hslk): Adam on two factors, and now and then a step of B A.

Shapes in this file: W = B A is m×n, B is m×r, A is r×n; d in the paper's r/d is m. A scale in front
of the product is not the optimizer's: it is part of the gradients.

The exact step moves W along the tangent space of the matrices of rank r and goes back to them.
With W = U S Vᵀ (U m×r, V n×r, both orthonormal) and W's gradient G (m×n), G's tangent part is

    T = U Uᵀ G + (I − U Uᵀ) G V Vᵀ,

and the factors' gradients give both products without G, since D_A = Bᵀ G and D_B = G Aᵀ:

    B = Q_B R_B  ⇒  Uᵀ G = R_B⁻ᵀ D_A =: X_A (r×n)      with U = Q_B
    Aᵀ = Q_A R_A ⇒  G V  = D_B R_A⁻¹ =: X_B (m×r)      with V = Q_A

LORO puts Adam's directions in the place of D_A and D_B. No single G has both any more, and the core
Uᵀ G V is then X_A Q_A from the one and Q_Bᵀ X_B from the other, which differ widely. The form of T
above takes X_A whole and of X_B only what lies outside of U: the core is A's, as in the published
code. With Y = (I − U Uᵀ) X_B the step is

    W − lr·T = [Q_B | Y] · [[R_B R_Aᵀ, −lr·I], [−lr·I, 0]] · [Q_A | X_Aᵀ]ᵀ.

Two QR decompositions, [Q_B | Y] = Q_L L and [Q_A | X_Aᵀ] = Q_R R, leave a matrix of at most 2r×2r,
whose SVD truncated to r is the best approximation of rank r of W − lr·T. The derivation's R_b′ is
L's lower right block; the published code has R_b in its place and misses by more than the step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank_lab.layers.base import RANK_TOLERANCE
from lowrank_lab.optim.base import (
    ProjectedAdamW,
    _check,
    _step_size,
    adam_direction,
    adam_update_,
    averages,
)

# Directions of a factor below this share of its largest singular value count as absent.


class Loro(ProjectedAdamW):
    """LORO on pairs of factors, and AdamW on everything else.

    A group with `rank` holds the factors in the order B1, A1, B2, A2, … (B m×r, A r×n). Its other
    keys are `update_k`, K, steps between two exact steps (500, as in the authors' scripts), and
    `scale`, what the learning rate of the factors is multiplied with between exact steps (None is
    the paper's r/d = r/m). Step K, 2K, … of a pair is exact, with the full learning rate; the
    factors are then balanced, BᵀB = AAᵀ, and their moments and bias corrections start anew.

    ε is added to √v̂ *after* the bias correction, in all groups: it is torch's AdamW here, unlike in
    this project's other projected optimizers. Weight decay is decoupled and applied after the
    update, to each factor by itself.

    A pair of which one factor has no gradient is left alone. Where a factor is rank-deficient
    (B = 0 at the start of LoRA) the exact step takes pseudo-inverses: T is then (B⁺)ᵀ D_A +
    (I − B B⁺) D_B (A⁺)ᵀ. Where even W − lr·T has a rank below r the pair takes an approximate step.

    Args:
        params: groups of pairs with `rank`; groups without it are plain AdamW.
        lr: learning rate, absolute.
        betas: decay rates of the two averages.
        eps: added to √v̂ after bias correction.
        weight_decay: decoupled, applied after the update with lr · weight_decay.

    Raises:
        ValueError: a hyperparameter out of range, an unknown key, parameters that are not pairs.
    """

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
        _check("rank", rank, isinstance(rank, int) and rank >= 1, "a whole number from 1")
        whole = isinstance(period, int) and period >= 1
        _check("update_k", period, whole, "a whole number from 1")
        for key, only in (("state_precision", "same"), ("stochastic_rounding", False)):
            _check(key, group[key], group[key] == only, f"{only} is all that LORO has")
        _check("scale", scale, scale is None or scale > 0, "None (r/m) or above 0")
        _check("params", len(params), len(params) % 2 == 0, "pairs of factors: B1, A1, B2, A2, …")
        for B, A in _pairs(params):
            shapes = (tuple(B.shape), tuple(A.shape))
            factors = B.ndim == A.ndim == 2 and B.shape[1] == A.shape[0] == rank
            _check("params", shapes, factors, f"each B m×{rank}, followed by its A {rank}×n")
            fits = rank <= min(B.shape[0], A.shape[1])
            _check("rank", rank, fits, f"at most min(m, n) of each pair, not {shapes}")

    @torch.no_grad()
    def step_group_(self, params: list[Tensor], group: dict[str, Any]) -> None:
        if "rank" not in group:
            super().step_group_(params, group)
            return
        pairs = [pair for pair in _pairs(group["params"]) if _have_gradients(*pair)]
        for B, A in pairs:
            self._step_pair_(B, A, group)
        if group["weight_decay"] > 0 and pairs:
            factors = [p for pair in pairs for p in pair]
            torch._foreach_mul_(factors, 1.0 - group["lr"] * group["weight_decay"])

    def _step_pair_(self, B: Tensor, A: Tensor, group: dict[str, Any]) -> None:
        """One step of B (m×r) and A (r×n), exact when update_k says so."""
        states = self._advanced(B, group), self._advanced(A, group)
        scale = group["rank"] / B.shape[0] if group["scale"] is None else group["scale"]
        # B ← B − lr · r/d · Adam(G_B);  A ← A − lr · r/d · Adam(G_A)
        update = _exact_ if (states[0]["step"] + 1) % group["update_k"] == 0 else _approximate_
        update((B, A), states, group, scale)
        for state in states:
            state["step"] += 1

    def _plain_adamw_(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """The base's, with ε after the bias correction: √v̂ + ε = (√v + ε·√w₂) / √w₂."""
        batches: dict[float, list[Tensor]] = {}
        for p in params:
            past = self.state[p].get("exp_avg_sq_weight", 0.0)
            beta2 = group["betas"][1]
            batches.setdefault(beta2 * past + 1 - beta2, []).append(p)
        for weight, batch in batches.items():
            eps = _eps({"exp_avg_sq_weight": weight}, group)
            super()._plain_adamw_(batch, {**group, "eps": eps})


def _pairs(params: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(params[::2], params[1::2], strict=True))


def _have_gradients(B: Tensor, A: Tensor) -> bool:
    return B.grad is not None and A.grad is not None


def _eps(state: dict[str, Any], group: dict[str, Any]) -> float:
    """ε·√w₂: what is added to √v, so that ε is added after the bias correction."""
    eps = float(group["eps"])
    return eps * math.sqrt(state["exp_avg_sq_weight"]) if group["correct_bias"] else eps


def _approximate_(
    factors: tuple[Tensor, Tensor],
    states: tuple[dict[str, Any], dict[str, Any]],
    group: dict[str, Any],
    scale: float,
) -> None:
    """X ← X − lr · scale · m̂ / (√v̂ + ε) for both factors, in place."""
    for X, state in zip(factors, states, strict=True):
        assert X.grad is not None
        m, v = averages(state, X)
        step_size, eps = scale * _step_size(state, group), _eps(state, group)
        adam_update_([X], [X.grad], [m], [v], step_size=step_size, betas=group["betas"], eps=eps)


def _exact_(
    factors: tuple[Tensor, Tensor],
    states: tuple[dict[str, Any], dict[str, Any]],
    group: dict[str, Any],
    scale: float,
) -> None:
    """The retraction of W − lr·T, then a full reset of both factors' moments, in place.

    Where that has a rank below r, balanced factors would have a zero column and row, which no
    gradient reaches again: the pair then takes an approximate step.
    """
    lr, directions = group["lr"], []
    for X, state in zip(factors, states, strict=True):
        assert X.grad is not None
        N = adam_direction(X.grad, state, group["betas"], _eps(state, group))
        # m̂ / (√v̂ + ε) = √w₂/w₁ · N
        directions.append(N.double() * _step_size(state, {**group, "lr": 1.0}))
        for name in ("exp_avg", "exp_avg_sq"):
            state[name].zero_()
            state[f"{name}_weight"] = 0.0
    B, A, full_rank = retraction(*factors, directions[0], directions[1], lr)
    for X, D, new in zip(factors, directions, (B, A), strict=True):
        X.copy_(torch.where(full_rank, new, X - lr * scale * D))


def retraction(
    B: Tensor, A: Tensor, D_B: Tensor, D_A: Tensor, lr: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Balanced factors of the best rank-r approximation of W − lr·T; m×n is never formed.

    Args:
        B, A: the factors, m×r and r×n.
        D_B, D_A: the directions of the factors, shaped like them.
        lr: the step along T.

    Returns:
        B (m×r) and A (r×n) in float64, with BᵀB = AAᵀ = Σ, diagonal and descending; and whether the
        approximation has the full rank r, as a 0-dimensional boolean tensor.
    """
    tolerance, r = RANK_TOLERANCE[B.dtype], B.shape[1]
    Q_B, R_B, R_B_inverse = _decomposed(B.double(), tolerance)
    Q_A, R_A, R_A_inverse = _decomposed(A.T.double(), tolerance)
    # X_A = R_B⁻ᵀ D_A (r×n);  X_B = D_B R_A⁻¹ (m×r);  Y = (I − B B⁺) X_B
    X_A, X_B = R_B_inverse.T @ D_A.double(), D_B.double() @ R_A_inverse
    Y = X_B - Q_B @ (R_B @ (R_B_inverse @ (Q_B.T @ X_B)))
    # One QR of both blocks, not one of Y alone: where Y is rank-deficient (2r > m, or A is) the
    # columns that QR fills in for Y would not be orthogonal to Q_B.
    Q_L, L = torch.linalg.qr(torch.cat([Q_B, Y], 1))  # m×p and p×2r, p = min(m, 2r)
    Q_R, R = torch.linalg.qr(torch.cat([Q_A, X_A.T], 1))  # n×q and q×2r, q = min(n, 2r)
    # W − lr·T = Q_B R_B R_Aᵀ Q_Aᵀ − lr · (Q_B X_A + Y Q_Aᵀ) = Q_L (L · core · Rᵀ) Q_Rᵀ
    step = -lr * torch.eye(r, dtype=L.dtype, device=L.device)
    core = torch.cat([torch.cat([R_B @ R_A.T, step], 1), torch.cat([step, 0 * step], 1)])
    U, S, Vh = torch.linalg.svd(L @ core @ R.T, full_matrices=False)
    root = S[:r].sqrt()
    full_rank = S[r - 1] > tolerance * S[0]
    return Q_L @ (U[:, :r] * root), (root[:, None] * Vh[:r]) @ Q_R.T, full_rank


def _decomposed(X: Tensor, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    """Q (m×r) and R (r×r) of X = Q R, and R's pseudo-inverse (r×r)."""
    Q, R = torch.linalg.qr(X)
    U, S, Vh = torch.linalg.svd(R)
    inverse = torch.where(tolerance * S[0] < S, 1 / S, 0.0)
    return Q, R, (Vh.T * inverse) @ U.T
