"""Which rank stores and updates which weight of a sharded model: functions of names and shapes.

Weights that the optimizer can't update as DTensors have an owner each: the rank that stores their
states and updates them as full matrices. The optimizers of this package need no owners, and torch's
Adam and AdamW neither.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from lowrank_lab import distributed
from lowrank_lab.config import InputError, ResolvedConfig
from lowrank_lab.layers import FactorizedLinear
from lowrank_lab.methods.build import partition
from lowrank_lab.methods.optimizers import ADAMS
from lowrank_lab.methods.registry import METHODS
from lowrank_lab.optim import ProjectedAdamW


def check_fsdp(config: ResolvedConfig) -> None:
    """Refuse options that are not supported with fsdp2."""
    options = config.method_options
    refused = (
        ("per_layer", config.per_layer, "with fsdp2 gradients arrive one block at a time; False"),
        ("method_options.warm_start", options.get("warm_start"),
         "with fsdp2 the trained weights can't change during the run; 0"),
    )  # fmt: skip
    for name, value, allowed in refused:
        if value:
            raise InputError(name, value, allowed)


def names_needing_owners(
    model: nn.Module, optimizer: torch.optim.Optimizer, config: ResolvedConfig
) -> set[str]:
    """Names of the weights that the optimizer of the run can't update as DTensors."""
    if isinstance(optimizer, ProjectedAdamW):
        return set()
    foreign = config.optimizer not in (None, *ADAMS)
    method = METHODS[config.method].in_precision(config.state_precision)
    which = "all" if foreign else method.needs_full
    targets, rest = partition(model, config.target)
    chosen = {id(p) for p in {"none": [], "targets": targets, "all": targets + rest}[which]}
    return {name for name, p in model.named_parameters() if id(p) in chosen}


def column_sharded(model: nn.Module, optimizer: torch.optim.Optimizer, owned: set[str]) -> set[str]:
    """Names of the weights that are sharded by columns; all others are sharded by rows.

    Columns suit the projected optimizers for wide matrices, and refactorization for A. FSDP2 asks
    for the same number of columns on all ranks.
    """
    factors = {
        f"{name}.A" for name, layer in model.named_modules() if isinstance(layer, FactorizedLinear)
    }
    projected = set()
    if isinstance(optimizer, ProjectedAdamW):
        for group in optimizer.param_groups:
            projected |= {p for p in group["params"] if optimizer.dim_of(group, p.shape) == 1}
    return {
        name
        for name, p in model.named_parameters()
        if (name in factors or p in projected)
        and name not in owned
        and not p.shape[1] % distributed.world_size()
    }


def assign_owners(names: set[str], sizes: Mapping[str, int]) -> list[tuple[int, list[str]]]:
    """Owners of units: the weights of one layer, which are updated together.

    Largest unit first, each to the rank with the fewest entries so far: states are spread evenly.

    Args:
        names: of the weights that are updated as full matrices.
        sizes: entries of every weight of the model, in its order.

    Returns:
        Pairs of an owner and the names of its unit.

    Raises:
        InputError: more ranks than units.
    """
    layers: dict[str, list[str]] = {}
    for name in names:
        layers.setdefault(name.rpartition(".")[0], []).append(name)
    order = {name: i for i, name in enumerate(sizes)}
    units = [sorted(unit, key=order.__getitem__) for unit in layers.values()]
    units.sort(key=lambda unit: (-sum(sizes[name] for name in unit), order[unit[0]]))
    ranks = distributed.world_size()
    if units and len(units) < ranks:
        allowed = f"{len(units)} layers are updated as full matrices: at most as many processes"
        raise InputError("nproc-per-node", ranks, allowed)
    entries, assigned = [0] * ranks, []
    for unit in units:
        owner = entries.index(min(entries))
        entries[owner] += sum(sizes[name] for name in unit)
        assigned.append((owner, unit))
    return assigned
