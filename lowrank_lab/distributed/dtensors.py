"""torch's DTensors: their local parts, and how an optimizer updates one and stores its states.

FSDP2's `fully_shard` and tensor parallelism turn parameters into DTensors. An optimizer's update is
written for plain tensors: `ShardLayout` gives it the local parts of a parameter, its gradient and
its states, and puts the results back. Shapes and placements are read from the tensors alone.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard, cast

import torch
from torch import Tensor, nn

from lowrank_lab.distributed.placements import REPLICATED, Gathered, Groups, Placement, Sharded

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement as TorchPlacement

    Placements = tuple[TorchPlacement, ...]

ANY_DIM = -1  # the update is elementwise, so any sharding will do


def is_dtensor(t: object) -> TypeGuard[DTensor]:
    """Whether `t` is a DTensor; does not import torch.distributed.tensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def local_part(t: Tensor) -> Tensor:
    """This rank's part of a DTensor, not copied, for changes in place; other tensors unchanged."""
    with torch.no_grad():
        return t.to_local() if is_dtensor(t) else t


def full_tensor(t: Tensor) -> Tensor:
    """The full tensor of a DTensor, gathered on every rank; other tensors unchanged."""
    return t.full_tensor() if is_dtensor(t) else t


def redistributed(t: DTensor, placements: Placements) -> Tensor:
    """This rank's part of a DTensor under other placements; not copied if they are its own."""
    if tuple(t.placements) == placements:
        return local_part(t)
    with torch.no_grad():
        return t.redistribute(placements=placements).to_local()


def local_gradient(p: Tensor) -> Tensor:
    """This rank's part of a parameter's gradient."""
    assert p.grad is not None
    if not is_dtensor(p):
        return p.grad
    return redistributed(cast("DTensor", p.grad), tuple(p.placements))


def part_of(full: Tensor, like: DTensor, placements: Placements) -> Tensor:
    """A copy of this rank's part of a full tensor that every rank of the mesh of `like` has."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh, part = like.device_mesh, full
    if all(q.is_replicate() or type(q) is Shard for q in placements):
        for i, q in enumerate(placements):
            if isinstance(q, Shard):
                count, length = mesh.size(i), part.shape[q.dim]
                step = -(-length // count)
                start = min(length, step * mesh.get_local_rank(i))
                part = part.narrow(q.dim, start, min(step, length - start))
    else:
        everywhere = [Replicate()] * mesh.ndim
        joint = DTensor.from_local(full, mesh, everywhere, run_check=False)
        part = redistributed(joint, placements)
    return part.clone(memory_format=torch.contiguous_format)


def joined(part: Tensor, like: DTensor, placements: Placements, shape: Iterable[int]) -> DTensor:
    """The DTensor of a full shape whose part on this rank is `part`, on the mesh of `like`."""
    from torch.distributed.tensor import DTensor

    shape = torch.Size(shape)
    stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return DTensor.from_local(
        part, like.device_mesh, placements, run_check=False, shape=shape, stride=stride
    )


def shard_as(full: Tensor, like: DTensor) -> DTensor:
    """Shard a full tensor, which every rank has, into a DTensor with the placements of `like`."""
    placements = tuple(like.placements)
    return joined(part_of(full, like, placements), like, placements, like.shape)


def write_(p: DTensor, part: Tensor, placements: Placements) -> None:
    """Set a DTensor, in place, to the one whose part with these placements is `part`."""
    if part is not (own := local_part(p)):
        own.copy_(redistributed(joined(part, p, placements, p.shape), tuple(p.placements)))


def non_finite(t: Tensor) -> Tensor:
    """1 if a tensor has NaN or infinite entries, on any rank, else 0 (0-dimensional, float64)."""
    found = (~local_part(t).isfinite().all()).double()
    return layout_of(t, ANY_DIM).placement.all_reduce_max_(found) if is_dtensor(t) else found


def overwrite_(t: Tensor, full: Tensor) -> None:
    """Set a tensor, in place, to a full one: of a DTensor, this rank's part."""
    if is_dtensor(t):
        local_part(t).copy_(part_of(full, t, tuple(t.placements)))
    else:
        t.copy_(full)


@contextmanager
def joint_parts(*tensors: tuple[Tensor, int]) -> Iterator[tuple[list[Tensor], Placement]]:
    """Plain parts of tensors, to be changed in place within the block, and their placement.

    Parts are shards along the given dimensions if the same ranks share all tensors, otherwise full
    tensors. The sharded dimension may differ between the tensors; don't read it from the placement.
    """
    layouts = [layout_of(t, dim) if is_dtensor(t) else None for t, dim in tensors]
    shared = {x.groups if x is not None and x.dim is not None else () for x in layouts}
    if len(shared) > 1 or () in shared:
        layouts = [layout_of(t, None) if is_dtensor(t) else None for t, _ in tensors]
    parts = [t if x is None else x.load() for x, (t, _) in zip(layouts, tensors, strict=True)]
    yield parts, next((x.placement for x in layouts if x is not None), REPLICATED)
    for x, part in zip(layouts, parts, strict=True):
        if x is not None:
            x.write_(part)


def reshard_(module: nn.Module) -> None:
    """Reshard FSDP2's modules: changes to gathered weights would be lost."""
    if (fsdp := sys.modules.get("torch.distributed.fsdp")) is not None:
        for each in module.modules():
            if isinstance(each, fsdp.FSDPModule):
                each.reshard()


class ShardLayout(NamedTuple):
    """How a DTensor parameter is updated: `layout_of`."""

    p: DTensor
    placements: Placements  # of W and G during the update
    dim: int | None  # of the shards; None: in full
    placement: Placement  # for the update itself

    @property
    def groups(self) -> Groups:
        """The process groups that share p; several for shards of shards."""
        return self.placement.groups if isinstance(self.placement, Gathered) else ()

    def load(self) -> Tensor:
        """This rank's part of p during the update: p's own, or a copy with other placements."""
        return redistributed(self.p, self.placements)

    def gradient(self) -> Tensor:
        """This rank's part of the gradient during the update."""
        return redistributed(cast("DTensor", self.p.grad), self.placements)

    def write_(self, W: Tensor) -> None:
        """Set p, in place, to what an update has made of `load(p)`."""
        write_(self.p, W, self.placements)

    def load_states(self, state: dict[str, Any]) -> dict[str, Any]:
        """The states that the update works on: this rank's parts, or full tensors."""
        return {key: self._load_state(key, value) for key, value in state.items()}

    def store_states_(self, state: dict[str, Any], new: dict[str, Any]) -> None:
        """Store the states after an update as DTensors; single numbers stay plain tensors."""
        for key in state.keys() - new.keys():
            del state[key]
        for key, value in new.items():
            old = state.get(key)
            if not is_dtensor(old) or value is not local_part(old):
                state[key] = self._store_state(key, value)

    def place_states_(self, state: dict[str, Any]) -> None:
        """Store this rank's parts of states that are full, or have other placements."""
        self.store_states_(state, self.load_states(state))

    def _load_state(self, key: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim == 0:
            return value
        if self.dim is None:
            return full_tensor(value)
        placements = self._state_placements(key, value.shape)
        if is_dtensor(value):
            return redistributed(value, placements)
        return part_of(value, self.p, placements)  # of a checkpoint of full tensors

    def _store_state(self, key: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim == 0:
            return value
        shape = torch.Size(value.shape)
        if self.dim is None:
            placements = self._state_placements(key, shape)
            return joined(part_of(value, self.p, placements), self.p, placements, shape)
        if key.startswith("projection"):  # all ranks have an index in full
            shape = torch.Size((self.p.shape[1 - self.dim], *shape[1:])) if shape[1:] else shape
        elif self.dim == ANY_DIM:
            if shape != local_part(self.p).shape:
                return value
            shape = self.p.shape
        else:
            ours, dim = self.p.shape, self.dim
            shape = torch.Size(ours[i] if i == dim else n for i, n in enumerate(shape))
        return joined(value, self.p, self._state_placements(key, shape), shape)

    def _state_placements(self, key: str, shape: torch.Size) -> Placements:
        """Placements of a state of this full shape: as p, projections by rows, indices in full."""
        from torch.distributed.tensor import Replicate, Shard

        own: Placements = tuple(self.p.placements)
        if key.startswith("projection") and len(shape) == 1:
            return (Replicate(),) * len(own)
        if self.dim is None and shape == self.p.shape:
            return own
        if self.dim is not None and not key.startswith("projection"):
            return self.placements
        # In full the longest side; not in shards of shards, which may be too short for them.
        dim = 0 if self.dim is not None else shape.index(max(shape))
        first = next((i for i, q in enumerate(own) if not q.is_replicate()), None)
        return tuple(Shard(dim) if i == first else Replicate() for i in range(len(own)))


def layout_of(p: DTensor, dim: int | None) -> ShardLayout:
    """How a DTensor parameter is updated in shards along `dim`, or in full (None).

    If p is sharded along one dimension of its mesh (FSDP, HSDP), it is updated in shards along
    `dim`, even if p's own shards are along another. ANY_DIM keeps p's own shards, also those along
    several dimensions. Otherwise every rank gathers the full matrix.
    """
    from torch.distributed.tensor import Replicate, Shard

    own: Placements = tuple(p.placements)
    sharding = [i for i, q in enumerate(own) if not q.is_replicate()]
    groups = tuple(p.device_mesh.get_group(i) for i in sharding)
    if not sharding:
        return ShardLayout(p, own, None, REPLICATED)
    if dim == ANY_DIM:
        return ShardLayout(p, own, ANY_DIM, Sharded(ANY_DIM, groups, p.shape))
    if dim is None or len(sharding) > 1:
        return ShardLayout(p, (Replicate(),) * len(own), None, Gathered(groups))
    placements = tuple(Shard(dim) if i == sharding[0] else q for i, q in enumerate(own))
    return ShardLayout(p, placements, dim, Sharded(dim, groups, p.shape))
