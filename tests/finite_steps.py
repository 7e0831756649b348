"""Steps that aren't finite, on CUDA's path and off it, and what the host reads in between."""

import math
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank_lab import train
from lowrank_lab.device import cuda_path
from lowrank_lab.distributed.dtensors import local_part
from lowrank_lab.training import step as stepping
from lowrank_lab.training.finite import FiniteCheck, off_where


def spoiled(monkeypatch, steps, where):
    """Make the loss, or a gradient and with it the norm, of these steps (from 1) not finite."""
    real = stepping.gradients

    def gradients(model, batches, config, *rest):
        loss, norm = real(model, batches, config, *rest)
        calls.append(1)
        if len(calls) not in steps:
            return loss, norm
        if where == "loss":
            return loss * math.nan, norm
        for p in model.parameters():
            if p.grad is not None:
                bad = math.inf if where == "overflow" else math.nan
                local_part(p.grad).view(-1)[0] = bad
        return loss, norm * math.nan

    calls = []
    monkeypatch.setattr(stepping, "gradients", gradients)


def late_and_not(monkeypatch, folder, config, bad, where):
    """The run on CUDA's path, and the one in which the host waits before each update."""
    flags = []

    @contextmanager
    def noted(optimizer, found_inf):
        flags.append(found_inf.item())
        with off_where(optimizer, found_inf):
            yield

    for late in (True, False):
        with monkeypatch.context() as patch, cuda_path():
            spoiled(patch, bad, where)
            patch.setattr(stepping, "off_where", noted)
            if not late:
                patch.setattr(stepping, "checks_on_device", lambda *_: False)
            yield train(config, folder / str(late))
    assert {0, 1} == set(flags)  # both kinds of steps were queued


class HostReads(TorchDispatchMode):
    """Appends the names of what waits for the device to give the host numbers.

    Of a CPU's tensors, the methods below read memory without an operator.
    """

    METHODS = ("tolist", "numpy", "cpu", "__array__")

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __enter__(self):
        self._patch = pytest.MonkeyPatch()
        for name in self.METHODS:
            self._patch.setattr(torch.Tensor, name, self._noting(name))
        return super().__enter__()

    def __exit__(self, *error):
        self._patch.undo()
        return super().__exit__(*error)

    def _noting(self, name):
        real = getattr(torch.Tensor, name)

        def noting(tensor, *args, **kwargs):
            self.found.append(name)
            return real(tensor, *args, **kwargs)

        return noting

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "item"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def order_of_step(take_step, optimizer_step):
    """What happens in a step, in order: `update` (queued), `check` (its numbers), and host reads.

    Args:
        take_step: takes it, given a `FiniteCheck`.
        optimizer_step: an object and the name of its method that updates.
    """
    found, (owner, name) = [], optimizer_step
    real = getattr(owner, name)

    def step():
        real()
        found.append("update")

    def check(loss, norm):
        found.append("check")
        return loss.item(), norm.item()

    setattr(owner, name, step)
    try:
        with cuda_path(), HostReads(found):
            take_step(FiniteCheck(check, lambda: found.append("ready")))
    finally:
        setattr(owner, name, real)
    return found


READS = ["_local_scalar_dense"] * 2  # of two numbers that are on the host already
QUEUED_FIRST = ["ready", "update", "check", *READS]
