"""Placements: how processes store a matrix, `Replicated` or `Sharded` along a dimension.

Optimizers, layers and techniques are written once, against the methods of a placement.
`dtensors.layout_of` reads the placement of torch's DTensors, such as the parameters of FSDP2.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class Replicated:
    """Replicated placement: each process has the full matrix, and every collective is a no-op."""

    dim: int | None = None  # the sharded dimension

    def global_shape(self, t: Tensor) -> tuple[int, ...]:
        """The shape of the full tensor whose local shard is `t`."""
        return tuple(t.shape)

    def all_reduce_sum_(self, t: Tensor) -> Tensor:
        """Sum over the shards, in place."""
        return t

    def all_reduce_max_(self, t: Tensor) -> Tensor:
        """Maximum over the shards, in place."""
        return t

    def global_norm(self, t: Tensor) -> Tensor:
        """Norms of full tensors from the norms of their local shards."""
        return t

    def broadcast(self, t: Tensor, source: int = 0) -> Tensor:
        """`t` of rank `source`, on all ranks: other machines may have rounded it differently."""
        return t

    def local_shard(self, t: Tensor, dim: int = 0) -> Tensor:
        """This rank's shard along `dim` of a full tensor."""
        return t

    def all_gather(self, t: Tensor, dim: int = 0, length: int | None = None) -> Tensor:
        """The full tensor from shards along `dim`; `length`: its size there, for unequal shards."""
        return t


REPLICATED = Replicated()
Groups = tuple[dist.ProcessGroup | None, ...]  # None: the default group


class Gathered(Replicated):
    """Every process has gathered the full matrix; decisions use the values of one of them."""

    def __init__(self, groups: Groups = (None,)) -> None:
        self.groups = groups

    def broadcast(self, t: Tensor, source: int = 0) -> Tensor:
        t = t.contiguous()
        for group in self.groups:
            dist.broadcast(t, group=group, group_src=source)
        return t


class Sharded(Gathered):
    """Sharded placement: each process has a shard of the matrix along dimension `dim`.

    All shards have ⌈length / processes⌉ entries along it, except for the last ones, which are
    shorter or empty.

    Args:
        dim: of the shards.
        groups: of the processes that have the shards; one, unless the matrix has shards of shards.
        shape: of the full matrix; None: all shards are equal.
    """

    def __init__(
        self, dim: int, groups: Groups = (None,), shape: tuple[int, ...] | None = None
    ) -> None:
        super().__init__(groups)
        self.dim: int = dim
        self._shape = shape

    @property
    def rank(self) -> int:
        return dist.get_rank(self.groups[0])

    @property
    def count(self) -> int:
        """The number of shards."""
        return dist.get_world_size(self.groups[0])

    def global_shape(self, t: Tensor) -> tuple[int, ...]:
        if self._shape is not None:
            return tuple(self._shape)
        return tuple(n * self.count if i == self.dim else n for i, n in enumerate(t.shape))

    def all_reduce_sum_(self, t: Tensor) -> Tensor:
        for group in self.groups:
            dist.all_reduce(t, group=group)
        return t

    def all_reduce_max_(self, t: Tensor) -> Tensor:
        for group in self.groups:
            dist.all_reduce(t, dist.ReduceOp.MAX, group=group)
        return t

    def global_norm(self, t: Tensor) -> Tensor:
        return self.all_reduce_sum_(t.double().square()).sqrt().to(t.dtype)

    def local_shard(self, t: Tensor, dim: int = 0) -> Tensor:
        length = t.shape[dim]
        step = -(-length // self.count)
        start = min(length, step * self.rank)
        # A copy: a view would keep the full tensor alive.
        shard = t.narrow(dim, start, min(step, length - start))
        return shard.clone(memory_format=torch.contiguous_format)

    def all_gather(self, t: Tensor, dim: int = 0, length: int | None = None) -> Tensor:
        step = t.shape[dim] if length is None else -(-length // self.count)
        if t.shape[dim] < step:
            missing = [step - n if i == dim else n for i, n in enumerate(t.shape)]
            t = torch.cat([t, t.new_zeros(missing)], dim)
        shards = t.new_empty((self.count, *t.shape))
        dist.all_gather(list(shards), t.contiguous(), group=self.groups[0])
        joint = shards.flatten(0, 1) if dim == 0 else torch.cat(list(shards), dim)
        return joint if length is None else joint.narrow(dim, 0, length)


Placement = Replicated | Gathered | Sharded
