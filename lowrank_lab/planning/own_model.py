"""Memory of training a model of one's own: its steps on fake tensors, without a configuration."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
)
from torch.profiler import record_function
from torch.utils._pytree import tree_leaves, tree_map_only

from lowrank_lab.device import cuda_path
from lowrank_lab.memory.breakdown import compiles_itself, persistent
from lowrank_lab.memory.hidden import CUDA_KERNELS, LAPACK, cublas_bytes
from lowrank_lab.memory.tracker import Tracker
from lowrank_lab.planning.memory_report import MemoryReport
from lowrank_lab.training.kinds import CLOCKS, set_clock_

CUDA_BLOCK = 512  # bytes: CUDA's caching allocator rounds up to a multiple of it

Loss = Callable[[nn.Module, Any], Tensor]  # (model, batch) → a scalar
# An optimizer of the model's parameters, or what makes one for a model.
AnyOptimizer = torch.optim.Optimizer | Callable[[nn.Module], torch.optim.Optimizer]
NEEDS_VALUES = (
    DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException,
)  # fmt: skip


def simulate_model(
    model: nn.Module,
    optimizer: AnyOptimizer,
    batch: Any,
    loss: Loss | None = None,
    device: str = "cpu",
) -> MemoryReport:
    """The report of training steps of a model on fake tensors; `simulate` documents it."""
    started = time.perf_counter()
    report = MemoryReport(None, "simulated")
    with ExitStack() as stack:
        if device == "cuda":
            stack.enter_context(cuda_path())
            report.excluded.append("CUDA's context and libraries (some 0.5 GiB), fragmentation")
        elif any(isinstance(module, nn.LSTM) for module in model.modules()):
            report.excluded.append("workspaces of fused LSTM kernels, which can exceed all else")
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        fake, built = _fake_copy(model, optimizer, mode)
        stack.enter_context(mode)
        tracker = Tracker(
            fake, built, **(on_cuda() if device == "cuda" else {"hidden": LAPACK})
        )  # fmt: skip
        stack.callback(tracker.close)
        fake.train()
        for name, updates in _kinds(built):
            if updates:
                set_clock_(built, updates)
            _step(fake, built, batch, loss or _loss_of, tracker)
            report.steps[name] = tracker.trace()
        report.persistent = persistent(fake, built)
    report.seconds = time.perf_counter() - started
    return report


def on_cuda() -> dict[str, Any]:
    """Arguments of a `Tracker` of steps on CUDA."""
    return {"granularity": CUDA_BLOCK, "hidden": CUDA_KERNELS, "cublas": cublas_bytes()}


def _kinds(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, int]]:
    """Names of steps that take different memory, and the number of updates before each."""
    yield "first", 0
    yield "next", 1
    for key, (name, early) in CLOCKS.items():
        for period in sorted({group[key] for group in optimizer.param_groups if key in group}):
            if period > 1 + early:
                yield f"{name} ({key} {period})", period - early


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any, loss: Loss, tracker: Tracker
) -> None:
    try:
        with tracker:
            with record_function("batch"):
                fake = tree_map_only(Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype), batch)
            with record_function("forward"):
                value = loss(model, fake)
            with record_function("backward"):
                value.backward()  # type: ignore[no-untyped-call]
            with record_function("optimizer"):
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            model.zero_grad(set_to_none=True)
    except NEEDS_VALUES as error:
        why = str(error).strip().splitlines()[0]
        raise ValueError(f"model: it reads values, which a simulation has not ({why})") from None


def _loss_of(model: nn.Module, batch: Any) -> Tensor:
    """The model's own loss; where it returns a tensor, the mean of that."""
    if isinstance(batch, dict):
        out = model(**batch)
    else:
        out = model(*batch) if isinstance(batch, tuple | list) else model(batch)
    found = out.get("loss") if isinstance(out, dict) else getattr(out, "loss", out)
    if isinstance(found, Tensor) and found.is_floating_point():
        return found if found.ndim == 0 else found.mean()
    raise ValueError(
        f"loss: None is not allowed; the model returns {type(out).__name__} without a loss, "
        "so a function of (model, batch) is needed"
    )


def _fake_copy(
    model: nn.Module, optimizer: AnyOptimizer, mode: FakeTensorMode
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Copies on fake tensors of the same shapes, dtypes and ties; the originals don't change."""
    states = optimizer.state.values() if isinstance(optimizer, torch.optim.Optimizer) else ()
    memo: dict[int, Any] = {}
    for t in itertools.chain(model.parameters(), model.buffers(), _tensors(states)):
        memo[id(t)] = _fake(t, mode)
    fake = copy.deepcopy(model, memo)
    if isinstance(optimizer, torch.optim.Optimizer):
        _refuse_foreign(optimizer, model)
        built = copy.deepcopy(optimizer, memo)
    else:
        with mode:
            built = optimizer(fake)
        if not isinstance(built, torch.optim.Optimizer):
            raise ValueError(
                f"optimizer: {type(built).__name__} is not allowed; an optimizer, or a function "
                "that returns one for a model"
            )
    if compiles_itself(built):
        raise ValueError(
            f"optimizer: {type(built).__name__} is not allowed; its step compiles itself, which "
            "needs values"
        )
    return fake, built


def _fake(t: Tensor, mode: FakeTensorMode) -> Tensor:
    # Optimizers read the values of step counts.
    number = t.item() if t.ndim == 0 and not t.is_meta and not t.requires_grad else None
    with mode:
        if number is not None:
            return torch.tensor(number, dtype=t.dtype)
        fake = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype)
        return nn.Parameter(fake, t.requires_grad) if isinstance(t, nn.Parameter) else fake


def _tensors(states: Iterable[dict[str, Any]]) -> Iterator[Tensor]:
    yield from (t for t in tree_leaves(list(states)) if isinstance(t, Tensor))


def _refuse_foreign(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    known = {id(p) for p in model.parameters()}
    if any(id(p) not in known for group in optimizer.param_groups for p in group["params"]):
        raise ValueError("optimizer: it has parameters that the model has not")
