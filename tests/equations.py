"""Each optimizer's published equations, transcribed in float64.

All take the initial matrix `W` (m×n), the gradients of all steps and, where a projection or mask is
drawn at random, `seen`: what the optimizer kept of it after each step. All return the matrix after
the last step.
"""

import math

import torch
from small_matrices import GAP, LR, is_left, is_right

from lowrank_lab.optim.columns import as_matrix


def step_size(t, betas=(0.9, 0.999)):
    """Adam's two bias corrections and the learning rate."""
    return LR * (1 - betas[1] ** t) ** 0.5 / (1 - betas[0] ** t)


def decayed(W, weight_decay):
    return W - LR * weight_decay * W


class Adam:
    """m and v of 1412.6980 without bias correction."""

    def __init__(self):
        self.m, self.v = 0.0, 0.0

    def __call__(self, R, eps=1e-6):
        self.m, self.v = 0.9 * self.m + 0.1 * R, 0.999 * self.v + 0.001 * R**2
        return self.m / (self.v.sqrt() + eps)


def exact_sides(G, rank, proj_type):
    """L and Rᵀ from the SVD of G in float32; an identity where a side isn't projected."""
    U, _, Vh = torch.linalg.svd(G.float(), full_matrices=False)
    L, Rt = (torch.eye(side, dtype=torch.float64) for side in G.shape)
    if is_left(proj_type, G.shape):
        L = U[:, :rank].to(G.dtype).double()
    if is_right(proj_type, G.shape):
        Rt = Vh[:rank].to(G.dtype).double()
    return L, Rt


def mean_over(squares, v):
    """Averages of v's rows, weighted by each row of squares; equally where all are zero."""
    squares = squares + 1e-12 / squares.shape[1]
    return (squares @ v) / squares.sum(1, keepdim=True)


def follow(adam, old, new, how):
    """Adam after a refresh, from the projections (L, Rᵀ) before it and after it."""
    X, Y = new[0].T @ old[0], old[1] @ new[1].T
    if how == "reset":
        return Adam()
    if how in ("transport", "published"):
        adam.m = X @ adam.m @ Y
    if how == "transport":
        adam.v = mean_over(Y.T**2, mean_over(X**2, adam.v).T).T
    return adam


def refreshes(grads, rank, proj_type, on_refresh):
    """For each gradient: itself, L, Rᵀ, Adam and its number of steps."""
    adam, k, sides = Adam(), 0, None
    for t, G in enumerate(grads, 1):
        if t % GAP == 1:
            old, sides = sides, exact_sides(G, rank, proj_type)
            if old is not None:
                adam, k = follow(adam, old, sides, on_refresh), 0 if on_refresh == "reset" else k
        k += 1
        yield G.double(), *sides, adam, k


def galore(
    W, grads, seen, *, rank, proj_type="std", scale=1.0, weight_decay=0.0, on_refresh="keep", **_
):
    """2403.03507, with a projection of its own."""
    for G, L, Rt, adam, k in refreshes(grads, rank, proj_type, on_refresh):
        N = adam(L.T @ G @ Rt.T)
        W = decayed(W - step_size(k) * scale * L @ N @ Rt, weight_decay)
    return W


def limited(S, previous):
    """A residual whose norm grows by one percent at most."""
    return S if previous is None else S / (max(S.norm() / (previous + 1e-8), 1.01) / 1.01)


def fira(
    W, grads, seen, *, rank, proj_type="std", alpha=1.0, weight_decay=0.0, on_refresh="keep", **_
):
    """2410.01623, with a projection of its own."""
    previous, axis = None, 0 if is_left(proj_type, W.shape) else 1
    for G, L, Rt, adam, k in refreshes(grads, rank, proj_type, on_refresh):
        previous = None if k == 1 else previous
        R = L.T @ G @ Rt.T
        N = adam(R)
        S = (G - alpha * L @ R @ Rt) * N.norm(dim=axis, keepdim=True)
        S = limited(S / (R.norm(dim=axis, keepdim=True) + 1e-8), previous)
        previous = S.norm()
        W = decayed(W - step_size(k) * (alpha * L @ N @ Rt + S), weight_decay)
    return W


def sides_of(state, shape):
    """L and R of a state in float64, an identity where a side isn't projected."""
    pair = zip(("projection_left", "projection_right"), shape, strict=True)
    return [
        as_matrix(state[name], side).double().clone()
        if name in state
        else torch.eye(side, dtype=torch.float64)
        for name, side in pair
    ]


def golore(W, grads, seen, *, scale=1.0, weight_decay=0.0, gap=GAP, on_refresh="published", **_):
    """2410.11289, with the optimizer's projections."""
    adam, old, k = Adam(), None, 0
    for t, (G, state) in enumerate(zip(grads, seen, strict=True), 1):
        L, R = sides_of(state, W.shape)
        if old is not None and t % gap == 1:
            adam, k = follow(adam, old, (L, R.T), on_refresh), 0 if on_refresh == "reset" else k
        k, old = k + 1, (L, R.T)
        N = adam(L.T @ G.double() @ R)
        W = decayed(W - step_size(k) * scale * L @ N @ R.T, weight_decay)
    return W


def frugal(W, grads, seen, *, inactive_lr_scale=1.0, weight_decay=0.0, on_refresh="reset", **_):
    """2411.07837 with the optimizer's projections."""
    adam, old, k = Adam(), None, 0
    for t, (G, state) in enumerate(zip(grads, seen, strict=True), 1):
        G, (L, R) = G.double(), sides_of(state, W.shape)
        if old is not None and t % GAP == 1:
            adam, k = follow(adam, old, (L, R.T), on_refresh), 0 if on_refresh == "reset" else k
        k, old, r = k + 1, (L, R.T), L.T @ G @ R
        adam(r)
        N = adam.m / (1 - 0.9**k) / ((adam.v / (1 - 0.999**k)).sqrt() + 1e-8)
        rest = G - L @ r @ R.T
        rest = torch.where(rest.abs() > 1e-9 * G.abs().max(), rest, 0.0).sign()
        W = decayed(W, weight_decay) - LR * (L @ N @ R.T + inactive_lr_scale * rest)
    return W


def ldadam(
    W, grads, seen, *, rank, proj_type="std", rho=0.908, error_feedback=True, weight_decay=0.0, **_
):
    """2410.16103, algorithm 1; transposed where the right side is projected.

    With the optimizer's projections, because rounding errors of one power iteration grow in the
    next ones; with projections of its own if `seen` is empty.
    """
    left, (b1, b2), e = is_left(proj_type, W.shape), (0.908, 0.99), 0.0
    for k, G in enumerate(grads):  # k completed steps
        L, Rt = exact_sides(G, rank, proj_type)
        if seen:
            L, Rt = (X.T if i else X for i, X in enumerate(sides_of(seen[k], W.shape)))
        G = (G.double() + e) if left else (G.double() + e).T
        if k == 0:
            P = L if left else Rt.T
            m, v, old, before = 0.0, 0.0, P, torch.zeros(rank, G.shape[1]).double()
        else:
            old, before = P, m
            b = rho * P @ m / (1 - b1**k) + (1 - rho) * G
            P = torch.linalg.qr(b @ (b.T @ P))[0] if not seen else L if left else Rt.T
            C, m_hat, v_hat = P.T @ old, m / (1 - b1**k), v / (1 - b2**k)
            m = C @ m
            v = (1 - b2**k) * (C**2 @ (v_hat - m_hat**2) + (C @ m_hat) ** 2).abs()
        R = P.T @ G
        if error_feedback:
            e = G - P @ R + b1 / (1 - b1) * (old @ before - P @ (torch.zeros_like(R) + m))
            e = e if left else e.T
        m, v = b1 * m + (1 - b1) * R, b2 * v + (1 - b2) * R**2
        N = m / (1 - b1 ** (k + 1)) / ((v / (1 - b2 ** (k + 1))).sqrt() + 1e-8)
        W = decayed(W, weight_decay)
        W = W - LR * (P @ N if left else (P @ N).T)
    return W


def apollo(
    W, grads, seen, *, proj_type="std", scale_type="channel", scale=1.0, weight_decay=0.0, **_
):
    """2412.05270, with the optimizer's projections."""
    adam, previous, left = Adam(), None, is_left(proj_type, W.shape)
    axis = (0, 1) if scale_type == "tensor" else 0 if left else 1
    for t, (G, state) in enumerate(zip(grads, seen, strict=True), 1):
        G, (L, R) = G.double(), sides_of(state, W.shape)
        R = L.T @ G @ R
        S = G * adam(R).norm(dim=axis, keepdim=True) / (R.norm(dim=axis, keepdim=True) + 1e-8)
        S = limited(S, previous)
        previous = S.norm()
        W = decayed(W - step_size(t) * math.sqrt(scale) * S, weight_decay)
    return W


def spam(W, grads, seen, *, update_proj_gap, density=1.0, weight_decay=0.0, **_):
    """2501.06842 with 10 steps of warmup, clipping from 5 on at 100; the optimizer's masks."""
    m, v = torch.zeros_like(W), torch.zeros_like(W)
    mask = None
    for t, (G, state) in enumerate(zip(grads, seen, strict=True), 1):
        k, factor = t % update_proj_gap, 1.0
        new = state.get("mask", torch.ones_like(W, dtype=torch.bool))
        if k == 0:
            kept = mask & new if density < 1 else torch.zeros_like(new)
            m, v = m * kept, v * kept
        mask = new
        if t >= update_proj_gap and k < 10:
            factor = 1 - 0.99 * (1 + math.cos(math.pi * (k + 1) / 11)) / 2
        g = G.double() * mask
        if k >= 5:
            g = torch.where(g**2 > 100 * v, g.sign() * (100 * v).sqrt(), g)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        W = W - factor * step_size(t) * m / (v.sqrt() + 1e-6)
        W = torch.where(mask, decayed(W, weight_decay), W)
    return W


def stable_spam(W, grads, seen, *, update_proj_gap, weight_decay=0.0, **_):
    """2502.17055."""
    m, v, k = 0.0, 0.0, 0
    peak = norm = square = torch.zeros(()).double()
    for T, G in enumerate(grads, 1):
        if T % update_proj_gap == 0:
            m, v, k = 0.0, 0.0, 0
        k, g = k + 1, G.double()
        peak = 0.999 * peak + 0.001 * g.abs().max()
        limit = peak / (1 - 0.999**T)
        g = torch.where(g.abs() > limit, g * limit / g.abs().max(), g)
        norm, square = 0.7 * norm + 0.3 * g.norm(), 0.9 * square + 0.1 * g.norm() ** 2
        size = norm / (1 - 0.7**T) / ((square / (1 - 0.9**T)).sqrt() + 1e-8)
        g = g / g.norm() * size if g.norm() > 0 else g
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        W = decayed(W, weight_decay)
        W = W - LR * m / (1 - 0.9**k) / ((v / (1 - 0.999**k)).sqrt() + 1e-8)
    return W


def tangent(B, A, D_B, D_A, rtol=1e-6):
    """LORO's T = (B⁺)ᵀ D_A + (I − B B⁺) D_B (A⁺)ᵀ (m×n)."""
    B, A, D_B, D_A = (X.double() for X in (B, A, D_B, D_A))
    B_plus, A_plus = torch.linalg.pinv(B, rtol=rtol), torch.linalg.pinv(A, rtol=rtol)
    outside = D_B - B @ (B_plus @ D_B)
    return B_plus.T @ D_A + outside @ A_plus.T


def loro(W, grads, seen, *, factors, update_k, weight_decay=0.0, eps=1e-8, scale=None, **_):
    """LORO (ICLR 2025) on factors B (m×r) and A (r×n); the product after all steps."""
    B, A = (X.double() for X in factors)
    r, moments, k = A.shape[0], [0.0] * 4, 0
    scale = r / B.shape[0] if scale is None else scale
    for t, G in enumerate(grads, 1):
        k, G_B, G_A = k + 1, G.double() @ A.T, B.T @ G.double()
        fresh = (0.1 * G_B, 0.1 * G_A, 0.001 * G_B**2, 0.001 * G_A**2)
        decays = (0.9, 0.9, 0.999, 0.999)
        moments = [d * x + y for d, x, y in zip(decays, moments, fresh, strict=True)]
        m_B, m_A, v_B, v_A = (x / (1 - d**k) for x, d in zip(moments, decays, strict=True))
        D_B, D_A = m_B / (v_B.sqrt() + eps), m_A / (v_A.sqrt() + eps)
        if t % update_k == 0:
            U, S, Vh = torch.linalg.svd(B @ A - LR * tangent(B, A, D_B, D_A), full_matrices=False)
            B, A = U[:, :r] * S[:r].sqrt(), S[:r].sqrt()[:, None] * Vh[:r]
            moments, k = [0.0] * 4, 0
        else:
            B, A = B - LR * scale * D_B, A - LR * scale * D_A
        B, A = decayed(B, weight_decay), decayed(A, weight_decay)
    return B @ A


def scale(W, grads, seen, *, norm_dim=1, momentum=0.0, weight_decay=0.0, **_):
    """SCALE, 2506.16659."""
    M = 0.0
    for G in grads:
        M = G.double() if not momentum else momentum * M + (1 - momentum) * G.double()
        rms = M.square().mean(dim=norm_dim, keepdim=True).sqrt()
        W = decayed(W, weight_decay) - LR * M / rms.clamp(min=1e-8)
    return W


def newton_schulz(X, schedule):
    """X ← aX + (bA + cA²)X with A = X Xᵀ, of a matrix divided by its norm."""
    X = X / max(X.norm(), 1e-7)
    for a, b, c in schedule:
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    return X


def normuon(
    W, grads, seen, *, momentum=0.95, beta2=0.95, nesterov=True, update_scale="preserve_norm",
    use_adjusted_lr=False, weight_decay=0.0, eps=1e-10, **_,
):  # fmt: skip
    """NorMuon, 2510.05491."""
    (m, n), M, v = W.shape, 0.0, 0.0
    for G in grads:
        M = momentum * M + (1 - momentum) * G.double()
        U = momentum * M + (1 - momentum) * G.double() if nesterov else M
        Q = newton_schulz(U, [(3.4445, -4.7750, 2.0315)] * 5)
        v = beta2 * v + (1 - beta2) * Q.square().mean(1, keepdim=True)
        N = Q / (v.sqrt() + eps)
        size, rate = Q.norm(), LR * math.sqrt(max(1, m / n))
        if use_adjusted_lr:
            rate = LR * 0.2 * math.sqrt(max(m, n))
        if update_scale == "match_rms":
            size, rate = 0.2 * math.sqrt(m * n), LR
        W = decayed(W, weight_decay) - rate * size * N / (N.norm() + eps)
    return W


QUINTIC = ((4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037),
           (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012))  # fmt: skip


def spectron(W, grads, seen, *, factors, vectors, momentum=0.9, weight_decay=0.0, **_):
    """Spectron, 2602.12429, on factors B (m×r) and A (r×n); the product after all steps.

    `vectors`: where power iteration starts, along the longer side of each factor.
    """
    Xs, Ms = [X.detach().double() for X in factors], [0.0, 0.0]
    us = [u.flatten().double() for u in vectors]
    for G in grads:
        B, A = Xs
        grads_of = (G.double() @ A.T, B.T @ G.double())
        sigmas, Qs = [], []
        for i in range(2):
            Xs[i] = decayed(Xs[i], weight_decay)
            tall = Xs[i] if Xs[i].shape[0] > Xs[i].shape[1] else Xs[i].T
            v = tall.T @ us[i]
            us[i] = tall @ (v / v.norm())
            us[i] = us[i] / us[i].norm()
            v = tall.T @ us[i]
            sigmas.append(us[i] @ tall @ (v / v.norm()))
            Ms[i] = momentum * Ms[i] + (1 - momentum) * grads_of[i]
            Qs.append(newton_schulz(Ms[i], QUINTIC))
        Xs = [X - LR / (sum(sigmas) + 1) * Q for X, Q in zip(Xs, Qs, strict=True)]
    return Xs[0] @ Xs[1]
