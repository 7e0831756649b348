"""Pruning of an optimizer's moments, as ReLoRA (2307.05695) does at its merges."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from lowrank_lab.distributed.dtensors import overwrite_
from lowrank_lab.layers import generator_of
from lowrank_lab.techniques.momentum import MOMENTS, plain
from lowrank_lab.techniques.states import Entry, entry_of, held_by, require_held

PRUNINGS = ("magnitude", "random")


@torch.no_grad()
def prune_moments_(
    optimizer: torch.optim.Optimizer,
    params: Iterable[Tensor],
    keep: float,
    how: Literal["magnitude", "random"] = "magnitude",
    seed: int = 0,
    moments: Sequence[str] = MOMENTS,
) -> int:
    """Set most entries of an optimizer's moments to zero, in place, as ReLoRA (2307.05695) does.

    round(keep · entries) entries of each parameter survive, the same ones in all its moments. A
    second moment that a row of entries shares (NorMuon's) survives if one of them does. Bias
    corrections don't change.

    Args:
        optimizer: one whose states are first moments, and perhaps second ones: Adam and its
            relatives, torchao's 8-bit ones, SGD with momentum, Muon, and this package's.
        params: the parameters to prune; those without moments are skipped.
        keep: share of the entries that survive, in [0, 1]; at most 0.1 in ReLoRA.
        how: `magnitude` keeps the entries with the largest first moment (the first of equal ones),
            `random` a random subset.
        seed: of the random subset, which is the same on any device.
        moments: which moments are pruned; `exp_avg_sq` includes AMSGrad's maximum.

    Returns:
        The number of parameters whose moments were pruned.

    Raises:
        ValueError: `keep`, `how` or `moments` is not allowed, or the optimizer has other states
            than moments, or doesn't hold `params`. Nothing has changed then.
    """
    if not 0 <= keep <= 1:
        raise ValueError(f"keep: {keep!r} is not allowed; from 0 to 1")
    if how not in PRUNINGS:
        raise ValueError(f"how: {how!r} is not allowed; {' or '.join(PRUNINGS)}")
    if not moments or not set(moments) <= {*MOMENTS, "max_exp_avg_sq"}:
        allowed = f"one or both of {', '.join(MOMENTS)}"
        raise ValueError(f"moments: {moments!r} is not allowed; {allowed}")
    if not isinstance(params, Iterator):  # a generator may make states that last for one turn
        params = list(params)
        require_held(optimizer, params)
    held, count = held_by(optimizer), 0
    for p in params if isinstance(params, list) else ():
        _prunable(entry_of(p, held), moments)
    for index, p in enumerate(params):
        entry = entry_of(p, held)
        if entry is None:
            continue
        names = _prunable(entry, moments)
        largest = plain(entry.state[_first(entry)])
        dropped = _dropped(largest, keep, how, generator_of(seed, index))
        for name in names:
            moment = plain(entry.state[name])
            overwrite_(entry.state[name], moment.masked_fill_(_shared(dropped, moment), 0))
        count += 1
    return count


def _first(entry: Entry) -> str:
    """The name of the first moment in a state; empty if there is none."""
    return next((name for name in entry.layout.first if name in entry.state), "")


def _prunable(entry: Entry | None, moments: Sequence[str]) -> list[str]:
    """The names of the moments to prune; what has other states is refused."""
    if entry is None:
        return []
    layout, state = entry.layout, entry.state
    if layout.clears or not _first(entry) or any(name in state for name in layout.others):
        allowed = "its states are not only moments, or no first one"
        raise ValueError(f"optimizer: {entry.name} is not allowed; {allowed}")
    of = {"exp_avg": layout.first, "exp_avg_sq": layout.second, "max_exp_avg_sq": layout.second}
    names = sorted({name for moment in moments for name in of[moment] if name in state})
    if not names:
        allowed = f"{entry.name} has a first moment only"
        raise ValueError(f"moments: {tuple(moments)!r} is not allowed; {allowed}")
    return names


def _shared(dropped: Tensor, moment: Tensor) -> Tensor:
    """The mask of a moment with fewer entries, each shared along a dimension."""
    for dim in range(dropped.ndim):
        if moment.shape[dim] != dropped.shape[dim]:
            dropped = dropped.all(dim, keepdim=True)
    return dropped


def _dropped(moment: Tensor, keep: float, how: str, generator: torch.Generator) -> Tensor:
    """Mask (bool, shaped like the moment) of the entries that are pruned."""
    if how == "magnitude":
        order = moment.abs().flatten().argsort(descending=True, stable=True)
    else:
        order = torch.randperm(moment.numel(), generator=generator).to(moment.device)
    dropped = torch.zeros(moment.numel(), dtype=torch.bool, device=moment.device)
    dropped[order[round(keep * moment.numel()) :]] = True
    return dropped.view(moment.shape)
