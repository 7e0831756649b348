"""Adam's moments in 8 bits (2110.02861, `block_codes`), for the updates of this package.

An update decodes the moments to float32, takes its step and encodes them again: the first moment by
the signed table, the second by the one without signs. They are torchao's tensors, so that
checkpoints and resets know them. A moment with fewer than 4096 entries, or with a block that isn't
full, is kept in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowrank_lab.optim.adam import MOMENTS, adam_direction, adam_update_, is_quantized
from lowrank_lab.optim.block_codes import BLOCK, Codes, piece_of, torchao_optim

EIGHT_BIT = "8bit"  # the state_precision
FEWEST = 4096  # entries of the smallest moment that is quantized


def is_quantizable(entries: int) -> bool:
    """Whether a moment of so many entries is stored in 8 bits."""
    return entries >= FEWEST and entries % BLOCK == 0


def eight_bit_bytes(entries: int, otherwise: int) -> int:
    """Bytes of a moment: a byte per entry, a scale per block, a table; or so many per entry."""
    if not is_quantizable(entries):
        return otherwise * entries
    return entries + 4 * (entries // BLOCK) + 4 * 256


def quantizes(group: dict[str, Any], entries: int) -> bool:
    """Whether moments of so many entries are stored in 8 bits in a group."""
    return group.get("state_precision") == EIGHT_BIT and is_quantizable(entries)


def zero_moments_(state: dict[str, Any], like: Tensor) -> None:
    """Create both moments of a state at first use, in 8 bits, shaped like a tensor."""
    if "exp_avg" not in state:
        kind = torchao_optim().subclass_8bit.OptimState8bit
        for name, signed in zip(MOMENTS, (True, False), strict=True):
            state[name] = kind.zeros(like.shape, signed, BLOCK, like.device)


def update_moments_(
    N: Tensor, R: Tensor, states: list[dict[str, Any]], betas: tuple[float, float], eps: float
) -> None:
    """N ← m / (√v + ε) with the moments of states, in 8 bits, updated by R.

    Args:
        N: zeros; one-dimensional float32, as R.
        R: the gradients of all states, one after the other.
        states: of one or more parameters; they have moments.
    """
    firsts, seconds = ([state[name] for state in states] for name in MOMENTS)
    first, second = Codes.of(firsts), Codes.of(seconds)
    parts = (torch.split(t, piece_of(t)) for t in (N, R))
    for n, r, m, v in zip(*parts, first.pieces(), second.pieces(), strict=True):
        _update_(n, r, m, v, betas, eps)
    first.store_(firsts)
    second.store_(seconds)


def _update_(
    n: Tensor, r: Tensor, m: Codes, v: Codes, betas: tuple[float, float], eps: float
) -> None:
    """`update_moments_` of a piece."""
    M, V = m.decode(), v.decode()
    adam_update_([n], [r], [M], [V], step_size=-1.0, betas=betas, eps=eps)
    m.encode_(M)
    v.encode_(V)


def adamw_step_(
    W: Tensor, G: Tensor, state: dict[str, Any], group: dict[str, Any], step_size: float
) -> None:
    """W ← W − step_size · m / (√v + ε), in place; a piece at a time is in float32.

    Args:
        W: contiguous.
        G: its gradient.
        state: of W; `quantizes` is true for its moments.
    """
    zero_moments_(state, W)
    m, v = (Codes.of([state[name]]) for name in MOMENTS)
    parts = (torch.split(t.reshape(-1), piece_of(t)) for t in (W, G))
    for w, g, coded_m, coded_v in zip(*parts, m.pieces(), v.pieces(), strict=True):
        n = torch.zeros_like(g, dtype=torch.float32)
        _update_(n, g.float(), coded_m, coded_v, group["betas"], group["eps"])
        w.add_(n, alpha=-step_size)


def direction(
    g: Tensor,
    state: dict[str, Any],
    group: dict[str, Any],
    *,
    out: Tensor | None = None,
    eps: float,
) -> Tensor:
    """`adam.adam_direction` of a gradient in `to_state_precision`, with the group's moments."""
    if not quantizes(group, g.numel()):
        return adam_direction(g, state, group["betas"], eps, out)
    N = torch.zeros_like(g, memory_format=torch.contiguous_format) if out is None else out.zero_()
    zero_moments_(state, g)
    R = g.contiguous()
    update_moments_(N.view(-1), R.view(-1), [state], group["betas"], eps)
    return N


def read_moment(moment: Tensor) -> Tensor:
    """A moment as an ordinary tensor: itself, or decoded to float32."""
    if not is_quantized(moment):
        return moment
    return Codes.of([moment]).decode().view(moment.shape)


def moment_like(values: Tensor, moment: Any) -> Tensor:
    """A new moment with these values, stored as another one is."""
    if not is_quantized(moment):
        return values.to(moment).contiguous()
    return _encoded(values, type(moment), moment.signed)


def _encoded(values: Tensor, kind: Any, signed: bool) -> Tensor:
    new: Tensor = kind.zeros(values.shape, signed, BLOCK, values.device)
    Codes.of([new]).encode_(values.float().contiguous().view(-1))
    return new


def in_precision(moment: Tensor, name: str, group: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """A copy of a moment as a group stores it: in 8 bits, or as an ordinary tensor of a dtype."""
    if not quantizes(group, moment.numel()):
        return read_moment(moment).to(dtype, copy=True)
    kind, signed = torchao_optim().subclass_8bit.OptimState8bit, name == "exp_avg"
    if not is_quantized(moment):
        return _encoded(moment, kind, signed)
    copied: Tensor = kind.zeros(moment.shape, signed, BLOCK, moment.device)
    return copied.copy_(moment)  # the same bits
