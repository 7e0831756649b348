"""One process of many that share a run by FSDP2: what it holds by formula, and a group to be it in.

Nothing of the others exists: `one_of` makes a group in which what they would send has a shape and
no values, which is all that `memory.simulate` needs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch.distributed as dist

from lowrank_lab.config import InputError, RunConfig
from lowrank_lab.formulas import (
    Weight,
    element_bytes,
    layers,
    matrices,
    projection_bytes,
    sparse_entries,
    state_bytes,
    weights,
)
from lowrank_lab.methods import METHODS, resolve
from lowrank_lab.sharded import check_shards
from lowrank_lab.tracing import Breakdown, unseen


def check_ranks(config: RunConfig, ranks: int) -> RunConfig:
    """The resolved configuration as so many processes share it by FSDP2.

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
    config = resolve(config).replace(parallel="fsdp2")
    check_shards(config)
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
    setattr(ShardingPropagator, name, unseen()(found))
    try:
        yield
    finally:
        setattr(ShardingPropagator, name, found)


def fullest(accounts: Sequence[Breakdown]) -> tuple[int, Breakdown]:
    """The process that holds most, the first of those, and what it holds."""
    return max(enumerate(accounts), key=lambda item: (item[1].total, -item[0]))


def of_ranks(config: RunConfig, ranks: int) -> list[Breakdown]:
    """Weights, gradients and states of each of so many processes.

    Weights and gradients are padded to as many rows on all of them, and sparse positions are whole
    on each. What an optimizer updates entry by entry has states of the process's own rows; of a
    layer that it needs whole one process owns all states.

    Raises:
        InputError: a method of one's own or an optimizer by import path: states aren't known.
    """
    config = resolve(config)
    shared = _in_rows(config)
    found = [_shards(config, ranks) for _ in range(ranks)]
    for rank, account in enumerate(found):
        for w in shared:
            rows = -(-w.shape[0] // ranks)
            own = max(0, min(rows, w.shape[0] - rank * rows))
            _add_states_(account, w._replace(shape=(own, *w.shape[1:])), config)
    for owner, layer in _owned(config, ranks):
        for w in layer:
            _add_states_(found[owner], w, config)
    return found


def _shards(config: RunConfig, ranks: int) -> Breakdown:
    """What every process has as much of: weights and gradients."""
    found, b = Breakdown(), element_bytes(config)
    for w in weights(config):
        size = b * -(-w.shape[0] // ranks) * math.prod(w.shape[1:])
        found.weights += size
        found.gradients += size * w.trains
        found.frozen += size * (not w.trains)
    sparse = (sparse_entries(config, m, n) for m, n, target in matrices(config) if target)
    found.indices = 4 * sum(sparse)
    found.weights += found.indices
    return found


def _in_rows(config: RunConfig) -> list[Weight]:
    """The weights whose states are in shards like them."""
    return [w for w in weights(config) if w.trains and not _needed_whole(w, config)]


def _owned(config: RunConfig, ranks: int) -> Iterator[tuple[int, list[Weight]]]:
    """What trains in layers that are updated whole, with its owner.

    The largest come first, each to the process that has fewest entries (`sharded.Shards`).
    """
    units = [
        [w for w in layer if w.trains and _needed_whole(w, config)] for layer in layers(config)
    ]
    held = [0] * ranks
    for unit in sorted(units, key=lambda unit: -sum(w.numel() for w in unit)):
        owner = held.index(min(held))
        held[owner] += sum(w.numel() for w in unit)
        yield owner, unit


def _add_states_(account: Breakdown, w: Weight, config: RunConfig) -> None:
    account.optimizer_states += state_bytes(w, config)
    account.projections += projection_bytes(w, config)


def _needed_whole(w: Weight, config: RunConfig) -> bool:
    """Whether an update of the weight needs all of it, and not its rows alone."""
    which = METHODS[config.method].whole
    if config.method_options.get("density", 1) < 1:
        which = "all"
    return which == "all" or (which == "targets" and w.target)
