"""Singular values of weights, updates and gradients, from factors where there are any.

Nothing here forms a product that its factors can stand for: of B A only the r×r core is decomposed,
of a difference of two products the 2r×2r core.
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
    """Singular values of a layer's weight, descending, float32: min(m, n), or r from factors."""
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

    Of B A − B₀ A₀ = [B, B₀] [A; −A₀] at most 2r are not zero, and only these are returned.
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
    """Singular values of the step that the gradient asks of W, descending; None without gradients.

    Of a dense weight those of its gradient G. Of factors, along whose gradients W moves by
    scale · (G_B A + B G_A), those of [G_B, B] [A; G_A]: at most 2r are not zero. What trains beside
    the factors (SLTrain's sparse part) is left out.
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
    """How well factors are conditioned: what refactorization repairs."""

    condition_B: float  # largest over smallest singular value; inf where B is rank-deficient
    condition_A: float
    imbalance: float  # ‖BᵀB − AAᵀ‖ / (‖BᵀB‖ + ‖AAᵀ‖): 0 balanced, towards 1 one-sided


@torch.no_grad()
def factor_health(layer: FactorizedLinear) -> FactorHealth:
    """Condition numbers of B and A, and how far they are from balanced (2505.22922)."""
    B, A = (t.double() for t in layer.factors())
    return FactorHealth(_condition(B), _condition(A), float(imbalance(B, A)))


def _condition(X: Tensor) -> float:
    values = torch.linalg.svdvals(X)
    small = values[-1] <= torch.finfo(values.dtype).eps * max(X.shape) * values[0]
    return float("inf") if small else float(values[0] / values[-1])


@torch.no_grad()
def low_rank_shares(layer: SLTrainLinear) -> Tensor:
    """The share of scale · B A in each singular value of scale · B A + S, by its index.

    σᵢ = uᵢᵀ (L + S) vᵢ, of which uᵢᵀ L vᵢ comes from the low-rank part L and the rest from the
    sparse one S. A share may lie outside 0 … 1, where the two parts work against each other.
    """
    L = (layer.scale * (layer.B @ layer.A)).double()
    U, S, Vh = torch.linalg.svd(layer.dense_weight().double(), full_matrices=False)
    parts = ((U.T @ L) * Vh).sum(1)
    tiny = torch.finfo(torch.float64).eps * max(L.shape) * S[0]
    return torch.where(tiny < S, parts / S, torch.nan).float()


def subspace_overlap(P: Tensor, Q: Tensor) -> Tensor:
    """‖Pᵀ Q‖² / r of the spaces that the columns of two m×r matrices span, made orthonormal.

    1 is the same space, 0 an orthogonal one; two random spaces overlap by r / m on average.
    """
    return (_basis(P).T @ _basis(Q)).square().sum() / P.shape[1]


def captured_energy(G: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """Share of a gradient's energy ‖G‖² in the spaces that a projection's columns span.

    ‖Lᵀ G‖² / ‖G‖² (or G R, Lᵀ G R) with L and R made orthonormal first, which APOLLO's random ones
    aren't; 0 of no gradient.
    """
    seen = G.double()
    total = seen.square().sum()
    seen = seen if left is None else _basis(left).T @ seen
    seen = seen if right is None else seen @ _basis(right)
    return torch.where(total > 0, seen.square().sum() / total, torch.zeros_like(total))


def _basis(P: Tensor) -> Tensor:
    """An orthonormal basis, in float64, of what the columns of P span."""
    basis: Tensor = torch.linalg.qr(P.double()).Q
    return basis


def energy_in_top(singular: Tensor, k: int) -> Tensor:
    """Σ of the k largest σ² over Σσ², over the last dimension; 0 if all are zero."""
    squares = singular.double().square().sort(-1, descending=True).values
    total = squares.sum(-1)
    share = squares[..., :k].sum(-1) / total.clamp(min=torch.finfo(squares.dtype).tiny)
    return torch.where(total > 0, share, torch.zeros_like(share))


def _wide_weight(layer: Layer, state: dict[str, Tensor]) -> Tensor:
    """The dense weight that a state_dict of the layer stands for, in float64."""
    if not isinstance(layer, FactorizedLinear):
        return state["weight"].to(layer.weight.device).double()
    wide = copy.deepcopy(layer).double()
    wide.load_state_dict(state)
    return wide.dense_weight()


@torch.no_grad()
def momentum_direction(layer: Layer, optimizer: torch.optim.Optimizer) -> Tensor | None:
    """The direction in which Adam's first moments would move W, m×n, float32; None without moments.

    Projected moments are lifted (L m, m Rᵀ), and those of factors give scale · (m_B A + B m_A): a
    dense matrix in each case, so that before and after an event can be compared.
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
        return lifted if lifted.shape == p.shape else None  # its own layout: SPAM's masked entries

    if not isinstance(layer, FactorizedLinear):
        return moment(layer.weight)
    m_B, m_A = (moment(p) for p in layer.factors())
    if m_B is None or m_A is None:
        return None
    B, A = (p.float() for p in layer.factors())
    return layer.scale * (m_B @ A + B @ m_A)


class SpectraRecorder:
    """Records what `spectra.jsonl` holds of a model in training.

    Args:
        model, optimizer: in training; the model as it was initialised, of whose recorded layers
            copies are kept on the CPU.
        layers: regular expression of the layers to record.
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
        """Note the gradients of the step that is about to be taken; the next `rows` have them."""
        self._gradients = {name: self._gradient(layer) for name, layer in self._layers.items()}

    def rows(self, step: int) -> list[dict[str, Any]]:
        """One row a layer.

        Always: step, layer, singular_values (of W) and update (of W − W₀). Where there are: of the
        gradients that were seen, gradient (singular values), captured_energy and overlap (of the
        projection that was used until then with the one that this gradient asks for); condition_B,
        condition_A (null for a deficient one) and imbalance of factors; low_rank_share by index.
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
        """Remember the moments of one layer of each kind, before something happens to them."""
        self._moments = {}
        for name in middle_layers(self._layers):
            found = momentum_direction(self._layers[name], self._optimizer)
            if found is not None:
                self._moments[name] = found.cpu()  # the step's peak memory is not to hold it

    def momentum_rows(self, step: int, event: str) -> list[dict[str, Any]]:
        """What became of the moments since `note_momentum`: a row a layer.

        step, layer, event, momentum_cosine (of the directions before and after; 0 if one of them is
        nothing) and momentum_ratio (of their lengths).
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
    """As many digits as float32 has, and no more, so that files stay small."""
    return [_number(float(f"{v:.7g}")) for v in values.tolist()]


def _number(value: float | None) -> float | None:
    """The value, or None where JSON has no number for it."""
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
