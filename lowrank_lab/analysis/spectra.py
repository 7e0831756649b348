"""Singular values of weights, updates and gradients, computed from factors where possible.

The dense product B A is not formed unless other weights are added to it. Its singular values come
from an r×r core; those of a difference of two products come from a 2r×2r core.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lowrank_lab.layers import (
    FactorizedLinear,
    SLTrainLinear,
    dense_singular_values,
    imbalance,
    product_singular_values,
    require_dense_weights,
    truncated_svd,
)


class Factor:
    """A factor of a layer without a dense weight (CoLA), as a matrix whose spectra are its own."""

    def __init__(self, layer: FactorizedLinear, part: str) -> None:
        self.layer, self.part = layer, part

    @property
    def weight(self) -> Tensor:
        found: Tensor = getattr(self.layer, self.part)
        return found

    def parameters(self) -> Iterator[Tensor]:
        yield self.weight

    def state_dict(self) -> dict[str, Tensor]:
        return {"weight": self.weight.detach()}


Layer = nn.Linear | FactorizedLinear | Factor


def matrices(name: str, layer: Layer) -> Iterator[tuple[str, Layer]]:
    """The matrices of a layer to take spectra of, by name: its weight, or `name[B]` and `name[A]`.

    The latter of a layer without a dense weight.
    """
    if isinstance(layer, FactorizedLinear) and not layer.has_dense_weight:
        yield from ((f"{name}[{part}]", Factor(layer, part)) for part in "BA")
    else:
        yield name, layer


def is_factor(name: str) -> bool:
    """Whether recorded spectra of this name are those of a factor, not of a weight."""
    return name.endswith(("[B]", "[A]"))


@torch.no_grad()
def singular_values(layer: Layer) -> Tensor:
    """Singular values of a layer's weight, descending, float32: min(m, n) values, r for factors.

    Raises:
        ValueError: the layer has no dense weight.
    """
    if isinstance(layer, FactorizedLinear):
        require_dense_weights(layer, "layer")
        if layer.has_other_weights:
            return dense_singular_values(layer.dense_weight())
        B, A = layer.factors()
        return product_singular_values(B, A).float() * abs(layer.scale)
    return dense_singular_values(layer.weight)


@torch.no_grad()
def update_singular_values(layer: Layer, start: dict[str, Tensor]) -> Tensor:
    """Singular values of W − W₀, descending, float32; `start` is the layer's earlier state_dict.

    For factors, B A − B₀ A₀ = [B, B₀] [A; −A₀] has at most 2r nonzero singular values; only these
    are returned. Errors are those of `singular_values`.
    """
    if isinstance(layer, FactorizedLinear):
        require_dense_weights(layer, "layer")
    if isinstance(layer, FactorizedLinear) and not layer.has_other_weights:
        B, A = (t.double() for t in layer.factors())
        B0, A0 = (start[name].to(B.device).double() for name in ("B", "A"))
        values = product_singular_values(torch.cat([B, B0], 1), torch.cat([A, -A0]))
        return values.float() * abs(layer.scale)
    moved = _wide_weight(layer, layer.state_dict()) - _wide_weight(layer, start)
    return dense_singular_values(moved)


@torch.no_grad()
def gradient_singular_values(layer: Layer) -> Tensor | None:
    """Singular values of the gradient step in W, descending; None without gradients.

    For a dense weight, they are the singular values of its gradient G. For factors, W moves by
    scale · (G_B A + B G_A) = scale · [G_B, B] [A; G_A], which has at most 2r nonzero singular
    values. SLTrain's sparse part is excluded. Errors are those of `singular_values`.
    """
    if not isinstance(layer, FactorizedLinear):
        if layer.weight.grad is None:
            return None
        return dense_singular_values(layer.weight.grad)
    require_dense_weights(layer, "layer")
    B, A = layer.factors()
    if B.grad is None or A.grad is None:
        return None
    left, right = torch.cat([B.grad, B], 1).double(), torch.cat([A, A.grad]).double()
    return product_singular_values(left, right).float() * abs(layer.scale)


class FactorHealth(NamedTuple):
    """Conditioning of the factors, which refactorization restores."""

    condition_B: float  # largest over smallest singular value; inf where B is rank-deficient
    condition_A: float
    imbalance: float  # ‖BᵀB − AAᵀ‖ / (‖BᵀB‖ + ‖AAᵀ‖): 0 = balanced, near 1 = one-sided


@torch.no_grad()
def factor_health(layer: FactorizedLinear) -> FactorHealth:
    """Condition numbers of B and A, and their imbalance (arXiv 2505.22922)."""
    B, A = (t.double() for t in layer.factors())
    return FactorHealth(_condition(B), _condition(A), float(imbalance(B, A)))


def _condition(X: Tensor) -> float:
    values = torch.linalg.svdvals(X)
    small = values[-1] <= torch.finfo(values.dtype).eps * max(X.shape) * values[0]
    return float("inf") if small else float(values[0] / values[-1])


@torch.no_grad()
def low_rank_shares(layer: SLTrainLinear) -> Tensor:
    """The low-rank part's share of each singular value of scale · B A + S.

    With L = scale · B A, σᵢ = uᵢᵀ (L + S) vᵢ. The share is uᵢᵀ L vᵢ / σᵢ; the rest comes from the
    sparse part S. A share lies outside [0, 1] if the two parts partly cancel.
    """
    L = (layer.scale * (layer.B @ layer.A)).double()
    W = layer.dense_weight()
    U, S, Vh = truncated_svd(W, min(W.shape))
    parts = ((U.T @ L) * Vh).sum(1)
    tiny = (torch.finfo(torch.float64).eps * max(L.shape)) ** 0.5 * S[0]  # squares are resolved
    return torch.where(tiny < S, parts / S, torch.nan).float()


def subspace_overlap(P: Tensor, Q: Tensor) -> Tensor:
    """Overlap ‖Pᵀ Q‖² / r of the column spaces of two m×r matrices, after orthonormalization.

    1 = the same space, 0 = orthogonal spaces. The mean overlap of two random spaces is r / m.
    """
    return (_basis(P).T @ _basis(Q)).square().sum() / P.shape[1]


def captured_energy(G: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """Share of the gradient's energy ‖G‖² in the column spaces of its projections.

    The share is ‖Lᵀ G‖² / ‖G‖², or the same with G R or Lᵀ G R. L and R are orthonormalized first,
    because APOLLO's random projections are not orthonormal. A zero gradient has share 0.
    """
    seen = G.double()
    total = seen.square().sum()
    seen = seen if left is None else _basis(left).T @ seen
    seen = seen if right is None else seen @ _basis(right)
    return torch.where(total > 0, seen.square().sum() / total, torch.zeros_like(total))


def _basis(P: Tensor) -> Tensor:
    """An orthonormal basis of the column space of P, in float64."""
    basis: Tensor = torch.linalg.qr(P.double()).Q
    return basis


def energy_in_top(singular: Tensor, k: int) -> Tensor:
    """Sum of the k largest σ² / Σσ², over the last dimension; 0 if all are zero."""
    squares = singular.double().square().sort(-1, descending=True).values
    total = squares.sum(-1)
    share = squares[..., :k].sum(-1) / total.clamp(min=torch.finfo(squares.dtype).tiny)
    return torch.where(total > 0, share, torch.zeros_like(share))


def _wide_weight(layer: Layer, state: dict[str, Tensor]) -> Tensor:
    """The dense weight of a layer with the given state_dict, in float64."""
    if not isinstance(layer, FactorizedLinear):
        return state["weight"].to(layer.weight.device).double()
    wide = copy.deepcopy(layer).double()
    wide.load_state_dict(state)
    return wide.dense_weight()


def effective_rank(singular: Tensor) -> Tensor:
    """exp of the entropy of σ/Σσ over the last dimension (Roy & Vetterli 2007): from 1 to len(σ).

    All-zero singular values have effective rank 0.
    """
    total = singular.sum(-1, keepdim=True)
    p = singular / total.clamp(min=torch.finfo(singular.dtype).tiny)
    rank = torch.special.entr(p).sum(-1).exp()
    return torch.where(total.squeeze(-1) > 0, rank, torch.zeros_like(rank))


def stable_rank(singular: Tensor) -> Tensor:
    """Σσ² / σ₁² over the last dimension: from 1 to len(σ); 0 if all are zero."""
    largest = singular.amax(-1)
    square = (singular / largest.unsqueeze(-1)).square().sum(-1)
    return torch.where(largest > 0, square, torch.zeros_like(square))


def middle_layers(names: Iterable[str]) -> list[str]:
    """One layer of each kind, from the middle of the model."""
    kinds: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        kinds.setdefault(name.rsplit(".", 1)[-1], []).append(name)
    return [found[len(found) // 2] for found in kinds.values()]
