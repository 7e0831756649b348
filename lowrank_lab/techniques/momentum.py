"""Momentum reset (2505.22922), pruning and transport of an optimizer's moments.

All three are functions of optimizer states and work with any model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lowrank_lab.distributed.dtensors import full_tensor, is_dtensor, joint_parts, overwrite_
from lowrank_lab.layers import Balance, generator_of
from lowrank_lab.layers.balance import value_of
from lowrank_lab.optim.adam import is_quantized

PRUNINGS = ("magnitude", "random")
PRUNED = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def transport_moments_(state_B: dict[str, Any], state_A: dict[str, Any], found: Balance) -> None:
    """Transform Adam's moments of B and A to those of the balanced factors B T and T⁻¹A, in place.

    Gradients transform with the factors: G_B ← G_B T⁻ᵀ and G_A ← Tᵀ G_A. First moments are averages
    of gradients and follow exactly; second moments follow approximately, by T's squared entries:
        m_B ← m_B T⁻ᵀ,  m_A ← Tᵀ m_A,  v_B ← v_B (T⁻ᵀ)∘²,  v_A ← (Tᵀ)∘² v_A

    Args:
        state_B, state_A: optimizer states; without moments they don't change.
        found: the balance of B and A.

    Raises:
        ValueError: the moments are not shaped like the factors (the optimizer projects).
    """
    r = len(found.S)
    for state, on_right, matrix in (
        (state_B, True, found.T_inverse.T), (state_A, False, found.T.T),
    ):  # fmt: skip
        squares = matrix.square()
        carriers = {"exp_avg": matrix, "exp_avg_sq": squares, "max_exp_avg_sq": squares}
        for name, factor in carriers.items():
            if name not in state:
                continue
            moment = state[name]
            if moment.ndim != 2 or moment.shape[1 if on_right else 0] != r:
                raise ValueError("on_refactor: 'transport' is not allowed; moments are projected")
            with joint_parts((moment, 0 if on_right else 1)) as ((part,), _):
                wide = part.double()
                part.copy_(wide @ factor if on_right else factor @ wide)


@torch.no_grad()
def reset_momentum_(
    optimizer: torch.optim.Optimizer,
    strength: float = 1.0,
    moments: Sequence[str] = ("exp_avg", "exp_avg_sq"),
    params: Iterable[Tensor] | None = None,
) -> int:
    """Scale Adam's moments and their bias corrections by 1 − strength, in place.

    Strength 1 is exactly a restart of Adam, and 0 changes nothing; in between, past gradients keep
    a weight of 1 − strength. Projections and schedules don't change. A full reset also restarts the
    growth limiter of Fira and APOLLO, which compares with earlier norms.

    The optimizers of this package store the weights of their moments, which are scaled as well.
    torch's Adam and AdamW have one step count t for both moments. It becomes t′ with 1 − β₂^t′ =
    (1 − strength)(1 − β₂ᵗ), which is exact for the second moment. The first moment is scaled so
    that its bias-corrected value stays the same; only its decay afterwards differs.

    Args:
        optimizer: any with Adam's moments, or with a `momentum_buffer` (SGD, Muon).
        strength: s in [0, 1].
        moments: one or both of the moments. torch's optimizers can only reset both.
        params: the parameters to reset; None: all.

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
    chosen = _with_moments(optimizer, params)
    for group, state in chosen:
        _reset_state_(state, group, 1 - strength, moments)
    return len(chosen)


def _reset_state_(
    state: dict[str, Any], group: dict[str, Any], keep: float, moments: Sequence[str]
) -> None:
    if "momentum_buffer" in state:  # SGD and Muon have no bias correction
        if isinstance(state["momentum_buffer"], Tensor):
            _scale_(state["momentum_buffer"], keep)
        return
    if "exp_avg_weight" in state:
        for name in moments:
            if name in state:  # a custom method may have only one of the moments
                _scale_(state[name], keep)
            state[f"{name}_weight"] *= keep
        if not keep and len(set(moments)) == 2 and "residual_norm" in state:
            # A full reset restarts the growth limiter too. The entry stays: states with the same
            # entries load into each other.
            state["residual_norm"].fill_(math.inf)
        return
    if set(moments) != {"exp_avg", "exp_avg_sq"}:
        raise ValueError(
            f"moments: {tuple(moments)!r} is not allowed; torch's optimizers share one step count, "
            "so both moments are reset together"
        )
    beta1, beta2 = group["betas"]
    count = state["step"]
    t, new_t = value_of(count, usually=1) if isinstance(count, Tensor) else float(count), 0.0
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


@torch.no_grad()
def prune_moments_(
    optimizer: torch.optim.Optimizer,
    params: Iterable[Tensor],
    keep: float,
    how: Literal["magnitude", "random"] = "magnitude",
    seed: int = 0,
    moments: Sequence[str] = PRUNED,
) -> int:
    """Set most entries of Adam's moments to zero, in place, as ReLoRA (2307.05695) does at merges.

    round(keep · entries) entries of each parameter survive, the same ones in all its moments. Bias
    corrections don't change. Works with every optimizer whose states are `exp_avg` and
    `exp_avg_sq`, including torchao's 8-bit ones.

    Args:
        optimizer: of the parameters.
        params: the parameters to prune; those without moments are skipped.
        keep: share of the entries that survive, in [0, 1]; at most 0.1 in ReLoRA.
        how: `magnitude` keeps the entries with the largest |exp_avg| (the first of equal ones),
            `random` a random subset.
        seed: of the random subset, which is the same on any device.
        moments: the states that are pruned.

    Returns:
        The number of parameters whose moments were pruned.

    Raises:
        ValueError: `keep` or `how` is not allowed.
    """
    if not 0 <= keep <= 1:
        raise ValueError(f"keep: {keep!r} is not allowed; from 0 to 1")
    if how not in PRUNINGS:
        raise ValueError(f"how: {how!r} is not allowed; {' or '.join(PRUNINGS)}")
    count = 0
    for index, p in enumerate(params):
        state = optimizer.state.get(p, {})
        if "exp_avg" not in state:
            continue
        dropped = _dropped(_plain(state["exp_avg"]), keep, how, generator_of(seed, index))
        for name in moments:
            if name in state:
                overwrite_(state[name], _plain(state[name]).masked_fill_(dropped, 0))
        count += 1
    return count


def _dropped(moment: Tensor, keep: float, how: str, generator: torch.Generator) -> Tensor:
    """Mask (bool, shaped like the moment) of the entries that are pruned."""
    if how == "magnitude":
        order = moment.abs().flatten().argsort(descending=True, stable=True)
    else:
        order = torch.randperm(moment.numel(), generator=generator).to(moment.device)
    dropped = torch.zeros(moment.numel(), dtype=torch.bool, device=moment.device)
    dropped[order[round(keep * moment.numel()) :]] = True
    return dropped.view(moment.shape)


def _plain(moment: Tensor) -> Tensor:
    """A full copy as an ordinary tensor: quantized moments support little more than `copy_`."""
    if is_dtensor(moment):
        return full_tensor(moment).clone()
    return torch.empty(moment.shape, dtype=moment.dtype, device=moment.device).copy_(moment)


def _with_moments(
    optimizer: torch.optim.Optimizer, params: Iterable[Tensor] | None
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Group and state of each parameter (None: of all) that has moments."""
    chosen = None if params is None else {id(p) for p in params}
    return [
        (group, optimizer.state[p])
        for group in optimizer.param_groups
        for p in group["params"]
        if (chosen is None or id(p) in chosen)
        and any(name in optimizer.state.get(p, {}) for name in ("exp_avg", "momentum_buffer"))
    ]


def _scale_(moment: Tensor, factor: float) -> None:
    """Multiply a moment by a factor, in place; 0 also clears inf and NaN."""
    if is_quantized(moment):  # supports little more than copy_
        moment.copy_(_plain(moment) * factor if factor else torch.zeros(moment.shape))
    elif factor:
        moment.mul_(factor)
    else:
        moment.zero_()
