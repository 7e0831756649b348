"""Singular values of weights, updates and gradients, computed from factors where possible.

The dense product B A is not formed unless other weights are added to it. Its singular values come
from an r×r core; those of a difference of two products come from a 2r×2r core.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowrank_lab.layers import (
    FactorizedLinear,
    SLTrainLinear,
    imbalance,
    product_singular_values,
    target_layers,
)

Layer = nn.Linear | FactorizedLinear


@torch.no_grad()
def singular_values(layer: Layer) -> Tensor:
    """Singular values of a layer's weight, descending, float32: min(m, n) values, r for factors."""
    if isinstance(layer, FactorizedLinear):
        if layer.has_other_weights:
            dense: Tensor = torch.linalg.svdvals(layer.dense_weight().float())
            return dense
        B, A = layer.factors()
        return product_singular_values(B, A).float() * abs(layer.scale)
    values: Tensor = torch.linalg.svdvals(layer.weight.float())
    return values


@torch.no_grad()
def update_singular_values(layer: Layer, start: dict[str, Tensor]) -> Tensor:
    """Singular values of W − W₀, descending, float32; `start` is the layer's earlier state_dict.

    For factors, B A − B₀ A₀ = [B, B₀] [A; −A₀] has at most 2r nonzero singular values; only these
    are returned.
    """
    if isinstance(layer, FactorizedLinear) and not layer.has_other_weights:
        B, A = (t.double() for t in layer.factors())
        B0, A0 = (start[name].to(B.device).double() for name in ("B", "A"))
        values = product_singular_values(torch.cat([B, B0], 1), torch.cat([A, -A0]))
        return values.float() * abs(layer.scale)
    moved = _wide_weight(layer, layer.state_dict()) - _wide_weight(layer, start)
    found: Tensor = torch.linalg.svdvals(moved.float())
    return found


@torch.no_grad()
def gradient_singular_values(layer: Layer) -> Tensor | None:
    """Singular values of the gradient step in W, descending; None without gradients.

    For a dense weight, they are the singular values of its gradient G. For factors, W moves by
    scale · (G_B A + B G_A) = scale · [G_B, B] [A; G_A], which has at most 2r nonzero singular
    values. SLTrain's sparse part is excluded.
    """
    if not isinstance(layer, FactorizedLinear):
        if layer.weight.grad is None:
            return None
        dense: Tensor = torch.linalg.svdvals(layer.weight.grad.float())
        return dense
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
    U, S, Vh = torch.linalg.svd(layer.dense_weight().double(), full_matrices=False)
    parts = ((U.T @ L) * Vh).sum(1)
    tiny = torch.finfo(torch.float64).eps * max(L.shape) * S[0]
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


@torch.no_grad()
def momentum_direction(layer: Layer, optimizer: torch.optim.Optimizer) -> Tensor | None:
    """The direction of Adam's first moments in W (m×n), float32; None without moments.

    Projected moments m are projected back (L m, m Rᵀ). The moments of factors give
    scale · (m_B A + B m_A). The result is always dense, so it can be compared across an event.
    """

    def moment(p: Tensor) -> Tensor | None:
        state = optimizer.state.get(p, {})
        found = state.get("exp_avg", state.get("momentum_buffer"))
        if found is None or found.numel() == 0:
            return None
        plain = torch.empty(found.shape, dtype=found.dtype, device=found.device).copy_(found)
        wide = plain.float()
        left, right = state.get("projection_left"), state.get("projection_right")
        wide = wide if left is None else left.float() @ wide
        lifted = wide if right is None else wide @ right.float().T
        return lifted if lifted.shape == p.shape else None  # other layouts: SPAM's masked entries

    if not isinstance(layer, FactorizedLinear):
        return moment(layer.weight)
    m_B, m_A = (moment(p) for p in layer.factors())
    if m_B is None or m_A is None:
        return None
    B, A = (p.float() for p in layer.factors())
    return layer.scale * (m_B @ A + B @ m_A)


class SpectraRecorder:
    """Records the rows of `spectra.jsonl` during training.

    Args:
        model: the initialised model; the initial weights of recorded layers are copied to the CPU.
        optimizer: the optimizer of the model.
        layers: regular expression; matching layers are recorded.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, layers: str) -> None:
        self._layers = dict(target_layers(model, layers))
        self._optimizer = optimizer
        self._start = {
            name: {k: v.detach().to("cpu", copy=True) for k, v in layer.state_dict().items()}
            for name, layer in self._layers.items()
        }
        self._gradients: dict[str, dict[str, Any]] = {}
        self._moments: dict[str, Tensor] = {}

    def see_gradients(self) -> None:
        """Store the spectra of the current gradients; the next call of `rows` includes them."""
        self._gradients = {name: self._gradient(layer) for name, layer in self._layers.items()}

    def rows(self, step: int) -> list[dict[str, Any]]:
        """One row per layer: step, layer, singular_values (of W), update (of W − W₀), and:

        - after `see_gradients`: gradient (its singular values); for projected gradients also
          captured_energy and overlap (of the projection with the gradient's top singular vectors)
        - for factors: condition_B, condition_A (null if rank-deficient) and imbalance
        - for SLTrain: low_rank_share, per singular value
        """
        found = []
        for name, layer in self._layers.items():
            row: dict[str, Any] = {"step": step, "layer": name}
            if not all(bool(p.isfinite().all()) for p in layer.parameters()):
                continue  # the run is about to stop
            values = singular_values(layer)
            row["singular_values"] = _rounded(values)
            moved = update_singular_values(layer, self._start[name])
            rounding = torch.finfo(torch.float32).eps * values[0]
            row["update"] = _rounded(torch.where(moved > rounding, moved, 0.0))
            row |= self._gradients.get(name, {})
            if isinstance(layer, FactorizedLinear):
                health = factor_health(layer)._asdict()
                row |= {k: _number(v) for k, v in health.items()}
            if isinstance(layer, SLTrainLinear):
                row["low_rank_share"] = _rounded(low_rank_shares(layer))
            found.append(row)
        self._gradients = {}
        return found

    def note_momentum(self) -> None:
        """Store the momentum direction of one layer of each kind, before an event."""
        self._moments = {}
        for name in middle_layers(self._layers):
            found = momentum_direction(self._layers[name], self._optimizer)
            if found is not None:
                self._moments[name] = found.cpu()  # not part of the step's peak memory

    def momentum_rows(self, step: int, event: str) -> list[dict[str, Any]]:
        """The change in momentum since `note_momentum`: one row per layer.

        Columns: step, layer, event, momentum_cosine (between the directions before and after; 0 if
        either is zero) and momentum_ratio (norm after / norm before).
        """
        found = []
        for name, before in self._moments.items():
            after = momentum_direction(self._layers[name], self._optimizer)
            after = torch.zeros_like(before) if after is None else after.cpu()
            lengths = float(before.norm()), float(after.norm())
            cosine = float((before * after).sum()) / (lengths[0] * lengths[1] or 1.0)
            ratio = lengths[1] / lengths[0] if lengths[0] else None
            found.append(
                {
                    "step": step, "layer": name, "event": event,
                    "momentum_cosine": _number(cosine), "momentum_ratio": _number(ratio),
                }
            )  # fmt: skip
        self._moments = {}
        return found

    def _gradient(self, layer: Layer) -> dict[str, Any]:
        weight = layer.B if isinstance(layer, FactorizedLinear) else layer.weight
        state = self._optimizer.state.get(weight, {})
        left, right = state.get("projection_left"), state.get("projection_right")
        if isinstance(layer, FactorizedLinear) or (left is None and right is None):
            values = gradient_singular_values(layer)
            return {} if values is None else {"gradient": _rounded(values)}
        if weight.grad is None:
            return {}
        G = weight.grad.detach()
        U, S, Vh = torch.linalg.svd(G.float(), full_matrices=False)
        overlaps = [
            float(subspace_overlap(P, asked[:, : P.shape[1]]))
            for P, asked in ((left, U), (right, Vh.T))
            if P is not None
        ]
        return {
            "gradient": _rounded(S),
            "captured_energy": float(captured_energy(G, left, right)),
            "overlap": sum(overlaps) / len(overlaps),
        }


def middle_layers(names: Iterable[str]) -> list[str]:
    """One layer of each kind, from the middle of the model."""
    kinds: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        kinds.setdefault(name.rsplit(".", 1)[-1], []).append(name)
    return [found[len(found) // 2] for found in kinds.values()]


def _rounded(values: Tensor) -> list[float | None]:
    """Round to the precision of float32 (seven digits), to keep files small."""
    return [_number(float(f"{v:.7g}")) for v in values.tolist()]


def _number(value: float | None) -> float | None:
    """The value, or None if it is not finite: JSON has no such numbers."""
    return value if value is not None and math.isfinite(value) else None


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
