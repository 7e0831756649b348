"""The rows of `spectra.jsonl`: what a training run records of the singular values of its layers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_lab.analysis.spectra import (
    Layer,
    captured_energy,
    factor_health,
    gradient_singular_values,
    low_rank_shares,
    matrices,
    middle_layers,
    singular_values,
    subspace_overlap,
    update_singular_values,
)
from lowrank_lab.layers import FactorizedLinear, SLTrainLinear, target_layers, truncated_svd
from lowrank_lab.optim.columns import as_matrix


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
        left, right = _projections(state, p)
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
        layers: regular expression; matching layers are recorded, those without a dense weight
            (CoLA) as two matrices, `name[B]` and `name[A]`.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, layers: str) -> None:
        found = target_layers(model, layers)
        self._layers = {n: part for name, layer in found for n, part in matrices(name, layer)}
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
        left, right = _projections(state, weight)
        if isinstance(layer, FactorizedLinear) or (left is None and right is None):
            values = gradient_singular_values(layer)
            return {} if values is None else {"gradient": _rounded(values)}
        if weight.grad is None:
            return {}
        G = weight.grad.detach()
        rank = next(P.shape[1] for P in (left, right) if P is not None)
        U, S, Vh = truncated_svd(G, rank)
        overlaps = [
            float(subspace_overlap(P, asked))
            for P, asked in ((left, U), (right, Vh.T))
            if P is not None
        ]
        return {
            "gradient": _rounded(S.float()),
            "captured_energy": float(captured_energy(G, left, right)),
            "overlap": sum(overlaps) / len(overlaps),
        }


def _projections(state: dict[str, Any], p: Tensor) -> list[Tensor | None]:
    """L and R of a matrix, from a state that may have their indices."""
    pairs = zip(("projection_left", "projection_right"), p.shape, strict=False)
    return [as_matrix(state[name], side) if name in state else None for name, side in pairs]


def _rounded(values: Tensor) -> list[float | None]:
    """Round to the precision of float32 (seven digits), to keep files small."""
    return [_number(float(f"{v:.7g}")) for v in values.tolist()]


def _number(value: float | None) -> float | None:
    """The value, or None if it is not finite: JSON has no such numbers."""
    return value if value is not None and math.isfinite(value) else None
