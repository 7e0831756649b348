"""The paper's two techniques (2505.22922): weight refactorization and momentum reset.

Both are functions of factors and optimizer states and work on any model and optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowrank_lab.layers import FactorizedLinear, svd_of_product

# A layer is left alone while the smallest singular value of B·A is below this share of the largest.
RANK_TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.bfloat16: 1e-3,
    torch.float16: 1e-4,
}


class Refactorization(NamedTuple):
    """What `refactorize_` did: the names of the layers it changed and of those it left alone."""

    changed: list[str]
    rank_deficient: list[str]


@torch.no_grad()
def refactorize_(module: nn.Module) -> Refactorization:
    """Balance the factors of every factorised layer: B ← U√Σ, A ← √ΣVᵀ with B A = U Σ Vᵀ, in place.

    The product stays the same to rounding, and BᵀB = AAᵀ = Σ, diagonal and descending. A scale in
    front of the product and a sparse part beside it are left alone. Layers whose product is
    rank-deficient (B = 0 at the start of LoRA; see RANK_TOLERANCE) are left alone and named in the
    result.

    Source: 2505.22922, weight refactorization, through the r×r core instead of the m×n product.
    """
    done = Refactorization([], [])
    for name, layer in module.named_modules():
        if isinstance(layer, FactorizedLinear):
            B, A = layer.factors()
            balanced = balanced_factors(B, A)
            if balanced is None:
                done.rank_deficient.append(name)
            else:
                # copy_, not assignment: sharded and compiled models keep hold of the tensors.
                B.copy_(balanced[0])
                A.copy_(balanced[1])
                done.changed.append(name)
    return done


def balanced_factors(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor] | None:
    """U√Σ (m×r) and √ΣVᵀ (r×n) of B A = U Σ Vᵀ, or None if the product is rank-deficient."""
    U, S, Vh = svd_of_product(B, A)
    if not bool(S[-1] > RANK_TOLERANCE[B.dtype] * S[0]):
        return None
    root = S.sqrt()
    return U * root, root[:, None] * Vh


@torch.no_grad()
def reset_momentum_(
    optimizer: torch.optim.Optimizer,
    strength: float = 1.0,
    moments: Sequence[str] = ("exp_avg", "exp_avg_sq"),
    params: Iterable[Tensor] | None = None,
) -> int:
    """Shrink Adam's moments, with their bias corrections, by the factor 1 − strength, in place.

    Strength 1 is exactly a restart of Adam, 0 changes nothing; between them the past keeps a weight
    of 1 − strength. Projections and schedules are left alone. A full restart also restarts Fira's
    growth limiter, which compares with norms from before.

    This project's optimizers keep a weight for each average, and those are scaled with the
    averages. torch's Adam and AdamW have one step count t for both. There t′ is chosen so that 1 −
    β₂^t′ is (1 − strength)(1 − β₂ᵗ), exact for the second moment, and the first moment is scaled so
    that its corrected value stays the same: only how fast it then forgets differs.

    Args:
        strength: s in [0, 1].
        moments: which of the averages. torch's optimizers can't reset one alone and refuse it.
        params: the parameters whose moments are reset; all by default.

    Returns:
        The number of parameters whose moments were reset.

    Raises:
        ValueError: a strength outside [0, 1], unknown moments, a moment that can't be reset alone.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength: {strength!r} is not allowed; from 0 to 1")
    known = ("exp_avg", "exp_avg_sq")
    if not moments or not set(moments) <= set(known):
        raise ValueError(f"moments: {moments!r} is not allowed; one or both of {', '.join(known)}")
    if strength == 0:
        return 0
    chosen = None if params is None else {id(p) for p in params}
    count = 0
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            if (chosen is None or id(p) in chosen) and "exp_avg" in state:
                _reset_state_(state, group, 1 - strength, moments)
                count += 1
    return count


def _reset_state_(
    state: dict[str, Any], group: dict[str, Any], keep: float, moments: Sequence[str]
) -> None:
    if "exp_avg_weight" in state:
        for name in moments:
            _scale_(state[name], keep)
            state[f"{name}_weight"] *= keep
        if not keep and len(set(moments)) == 2:  # Adam starts anew, and so does Fira's limiter
            state.pop("residual_norm", None)
        return
    if set(moments) != {"exp_avg", "exp_avg_sq"}:
        raise ValueError(
            f"moments: {tuple(moments)!r} is not allowed; torch's optimizers share one step count, "
            "so both moments are reset together"
        )
    beta1, beta2 = group["betas"]
    t, new_t = float(state["step"]), 0.0
    if keep and t:  # β₂^t′ = 1 − keep · (1 − β₂ᵗ)
        new_t = math.log1p(keep * math.expm1(t * math.log(beta2))) / math.log(beta2)
    _scale_(state["exp_avg"], (1 - beta1**new_t) / (1 - beta1**t) if new_t else 0.0)
    _scale_(state["exp_avg_sq"], keep)
    if "max_exp_avg_sq" in state:
        _scale_(state["max_exp_avg_sq"], keep)
    if isinstance(state["step"], Tensor):
        state["step"].fill_(new_t)
    else:
        state["step"] = new_t


def _scale_(moment: Tensor, factor: float) -> None:
    """moment · factor; a factor of 0 clears it, inf and NaN included."""
    moment.mul_(factor) if factor else moment.zero_()
