"""Weight refactorization (2505.22922): replace B and A by balanced factors of the same product."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from lowrank_lab.distributed.dtensors import joint_parts, non_finite, reshard_
from lowrank_lab.distributed.placements import REPLICATED, Placement
from lowrank_lab.layers import (
    Balance,
    FactorizedLinear,
    balance,
    imbalance,
    require_dense_weights,
)
from lowrank_lab.layers.balance import RANK_TOLERANCE, value_of
from lowrank_lab.layers.base import require_own_parameters
from lowrank_lab.techniques.layouts import WEIGHT_COPIES
from lowrank_lab.techniques.momentum import reset_momentum_, resettable
from lowrank_lab.techniques.states import unwrapped
from lowrank_lab.techniques.transport import require_transportable, transport_


class NotFiniteError(ValueError):
    """A factor has NaN or infinite entries."""


class Refactorization(NamedTuple):
    """The names of the layers that `refactorize_` changed, and of those it skipped."""

    changed: list[str]
    rank_deficient: list[str]  # skipped: the product is rank-deficient
    balanced: list[str]  # skipped: the imbalance was at most `above`


@torch.no_grad()
def refactorize_(
    module: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    on_refactor: Literal["keep", "reset", "transport"] = "keep",
    basis: Literal["singular", "nearest"] = "singular",
    above: float = 0.0,
) -> Refactorization:
    """Balance the factors of every factorised layer: B ← U√Σ, A ← √ΣVᵀ with B A = U Σ Vᵀ, in place.

    Afterwards BᵀB = AAᵀ = Σ, diagonal and descending; the product is the same up to rounding. A
    scale in front of the product and a sparse part beside it don't change. Layers with a
    rank-deficient product (B = 0 at the start of LoRA; RANK_TOLERANCE) are skipped and named in the
    result. Factors that are DTensors (FSDP2) are balanced in shards, all ranks together; they
    exchange only r×r matrices if A is sharded by columns, otherwise A as well.

    Args:
        module: a factorised layer, or any model that contains some.
        optimizer: of the factors; needed to `reset` or `transport` their moments.
        on_refactor: `keep` leaves the factors' moments unchanged, `reset` restarts them,
            `transport` transforms them with the factors (`transport_moments_`): first moments of
            any name exactly (Adam and its relatives, SGD, Muon, Lion), second ones approximately.
        basis: `singular`: BᵀB is diagonal and descending, as published. `nearest`: the balanced
            factors of minimal rotation (`Balance.minimal_rotation`), so that kept moments still
            belong to nearly the same entries.
        above: layers with an `imbalance` (0 to 1) of at most this are skipped.

    Returns:
        The names of the changed and of the skipped layers; none of a model without factors.

    Raises:
        ValueError: `on_refactor` or `basis` is not allowed, layers share a factor or have an
            activation between their factors (CoLA), or the optimizer is missing, lacks the factors
            or has states that can't follow them. Nothing has changed then.
        NotFiniteError: a factor is not finite. Nothing has changed then.

    Source: 2505.22922, weight refactorization, by r×r matrices instead of the m×n product.
    """
    require_known(on_refactor, basis)
    if on_refactor != "keep" and optimizer is None:
        raise ValueError(f"optimizer: None is not allowed; {on_refactor} changes its moments")
    require_dense_weights(module, "module")
    require_own_parameters(module)
    reshard_(module)
    _require_finite(module)
    if optimizer is not None:
        require_moments_follow(module, optimizer, on_refactor)
    done = Refactorization([], [], [])
    for name, layer in factorized_layers(module):
        factors = layer.factors()
        with joint_parts((factors[0], 0), (factors[1], 1)) as ((B, A), placement):
            found, skipped = balance_factors_(B, A, basis, above, placement)
        if found is None:
            getattr(done, skipped).append(name)
            continue
        done.changed.append(name)
        if on_refactor == "reset":
            assert optimizer is not None
            reset_momentum_(optimizer, params=factors)
        elif on_refactor == "transport":
            assert optimizer is not None
            transport_(optimizer, *factors, found)
    return done


def require_known(on_refactor: str, basis: str) -> None:
    """Refuse unknown values of two arguments of `refactorize_`."""
    if on_refactor not in ("keep", "reset", "transport"):
        raise ValueError(f"on_refactor: {on_refactor!r} is not allowed; keep, reset or transport")
    if basis not in ("singular", "nearest"):
        raise ValueError(f"basis: {basis!r} is not allowed; singular or nearest")


def balance_factors_(
    B: Tensor, A: Tensor, basis: str, above: float, placement: Placement = REPLICATED
) -> tuple[Balance | None, str]:
    """Balance B and A in place; their balance, or None and the name of the list of those skipped.

    Args:
        B, A: the factors, or shards: rows of B and columns of A.
        basis, above: of `refactorize_`.
        placement: of the shards.
    """
    if above and not value_of(imbalance(B, A, placement) > above, usually=True):
        return None, "balanced"
    found = balance(B, A, placement)
    if not value_of(found.S[-1] > RANK_TOLERANCE[B.dtype] * found.S[0], usually=True):
        return None, "rank_deficient"
    if basis == "nearest":
        found = Balance(*map(placement.broadcast, found.minimal_rotation()))
    _balance_(B, A, found, placement)
    return found, ""


def _balance_(B: Tensor, A: Tensor, found: Balance, placement: Placement) -> None:
    """B ← B T and A ← T⁻¹ A, rounded once: in float64, or in float32 where nothing cancels."""
    # Both results have the norm √ΣS. Cancellation is bounded by how much the norms of the operands
    # exceed it.
    result = (found.S.sum() * len(found.S)).sqrt()
    norm_B, norm_A = placement.global_norm(torch.stack([B.norm(), A.norm()]))
    growth = torch.maximum(norm_B * found.T.norm(), found.T_inverse.norm() * norm_A) / result
    wide = torch.promote_types(
        B.dtype, torch.float32 if value_of(growth < 4, usually=True) else torch.float64
    )
    # copy_, not assignment: sharded and compiled models refer to these tensors.
    B.copy_(B.to(wide) @ found.T.to(wide))
    A.copy_(found.T_inverse.to(wide) @ A.to(wide))


def _require_finite(module: nn.Module) -> None:
    """Refuse factors with NaN or infinite entries, by the name of their layer."""
    for name, layer in factorized_layers(module):
        lost = torch.stack([non_finite(factor) for factor in layer.factors()]).sum()
        if value_of(lost, usually=0):
            raise NotFiniteError(f"module: {name!r} is not allowed; its factors are not finite")


def require_moments_follow(
    module: nn.Module, optimizer: torch.optim.Optimizer, on_refactor: str
) -> None:
    """Refuse an optimizer whose states can't follow the factors in this way."""
    factors = [factor for _, layer in factorized_layers(module) for factor in layer.factors()]
    if on_refactor == "transport":
        require_transportable(optimizer, factors)
    elif on_refactor == "reset":
        for _, layer in factorized_layers(module):
            resettable(optimizer, params=layer.factors())
    else:
        states = [inner.state.get(f, {}) for inner in unwrapped(optimizer) for f in factors]
        for name in WEIGHT_COPIES.intersection(name for state in states for name in state):
            kind = type(optimizer).__name__
            allowed = f"{kind}'s state {name!r} belongs to the old factors; reset"
            raise ValueError(f"on_refactor: 'keep' is not allowed; {allowed}")


def factorized_layers(module: nn.Module) -> Iterator[tuple[str, FactorizedLinear]]:
    """Names and modules of the factorised layers of a model."""
    for name, layer in module.named_modules():
        if isinstance(layer, FactorizedLinear):
            yield name, layer
