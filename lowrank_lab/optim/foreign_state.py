"""Convert saved states of other packages to states of the optimizers here that replace them.

| source | loaded by |
|---|---|
| torch.optim.AdamW, and Adam without weight decay | groups without `rank`, not Spam, StableSpam |
| groups without `rank` of galore-torch, fira, apollo-torch | the same, not Loro |
| galore-torch's GaLoreAdamW | GaLore |
| fira's FiraAdamW | Fira |
| apollo-torch's APOLLOAdamW | Apollo |
| pytorch-optimizer's GaLore, SPAM, StableSPAM | GaLore, Spam (density 1), StableSpam (no `t_max`) |

The next steps equal those of the package. After torch.optim.AdamW they differ in two ways: ε is
added where the loading optimizer adds it, and weight decay is applied after the update. Every other
state is refused.

Names in this file: t is the number of steps done; 1 − β₁ᵗ and 1 − β₂ᵗ are the weights of the
moments (`adam.py`). The packages store a right projection as r×n, the state here as n×r.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowrank_lab.optim.checked import CheckedOptimizer
from lowrank_lab.optim.checks import NEUTRAL, parameter_name, require
from lowrank_lab.optim.subspaces import next_seed, sides

OWN_KEYS = {"state_precision", "threshold", "gamma1"}  # of groups that are saved here
NORMS = {"fira": "scaling_grad", "apollo_torch": "scaled_grad"}  # of the growth limiter
AVERAGES = {"m_max_t": "max_average", "m_norm_t": "norm_average", "v_norm_t": "norm_sq_average"}


class Saved(NamedTuple):
    """What a conversion reads of one parameter.

    Attributes:
        source: one of `_source`.
        name: of the parameter, for messages.
        p: the parameter that loads the state.
        own: its group in the loading optimizer.
        group: its group in the saved state.
        entries: its saved state.
        totals: saved entries that belong to no parameter.
    """

    source: str
    name: str
    p: Tensor
    own: dict[str, Any]
    group: dict[str, Any]
    entries: dict[str, Any]
    totals: dict[str, Any]


def converted(optimizer: CheckedOptimizer, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A saved state in the form of this optimizer; one of this package is returned as it is.

    Raises:
        ValueError: a source that this optimizer doesn't load, or settings that it doesn't have.
    """
    source = _source(state_dict)
    if source == "own":
        return dict(state_dict)
    allowed = ", ".join((f"{type(optimizer).__name__}'s own", *optimizer.loads_from))
    require("state_dict", source, source in optimizer.loads_from, f"states it loads: {allowed}")
    totals = {k: v for k, v in state_dict["state"].items() if isinstance(k, str)}
    totals |= {k: v for k, v in state_dict.items() if k not in ("state", "param_groups")}
    groups, states = [], {}
    for own, group in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        groups.append(_group(source, group))
        for p, i in zip(own["params"], group["params"], strict=True):
            entries = state_dict["state"].get(i, {})
            if "exp_avg" in entries:  # it has been updated
                name = parameter_name(optimizer, p)
                saved = Saved(source, name, p, own, group, entries, totals)
                try:
                    states[i] = CONVERSIONS[source](saved)
                except KeyError as missing:
                    raise ValueError(f"state_dict: {name} is saved without {missing}") from None
    return {"state": states, "param_groups": groups}


def _source(state_dict: Mapping[str, Any]) -> str:
    """The package that saved a state: a key of CONVERSIONS, `own`, or a description."""
    groups, states = state_dict["param_groups"], state_dict["state"]
    keys = {key for group in groups for key in group}
    names = {name for entries in states.values() if isinstance(entries, dict) for name in entries}
    if keys & OWN_KEYS or "exp_avg_weight" in names:
        return "own"
    if {"foreach", "step"} <= keys:
        spam = "SPAM" if "total_step" in states else "StableSPAM" if "m_norm_t" in names else ""
        return f"pytorch_optimizer.{spam or ('GaLore' if 'projection_type' in keys else 'other')}"
    if "amsgrad" in keys:
        return "torch"
    if "correct_bias" in keys and "rank" not in keys:
        return "adamw"
    if {"correct_bias", "update_proj_gap"} <= keys:
        return "apollo_torch" if "proj" in keys else "fira" if "alpha" in keys else "galore_torch"
    return f"groups of {', '.join(sorted(keys - {'params'}))}"


def _group(source: str, group: Mapping[str, Any]) -> dict[str, Any]:
    """A saved group, with its keys renamed to those of this package."""
    group = dict(group)
    if source == "torch":
        for key in ("amsgrad", "maximize"):
            require(f"state_dict: {key}", group.get(key), not group.get(key), "only False")
        decoupled = group.get("decoupled_weight_decay", True) or group["weight_decay"] == 0
        require("state_dict: decoupled_weight_decay", False, decoupled, "True, or no weight decay")
        group = {k: v for k, v in group.items() if k not in NEUTRAL}
        group |= {"lr": float(group["lr"]), "correct_bias": True}
    elif source.startswith("pytorch_optimizer"):
        group = {k: v for k, v in group.items() if k not in ("step", "foreach")}
        group["correct_bias"] = True
        if "projection_type" in group:
            group["proj_type"] = group.pop("projection_type")
    return group


def _adam(saved: Saved, t: int, k: float | None = None) -> dict[str, Any]:
    """Moments after t steps, k of them since the bias correction began."""
    beta1, beta2 = saved.group["betas"]
    k = t if k is None else k
    return {
        "step": t,
        "exp_avg_weight": 1 - float(beta1) ** k,
        "exp_avg_sq_weight": 1 - float(beta2) ** k,
        "exp_avg": saved.entries["exp_avg"],
        "exp_avg_sq": saved.entries["exp_avg_sq"],
    }


def _adamw(saved: Saved) -> dict[str, Any]:
    """A state of AdamW's, whose step may be a tensor."""
    known = {"step", "exp_avg", "exp_avg_sq", "seed"}  # APOLLO numbers every parameter
    unknown = sorted(saved.entries.keys() - known)
    require(f"state_dict: {saved.name}", f"with {', '.join(unknown)}", not unknown, "AdamW's state")
    t = float(saved.entries["step"])
    return _adam(saved, round(t), t)  # a partial reset leaves a fraction, which the weights keep


def _projected(saved: Saved) -> dict[str, Any]:
    """A state of galore-torch, fira or apollo-torch: a projector, and what limits the growth."""
    if "rank" not in saved.group:
        return _adamw(saved)
    t, entries = saved.entries["step"], saved.entries
    state = _adam(saved, t) | _projections(saved)
    if saved.source == "apollo_torch":
        limited, disabled = "scaled_grad" in entries, saved.own.get("disable_nl")
        require("disable_nl", disabled, limited != disabled, f"{not limited}, as in the saved run")
        if saved.group["proj"] == "random":
            state["seed"] = _current_seed(saved, t)
    norm = NORMS.get(saved.source)
    if norm in entries:
        wide = torch.promote_types(saved.p.dtype, torch.float32)
        state["residual_norm"] = entries[norm].to(wide, copy=True)
    return state


def _projections(saved: Saved) -> dict[str, Any]:
    """Projections from the projector of a package, which repeats the settings of its group."""
    group = _group(saved.source, saved.group)
    rank = saved.own.get("rank")
    require("state_dict: rank", group["rank"], rank == group["rank"], f"{rank}, as here")
    projector: Any = saved.entries.get("projector")
    package = type(projector).__module__.partition(".")[0]
    expected = saved.source.partition(".")[0]
    field = f"state_dict: projector of {saved.name}"
    require(field, package, package == expected, f"one of {expected}")
    for key in ("rank", "update_proj_gap", "scale", "alpha", "proj_type", "projection_type"):
        value = getattr(projector, key, None)
        wanted = group["proj_type" if key == "projection_type" else key] if value else value
        require(f"{field}: {key}", value, value == wanted, f"{wanted}, as in its group")
    if not saved.own.get("store_projection", True):
        return {}
    left, right = sides(group["proj_type"], tuple(saved.p.shape))
    both = projector.ortho_matrix if left and right else [projector.ortho_matrix] * 2
    found = {"projection_left": both[0]} if left else {}
    found |= {"projection_right": both[1].T} if right else {}
    # Copies: a view would keep all of U or V alive.
    return {k: P.clone(memory_format=torch.contiguous_format) for k, P in found.items()}


def _current_seed(saved: Saved, t: int) -> int:
    """The seed of the present projection; the package keeps the first and the following one."""
    seed, following = saved.entries["seed"], saved.entries["projector"].seed
    for _ in range(t):
        after = next_seed(seed)
        if after == following:
            return int(seed)
        seed = after
    raise ValueError(f"state_dict: seed {following} of {saved.name} is not in its sequence")


def _pytorch_galore(saved: Saved) -> dict[str, Any]:
    """Its groups count steps from 1, so each refresh comes one step earlier than here."""
    state = _adam(saved, saved.group["step"])
    if "rank" in saved.group:
        state |= _projections(saved) | {"refresh_offset": 1}
    return state


def _spam(saved: Saved) -> dict[str, Any]:
    """pytorch-optimizer stores a mask per matrix, and moments as a vector of its entries."""
    t, gap = saved.totals["total_step"], saved.own["update_proj_gap"]
    since, resets = saved.totals["current_step"], t + 1 >= gap
    _require_gap(gap, since == (t + 1) % gap if resets else since > t)
    state = _adam(saved, t, saved.group["step"])
    mask = saved.entries.get("mask")
    if mask is not None:
        require(f"state_dict: mask of {saved.name}", "sparse", bool(mask.all()), "density 1")
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = state[key].view(mask.shape)
    return state


def _stable_spam(saved: Saved) -> dict[str, Any]:
    require("state_dict", "t_max", "warmup" not in saved.totals, "runs without t_max")
    t, k, gap = saved.totals["total_step"], saved.group["step"], saved.own["update_proj_gap"]
    since = t if t < gap else t % gap + 1
    _require_gap(gap, k == since)
    wide, state = torch.promote_types(saved.p.dtype, torch.float32), _adam(saved, t, k)
    for theirs, ours in AVERAGES.items():
        state[ours] = saved.entries[theirs].to(wide, copy=True)
    return state


def _require_gap(gap: int, fits: bool) -> None:
    require("update_proj_gap", gap, fits, "that of the saved run: its last reset was elsewhere")


CONVERSIONS = {
    "torch": _adamw,
    "adamw": _adamw,
    "galore_torch": _projected,
    "fira": _projected,
    "apollo_torch": _projected,
    "pytorch_optimizer.GaLore": _pytorch_galore,
    "pytorch_optimizer.SPAM": _spam,
    "pytorch_optimizer.StableSPAM": _stable_spam,
}
