"""Momentum reset (2505.22922): a function of optimizer states, which works with any model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lowrank_lab.distributed.dtensors import full_tensor, is_dtensor
from lowrank_lab.layers.balance import value_of
from lowrank_lab.optim.adam import is_quantized
from lowrank_lab.techniques.states import Entry, Held, entries, held_by

MOMENTS = ("exp_avg", "exp_avg_sq")


@torch.no_grad()
def reset_momentum_(
    optimizer: torch.optim.Optimizer,
    strength: float = 1.0,
    moments: Sequence[str] = MOMENTS,
    params: Iterable[Tensor] | None = None,
) -> int:
    """Scale an optimizer's moments and their bias corrections by 1 − strength, in place.

    Strength 1 is an exact restart: the next steps are those of a new optimizer. 0 changes nothing;
    in between, past gradients keep a weight of 1 − strength. Projections and refresh schedules of
    this package's optimizers don't change. A full reset also restarts the growth limiter of Fira
    and APOLLO, which compares norms with earlier ones.

    The optimizers of this package store the weights of their moments, which are scaled as well.
    torch's Adam and its relatives have one step count t for both moments. It becomes t′ with
    1 − β₂^t′ = (1 − strength)(1 − β₂ᵗ), which is exact for the second moment. The first moment is
    scaled so that its bias-corrected value stays the same; only its decay afterwards differs.

    Args:
        optimizer: one of this package, torch.optim, torchao, or most of pytorch_optimizer
            (`techniques.layouts`); also within wrappers of accelerate and Lightning.
        strength: s in [0, 1]; below 1 only for optimizers of this package and of torchao, and
            torch's Adam, AdamW, RAdam, SparseAdam, SGD and Muon.
        moments: one or both of the moments. Optimizers with one step count reset both only; the
            buffers of SGD and Muon are first moments.
        params: the parameters to reset; None: all. Frozen ones are skipped. Optimizers of
            pytorch_optimizer, and LBFGS, need all parameters of a group.

    Returns:
        The number of parameters whose moments were reset.

    Raises:
        ValueError: a strength outside [0, 1], unknown moments, a moment that can't be reset alone,
            a part of a group that shares states, an optimizer whose restart isn't known, or one
            without `params`. Nothing has changed then.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength: {strength!r} is not allowed; from 0 to 1")
    if not moments or not set(moments) <= set(MOMENTS):
        allowed = f"one or both of {', '.join(MOMENTS)}"
        raise ValueError(f"moments: {moments!r} is not allowed; {allowed}")
    if strength == 0:
        return 0
    chosen = resettable(optimizer, strength, moments, params)
    for entry in chosen:
        _reset_state_(entry, 1 - strength, moments)
    for entry in {id(entry.group): entry for entry in chosen}.values():
        _restart_counts_(entry)
    return len(chosen)


def resettable(
    optimizer: torch.optim.Optimizer,
    strength: float = 1.0,
    moments: Sequence[str] = MOMENTS,
    params: Iterable[Tensor] | None = None,
) -> list[Entry]:
    """The entries that a reset changes; the arguments and errors of `reset_momentum_`."""
    chosen = None if params is None else list(params)
    found = entries(optimizer, chosen)
    held, wanted = held_by(optimizer), None if chosen is None else set(chosen)
    for p, where in held.items():
        if wanted is None or p in wanted:
            _require_resettable(where, strength, moments, wanted)
    return found


def _require_resettable(
    held: Held, strength: float, moments: Sequence[str], chosen: set[Tensor] | None
) -> None:
    """Refuse what the optimizer of a parameter can't do, whether or not it has stepped."""
    layout, name = held.layout, type(held.optimizer).__name__
    if strength < 1 and layout.partial is None:
        allowed = f"{name} only restarts as a whole: 0 or 1"
        raise ValueError(f"strength: {strength!r} is not allowed; {allowed}")
    if layout.shared and chosen is not None and not chosen.issuperset(held.group["params"]):
        allowed = f"{name} has states that a group shares"
        raise ValueError(f"params: a part of a group is not allowed; {allowed}")
    if layout.partial == "weights" or set(moments) == set(MOMENTS):
        return
    if layout.partial != "buffer":
        allowed = f"{name} has one step count, so both moments are reset together"
        raise ValueError(f"moments: {tuple(moments)!r} is not allowed; {allowed}")
    if "exp_avg" not in moments:
        allowed = f"{name} has a first moment only"
        raise ValueError(f"moments: {tuple(moments)!r} is not allowed; {allowed}")


def _reset_state_(entry: Entry, keep: float, moments: Sequence[str]) -> None:
    state, partial = entry.state, entry.layout.partial
    if partial == "weights":
        for name in moments:
            if name in state:  # a custom method may have only one of the moments
                _scale_(state[name], keep)
            state[f"{name}_weight"] *= keep
        if not keep and len(set(moments)) == 2 and "residual_norm" in state:
            # A full reset restarts the growth limiter too. The entry stays: states with the same
            # entries load into each other.
            state["residual_norm"].fill_(math.inf)
        if len(set(moments)) == 2 and "error" in state:  # what past gradients have left (LDAdam)
            _scale_(state["error"], keep)
    elif not keep:
        _restart_(entry)
    elif partial == "buffer":  # no bias correction
        for name in entry.layout.first:
            _scale_(state[name], keep)
    else:
        _scale_adam_(state, entry.group["betas"], keep)


def _restart_(entry: Entry) -> None:
    """Give every entry of a state the value that a new optimizer has."""
    state, layout = entry.state, entry.layout
    if layout.clears:
        state.clear()
        return
    if entry.group.get("dampening"):  # SGD's first buffer is the first gradient, undampened
        state.pop("momentum_buffer", None)
    for name, value in state.items():
        if value is None or name in layout.kept:
            continue
        fresh = layout.fresh.get(name, 0.0)
        fresh = float(entry.group[fresh] if isinstance(fresh, str) else fresh)
        if not isinstance(value, Tensor):
            state[name] = type(value)(fresh)
        elif fresh:
            value.fill_(fresh)
        else:
            _scale_(value, 0.0)


def _restart_counts_(entry: Entry) -> None:
    """Set what the entry's group counts to its default, or remove it."""
    defaults = entry.optimizer.defaults
    for name in entry.layout.group_counts:
        if name in defaults:
            entry.group[name] = defaults[name]
        else:
            entry.group.pop(name, None)


def _scale_adam_(state: dict[str, Any], betas: tuple[float, float], keep: float) -> None:
    """Scale the moments of torch's Adam, and map its step count t to t′ (`reset_momentum_`)."""
    beta1, beta2 = betas
    count, new_t = state["step"], 0.0
    t = value_of(count, usually=1) if isinstance(count, Tensor) else float(count)
    beta = beta2 or beta1  # with β₂ = 0, v has no past
    if t and beta:  # β₂^t′ = 1 − keep · (1 − β₂ᵗ)
        new_t = math.log1p(keep * math.expm1(t * math.log(beta))) / math.log(beta)
    past, now = (_weight(beta1, steps) for steps in (t, new_t))
    _scale_(state["exp_avg"], now / past if past else 0.0)
    for name in ("exp_avg_sq", "max_exp_avg_sq"):
        if name in state:
            _scale_(state[name], keep)
    if isinstance(count, Tensor):
        count.fill_(new_t)
    else:
        state["step"] = new_t


def _weight(beta: float, t: float) -> float:
    """1 − βᵗ, precise for small t too."""
    return -math.expm1(t * math.log(beta)) if beta else float(t > 0)


def plain(moment: Tensor) -> Tensor:
    """A full copy as an ordinary tensor: quantized moments support little more than `copy_`."""
    if is_dtensor(moment):
        return full_tensor(moment).clone()
    return torch.empty(moment.shape, dtype=moment.dtype, device=moment.device).copy_(moment)


def _scale_(moment: Tensor, factor: float) -> None:
    """Multiply a moment by a factor, in place; 0 also clears inf and NaN."""
    if is_quantized(moment):  # supports little more than copy_
        zeros = torch.zeros(moment.shape, device=moment.device)
        moment.copy_(plain(moment) * factor if factor else zeros)
        for part in ("codes", "scale") if not factor else ():  # not every code book has a 0
            if hasattr(moment, part):
                getattr(moment, part).zero_()
    elif factor:
        moment.mul_(factor)
    else:
        moment.zero_()
