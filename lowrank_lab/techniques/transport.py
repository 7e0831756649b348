"""Transport: an optimizer's moments follow the factors through a refactorization."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lowrank_lab.distributed.dtensors import joint_parts
from lowrank_lab.layers import Balance
from lowrank_lab.optim.carried import carried
from lowrank_lab.optim.checked import CheckedOptimizer
from lowrank_lab.techniques.layouts import ADAM, Layout
from lowrank_lab.techniques.states import Entry, Held, entries, held_by

PROJECTIONS = frozenset({"projection_left", "projection_right"})


def transport_moments_(
    state_B: dict[str, Any], state_A: dict[str, Any], found: Balance, layout: Layout = ADAM
) -> None:
    """Transform the moments of B and A to those of the balanced factors B T and T⁻¹A, in place.

    Gradients transform with the factors: G_B ← G_B T⁻ᵀ and G_A ← Tᵀ G_A. First moments are averages
    of gradients and follow exactly; second moments follow approximately, by T's squared entries:
        m_B ← m_B T⁻ᵀ,  m_A ← Tᵀ m_A,  v_B ← v_B (T⁻ᵀ)∘²,  v_A ← (Tᵀ)∘² v_A

    Args:
        state_B, state_A: optimizer states; without moments they don't change.
        found: the balance of B and A.
        layout: which states are first and second moments.

    Raises:
        ValueError: the moments are not shaped like the factors (the optimizer projects).
    """
    r = len(found.S)
    for state, on_right, matrix in (
        (state_B, True, found.T_inverse.T), (state_A, False, found.T.T),
    ):  # fmt: skip
        left, right = (None, matrix) if on_right else (matrix, None)
        for name in layout.first + layout.second:
            moment = state.get(name)
            if moment is None:
                continue
            if moment.ndim != 2 or moment.shape[1 if on_right else 0] != r:
                raise ValueError("on_refactor: 'transport' is not allowed; moments are projected")
            with joint_parts((moment, 0 if on_right else 1)) as ((part,), _):
                wide = torch.empty(part.shape, dtype=part.dtype, device=part.device)
                wide = wide.copy_(part).double()  # quantized ones support little more than copy_
                part.copy_(carried(wide, left, right, second=name in layout.second))


def require_transportable(optimizer: torch.optim.Optimizer, factors: Iterable[Tensor]) -> None:
    """Refuse moments of factors that can't be transported.

    Raises:
        ValueError: the optimizer isn't known, doesn't hold a factor, projects its moments, or has
            states that are no moments.
    """
    factors = list(factors)
    stepped = entries(optimizer, factors)
    for entry in stepped:
        _require_transportable(entry)
    held, begun = held_by(optimizer), {entry.param for entry in stepped}
    for p in factors:
        if p in held and p not in begun:
            _require_transportable_later(p, held[p])


def _require_transportable(entry: Entry) -> None:
    layout, state = entry.layout, entry.state
    moments = [n for n in layout.first + layout.second if state.get(n) is not None]
    if PROJECTIONS & state.keys() or any(state[n].shape != entry.param.shape for n in moments):
        raise ValueError("on_refactor: 'transport' is not allowed; moments are projected")
    carried = {*layout.first, *layout.second, *layout.counts, *layout.kept}
    lost = [n for n, value in state.items() if n not in carried and value is not None]
    if lost:
        raise _no_average(entry.name, lost[0])


def _require_transportable_later(p: Tensor, held: Held) -> None:
    """The same of a factor before its first step, whose states are not there yet."""
    group, inner, layout = held
    if isinstance(inner, CheckedOptimizer):
        shapes = inner.state_shapes(group, tuple(p.shape))
        if PROJECTIONS & shapes.keys() or shapes.get("exp_avg") != tuple(p.shape):
            raise ValueError("on_refactor: 'transport' is not allowed; moments are projected")
    # torch's RMSprop has a buffer with momentum alone
    lost = [n for n in layout.others if n != "momentum_buffer" or group.get("momentum")]
    if lost or (layout.clears and not layout.first):
        raise _no_average(type(inner).__name__, *lost[:1])


def _no_average(optimizer: str, state: str = "") -> ValueError:
    which = f"{optimizer}'s state {state!r} is" if state else f"states of {optimizer} are"
    kind = "no average" if state else "no averages"
    return ValueError(
        f"on_refactor: 'transport' is not allowed; {which} {kind} of gradients; keep or reset"
    )


def transport_(optimizer: torch.optim.Optimizer, B: Tensor, A: Tensor, found: Balance) -> None:
    """`transport_moments_` of an optimizer's moments of B and A."""
    held = held_by(optimizer)
    for on_B, factor in ((True, B), (False, A)):
        if factor in held:
            _, inner, layout = held[factor]
            state = inner.state.get(factor, {})
            transport_moments_(*((state, {}) if on_B else ({}, state)), found, layout)
