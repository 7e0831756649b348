"""Full tensors on one rank from the shards of all, and back, with few collectives.

The DTensors here are those of FSDP2: on a mesh with one dimension, sharded along one dimension of
the tensor in chunks of ⌈length / ranks⌉ entries, or replicated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lowrank_lab.distributed.dtensors import is_dtensor, local_part
from lowrank_lab.distributed.processes import in_buckets

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Key = TypeVar("Key")


def gathered(tensors: Mapping[Key, Tensor]) -> Iterator[tuple[Key, Tensor]]:
    """Each tensor in full on the CPU of rank 0; the other ranks have to iterate and get nothing.

    Shards are gathered in buckets of one dtype. Tensors that aren't sharded are not communicated:
    rank 0 yields its own.
    """
    sharded = {key: t for key, t in tensors.items() if is_dtensor(t) and shard_dim(t) is not None}
    first = not dist.is_initialized() or dist.get_rank() == 0
    if first:
        for key in tensors.keys() - sharded.keys():
            yield key, local_part(tensors[key]).cpu()
    by_part = {id(part := local_part(t)): (key, t, part) for key, t in sharded.items()}
    for bucket in in_buckets(part for _, _, part in by_part.values()):
        which = [by_part[id(part)][:2] for part in bucket]
        longest = sum(_shape(t, 0).numel() for _, t in which)  # the first shard is the longest
        flat = torch.cat([part.reshape(-1) for part in bucket])
        flat = torch.cat([flat, flat.new_empty(longest - flat.numel())])
        ranks = [torch.empty_like(flat) for _ in range(dist.get_world_size())] if first else None
        dist.gather(flat, ranks)
        if ranks is not None:
            full = _joined([t for _, t in which], [of_rank.cpu() for of_rank in ranks])
            yield from zip((key for key, _ in which), full, strict=True)


def to_owners(tensors: Mapping[int, Sequence[DTensor]]) -> list[Tensor]:
    """Full tensors that this rank owns, from the shards of all ranks.

    Args:
        tensors: those of each owner, by its rank, all of one dtype. In one all-to-all, each rank
            receives the shards of its own tensors only.
    """
    me, ranks = dist.get_rank(), range(dist.get_world_size())
    mine = tensors.get(me, ())
    sent = [_flat([local_part(t) for t in tensors.get(r, ())], tensors) for r in ranks]
    lengths = [sum(_shape(t, r).numel() for t in mine) for r in ranks]
    return _joined(mine, _all_to_all(sent, lengths))


def from_owners_(tensors: Mapping[int, Sequence[DTensor]], full: Sequence[Tensor]) -> None:
    """Set DTensors in place to the full tensors of their owners: the inverse of `to_owners`.

    Args:
        tensors: those of each owner, by its rank.
        full: the full tensors that this rank owns. One all-to-all.
    """
    me, ranks = dist.get_rank(), range(dist.get_world_size())
    mine = tensors.get(me, ())
    sent = [
        _flat([_shard(whole, t, r) for whole, t in zip(full, mine, strict=True)], tensors)
        for r in ranks
    ]
    parts = [[local_part(t) for t in tensors.get(r, ())] for r in ranks]
    received = _all_to_all(sent, [sum(part.numel() for part in own) for own in parts])
    for own, flat in zip(parts, received, strict=True):
        for part, piece in zip(own, torch.split(flat, [p.numel() for p in own]), strict=True):
            part.copy_(piece.view(part.shape))


def shard_dim(t: DTensor) -> int | None:
    """The dimension along which a DTensor is sharded; None: it is replicated."""
    (placement,) = t.placements
    return None if placement.is_replicate() else placement.dim  # type: ignore[attr-defined]


def _span(t: DTensor, rank: int) -> tuple[int, int, int]:
    """The sharded dimension, and start and length of a rank's shard along it."""
    dim = shard_dim(t)
    assert dim is not None
    step = -(-t.shape[dim] // t.device_mesh.size())
    start = min(t.shape[dim], step * rank)
    return dim, start, min(step, t.shape[dim] - start)


def _shape(t: DTensor, rank: int) -> torch.Size:
    dim, _, length = _span(t, rank)
    return torch.Size(length if i == dim else n for i, n in enumerate(t.shape))


def _shard(full: Tensor, like: DTensor, rank: int) -> Tensor:
    return full.narrow(*_span(like, rank))


def _joined(tensors: Sequence[DTensor], ranks: Sequence[Tensor]) -> list[Tensor]:
    """Full tensors from what each rank has sent: its shards of them, one after the other."""
    found = [flat.new_empty(t.shape) for t in tensors for flat in ranks[:1]]
    for rank, flat in enumerate(ranks):
        shapes = [_shape(t, rank) for t in tensors]
        total = sum(s.numel() for s in shapes)
        pieces = torch.split(flat[:total], [s.numel() for s in shapes])
        for full, t, piece, shape in zip(found, tensors, pieces, shapes, strict=True):
            _shard(full, t, rank).copy_(piece.view(shape))
    return found


def _flat(parts: Sequence[Tensor], tensors: Mapping[int, Sequence[DTensor]]) -> Tensor:
    """Parts one after the other; without parts nothing, in the dtype of all tensors."""
    if parts:
        return torch.cat([part.reshape(-1) for part in parts])
    return local_part(next(t for own in tensors.values() for t in own)).new_empty(0)


def _all_to_all(sent: Sequence[Tensor], lengths: Sequence[int]) -> Sequence[Tensor]:
    """What each rank has sent to this one, of these lengths, from what this one sends to each."""
    joint = torch.cat(list(sent))
    received = joint.new_empty(sum(lengths))
    dist.all_to_all_single(received, joint, list(lengths), [t.numel() for t in sent])
    return torch.split(received, list(lengths))
