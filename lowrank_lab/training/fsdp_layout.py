"""Which rank stores and updates which weight of a sharded model: functions of names and shapes.

Three kinds of weights:

* updated entry by entry (AdamW, SPAM): every rank updates its shard;
* updated in shards along the unprojected dimension (`ProjectedAdamW.shard_dim`): so do these;
* updated as full matrices: each has an owner, the rank that stores its states and updates it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lowrank_lab import distributed
from lowrank_lab.config import InputError, ResolvedConfig
from lowrank_lab.distributed.placements import Sharded
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
        ("compile", config.compile, "not tested with fsdp2; False"),
        ("stochastic_rounding", config.stochastic_rounding, "not tested with fsdp2; False"),
        ("method_options.warm_start", options.get("warm_start"),
         "with fsdp2 the trained weights can't change during the run; 0"),
    )  # fmt: skip
    for name, value, allowed in refused:
        if value:
            raise InputError(name, value, allowed)


def sharded_placements(
    weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, config: ResolvedConfig
) -> dict[str, Sharded]:
    """Placements of the weights whose shards are updated by projections, by name.

    The world size divides both of their dimensions.
    """
    found: dict[str, Sharded] = {}
    method = METHODS[config.method]
    if not method.shardable or not isinstance(optimizer, ProjectedAdamW):
        return found
    all_in_full = method.full_weights(config.method_options) == "all"
    names: dict[Tensor, str] = {p: name for name, p in weights.items()}
    for group in optimizer.param_groups:
        for p in group["params"] if "rank" in group or all_in_full else ():
            dim = optimizer.shard_dim(group, p.shape)
            if dim is not None and not any(n % distributed.world_size() for n in p.shape):
                found[names[p]] = Sharded(dim)
    return found


def names_needing_full(model: nn.Module, config: ResolvedConfig) -> set[str]:
    """Names of the weights that the optimizer of the run can't update entry by entry."""
    method = METHODS[config.method]
    foreign = config.optimizer not in (None, *ADAMS)
    which = "all" if foreign else method.full_weights(config.method_options)
    targets, rest = partition(model, config.target)
    chosen = {id(p) for p in {"none": [], "targets": targets, "all": targets + rest}[which]}
    return {name for name, p in model.named_parameters() if id(p) in chosen}


def column_sharded(
    mirror: nn.Module, needed: set[str], placements: Mapping[str, Sharded]
) -> set[str]:
    """Names of the weights that are sharded by columns; all others are sharded by rows."""
    factors = {
        f"{name}.A"
        for name, layer in mirror.named_modules()
        if isinstance(layer, FactorizedLinear)
        and not layer.in_features % distributed.world_size()
        and f"{name}.A" not in needed
    }
    return factors | {name for name, placement in placements.items() if placement.dim == 1}


def assign_owners(
    names: set[str], sizes: Mapping[str, int], some_sharded: bool
) -> list[tuple[int, list[str]]]:
    """Owners of units: the weights of one layer, which are updated together.

    Largest unit first, each to the rank with the fewest entries so far: states are spread evenly.

    Args:
        names: of the weights that are updated as full matrices.
        sizes: entries of every weight of the model, in its order.
        some_sharded: whether other matrices are updated in shards; ranks without a unit are then
            not idle.

    Returns:
        Pairs of an owner and the names of its unit.

    Raises:
        InputError: more ranks than units, and nothing else to update.
    """
    layers: dict[str, list[str]] = {}
    for name in names:
        layers.setdefault(name.rpartition(".")[0], []).append(name)
    order = {name: i for i, name in enumerate(sizes)}
    units = [sorted(unit, key=order.__getitem__) for unit in layers.values()]
    units.sort(key=lambda unit: (-sum(sizes[name] for name in unit), order[unit[0]]))
    ranks = distributed.world_size()
    if units and not some_sharded and len(units) < ranks:
        allowed = f"{len(units)} layers are updated as full matrices: at most as many processes"
        raise InputError("nproc-per-node", ranks, allowed)
    entries, assigned = [0] * ranks, []
    for unit in units:
        owner = entries.index(min(entries))
        entries[owner] += sum(sizes[name] for name in unit)
        assigned.append((owner, unit))
    return assigned
