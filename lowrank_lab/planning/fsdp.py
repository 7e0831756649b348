"""One process of a run under FSDP2: its memory by formula, and a process group to simulate it in.

The other processes don't exist: in the group of `fake_rank`, collectives return tensors with a
shape and no values, which is all that `planning.simulate` needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist

from lowrank_lab.config import InputError, ResolvedConfig
from lowrank_lab.distributed.dtensors import ANY_DIM
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
from lowrank_lab.optim import ProjectedAdamW
from lowrank_lab.optim.state_bytes import Weight
from lowrank_lab.training.fsdp_layout import check_fsdp

Way = Literal["shard", "part", "owner"]  # of a weight's states


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
    from torch.distributed.tensor import _redistribute
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    _redistribute._gen_transform_infos.cache_clear()  # it doesn't tell ranks apart
    try:
        with untracked_global_shapes():
            yield
    finally:
        _redistribute._gen_transform_infos.cache_clear()
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
    positions are replicated. Optimizers of this package and AdamW shard their states; a layer that
    another optimizer needs in full has one owner with all its states.

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
                _add_part_(report, w, place.update_dim, config, (world_size, rank))
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
    way: Way
    update_dim: int | None = None  # of the shards of its moments; None: of all states alike


def _placed(config: ResolvedConfig, world_size: int) -> Iterator[tuple[Weight, Place]]:
    """All weights of a configuration, placed as `training.fsdp` places them."""
    method, dims = METHODS[config.method], _update_dims(config)
    for number, layer in enumerate(layers(config)):
        for index, w in enumerate(layer):
            owned = dims is None and w.trains and _needed_whole(w, config)
            dim = ANY_DIM if dims is None or not w.trains else dims[w.shape, w.target]
            way: Way = "owner" if owned else "shard" if dim == ANY_DIM else "part"
            is_A = method.layers is not None and index == 1
            by_columns = (dim == 1 or (is_A and not owned)) and not w.shape[1] % world_size
            yield w, Place(number, int(by_columns), way, None if dim == ANY_DIM else dim)


def _update_dims(config: ResolvedConfig) -> dict[tuple[tuple[int, ...], bool], int | None] | None:
    """`ProjectedAdamW.dim_of` by shape and target; None: another optimizer."""
    method, found = METHODS[config.method].in_precision(config.state_precision), {}
    if config.optimizer is not None or not method.fake_steps:
        return None
    metas = [(w, torch.empty(w.shape, device="meta", requires_grad=True)) for w in weights(config)]
    metas = [(w, p) for w, p in metas if w.trains]
    targets, rest = ([p for w, p in metas if w.target == target] for target in (True, False))
    optimizer = method.optimizer(targets, rest, config)
    if not isinstance(optimizer, ProjectedAdamW):
        return None
    of_param = {p: (w.shape, w.target) for w, p in metas}
    for group in optimizer.param_groups:
        for p in group["params"]:
            found[of_param[p]] = optimizer.dim_of(group, p.shape)
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


def _add_part_(
    report: Breakdown, w: Weight, dim: int | None, config: ResolvedConfig, place: tuple[int, int]
) -> None:
    """A rank's share of states, and what all ranks have: scalars, and indices of columns.

    Moments are sharded along `dim`, projections by rows. Where `dim` is None the update gathers
    all states, whose shares are about equal.
    """
    empty = w._replace(shape=(0,) * len(w.shape))
    numbers, indices = state_bytes(empty, config), projection_bytes(empty, config)
    projections = projection_bytes(w, config) - indices
    moments = state_bytes(w, config) - projections - numbers
    rank_shares = [_share(w, side, *place).shape[side] for side in range(len(w.shape))]
    if dim is None:
        moments, projections = moments // place[0], projections // place[0]
    else:
        moments = moments * rank_shares[dim] // w.shape[dim]
        projections = projections * rank_shares[1 - dim] // w.shape[1 - dim]
    report.optimizer_states += moments + projections + numbers
    report.projections += projections + indices


def _needed_whole(w: Weight, config: ResolvedConfig) -> bool:
    """Whether an update needs the weight in full, and not entry by entry."""
    which = METHODS[config.method].in_precision(config.state_precision).needs_full
    return which == "all" or (which == "targets" and w.target)
