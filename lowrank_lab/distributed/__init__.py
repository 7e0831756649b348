"""Several processes: their group and collectives, placements of tensors, and torch's DTensors."""

from lowrank_lab.distributed.processes import (
    AnyRank,
    all_reduce_mean_,
    all_reduce_sum_,
    barrier,
    equal_on_all_ranks,
    is_launched,
    is_rank_zero,
    local_chunk,
    local_rank,
    local_rank_zero_first,
    process_group,
    rank,
    world_size,
)

__all__ = [
    "AnyRank",
    "all_reduce_mean_",
    "all_reduce_sum_",
    "barrier",
    "equal_on_all_ranks",
    "is_launched",
    "is_rank_zero",
    "local_chunk",
    "local_rank",
    "local_rank_zero_first",
    "process_group",
    "rank",
    "world_size",
]
