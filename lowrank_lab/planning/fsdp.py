"""One process of many that share a run by FSDP2: what it holds by formula, and a group to be it in.

Nothing of the others exists: `one_of` makes a group in which what they would send has a shape and
no values, which is all that `memory.simulate` needs.
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


def check_ranks(config: ResolvedConfig, ranks: int) -> ResolvedConfig:
    """The configuration as so many processes share it by FSDP2.

    Raises:
        InputError: a number that can't be, or what is not sound with shards.
    """
    if ranks < 1:
        raise InputError("ranks", ranks, "a number of processes, 1 or more")
    if dist.is_initialized():
        allowed = "this process belongs to a group already; simulate in one that doesn't"
        raise InputError("ranks", ranks, allowed)
    pieces = config.gradient_accumulation
    if config.batch % (ranks * pieces):
        allowed = f"batch {config.batch} must be a multiple of ranks × gradient_accumulation"
        raise InputError("ranks", ranks, f"{allowed} {pieces}")
    config = config.override(parallel="fsdp2")
    check_fsdp(config)
    return config


@contextmanager
def one_of(ranks: int, rank: int) -> Iterator[None]:
    """Be this process of so many, alone, in this block: all that they do together ends at once."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        with whole_shapes_unseen():
            yield
    finally:
        dist.destroy_process_group()


@contextmanager
def whole_shapes_unseen() -> Iterator[None]:
    """Hide how DTensor finds shapes: by operations on tensors as large as all shards together."""
    from torch.distributed.tensor._sharding_prop import ShardingPropagator

    name = "_propagate_tensor_meta_non_cached"
    found = getattr(ShardingPropagator, name)
    setattr(ShardingPropagator, name, untracked()(found))
    try:
        yield
    finally:
        setattr(ShardingPropagator, name, found)


def fullest(accounts: Sequence[Breakdown]) -> tuple[int, Breakdown]:
    """The process that holds most, the first of those, and what it holds."""
    return max(enumerate(accounts), key=lambda item: (item[1].total, -item[0]))


def of_ranks(config: ResolvedConfig, ranks: int) -> list[Breakdown]:
    """Weights, gradients and states of each of so many processes.

    Weights and gradients are padded to as many rows (or columns) on all of them, and sparse
    positions are whole on each. What an optimizer updates entry by entry, or in parts, has states
    of the process's own share; of a layer that it needs whole one process owns all states.

    Raises:
        InputError: a method of one's own or an optimizer by import path: states aren't known.
    """
    placed = list(_placed(config, ranks))
    found = [_shards(config, placed, ranks) for _ in range(ranks)]
    for w, place in placed:
        if not w.trains or place.way == "owner":
            continue
        for rank, account in enumerate(found):
            if place.way == "part":
                _add_part_(account, w, config, ranks)
            else:
                _add_states_(account, _share(w, place.dim, ranks, rank), config)
    for owner, layer in _owned(config, placed, ranks):
        for w in layer:
            _add_states_(found[owner], w, config)
    return found


class Place(NamedTuple):
    """How processes share a weight."""

    layer: int  # its number: what is updated together
    dim: int  # along which it is cut
    way: Literal["shard", "part", "owner"]  # what its states are


def _placed(config: ResolvedConfig, ranks: int) -> Iterator[tuple[Weight, Place]]:
    """All weights of a configuration, placed as `training.fsdp` places them."""
    method, cuts = METHODS[config.method], _cuts(config, ranks)
    for number, layer in enumerate(layers(config)):
        for index, w in enumerate(layer):
            whole = _needed_whole(w, config)
            cut = cuts.get((w.shape, w.target)) if whole else None
            if cut is not None:
                yield w, Place(number, cut, "part")
                continue
            is_A = method.layers is not None and index == 1
            by_columns = is_A and not whole and not w.shape[1] % ranks
            way: Literal["shard", "owner"] = "owner" if whole and w.trains else "shard"
            yield w, Place(number, int(by_columns), way)


def _cuts(config: ResolvedConfig, ranks: int) -> dict[tuple[tuple[int, ...], bool], int]:
    """The dimension along which weights are held that are updated in parts, by shape and target."""
    method = METHODS[config.method]
    found: dict[tuple[tuple[int, ...], bool], int] = {}
    if not method.shardable:
        return found
    all_in_full = method.full_weights(config.method_options) == "all"
    for shape, target in {(w.shape, w.target) for w in weights(config)}:
        if any(n % ranks for n in shape) or not (target or all_in_full):
            continue
        one = [torch.empty(shape, device="meta", requires_grad=True)]
        optimizer = method.optimizer(*((one, []) if target else ([], one)), config)
        group = next(group for group in optimizer.param_groups if group["params"])
        dim = cast("ProjectedAdamW", optimizer).shard_dim(group, torch.Size(shape))
        if dim is not None:
            found[shape, target] = dim
    return found


def _share(w: Weight, dim: int, ranks: int, rank: int | None = None) -> Weight:
    """A process's part of a weight; without `rank` as it is padded."""
    length = -(-w.shape[dim] // ranks)
    if rank is not None:
        length = max(0, min(length, w.shape[dim] - rank * length))
    shape = tuple(length if i == dim else n for i, n in enumerate(w.shape))
    return w._replace(shape=shape)


def _shards(config: ResolvedConfig, placed: list[tuple[Weight, Place]], ranks: int) -> Breakdown:
    """What every process has as much of: weights and gradients."""
    found, b = Breakdown(), element_bytes(config)
    for w, place in placed:
        size = b * _share(w, place.dim, ranks).numel()
        found.weights += size
        found.gradients += size * w.trains
        found.frozen += size * (not w.trains)
    sparse = (sparse_entries(config, m, n) for m, n, target in matrices(config) if target)
    found.indices = 4 * sum(sparse)
    found.weights += found.indices
    return found


def _owned(
    config: ResolvedConfig, placed: list[tuple[Weight, Place]], ranks: int
) -> Iterator[tuple[int, list[Weight]]]:
    """What trains in layers that are updated whole, with its owner.

    The largest come first, each to the process that has fewest entries (`training.fsdp_layout`).
    """
    units: dict[int, list[Weight]] = {}
    for w, place in placed:
        if place.way == "owner":
            units.setdefault(place.layer, []).append(w)
    held = [0] * ranks
    for unit in sorted(units.values(), key=lambda unit: -sum(w.numel() for w in unit)):
        owner = held.index(min(held))
        held[owner] += sum(w.numel() for w in unit)
        yield owner, unit


def _add_states_(account: Breakdown, w: Weight, config: ResolvedConfig) -> None:
    account.optimizer_states += state_bytes(w, config)
    account.projections += projection_bytes(w, config)


def _add_part_(account: Breakdown, w: Weight, config: ResolvedConfig, ranks: int) -> None:
    """An equal share of the states, and numbers about the whole, which all processes have."""
    numbers = state_bytes(w._replace(shape=(0,) * len(w.shape)), config)
    account.optimizer_states += (state_bytes(w, config) - numbers) // ranks + numbers
    account.projections += projection_bytes(w, config) // ranks


def _needed_whole(w: Weight, config: ResolvedConfig) -> bool:
    """Whether an update of the weight needs more of it than single entries."""
    which = METHODS[config.method].full_weights(config.method_options)
    return which == "all" or (which == "targets" and w.target)
