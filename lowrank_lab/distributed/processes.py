"""Process group and collectives. With one process, every collective is a no-op.

torchrun starts the processes and sets RANK, WORLD_SIZE and LOCAL_RANK. With `ddp` each process has
the full model and computes an equal share of every batch; gradients are averaged by torch during
the backward pass (`training.ddp`) or here, in buckets, after it. Clipping, optimizer steps and
events are then computed by each process from the same numbers.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from lowrank_lab.config import InputError
from lowrank_lab.device import prefers_few_kernels

BUCKET_BYTES = 25 << 20  # gradients that are averaged in one all-reduce


def _environment_number(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    if not value.isdecimal():
        raise InputError(name, value, "a whole number, as torchrun sets it")
    return int(value)


def is_launched() -> bool:
    """Whether torchrun, or a launcher with the same variables, started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank() -> int:
    """The rank of this process, from 0."""
    if dist.is_initialized():
        return dist.get_rank()
    return _environment_number("RANK", 0) if is_launched() else 0


def world_size() -> int:
    """The number of processes that compute this run."""
    if dist.is_initialized():
        return dist.get_world_size()
    return _environment_number("WORLD_SIZE", 1) if is_launched() else 1


def local_rank() -> int:
    """The rank of this process on its machine, from 0."""
    return _environment_number("LOCAL_RANK", 0) if is_launched() else 0


def is_rank_zero() -> bool:
    """Whether this process has rank 0, the one that writes files and logs."""
    return rank() == 0


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """The default process group for the duration of the block: NCCL on CUDA, gloo on CPU.

    A no-op where torchrun did not start this process or the group is initialized already.
    """
    if not is_launched() or dist.is_initialized():
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
def local_rank_zero_first() -> Iterator[None]:
    """Local rank 0 runs this block first; the other ranks of its machine find what it built."""
    if local_rank():
        barrier()
    try:
        yield
    finally:
        if not local_rank():
            barrier()


def barrier() -> None:
    """Wait until every process has reached this point."""
    if dist.is_initialized():
        dist.barrier()


def local_chunk(t: Tensor) -> Tensor:
    """This rank's chunk of a tensor along dimension 0, whose length the world size divides."""
    return t.chunk(world_size())[rank()] if world_size() > 1 else t


def all_reduce_sum_(t: Tensor) -> Tensor:
    """Sum over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(t)
    return t


def all_reduce_mean_(tensors: Iterable[Tensor]) -> None:
    """Mean of each tensor over all ranks, in place, in buckets of one dtype."""
    if world_size() == 1:
        return
    for bucket in in_buckets(tensors):
        flat = bucket[0].view(-1) if len(bucket) == 1 and bucket[0].is_contiguous() else None
        joint = torch.cat([t.reshape(-1) for t in bucket]) if flat is None else flat
        dist.all_reduce(joint.div_(world_size()))
        if flat is None:
            means = torch.split(joint, [t.numel() for t in bucket])
            for t, mean in zip(bucket, means, strict=True):
                t.copy_(mean.view(t.shape))


def in_buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors grouped by dtype, in order, up to BUCKET_BYTES (one larger tensor is a bucket)."""
    filling: dict[torch.dtype, list[Tensor]] = {}
    for t in tensors:
        bucket = filling.setdefault(t.dtype, [])
        if bucket and sum(b.nbytes for b in bucket) + t.nbytes > BUCKET_BYTES:
            yield bucket
            bucket = filling[t.dtype] = []
        bucket.append(t)
    yield from filling.values()


class AnyRank:
    """Whether a flag is set on any rank, asked once per step; all ranks get the same answer.

    On CUDA the answer is that of the previous call, so that the host does not wait for the device:
    it is on the host once the step between both calls has been waited for.

    Args:
        device: of the all-reduce.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._answer: Tensor | None = None

    def __call__(self, flag: bool) -> bool:
        """Whether a flag is set, here or elsewhere."""
        if not dist.is_initialized():
            return flag
        sent = all_reduce_sum_(torch.full((), float(flag), device=self._device))
        if not prefers_few_kernels(sent):
            return bool(sent)
        before, self._answer = self._answer, sent
        if sent.is_cuda:
            self._answer = torch.empty((), pin_memory=True).copy_(sent, non_blocking=True)
        return before is not None and bool(before)


def equal_on_all_ranks(value: int) -> bool:
    """Whether all ranks have the same number (|value| < 2⁶³)."""
    if not dist.is_initialized():
        return True
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    extremes = torch.tensor([value, -value], device=device)
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    return int(extremes[0]) == -int(extremes[1])
