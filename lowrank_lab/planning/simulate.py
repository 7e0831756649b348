"""Where the bytes of training are, from three sources that check each other.

`formulas.by_formula` counts from the configuration, `simulate` runs the training step on fake
tensors, which have shapes and no memory, and `measure` runs it for real. All speak of the same
`Breakdown`.
"""

from __future__ import annotations

import gc
import itertools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.profiler import ProfilerActivity, profile, record_function

from lowrank_lab import distributed
from lowrank_lab.config import InputError, ResolvedConfig, RunConfig
from lowrank_lab.memory.breakdown import Breakdown, persistent, tensor_bytes
from lowrank_lab.memory.formulas import optimizer_state_bytes
from lowrank_lab.memory.hidden import GLOO, LAPACK
from lowrank_lab.memory.trace import Trace
from lowrank_lab.memory.tracker import Tracker, resizing
from lowrank_lab.methods.build import build
from lowrank_lab.methods.registry import METHODS
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.models.attention import flash_kernels
from lowrank_lab.planning.fsdp import check_ranks, fullest, of_ranks, one_of, whole_shapes_unseen
from lowrank_lab.training.fsdp import ShardedModel
from lowrank_lab.training.schedule import warm_start
from lowrank_lab.training.step import (
    Batch,
    PerLayerUpdates,
    kind_of,
    periods,
    set_clock_,
    take_step_,
)

CUDA_BLOCK = 512  # bytes: CUDA's caching allocator rounds up to a multiple of it


@dataclass
class Account:
    """The memory of a configuration's training, step by step of each kind.

    Attributes:
        source: `simulated` or `measured`.
        steps: a Trace for each kind of step, by name: `first`, `next`, and those with events.
        at_rest: weights, gradients and states as training holds them after the last of the steps.
        allocated: bytes at the peak of each step according to the allocator (measured only).
        left_out: what isn't in the figures, in words.
        ranks: how many processes share the run by FSDP2, and `rank` which of them this is; 0: none.
        seconds: that it took.
    """

    config: ResolvedConfig
    source: str
    steps: dict[str, Trace] = field(default_factory=dict)
    at_rest: Breakdown = field(default_factory=Breakdown)
    allocated: dict[str, int] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    ranks: int = 0
    rank: int = 0
    seconds: float = 0.0

    @property
    def peak_step(self) -> str:
        """The kind of step that takes most."""
        return max(self.steps, key=lambda name: self.steps[name].peak.total)

    @property
    def peak(self) -> Breakdown:
        """What is there when most is, over all kinds of steps."""
        return self.steps[self.peak_step].peak


def simulate(
    config: RunConfig, device: str = "cpu", *, ranks: int | None = None, rank: int | None = None
) -> Account:
    """The memory of training a configuration, from the training step itself on fake tensors.

    Args:
        config: any method and size; `compile` is left out, as compilers plan memory of their own.
        device: `cpu`, or `cuda` for what differs there: flash attention, blocks of 512 bytes.
        ranks: that many processes share the run by FSDP2, its batch too; the account is of one.
        rank: which one; by default the one that holds most, as owners of layers differ.

    Raises:
        InputError: the configuration, a device that isn't known, or ranks that can't share it.
    """
    if device not in ("cpu", "cuda"):
        raise InputError("device", device, "cpu or cuda")
    resolved = resolve(config)
    if ranks is None:
        return _simulate(device, Account(resolved, "simulated"))
    resolved = check_ranks(resolved, ranks)
    if rank is None:
        try:
            rank, _ = fullest(of_ranks(resolved, ranks))
        except InputError:  # states that no formula knows
            rank = 0
    if not 0 <= rank < ranks:
        raise InputError("rank", rank, f"0 to {ranks - 1}")
    account = Account(resolved, "simulated", ranks=ranks, rank=rank)
    with one_of(ranks, rank):
        try:
            return _simulate(device, account)
        except InputError as error:  # of ShardedModel: more processes than layers
            name = "ranks" if error.field == "nproc-per-node" else error.field
            raise InputError(name, error.value, error.allowed) from None


def _simulate(device: str, account: Account) -> Account:
    """Fill the account of its configuration."""
    account.config = config = account.config.override(compile=False)
    started = time.perf_counter()
    with ExitStack() as stack:
        if device == "cuda":
            stack.enter_context(flash_kernels())
            account.left_out.append("CUDA's context and libraries (some 0.5 GiB), fragmentation")
        if account.ranks:
            account.left_out.append("buffers of NCCL or gloo, and the first process's copy in RAM")
        stack.enter_context(FakeTensorMode())
        granularity = CUDA_BLOCK if device == "cuda" else 1
        stepping = _Stepping(config, torch.device("cpu"), granularity, account.ranks > 0)
        if not METHODS[config.method].fake_steps:
            account.left_out.append("temporaries of the optimizer (its states are by formula)")
            stepping.assume_states(
                of_ranks(config, account.ranks)[account.rank].optimizer_states
                if account.ranks
                else optimizer_state_bytes(config)
            )
        for name, run in stepping.kinds():
            run()
            account.steps[name] = stepping.tracker.trace()
        account.at_rest = stepping.at_rest()
        stepping.tracker.close()
    account.seconds = time.perf_counter() - started
    return account


def measure(config: RunConfig, device: str = "cpu") -> Account:
    """The memory of training a configuration, from real steps on random tokens.

    Live storages are followed operation by operation; beside them stands what the allocator says.
    A process of a group measures its shards, with `parallel: fsdp2`; all of them have to.

    Raises:
        InputError: the configuration, or a device that isn't there.
    """
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise InputError("device", device, "cpu, or cuda where there is one")
    resolved = resolve(config).override(compile=False)
    started = time.perf_counter()
    account = Account(resolved, "measured")
    in_shards = resolved.parallel == "fsdp2" and dist.is_initialized()
    if in_shards:
        account.ranks, account.rank = distributed.world_size(), distributed.rank()
    granularity = CUDA_BLOCK if device == "cuda" else 1
    stepping = _Stepping(resolved, torch.device(device), granularity, in_shards)
    for name, run in stepping.kinds():
        before = stepping.tracker.alive_bytes
        # A release by one of gloo's threads is not recorded: what it held then counts on.
        with whole_shapes_unseen(), allocator_peak(stepping.device) as above:
            run()
        account.steps[name] = stepping.tracker.trace()
        account.allocated[name] = before + above[0]
    account.at_rest = stepping.at_rest()
    stepping.tracker.close()
    account.seconds = time.perf_counter() - started
    return account


@contextmanager
def allocator_peak(device: torch.device) -> Iterator[list[int]]:
    """The most bytes that were allocated in this block above those before it: one number, after it.

    On a CPU from the allocator's events in torch's profiler, on CUDA from the allocator's counters.
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


class _Stepping:
    """A model in training that takes one step of each kind, under a tracker."""

    def __init__(
        self,
        config: ResolvedConfig,
        device: torch.device,
        granularity: int = 1,
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
        self.model.train()
        self.tracker = Tracker(
            self.model, self.optimizer, granularity=granularity,
            hidden=LAPACK | GLOO if granularity == 1 else {},
            mirror=None if self._shards is None else self._shards.mirror,
        )  # fmt: skip
        self._per_layer = PerLayerUpdates(self.model, self.optimizer) if config.per_layer else None
        self._assumed: Tensor | None = None

    def assume_states(self, size: int) -> None:
        """Hold that many bytes in place of states after the first step; steps do nothing else."""

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

    def at_rest(self) -> Breakdown:
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
    """Numbers of updates after which the steps of all kinds are met, in order."""
    starts = warm_start(config)
    found = {0, 1, config.total_steps - 1}  # nothing follows the last one
    if starts:
        found |= {starts - 1, starts}
    for period in periods(config):
        first = period * (starts // period + 1)
        found |= {first - 1, first}
    return sorted(n for n in found if 0 <= n < config.total_steps)
