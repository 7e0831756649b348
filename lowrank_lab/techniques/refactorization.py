"""Weight refactorization (2505.22922): factors of the same product, balanced.

It works on factors and optimizer states of any model.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from lowrank_lab.distributed import REPLICATED, Placement
from lowrank_lab.layers import Balance, FactorizedLinear, balance, imbalance
from lowrank_lab.layers.base import RANK_TOLERANCE, value_of
from lowrank_lab.techniques.momentum import reset_momentum_, transport_moments_


class Refactorization(NamedTuple):
    """What `refactorize_` did: the names of the layers it changed and of those it left alone."""

    changed: list[str]
    rank_deficient: list[str]
    balanced: list[str]


@torch.no_grad()
def refactorize_(
    module: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    on_refactor: Literal["keep", "reset", "transport"] = "keep",
    basis: Literal["singular", "nearest"] = "singular",
    above: float = 0.0,
    placement: Placement = REPLICATED,
) -> Refactorization:
    """Balance the factors of every factorised layer: B ← U√Σ, A ← √ΣVᵀ with B A = U Σ Vᵀ, in place.

    The product stays the same to rounding, and BᵀB = AAᵀ = Σ, diagonal and descending. A scale in
    front of the product and a sparse part beside it are left alone. Layers whose product is
    rank-deficient (B = 0 at the start of LoRA; see RANK_TOLERANCE) are left alone and named in the
    result.

    Args:
        module: a factorised layer or any model that holds some.
        optimizer: what trains the factors; needed to `reset` or `transport` their moments.
        on_refactor: what becomes of the factors' moments: `keep` leaves them, `reset` restarts
            them, `transport` carries them into the new factors (`transport_moments_`).
        basis: `singular`: BᵀB is diagonal and descending, as published; `nearest`: balanced with
            the least turning of the factors (`Balance.nearest`), so that kept moments stay about
            what they were collected for.
        above: a layer whose `imbalance` (0 to 1) is not above this is left alone.
        placement: `Sharded` for shards that are rows of B and columns of A.

    Source: 2505.22922, weight refactorization, through the r×r core instead of the m×n product.
    """
    if on_refactor not in ("keep", "reset", "transport"):
        raise ValueError(f"on_refactor: {on_refactor!r} is not allowed; keep, reset or transport")
    if on_refactor != "keep" and optimizer is None:
        raise ValueError(f"optimizer: None is not allowed; {on_refactor} acts on its moments")
    if on_refactor == "transport":
        assert optimizer is not None
        _refuse_projected(module, optimizer)
    if basis not in ("singular", "nearest"):
        raise ValueError(f"basis: {basis!r} is not allowed; singular or nearest")
    done = Refactorization([], [], [])
    for name, layer in module.named_modules():
        if not isinstance(layer, FactorizedLinear):
            continue
        B, A = layer.factors()
        if above and not value_of(imbalance(B, A, placement) > above, usually=True):
            done.balanced.append(name)
            continue
        found = balance(B, A, placement)
        if not value_of(found.S[-1] > RANK_TOLERANCE[B.dtype] * found.S[0], usually=True):
            done.rank_deficient.append(name)
            continue
        if basis == "nearest":
            found = Balance(*map(placement.broadcast, found.nearest()))
        _balance_(B, A, found, placement)
        done.changed.append(name)
        if on_refactor == "reset":
            assert optimizer is not None
            reset_momentum_(optimizer, params=(B, A))
        elif on_refactor == "transport":
            assert optimizer is not None
            transport_moments_(optimizer.state.get(B, {}), optimizer.state.get(A, {}), found)
    return done


def _balance_(B: Tensor, A: Tensor, found: Balance, placement: Placement) -> None:
    """B ← B T and A ← T⁻¹ A, rounded once: in float64, or in float32 where nothing cancels."""
    # The norms of both results are √ΣS; how far those of their factors exceed it is what float32
    # would lose.
    result = (found.S.sum() * len(found.S)).sqrt()
    norm_B, norm_A = placement.global_norm(torch.stack([B.norm(), A.norm()]))
    growth = torch.maximum(norm_B * found.T.norm(), found.T_inverse.norm() * norm_A) / result
    wide = torch.promote_types(
        B.dtype, torch.float32 if value_of(growth < 4, usually=True) else torch.float64
    )
    # copy_, not assignment: sharded and compiled models keep hold of the tensors.
    B.copy_(B.to(wide) @ found.T.to(wide))
    A.copy_(found.T_inverse.to(wide) @ A.to(wide))


def _refuse_projected(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Moments that live in a subspace of the factors can't be carried along with them."""
    for layer in module.modules():
        for factor in layer.factors() if isinstance(layer, FactorizedLinear) else ():
            state = optimizer.state.get(factor, {})
            projected = state.keys() & {"projection_left", "projection_right"}
            if projected or ("exp_avg" in state and state["exp_avg"].shape != factor.shape):
                raise ValueError("on_refactor: 'transport' is not allowed; moments are projected")
