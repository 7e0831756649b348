"""How an optimizer's `update_` is called: for one parameter after the other, or for many at once.

On CUDA's path, parameters whose states hold equal Python numbers are updated together, in few
kernels, if the optimizer `can_stack` them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from lowrank_lab.device import prefers_few_kernels
from lowrank_lab.distributed.dtensors import is_dtensor, part_of
from lowrank_lab.distributed.placements import REPLICATED
from lowrank_lab.optim.adam import (
    adam_update_,
    advance_weights_,
    bias_corrected_lr,
    eps_after_correction,
    random_bits,
    rounds_stochastically,
    stochastic_round,
)
from lowrank_lab.optim.dtensor_optimizer import DTensorOptimizer, param_index
from lowrank_lab.optim.eight_bit import direction, quantizes, update_moments_, zero_moments_
from lowrank_lab.optim.found_inf import decay_, zero_if_off_
from lowrank_lab.optim.stacks import (
    Matrices,
    Projections,
    StackedStates,
    Stacks,
    State,
    Weights,
    gather_,
    limited,
    moments_of,
)

SEED_STRIDE = 1_000_003  # between the seeds of two parameters, so that their streams differ
FEWEST = 2  # tensors in a stack; a single one is updated without a copy


class MatrixUpdates(DTensorOptimizer):
    """An optimizer that calls `update_` for its parameters."""

    in_8_bits: ClassVar[bool] = False  # whether moments may be in 8 bits
    eps_after: ClassVar[bool] = False  # ε is added after the bias correction, as in torch's AdamW
    decays_first: ClassVar[bool] = False  # weight decay precedes the update, as in torch's AdamW
    batch: list[Tensor]  # the parameters that are being updated together

    def can_stack(self, group: dict[str, Any]) -> bool:
        """Whether `update_` takes stacks of many parameters of the group, too (see stacks.py)."""
        return False

    def stack_order(self, p: Tensor, *, marked: bool) -> Any:
        """A key that sorts a batch so that shapes which one view can cover follow each other.

        They are matrices with rows of equal length, or, in groups whose update does not depend on
        the shape, tensors with equally many entries.
        """
        return p.shape[-1] if marked else p.numel(), tuple(p.shape)

    def update_(self, W: Any, G: Any, state: Any, group: dict[str, Any], step_size: float) -> None:
        """One step of one parameter: change W (m×n) in place, given its gradient G (m×n).

        `step_size` is the learning rate with Adam's bias correction in it. Where `can_stack` is
        true, W, G and the state may be the `Weights`, `Stacks` and `StackedStates` of many (see
        stacks.py).
        """
        raise NotImplementedError

    def eps_of(self, state: Any, group: dict[str, Any]) -> float:
        """What is added to √v."""
        return eps_after_correction(state, group) if self.eps_after else float(group["eps"])

    def step_size_of(self, state: Any, group: dict[str, Any]) -> float:
        """The learning rate with both bias corrections."""
        return bias_corrected_lr(state, group)

    def restarts(self, p: Tensor, group: dict[str, Any]) -> bool:
        """Whether Adam restarts on p in this step; `update_` then sets its moments to zero."""
        return False

    def _update_each_(self, params: list[Tensor], group: dict[str, Any]) -> None:
        for batch, together in batches(self, params, group):
            if together:
                self._update_many_(batch, group)
            else:
                self._update_one_(batch[0], group)

    def _update_one_(self, p: Tensor, group: dict[str, Any]) -> None:
        dim = self.dim_of(group, p.shape)
        with undone_on_error(self.state[p]):
            state = self._advanced_state(p, group)
            with (
                self.plain_parts(p, dim) as (part, G, parts),
                self._update_target(p, part, state["step"], group) as W,
            ):
                self.update_(W, zero_if_off_(G), parts, group, self.step_size_of(state, group))
        state["step"] += 1

    def _update_many_(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """As `_update_one_` of each, in few kernels; their states have equal numbers."""
        states = [self.state[p] for p in params]
        with undone_on_error(*states), ExitStack() as targets:
            for p in params:
                self._advanced_state(p, group)
            self.batch, self.layout, self.placement = params, None, REPLICATED
            G, together = Stacks.of([cast("Tensor", p.grad) for p in params]), StackedStates(states)
            W = Weights(
                [
                    targets.enter_context(self._update_target(p, p, s["step"], group))
                    for p, s in zip(params, states, strict=True)
                ],
                G,
            )
            self.update_(W, G, together, group, self.step_size_of(states[0], group))
            W.add_update_()
            together.store_()
        for state in states:
            state["step"] += 1

    def _advanced_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """The state of p, with the weights of its moments advanced by one step."""
        state: dict[str, Any] = self.state[p]
        if self.restarts(p, group):
            state.update(exp_avg_weight=0.0, exp_avg_sq_weight=0.0)
        advance_weights_(state, group["betas"])
        return state

    @contextmanager
    def _update_target(
        self, p: Tensor, part: Tensor, step: int, group: dict[str, Any]
    ) -> Iterator[Tensor]:
        """The tensor that an update changes: `part`, or a float32 copy that is rounded into it."""
        if not rounds_stochastically(part, group):
            yield part
            return
        W, share = part.float(), group["lr"] * group["weight_decay"]
        if self.decays_first:
            decay_([W], share)
        yield W
        if not self.decays_first:
            decay_([W], share)
        # The bits are those of the full matrix: the same ones for any number of processes.
        seed = (param_index(self, p) * SEED_STRIDE + step) % 2**63
        bits = random_bits(p.shape, seed, part.device)
        if self.layout is not None:
            bits = part_of(bits, self.layout.p, self.layout.placements)
        part.copy_(stochastic_round(W, bits))

    def adam_direction(self, R: Any, state: Any, group: dict[str, Any]) -> Any:
        """`adam.adam_direction` of a projected gradient, in a buffer that is reused."""
        eps = self.eps_of(state, group)
        if isinstance(R, Stacks) and quantizes(group, math.prod(R.shapes[0][1])):
            for own, like in zip(state.states, R.items, strict=True):
                zero_moments_(own, like)
            update_moments_(R.twin.flat, R.flat, state.states, group["betas"], eps)
            return R.twin
        if isinstance(R, Stacks):
            ms, vs = moments_of(state, R)
            adam_update_(
                R.twin.items, R.items, ms, vs, step_size=-1.0, betas=group["betas"], eps=eps
            )
            return R.twin
        N = self.buffer("direction", R.shape, R)
        return direction(R, state, group, out=N, eps=eps)

    def buffer(self, name: str, shape: tuple[int, ...] | torch.Size, like: Tensor) -> Tensor:
        """An uninitialised tensor of that shape, shared by all parameters within a step."""
        buffers = self.__dict__.setdefault("_buffers", {})
        key = (name, tuple(shape), like.dtype, like.device)
        if key not in buffers:
            buffers[key] = like.new_empty(shape)
        found: Tensor = buffers[key]
        return found


def each(
    optimizer: Any,
    projections: Callable[[Tensor, State, dict[str, Any]], Projections],
    G: Matrices,
    state: State | StackedStates,
    group: dict[str, Any],
) -> tuple[Any, Any]:
    """Call `projections` for a matrix, or for each of many; their (L, R) are then stacked."""
    if isinstance(G, Tensor):
        assert isinstance(state, dict)
        return projections(G, state, group)
    assert isinstance(state, StackedStates)
    found = []
    for p, own in zip(optimizer.batch, state.states, strict=True):
        optimizer.param = p
        found.append(projections(p.grad, own, group))
    both: tuple[list[Stacks | None], list[Stacks | None]] = ([], [])
    at = 0
    for count, _ in G.shapes:
        for stacks, side in zip(both, zip(*found[at : at + count], strict=True), strict=True):
            stacks.append(None if side[0] is None else Stacks.of(side))
        at += count
    gather_(G, *(s for stacks in both for s in stacks if s is not None))
    left, right = ([None if s is None else s.blocks[0] for s in stacks] for stacks in both)
    return left, right


def batches(
    optimizer: Any, params: list[Tensor], group: dict[str, Any]
) -> Iterator[tuple[list[Tensor], bool]]:
    """Parameters to update one after the other, and whether as stacks or one by one.

    DTensors, and matrices that fill a batch alone, are updated one by one, as is everything off
    CUDA's path.

    Those of a batch hold equal Python numbers in their states, and are sorted by `stack_order`.
    """
    alike: dict[Any, list[Tensor]] = {}
    can_stack = optimizer.can_stack(group)
    for p in params:
        if not (can_stack and prefers_few_kernels(p)) or is_dtensor(p):
            yield [p], False
            continue
        assert p.grad is not None
        state = optimizer.state[p]
        numbers = [state.get(k) for k in ("step", "exp_avg_weight", "exp_avg_sq_weight")]
        kinds = frozenset(
            (name, value.dtype)
            for name, value in state.items()
            if isinstance(value, Tensor) and not name.startswith("projection")
        )
        coded = optimizer.in_8_bits and quantizes(group, _entries(optimizer, p, group))
        restarts = optimizer.restarts(p, group)
        key = (p.device, p.dtype, p.grad.dtype, *numbers, restarts, kinds, coded)
        alike.setdefault(key, []).append(p)

    order = partial(optimizer.stack_order, marked=optimizer.marker in group)
    for same in alike.values():
        for batch in limited(sorted(same, key=lambda p: sorted(p.shape))):
            yield sorted(batch, key=order), len(batch) >= FEWEST


def _entries(optimizer: Any, p: Tensor, group: dict[str, Any]) -> int:
    """Entries of a moment of p."""
    return math.prod(optimizer.state_shapes(group, tuple(p.shape))["exp_avg"])


@contextmanager
def undone_on_error(*states: dict[str, Any]) -> Iterator[None]:
    """Restore the Python numbers of states, if an update raises within the block."""
    before = [{k: v for k, v in s.items() if not isinstance(v, Tensor)} for s in states]
    try:
        yield
    except BaseException:
        for state, numbers in zip(states, before, strict=True):
            for key in [k for k, v in state.items() if not isinstance(v, Tensor)]:
                if key not in numbers:
                    del state[key]
            state.update(numbers)
        raise
