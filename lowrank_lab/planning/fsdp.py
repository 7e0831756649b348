"""One process of a run under FSDP2: its memory by formula, and a process group to simulate it in.

The other processes don't exist: in the group of `fake_rank`, collectives return tensors with a
shape and no values, which is all that `planning.simulate` needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

import torch
import torch.distributed as dist

from lowrank_lab.config import InputError, ResolvedConfig
from lowrank_lab.memory.breakdown import Breakdown
from lowrank_lab.memory.formulas import (
    element_bytes,
    layers,
    matrices,
    projection_bytes,
    sparse_entries,
    state_bytes,
    weights,
)
from lowrank_lab.memory.tracker import untracked
from lowrank_lab.methods.registry import METHODS
from lowrank_lab.optim.state_bytes import Weight
from lowrank_lab.training.fsdp_layout import check_fsdp

if TYPE_CHECKING:
    from lowrank_lab.optim.base import ProjectedAdamW


def check_world_size(config: ResolvedConfig, world_size: int) -> ResolvedConfig:
    """The configuration under FSDP2 with that many processes.

    Raises:
        InputError: an impossible number, or a field that FSDP2 can't go with.
    """
    if world_size < 1:
        raise InputError("world_size", world_size, "a number of processes, 1 or more")
    if dist.is_initialized():
        allowed = "this process belongs to a group already; simulate in one that doesn't"
        raise InputError("world_size", world_size, allowed)
    pieces = config.gradient_accumulation
    if config.batch % (world_size * pieces):
        allowed = f"batch {config.batch} must be a multiple of world_size × gradient_accumulation"
        raise InputError("world_size", world_size, f"{allowed} {pieces}")
    config = config.override(parallel="fsdp2")
    check_fsdp(config)
    return config


@contextmanager
def fake_rank(world_size: int, rank: int) -> Iterator[None]:
    """A process group with this rank, in which every collective returns at once."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        with untracked_global_shapes():
            yield
    finally:
        dist.destroy_process_group()


@contextmanager
def untracked_global_shapes() -> Iterator[None]:
    """Hide DTensor's shape propagation, which works on tensors of the global shape."""
    from torch.distributed.tensor._sharding_prop import ShardingPropagator

    name = "_propagate_tensor_meta_non_cached"
    found = getattr(ShardingPropagator, name)
    setattr(ShardingPropagator, name, untracked()(found))
    try:
        yield
    finally:
        setattr(ShardingPropagator, name, found)


def fullest(reports: Sequence[Breakdown]) -> tuple[int, Breakdown]:
    """The rank with the most bytes (the first of those), and its breakdown."""
    return max(enumerate(reports), key=lambda item: (item[1].total, -item[0]))


def per_rank(config: ResolvedConfig, world_size: int) -> list[Breakdown]:
    """Weights, gradients and states of each rank.

    Weights and gradients are padded to the same number of rows (or columns) on all ranks; sparse
    positions are replicated. Where an optimizer updates shards, the states are those of the shard;
    a layer that it needs in full has one owner with all its states.

    Raises:
        InputError: a method of one's own or an optimizer by import path: states aren't known.
    """
    placed = list(_placed(config, world_size))
    found = [_shards(config, placed, world_size) for _ in range(world_size)]
    for w, place in placed:
        if not w.trains or place.way == "owner":
            continue
        for rank, report in enumerate(found):
            if place.way == "part":
                _add_part_(report, w, config, world_size)
            else:
                _add_states_(report, _share(w, place.dim, world_size, rank), config)
    for owner, layer in _owned(config, placed, world_size):
        for w in layer:
            _add_states_(found[owner], w, config)
    return found


class Place(NamedTuple):
    """How a weight is sharded."""

    layer: int  # its number; a layer is updated together
    dim: int  # of the shards
    way: Literal["shard", "part", "owner"]  # of its states


def _placed(config: ResolvedConfig, world_size: int) -> Iterator[tuple[Weight, Place]]:
    """All weights of a configuration, placed as `training.fsdp` places them."""
    method, cuts = METHODS[config.method], _cuts(config, world_size)
    for number, layer in enumerate(layers(config)):
        for index, w in enumerate(layer):
            whole = _needed_whole(w, config)
            cut = cuts.get((w.shape, w.target)) if whole else None
            if cut is not None:
                yield w, Place(number, cut, "part")
                continue
            is_A = method.layers is not None and index == 1
            by_columns = is_A and not whole and not w.shape[1] % world_size
            way: Literal["shard", "owner"] = "owner" if whole and w.trains else "shard"
            yield w, Place(number, int(by_columns), way)


def _cuts(config: ResolvedConfig, world_size: int) -> dict[tuple[tuple[int, ...], bool], int]:
    """The dimension of the shards that are updated in place, by shape and target."""
    method = METHODS[config.method]
    found: dict[tuple[tuple[int, ...], bool], int] = {}
    if not method.shardable:
        return found
    all_in_full = method.full_weights(config.method_options) == "all"
    for shape, target in {(w.shape, w.target) for w in weights(config)}:
        if any(n % world_size for n in shape) or not (target or all_in_full):
            continue
        one = [torch.empty(shape, device="meta", requires_grad=True)]
        optimizer = method.optimizer(*((one, []) if target else ([], one)), config)
        group = next(group for group in optimizer.param_groups if group["params"])
        dim = cast("ProjectedAdamW", optimizer).shard_dim(group, torch.Size(shape))
        if dim is not None:
            found[shape, target] = dim
    return found


def _share(w: Weight, dim: int, world_size: int, rank: int | None = None) -> Weight:
    """The shard of a weight on a rank; without `rank`, the padded shard."""
    length = -(-w.shape[dim] // world_size)
    if rank is not None:
        length = max(0, min(length, w.shape[dim] - rank * length))
    shape = tuple(length if i == dim else n for i, n in enumerate(w.shape))
    return w._replace(shape=shape)


def _shards(
    config: ResolvedConfig, placed: list[tuple[Weight, Place]], world_size: int
) -> Breakdown:
    """Weights and gradients, which have the same size on every rank."""
    found, b = Breakdown(), element_bytes(config)
    for w, place in placed:
        size = b * _share(w, place.dim, world_size).numel()
        found.weights += size
        found.gradients += size * w.trains
        found.frozen += size * (not w.trains)
    sparse = (sparse_entries(config, m, n) for m, n, target in matrices(config) if target)
    found.indices = 4 * sum(sparse)
    found.weights += found.indices
    return found


def _owned(
    config: ResolvedConfig, placed: list[tuple[Weight, Place]], world_size: int
) -> Iterator[tuple[int, list[Weight]]]:
    """The trained weights of each layer with an owner.

    The largest layer first, each to the rank with the fewest entries (`training.fsdp_layout`).
    """
    units: dict[int, list[Weight]] = {}
    for w, place in placed:
        if place.way == "owner":
            units.setdefault(place.layer, []).append(w)
    held = [0] * world_size
    for unit in sorted(units.values(), key=lambda unit: -sum(w.numel() for w in unit)):
        owner = held.index(min(held))
        held[owner] += sum(w.numel() for w in unit)
        yield owner, unit


def _add_states_(report: Breakdown, w: Weight, config: ResolvedConfig) -> None:
    report.optimizer_states += state_bytes(w, config)
    report.projections += projection_bytes(w, config)


def _add_part_(report: Breakdown, w: Weight, config: ResolvedConfig, world_size: int) -> None:
    """An equal share of the states, and scalars of the full weight, which all ranks have."""
    numbers = state_bytes(w._replace(shape=(0,) * len(w.shape)), config)
    report.optimizer_states += (state_bytes(w, config) - numbers) // world_size + numbers
    report.projections += projection_bytes(w, config) // world_size


def _needed_whole(w: Weight, config: ResolvedConfig) -> bool:
    """Whether an update needs the weight in full, and not entry by entry."""
    which = METHODS[config.method].full_weights(config.method_options)
    return which == "all" or (which == "targets" and w.target)
