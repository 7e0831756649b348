"""Several processes as one run: who we are, and what is summed between us. Alone, all is a no-op.

Processes are started by torchrun, which says by RANK, WORLD_SIZE and LOCAL_RANK who is who. With
`ddp` each holds the whole model and computes an equal share of every batch; gradients are averaged
in buckets after the last piece of a batch, and all else (clipping, optimizer, events) is computed
by each process from the same numbers. torch's DistributedDataParallel is not used: it wraps
`forward` where the loss is another method here, fixes at its start which parameters train (warm
starts change that), and holds gradients in buckets of its own that `per_layer` could not free.
What that costs: gradients travel after the backward pass, not within it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from lowrank_lab.config import InputError

BUCKET_BYTES = 25 << 20  # of gradients that travel together


def _number(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    if not value.isdecimal():
        raise InputError(name, value, "a whole number, as torchrun sets it")
    return int(value)


def launched() -> bool:
    """Whether this process is one of a group that torchrun, or its like, started."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank() -> int:
    """The number of this process, from 0."""
    if dist.is_initialized():
        return dist.get_rank()
    return _number("RANK", 0) if launched() else 0


def size() -> int:
    """How many processes compute this run."""
    if dist.is_initialized():
        return dist.get_world_size()
    return _number("WORLD_SIZE", 1) if launched() else 1


def local_rank() -> int:
    """The number of this process on its machine, from 0."""
    return _number("LOCAL_RANK", 0) if launched() else 0


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return rank() == 0


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Be one of the group in this block: NCCL between CUDA devices, gloo between CPUs."""
    if not launched() or dist.is_initialized():
        yield
        return
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def first_on_each_machine() -> Iterator[None]:
    """Local rank 0 alone runs this block, then all others do: what it built is there for them."""
    if local_rank():
        wait_for_all()
    try:
        yield
    finally:
        if not local_rank():
            wait_for_all()


def wait_for_all() -> None:
    """Go on when every process has come here."""
    if dist.is_initialized():
        dist.barrier()


def share(t: Tensor) -> Tensor:
    """This process's part of a tensor whose first dimension the number of processes divides."""
    return t.chunk(size())[rank()] if size() > 1 else t


def sum_(t: Tensor) -> Tensor:
    """The sum of the processes' tensors, in place."""
    if dist.is_initialized():
        dist.all_reduce(t)
    return t


def agreed(flag: bool, device: torch.device) -> bool:
    """Whether any process says so: what they must all do, or none."""
    if not dist.is_initialized():
        return flag
    return bool(sum_(torch.tensor([int(flag)], device=device)).item())


def average_(tensors: Iterable[Tensor]) -> None:
    """The means of the processes' tensors, in place, in buckets of one dtype."""
    if size() == 1:
        return
    for bucket in _buckets(tensors):
        flat = bucket[0].view(-1) if len(bucket) == 1 and bucket[0].is_contiguous() else None
        joint = torch.cat([t.reshape(-1) for t in bucket]) if flat is None else flat
        dist.all_reduce(joint.div_(size()))
        if flat is None:
            parts = torch.split(joint, [t.numel() for t in bucket])
            for t, part in zip(bucket, parts, strict=True):
                t.copy_(part.view(t.shape))


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype, up to BUCKET_BYTES together or one alone, in their order."""
    filling: dict[torch.dtype, list[Tensor]] = {}
    for t in tensors:
        bucket = filling.setdefault(t.dtype, [])
        if bucket and sum(b.nbytes for b in bucket) + t.nbytes > BUCKET_BYTES:
            yield bucket
            bucket = filling[t.dtype] = []
        bucket.append(t)
    yield from filling.values()


class Whole:
    """How a process holds a matrix: all of it. What holders of parts exchange is nothing here."""

    dim: int | None = None  # along which it is cut

    def shape(self, t: Tensor) -> tuple[int, ...]:
        """The shape of the whole of which `t` is held here."""
        return tuple(t.shape)

    def sum_(self, t: Tensor) -> Tensor:
        """The sum of what all holders have computed from their parts, in place."""
        return t

    def max_(self, t: Tensor) -> Tensor:
        """The largest of what all holders have found in their parts, in place."""
        return t

    def norm(self, t: Tensor) -> Tensor:
        """Norms of the whole from those of the parts."""
        return t

    def agreed(self, t: Tensor, source: int = 0) -> Tensor:
        """What one holder has for `t`: rounding may be another on another machine."""
        return t

    def own(self, t: Tensor, dim: int = 0) -> Tensor:
        """This process's part along `dim` of what all hold."""
        return t

    def joined(self, t: Tensor, dim: int = 0) -> Tensor:
        """The whole of which each process holds the part `t`, equal in size, along `dim`."""
        return t


WHOLE = Whole()


class Part(Whole):
    """One of equal parts along a dimension, each held by one process of the run."""

    def __init__(self, dim: int) -> None:
        self.dim: int = dim

    def shape(self, t: Tensor) -> tuple[int, ...]:
        return tuple(n * size() if i == self.dim else n for i, n in enumerate(t.shape))

    def sum_(self, t: Tensor) -> Tensor:
        return sum_(t)

    def max_(self, t: Tensor) -> Tensor:
        dist.all_reduce(t, dist.ReduceOp.MAX)
        return t

    def norm(self, t: Tensor) -> Tensor:
        return sum_(t.double().square()).sqrt().to(t.dtype)

    def agreed(self, t: Tensor, source: int = 0) -> Tensor:
        dist.broadcast(t := t.contiguous(), source)
        return t

    def own(self, t: Tensor, dim: int = 0) -> Tensor:
        # A copy: a view would keep all of it alive.
        return t.chunk(size(), dim)[rank()].clone(memory_format=torch.contiguous_format)

    def joined(self, t: Tensor, dim: int = 0) -> Tensor:
        parts = t.new_empty((size(), *t.shape))
        dist.all_gather(list(parts), t.contiguous())
        return parts.flatten(0, 1) if dim == 0 else torch.cat(list(parts), dim)


def same_everywhere(value: int) -> bool:
    """Whether all processes hold the same number (below 2⁶³)."""
    if not dist.is_initialized():
        return True
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    ends = torch.tensor([value, -value], device=device)
    dist.all_reduce(ends, dist.ReduceOp.MAX)
    return int(ends[0]) == -int(ends[1])
