"""Singular values and leading singular vectors of dense matrices, by their Gram matrices.

The eigenvectors of the smaller Gram matrix, in float64, are as exact as an SVD in float32: errors
of singular values are about 1e-8 times the largest one. They take half of its time or less, on a
GPU a small part. Devices agree to rounding, signs included.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank_lab.layers.balance import gram


def truncated_svd(
    W: Tensor, rank: int, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular vectors of W (m×n) and all its singular values, in float64.

    The largest entry of each singular vector on the shorter side is positive.

    Args:
        W: finite; of any floating point dtype.
        rank: number of singular vectors.
        device: where it is computed; the result is on the device of W.

    Returns:
        U (m×rank), S (min(m, n), descending) and Vᵀ (rank×n). A vector of the longer side is zero
        where its singular value is.
    """
    wide = W.shape[0] <= W.shape[1]
    X = W.to(device or W.device).double()
    X = X.T if wide else X  # tall: longer×shorter
    squares, vectors = torch.linalg.eigh(gram(X))  # ascending
    short = vectors[:, -rank:].flip(1)
    largest = short.gather(0, short.abs().argmax(0, keepdim=True))
    short = short * torch.where(largest < 0, -1.0, 1.0)
    long = F.normalize(X @ short, dim=0, eps=torch.finfo(X.dtype).tiny)
    S = squares.flip(0).clamp(min=0).sqrt()
    U, V = (short, long) if wide else (long, short)
    return U.to(W.device), S.to(W.device), V.T.to(W.device)


def dense_singular_values(W: Tensor) -> Tensor:
    """All singular values of W (m×n), descending, in float32."""
    X = W.double()
    squares: Tensor = torch.linalg.eigvalsh(gram(X.T if X.shape[0] <= X.shape[1] else X))
    return squares.flip(0).clamp(min=0).sqrt().float()
