"""Singular values of weights, from the factors where there are any, and their summaries."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowrank_lab.layers import FactorizedLinear, product_singular_values, target_layers


@torch.no_grad()
def singular_values(layer: nn.Linear | FactorizedLinear) -> Tensor:
    """Singular values of a layer's weight, descending, float32: min(m, n), or r from factors."""
    if isinstance(layer, FactorizedLinear):
        if layer.has_other_weights:
            dense: Tensor = torch.linalg.svdvals(layer.dense_weight().float())
            return dense
        B, A = layer.factors()
        return product_singular_values(B, A).float() * abs(layer.scale)
    values: Tensor = torch.linalg.svdvals(layer.weight.float())
    return values


def weight_spectra(model: nn.Module, layers: str) -> dict[str, list[float]]:
    """Singular values of each target layer whose name matches the regular expression `layers`."""
    return {name: singular_values(layer).tolist() for name, layer in target_layers(model, layers)}


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
