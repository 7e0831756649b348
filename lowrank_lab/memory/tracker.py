"""Who holds which bytes at every moment of a step, seen operation by operation.

`Tracker` watches the storages that are alive while a step runs, on real tensors (a measurement) and
on fake ones (a simulation) alike. What an operation allocates and frees within itself it does not
see; the allocator does, and so the two check each other (`memory.measure`).

Phases are the named ranges of `torch.profiler.record_function` that the step marks anyway.
"""

from __future__ import annotations

import itertools
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
)
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from lowrank_lab.memory.breakdown import CATEGORIES, NAMES, PARTS, Breakdown, storages_of
from lowrank_lab.models.attention import unfolded

if TYPE_CHECKING:
    import pandas as pd

TRAVEL = ("c10d", "_c10d_functional")  # namespaces of what processes do together


def _copy(A: Tensor, *args: object, **kwargs: object) -> int:
    return A.numel() * A.element_size()


def _copy_of_tall(A: Tensor, mode: str = "reduced") -> int:
    return _copy(A) if mode == "r" and A.shape[-2] > A.shape[-1] else 0


# Bytes that torch takes on a CPU within these operations, beside their results.
LAPACK: dict[str, Callable[..., int]] = {
    "aten::_linalg_svd": _copy,
    "aten::_linalg_eigh": lambda A, *args: 2 * _copy(A),
    "aten::linalg_cholesky_ex": _copy,
    "aten::linalg_qr": _copy_of_tall,
}
# And what gloo takes beside what it is given: flat copies of all that travels.
GLOO: dict[str, Callable[..., int]] = {
    "c10d::_allgather_base_": lambda out, A, *args, **kwargs: _copy(out),
    "c10d::_reduce_scatter_base_": lambda out, A, *args, **kwargs: _copy(A),
    "_c10d_functional::all_gather_into_tensor": lambda A, size, *args: size * _copy(A),
}


@dataclass
class Block:
    """One piece of memory: what it is, whose it is, and from which to which event it was there."""

    bytes: int
    category: str
    owner: str
    born: int
    died: int | None = None


@dataclass
class Trace:
    """The memory of one step, event by event: an event is an allocation or a release."""

    phases: list[tuple[int, str]]  # (first event, name), in order
    blocks: list[Block]
    events: int
    changes: list[tuple[int, int, int]] = field(repr=False)  # (event, block, +1 or −1)
    seconds: float = 0.0

    def timeline(self) -> dict[str, np.ndarray[Any, Any]]:
        """Bytes by category or part, at the start and after each event."""
        return self._timeline

    @cached_property
    def _timeline(self) -> dict[str, np.ndarray[Any, Any]]:
        found = {name: np.zeros(self.events + 1, dtype=np.int64) for name in NAMES}
        for event, index, sign in self.changes:
            block = self.blocks[index]
            found[block.category][event] += sign * block.bytes
            if block.category in PARTS:
                found[PARTS[block.category]][event] += sign * block.bytes
        return {name: values.cumsum() for name, values in found.items()}

    def table(self, points: int = 1000) -> pd.DataFrame:
        """The timeline as event, phase and bytes by category, thinned to about so many rows.

        Of neighbouring events the one with most bytes stays, so that no peak is lost.
        """
        import pandas as pd

        table = pd.DataFrame(self._timeline)
        table.insert(0, "event", np.arange(self.events + 1))
        bins = table["event"] // max(1, len(table) // points)
        kept = table.loc[pd.Series(self.total()).groupby(bins).idxmax()].reset_index(drop=True)
        kept.insert(1, "phase", [self.phase_of(event) for event in kept["event"]])
        return kept

    def total(self) -> np.ndarray[Any, Any]:
        """All bytes after each event."""
        total: np.ndarray[Any, Any] = np.sum([self._timeline[n] for n in CATEGORIES], axis=0)
        return total

    @property
    def peak_event(self) -> int:
        return int(self.total().argmax())

    @property
    def peak(self) -> Breakdown:
        """What was there when most was."""
        return self.at(self.peak_event)

    @property
    def kept(self) -> Breakdown:
        """What was there when the backward pass began."""
        return self.at(next((event for event, name in self.phases if name == "backward"), 0))

    def at(self, event: int) -> Breakdown:
        """What was there after an event."""
        return Breakdown(**{name: int(v[event]) for name, v in self.timeline().items()})

    def phase_of(self, event: int) -> str:
        """The phase in which an event happened."""
        return next((name for first, name in reversed(self.phases) if first <= event), "")

    def alive(self, event: int | None = None) -> list[Block]:
        """The blocks that were there after an event (the peak by default), the largest first."""
        when = self.peak_event if event is None else event
        there = [b for b in self.blocks if b.born <= when and (b.died is None or b.died > when)]
        return sorted(there, key=lambda block: -block.bytes)

    def by_owner(self, event: int | None = None) -> dict[tuple[str, str], int]:
        """Bytes that were there after an event (the peak by default), by category and module."""
        found: dict[tuple[str, str], int] = defaultdict(int)
        for block in self.alive(event):
            found[block.category, block.owner] += block.bytes
        return dict(sorted(found.items(), key=lambda item: -item[1]))


class Tracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the storages of a model in training; `trace()` ends a step and returns its Trace.

    Args:
        model, optimizer: what is trained. Their hooks are taken off by `close`.
        mirror: has the optimizer's parameters by the same names, if they aren't the model's.
        granularity: allocators round blocks up to a multiple of this (CUDA's: 512).
        hidden: bytes that an operation takes for itself while it runs, by its name, from its
            arguments (`memory.LAPACK`).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        granularity: int = 1,
        hidden: Mapping[str, Callable[..., int]] | None = None,
        mirror: nn.Module | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._model, self._optimizer = model, optimizer
        self._granularity, self._hidden = granularity, dict(hidden or {})
        self._alive: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}
        self._names: dict[Tensor, str] = {
            p: name for name, p in model.named_parameters(remove_duplicate=False)
        }
        self._updated = self._names | {
            p: name for name, p in (mirror.named_parameters() if mirror else ())
        }
        self._modules: list[str] = []  # whose forward pass is running, the innermost last
        self._going_back = ""  # the block whose backward pass is running
        self._ranges: list[str] = []
        self._begin()
        self._name_weights()
        self._name_states()
        for t in getattr(model, "_tables", None) or ():
            self.record(t, "temporaries", "rotary tables")
        self._handles = list(self._hooks())
        if type(optimizer).__module__.startswith("torchao"):
            step = optimizer.step  # which compiles itself: nothing to be seen there but its states
            optimizer.step = untracked()(step)  # type: ignore[method-assign]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(t.__module__.startswith("torch.distributed.tensor") for t in types):
            return NotImplemented  # it comes again, as operations on this process's shards
        if func.namespace == "profiler":
            self._mark(func, args)
            return func(*args, **kwargs)
        body = unfolded(func)
        if body is not None:  # an operation of ours: what it does within counts as well
            with self:
                out = body(*args, **kwargs)
        elif func.overloadpacket.__name__ == "wait_tensor" and isinstance(args[0], FakeTensor):
            out = args[0]  # torch would make another one
        else:
            out = func(*args, **kwargs)
        travels = func.namespace in TRAVEL
        for leaf in tree_leaves((args, out) if travels else out):
            if isinstance(leaf, Tensor):
                self.record(leaf)
                if travels:
                    self._gathered(leaf)
        hidden = self._hidden.get(func.overloadpacket._qualified_op_name)
        if hidden is not None:
            self._flash(hidden(*args, **kwargs))
        return out

    def trace(self) -> Trace:
        """What happened since the start or the last call; what is alive goes on into the next."""
        self._name_states()
        trace = Trace(self._phases, self._blocks, self._event, self._changes)
        alive = [(key, ref, self._blocks[i]) for key, (ref, i) in self._alive.items()]
        self._begin()
        for key, _, block in alive:
            self._alive[key] = (self._alive[key][0], len(self._blocks))
            kept = Block(block.bytes, block.category, block.owner, 0)
            if kept.category in ("activations", "logits"):
                kept.category = "temporaries"
            self._changes.append((0, len(self._blocks), 1))
            self._blocks.append(kept)
        self._name_weights()  # which of them are frozen may have changed
        return trace

    @property
    def alive_bytes(self) -> int:
        """Bytes that are there now."""
        return sum(self._blocks[index].bytes for _, index in self._alive.values())

    def close(self) -> None:
        """Take the hooks off the model and the optimizer."""
        for handle in self._handles:
            handle.remove()
        self._optimizer.__dict__.pop("step", None)

    def _begin(self) -> None:
        self._event = 0
        self._blocks: list[Block] = []
        self._changes: list[tuple[int, int, int]] = []
        self._phases: list[tuple[int, str]] = [(0, "start")]
        self._made_in: list[list[int]] = []  # blocks that running forward passes have made

    def record(self, t: Tensor, category: str = "", owner: str = "") -> None:
        """Note the storages of a tensor that are new; with a category, name them."""
        for storage in storages_of(t):
            key = storage._cdata
            if key not in self._alive:
                self._born(storage, key)
            if category:
                block = self._blocks[self._alive[key][1]]
                block.category, block.owner = category, owner

    def _gathered(self, t: Tensor) -> None:
        for storage in storages_of(t):
            block = self._blocks[self._alive[storage._cdata][1]]
            if block.category == "temporaries":
                block.category = "gathered"

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Note that a storage has given its memory back, or has got new memory, by `resize_`."""
        if storage._cdata in self._alive:
            self._died(storage._cdata)
        if storage.nbytes():
            self._born(storage, storage._cdata)

    def _born(self, storage: torch.UntypedStorage, key: int) -> None:
        size = -(-storage.nbytes() // self._granularity) * self._granularity
        index = len(self._blocks)

        if self._phases[-1][1] != "start":
            self._event += 1
        category = "temporaries"
        if self._ranges and self._ranges[-1] == "loss":
            category = "logits"
        elif self._ranges and self._ranges[-1].startswith("FSDP::"):
            category = "gathered"
        self._blocks.append(Block(size, category, self._owner(), self._event))
        self._changes.append((self._event, index, 1))
        self._alive[key] = (weakref.ref(storage, lambda _: self._died(key)), index)
        for made in self._made_in:
            made.append(index)

    def _died(self, key: int) -> None:
        place = self._alive.pop(key, None)
        if place is not None:
            self._event += 1
            self._blocks[place[1]].died = self._event
            self._changes.append((self._event, place[1], -1))

    def _flash(self, size: int) -> None:
        """Memory that is there and gone within one operation."""
        self._event += 1
        self._blocks.append(Block(size, "temporaries", self._owner(), self._event, self._event + 1))
        index = len(self._blocks) - 1
        self._changes.append((self._event, index, 1))
        self._event += 1
        self._changes.append((self._event, index, -1))

    def _owner(self) -> str:
        if self._modules:
            return self._modules[-1]
        return self._going_back if self._phase == "backward" else self._phase

    @property
    def _phase(self) -> str:
        return self._phases[-1][1]

    def _mark(self, func: Any, args: tuple[Any, ...]) -> None:
        """A named range begins or ends; torch names its own with capitals and dots."""
        if "enter" in func.overloadpacket.__name__:
            self._ranges.append(str(args[0]))
            ended = ""
        else:
            ended = self._ranges.pop()
        if ended.startswith("FSDP::pre_"):
            self._name_whole()
        if (ended or self._ranges[-1]).startswith("FSDP::") and "reduce" not in ended:
            return
        if ended == "forward":
            self._keep_activations()
        named = [name for name in self._ranges if name[0].islower()]
        phase = named[-1] if named else "between"
        for p, name in self._names.items():
            if p.grad is not None:
                self.record(p.grad, "gradients", name)
        if phase != self._phase:
            self._event += 1
            self._phases.append((self._event, phase))

    def _keep_activations(self) -> None:
        """What the forward pass has made and is still alive at its end waits for the backward."""
        for _, index in self._alive.values():
            block = self._blocks[index]
            if block.category == "temporaries" and block.born:
                block.category = "activations"

    def _name_weights(self) -> None:
        for name, t in itertools.chain(self._model.named_parameters(), self._model.named_buffers()):
            frozen = isinstance(t, nn.Parameter) and not t.requires_grad
            kind = "frozen" if frozen else "indices" if name.endswith("indices") else "weights"
            self.record(t, kind, name)

    def _name_whole(self) -> None:
        """Of shards, the parameters that stand for them while a block is whole."""
        for name, p in self._model.named_parameters(remove_duplicate=False):
            if p.requires_grad and p not in self._names:
                self._names[p] = name
                self._handles.append(p.register_post_accumulate_grad_hook(self._gradient(name)))  # type: ignore[no-untyped-call]

    def _name_states(self) -> None:
        for p, state in self._optimizer.state.items():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    kind = "projections" if key.startswith("projection") else "optimizer_states"
                    self.record(value, kind, self._updated.get(p, key))

    def _hooks(self) -> Iterable[RemovableHandle]:
        for name, module in self._model.named_modules():
            yield module.register_forward_pre_hook(self._enter(name))
            yield module.register_forward_hook(self._leave(name), always_call=True)
        for p, name in self._names.items():
            if p.requires_grad:
                handle = p.register_post_accumulate_grad_hook(self._gradient(name))  # type: ignore[no-untyped-call]
                # before those that use the gradient up (`step.PerLayerUpdates`)
                p._post_accumulate_grad_hooks.move_to_end(handle.id, last=False)  # type: ignore[attr-defined]
                yield handle

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any) -> None:
            self._modules.append(name)
            self._made_in.append([])

        return hook

    def _leave(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            self._modules.pop()
            made = self._made_in.pop()
            if self._phase == "backward" and not self._made_in:  # recomputed: it waits again
                alive = {index for _, index in self._alive.values()}
                for index in alive.intersection(made):
                    if self._blocks[index].category == "temporaries":
                        self._blocks[index].category = "activations"
            if isinstance(output, Tensor) and output.requires_grad and name.count(".") == 2:
                output.register_hook(self._back(name))  # type: ignore[no-untyped-call]

        return hook

    def _back(self, name: str) -> Callable[[Tensor], None]:
        def hook(grad: Tensor) -> None:
            self._going_back = name

        return hook

    def _gradient(self, name: str) -> Callable[[Tensor], None]:
        def hook(p: Tensor) -> None:
            if p.grad is not None:
                self.record(p.grad, "gradients", name)

        return hook


@contextmanager
def resizing(tracker: Tracker) -> Iterator[None]:
    """Tell a tracker in this block of storages that are resized: so FSDP frees whole weights."""
    resize = torch.UntypedStorage.resize_

    def seen(storage: torch.UntypedStorage, size: int) -> Any:
        changed = resize(storage, size)
        tracker.resized(storage)
        return changed

    torch.UntypedStorage.resize_ = seen  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]


@contextmanager
def untracked() -> Iterator[None]:
    """Let no tracker see what happens in this block."""
    with _disable_current_modes():
        yield
