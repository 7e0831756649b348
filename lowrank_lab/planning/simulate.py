"""Memory of training by simulation and by measurement, which check the formulas.

`simulate` runs the training step on fake tensors, which have shapes and no memory, `measure` on
real ones; `formulas.by_formula` counts from the configuration. All return the same `Breakdown`.
"""

from __future__ import annotations

import gc
import itertools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.profiler import ProfilerActivity, profile, record_function

from lowrank_lab import distributed
from lowrank_lab.config import InputError, ResolvedConfig, RunConfig, warn_renamed
from lowrank_lab.device import cuda_path
from lowrank_lab.memory.breakdown import Breakdown, persistent, tensor_bytes
from lowrank_lab.memory.formulas import optimizer_state_bytes
from lowrank_lab.memory.hidden import GLOO, LAPACK
from lowrank_lab.memory.tracker import Tracker, resizing
from lowrank_lab.methods.build import build
from lowrank_lab.methods.registry import METHODS
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.planning.fsdp import (
    check_world_size,
    fake_rank,
    fullest,
    per_rank,
    untracked_global_shapes,
)
from lowrank_lab.planning.memory_report import MemoryReport
from lowrank_lab.planning.own_model import AnyOptimizer, Loss, on_cuda, simulate_model
from lowrank_lab.training.fsdp import ShardedModel
from lowrank_lab.training.gradients import Batch, PerLayerUpdates
from lowrank_lab.training.kinds import kind_of, periods, set_clock_
from lowrank_lab.training.schedule import warm_start
from lowrank_lab.training.step import take_step_


def simulate(
    config: RunConfig | None = None,
    device: str = "cpu",
    *,
    model: nn.Module | None = None,
    optimizer: AnyOptimizer | None = None,
    batch: Any = None,
    loss: Loss | None = None,
    world_size: int | None = None,
    rank: int | None = None,
    ranks: int | None = None,
) -> MemoryReport:
    """Memory of training, from the training step itself on fake tensors.

    Pass a configuration, or a model of your own: `simulate_memory(model=…, optimizer=…, batch=…)`
    takes a first step, a second, and one with each kind of refresh that the optimizer has.

    Args:
        config: any method and size; `compile` is ignored, as compilers plan their own memory.
        device: `cpu`, or `cuda` with its flash attention and blocks of 512 bytes.
        model: any module, on any device, the meta device included; it is not changed.
        optimizer: an optimizer of the model's parameters, which is not changed, or a function that
            makes one for a model.
        batch: the model's input: a tensor, a tuple of arguments or a dict of keyword arguments.
            Only shapes and dtypes of its tensors matter.
        loss: a function of (model, batch); by default the `loss` of the model's output, or the mean
            of the tensor that the model returns.
        world_size: number of processes that share the run and its batch by FSDP2; the report is of
            one of them.
        rank: the process to report; by default the one with the most bytes.
        ranks: the earlier name of `world_size`.

    Raises:
        InputError: the configuration or device is not allowed, or the world size doesn't suit it.
        ValueError: neither or both of configuration and model, a model without optimizer or batch,
            or one whose step reads the values of tensors.
    """
    if device not in ("cpu", "cuda"):
        raise InputError("device", device, "cpu or cuda")
    if config is None or model is not None:
        return simulate_model(
            *_own_model(config, model, optimizer, batch, world_size), loss, device
        )
    if ranks is not None:
        warn_renamed("ranks", "world_size")
        world_size = ranks if world_size is None else world_size
    resolved = resolve(config)
    if world_size is None:
        return _simulate(device, MemoryReport(resolved, "simulated"))
    resolved = check_world_size(resolved, world_size)
    if rank is None:
        try:
            rank, _ = fullest(per_rank(resolved, world_size))
        except InputError:  # states that no formula knows
            rank = 0
    if not 0 <= rank < world_size:
        raise InputError("rank", rank, f"0 to {world_size - 1}")
    report = MemoryReport(resolved, "simulated", world_size=world_size, rank=rank)
    with fake_rank(world_size, rank):
        try:
            return _simulate(device, report)
        except InputError as error:  # of ShardedModel: more processes than layers
            name = "world_size" if error.field == "nproc-per-node" else error.field
            raise InputError(name, error.value, error.allowed) from None


def _own_model(
    config: RunConfig | None,
    model: nn.Module | None,
    optimizer: AnyOptimizer | None,
    batch: Any,
    world_size: int | None,
) -> tuple[nn.Module, AnyOptimizer, Any]:
    """What `simulate_model` needs, all there."""
    if config is not None or model is None:
        raise ValueError("config: either it or a model, with its optimizer and a batch, is needed")
    if optimizer is None or batch is None:
        missing = "optimizer" if optimizer is None else "batch"
        raise ValueError(f"{missing}: None is not allowed with a model")
    if world_size is not None:
        raise ValueError(f"world_size: {world_size!r} is not allowed; only with a configuration")
    return model, optimizer, batch


def _simulate(device: str, report: MemoryReport) -> MemoryReport:
    """The report, filled from its configuration."""
    assert report.config is not None
    report.config = config = report.config.override(compile=False)
    started = time.perf_counter()
    with ExitStack() as stack:
        if device == "cuda":
            stack.enter_context(cuda_path())
            report.excluded.append("CUDA's context and libraries (some 0.5 GiB), fragmentation")
        if report.world_size:
            report.excluded.append("buffers of NCCL or gloo, and the first process's copy in RAM")
        stack.enter_context(FakeTensorMode())
        stepping = Stepping(config, torch.device("cpu"), device, report.world_size > 0)
        if not METHODS[config.method].in_precision(config.state_precision).fake_steps:
            report.excluded.append("temporaries of the optimizer (its states are by formula)")
            stepping.assume_states(
                per_rank(config, report.world_size)[report.rank].optimizer_states
                if report.world_size
                else optimizer_state_bytes(config)
            )
        for name, run in stepping.kinds():
            run()
            report.steps[name] = stepping.tracker.trace()
        report.persistent = stepping.persistent()
        stepping.tracker.close()
    report.seconds = time.perf_counter() - started
    return report


def measure(config: RunConfig, device: str = "cpu") -> MemoryReport:
    """Memory of training a configuration, from real steps on random tokens.

    By live storages, operation by operation, and by the allocator. With `parallel: fsdp2` every
    process of the group has to call it, and measures its shards.

    Raises:
        InputError: the configuration, or a missing device.
    """
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise InputError("device", device, "cpu, or cuda where there is one")
    resolved = resolve(config).override(compile=False)
    started = time.perf_counter()
    report = MemoryReport(resolved, "measured")
    in_shards = resolved.parallel == "fsdp2" and dist.is_initialized()
    if in_shards:
        report.world_size, report.rank = distributed.world_size(), distributed.rank()
    stepping = Stepping(resolved, torch.device(device), device, in_shards)
    for name, run in stepping.kinds():
        before = stepping.tracker.alive_bytes
        # A release by one of gloo's threads is not recorded: what it held then counts on.
        with untracked_global_shapes(), allocator_peak(stepping.device) as above:
            run()
        report.steps[name] = stepping.tracker.trace()
        report.allocated[name] = before + above[0]
    report.persistent = stepping.persistent()
    stepping.tracker.close()
    report.seconds = time.perf_counter() - started
    return report


@contextmanager
def allocator_peak(device: torch.device) -> Iterator[list[int]]:
    """Peak of allocated bytes in this block above its start: a list of one number, afterwards.

    On a CPU by the allocator events of torch's profiler, on CUDA by the allocator's counters.
    """
    found: list[int] = []
    gc.collect()  # what others left must not be released within
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        found.append(torch.cuda.max_memory_allocated(device) - before)
        return
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # it writes to stderr otherwise
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        yield found
    kineto = record.profiler.kineto_results
    memory = [e for e in kineto.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(memory, key=lambda e: e.start_ns())]
    found.append(max(itertools.accumulate(changes, initial=0)))


def make_cublas_workspaces(device: torch.device) -> None:
    """Let the threads of the forward and the backward pass allocate their workspaces on CUDA."""
    x = torch.ones(8, 8, device=device, requires_grad=True)
    (x @ x).sum().backward()  # type: ignore[no-untyped-call]


class Stepping:
    """A model in training that takes one step of each kind, under a tracker.

    Args:
        device: of the tensors; fake ones are on the CPU.
        counted: the device for which bytes are counted, cpu or cuda.
    """

    def __init__(
        self,
        config: ResolvedConfig,
        device: torch.device,
        counted: str = "cpu",
        in_shards: bool = False,
    ) -> None:
        self.config, self.device = config, device
        self._shards = ShardedModel(config, device) if in_shards else None
        if self._shards is not None:
            self.model, self.optimizer = self._shards.model, self._shards.optimizer
        else:
            self.model, self.optimizer = build(config)
            if device.type != "cpu":
                self.model.to(device)
            if not config.per_layer:
                self.model.pack_(aligned=config.precision != "fp32")
        self.model.train()
        if device.type == "cuda":
            make_cublas_workspaces(device)  # which the tracker counts from the start
        self.tracker = Tracker(
            self.model, self.optimizer,
            mirror=None if self._shards is None else self._shards.mirror,
            **(on_cuda() if counted == "cuda" else {"hidden": LAPACK | GLOO}),
        )  # fmt: skip
        self._per_layer = PerLayerUpdates(self.model, self.optimizer) if config.per_layer else None
        self._assumed: Tensor | None = None

    def assume_states(self, size: int) -> None:
        """Replace the optimizer's step by an allocation of that many bytes of states."""

        def step(closure: object = None) -> None:
            if self._assumed is None:
                self._assumed = torch.empty(size, dtype=torch.uint8)
                self.tracker.record(self._assumed, "optimizer_states", "by formula")

        self.optimizer.step = step  # type: ignore[assignment, method-assign]

    def kinds(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """The name of each kind of step and a function that takes it; the names are `kind_of`'s."""
        seen = set()
        for updates in _candidates(self.config):
            name = kind_of(self.config, updates)
            if name not in seen:
                seen.add(name)
                yield name, partial(self._take, updates)

    def persistent(self) -> Breakdown:
        if self._shards is None:
            found = persistent(self.model, self.optimizer, self.config.per_layer)
        else:
            found = self._shards.persistent()
        if self._assumed is not None:
            found.optimizer_states = tensor_bytes([self._assumed])
        return found

    def _take(self, updates: int) -> None:
        """The step after so many updates, as training takes it."""
        config = self.config
        set_clock_(self.optimizer, updates)
        with resizing(self.tracker), self.tracker:
            with record_function("batch"):
                batches = self._batches()
            take_step_(
                self.model, self.optimizer, batches, config, updates,
                per_layer=self._per_layer, shards=self._shards,
            )  # fmt: skip

    def _batches(self) -> list[Batch]:
        own = distributed.world_size() if self._shards is not None else 1
        shape = self.config.batch // own, self.config.sequence_length
        tokens, targets = (
            torch.randint(self.config.size.vocab_size, shape, device=self.device) for _ in range(2)
        )
        pieces = self.config.gradient_accumulation
        return list(zip(tokens.chunk(pieces), targets.chunk(pieces), strict=True))


def _candidates(config: ResolvedConfig) -> list[int]:
    """Numbers of updates before a step of each kind, in order."""
    starts = warm_start(config)
    found = {0, 1, config.total_steps - 1}  # nothing follows the last one
    if starts:
        found |= {starts - 1, starts}
    for period in periods(config):
        first = period * (starts // period + 1)
        found |= {first - 1, first}
    return sorted(n for n in found if 0 <= n < config.total_steps)
