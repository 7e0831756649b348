"""The leading eigenvectors of Gram matrices by products and small factorisations, for GPUs.

Shapes in this file: A is a symmetric positive semidefinite p×p matrix, GᵀG or G Gᵀ of a gradient;
X is p×c, c = rank + OVERSAMPLING columns. All may have leading dimensions: a stack of matrices goes
through the same few kernels. The host waits once, for the eigenvalues of the c×c core.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank_lab.device import prefers_few_kernels

OVERSAMPLING = 16  # random columns beyond the rank
POWERS = 2  # products with A alone, which separate the largest eigenvalues
FILTERS = 3  # Chebyshev polynomials of A, which separate eigenvalues that are close to each other
RANGE = 1e4  # largest λ₁/λ_c at which float32 resolves all columns of such a polynomial


def leading_eigenvectors(gram: Tensor, rank: int) -> Tensor:
    """The leading eigenvectors (p×rank) of a Gram matrix (p×p), rounded to float32."""
    V: Tensor = torch.linalg.eigh(gram)[1]  # ascending
    return V[..., -rank:].flip(-1).to(torch.float32, memory_format=torch.contiguous_format)


def subspace_iteration(A: Tensor, rank: int, *, seed: int = 0, old: Tensor | None = None) -> Tensor:
    """Approximate leading eigenvectors (p×rank) of A, orthonormal and ordered, in float32.

    Starts from the old eigenvectors, where there are any, and random columns. Each of POWERS and
    FILTERS steps ends with an orthonormalization. The eigenvectors of A within the columns are the
    result (Rayleigh-Ritz). Deterministic in `seed`; a stack has the same random columns in each
    matrix. Exact where columns are as many as rows, or could not be made independent.

    Source: Chebyshev-filtered subspace iteration (Zhou, Saad, Tiago & Chelikowsky 2006).
    """
    if rank + OVERSAMPLING >= A.shape[-1]:
        return leading_eigenvectors(A, rank)
    exact, A = partial(leading_eigenvectors, A, rank), _scaled(A)
    X = _start(A, rank, seed, old)
    for _ in range(POWERS):
        X = orthonormal(A @ X, passes=1)
    for _ in range(FILTERS):
        X = orthonormal(_filtered(A, X), passes=1)
    X = orthonormal(X, passes=1)  # again: to rounding
    try:
        _, rotation = torch.linalg.eigh(X.mT @ (A @ X))  # ascending
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return exact()
    rotation = rotation.flip(-1)[..., :rank].double()  # stays a rotation if TF32 is allowed
    P: Tensor = X.double() @ rotation
    return P.float()


def _scaled(A: Tensor) -> Tensor:
    """A in float32, divided by its largest entry: no power of it over- or underflows."""
    largest = A.diagonal(dim1=-2, dim2=-1).amax(-1)[..., None, None]
    return (A / largest.clamp(min=torch.finfo(A.dtype).tiny)).float()


def _start(A: Tensor, rank: int, seed: int, old: Tensor | None) -> Tensor:
    """The old eigenvectors and random columns: p×c."""
    p = A.shape[-1]
    columns = rank + OVERSAMPLING - (0 if old is None else rank)
    X = random_columns(A, p, columns, seed).expand(*A.shape[:-1], columns)
    return X if old is None else torch.cat([old.float(), X], -1)


def random_columns(like: Tensor, p: int, columns: int, seed: int) -> Tensor:
    """Gaussian p×columns on the device of `like`, fixed by the seed."""
    generator = None if like.is_meta else torch.Generator(like.device).manual_seed(seed)
    return torch.randn(p, columns, generator=generator, device=like.device)


def _filtered(A: Tensor, X: Tensor) -> Tensor:
    """T₃(2A/λ_c − I) X, with Chebyshev's polynomial T₃; A X where that spans too many digits.

    T₃ is within ±1 on the eigenvalues up to λ_c, the least Rayleigh quotient of the orthonormal
    columns of X, and grows fast beyond it.
    """
    AX = A @ X
    quotients = (X * AX).sum(-2)
    top, least = (f(quotients, -1)[..., None, None] for f in (torch.amax, torch.amin))
    usable = top < RANGE * least
    # Y₁ = B X with B = 2A/λ_c − I,  Y₂ = 2B Y₁ − X,  Y₃ = 2B Y₂ − Y₁
    scale = torch.where(usable, 2 / least, 0.0)
    Y1 = scale * AX - X
    Y2 = 2 * (scale * (A @ Y1) - Y1) - X
    Y3 = 2 * (scale * (A @ Y2) - Y2) - Y1
    return torch.where(usable, Y3, AX)


def orthonormal(Y: Tensor, passes: int = 2) -> Tensor:
    """An orthonormal basis (p×c, float32) of the columns of Y, in their order, by CholeskyQR2.

    YᵀY = L Lᵀ ⇒ Q = Y L⁻ᵀ, in float64, twice: one pass orthonormalizes to the square of Y's
    condition number. Columns that depend on earlier ones, zero columns among them, are completed by
    unit vectors. NaN stays NaN; the host doesn't wait.

    Source: 1409.6147.
    """
    Q = F.normalize(Y, dim=-2).double()
    # Above the rounding of float32 and its square above that of float64
    Q.diagonal(dim1=-2, dim2=-1).add_(1e-6)
    for _ in range(passes):
        L, _ = torch.linalg.cholesky_ex(Q.mT @ Q)
        Q = torch.linalg.solve_triangular(L.mT, Q, upper=True, left=False)
    return Q.float()


def power_product(b: Tensor, P: Tensor, left: bool, out: Tensor | None = None) -> Tensor:
    """b bᵀP (left) or bᵀb P (p×r) of b (m×n) and P (p×r), or of stacks of them."""
    X = b if left else b.mT
    return torch.matmul(X, X.mT @ P, out=out)


def thin_q(Y: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Q (p×r) of the QR decomposition of Y (p×r, p ≥ r) whose R has a positive diagonal.

    In a given dtype, or that of Y, which is float32 or wider off CUDA's path.

    On CUDA's path it comes from products and Cholesky decompositions of a whole stack, where
    Householder's reflections would take many kernels per matrix: shifted CholeskyQR3, which is
    exact up to condition numbers of 1e8. Columns that depend on others are completed.

    Source: 1809.11085.
    """
    if not prefers_few_kernels(Y) or Y.dtype == torch.float64:
        Q, R = torch.linalg.qr(Y)
        Q = Q * torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(Y.dtype)[..., None, :]
        found: Tensor = Q.to(dtype or Y.dtype).clone(memory_format=torch.contiguous_format)
        return found
    Q = F.normalize(Y.double(), dim=-2)
    Q.diagonal(dim1=-2, dim2=-1).add_(1e-8)  # below the rounding of float32
    for shift in (1e-12, 0.0, 0.0):
        gram = Q.mT @ Q
        if shift:
            gram.diagonal(dim1=-2, dim2=-1).add_(shift)
        L, _ = torch.linalg.cholesky_ex(gram)
        Q = torch.linalg.solve_triangular(L.mT, Q, upper=True, left=False)
    found = Q.to(dtype or Y.dtype, memory_format=torch.contiguous_format)
    return found
