"""Adam's moments in 8 bits, block by block (2110.02861), for the updates of this package.

A block of 256 entries has a float32 scale, its largest absolute value. Each entry, divided by it,
is stored as the number of the nearest of 256 values (torchao's tables, one signed for the first
moment, one without signs for the second). An update decodes the moments to float32, takes its step
and encodes them again. They are torchao's tensors, so that checkpoints and resets know them.

A moment with fewer than 4096 entries, or with a block that isn't full, is kept in float32.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from lowrank_lab.optim.adam import MOMENTS, adam_direction, adam_update_, is_quantized

EIGHT_BIT = "8bit"  # the state_precision
BLOCK, FEWEST = 256, 4096  # entries of a block, and of the smallest moment that is quantized
PIECE = 1 << 23  # entries that are decoded at a time
SMALLEST_SCALE = 1e-12


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


def torchao_optim() -> Any:
    """The module torchao.optim, with its tables made.

    Raises:
        ImportError: torchao isn't installed; the message says how to.
    """
    try:
        with _quiet():  # it warns of each missing kernel on machines without CUDA
            import torchao.optim.subclass_8bit
    except ImportError:
        raise ImportError("it needs torchao: pip install 'lowrank-lab[quant]'") from None
    with _disable_current_modes():  # they are read from a tensor, and fake ones have no values
        torchao.optim.subclass_8bit.get_qmap_signed()
        torchao.optim.subclass_8bit.get_qmap_unsigned()
    return torchao.optim


@contextmanager
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"), redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


class Codes(NamedTuple):
    """Encoded entries, one-dimensional: whole blocks with their scales, and the table."""

    codes: Tensor  # uint8
    scale: Tensor  # float32, one for each block
    table: Tensor  # float32, 256 values, ascending

    @classmethod
    def of(cls, moments: list[Any]) -> Codes:
        """Those of one moment, or copies of those of many of a kind, one after the other."""
        if len(moments) == 1:
            (m,) = moments
            return cls(m.codes.view(-1), m.scale, m.qmap)
        codes = torch.cat([m.codes.view(-1) for m in moments])
        return cls(codes, torch.cat([m.scale for m in moments]), moments[0].qmap)

    def store_(self, moments: list[Any]) -> None:
        """Copy what `of` copied back."""
        if len(moments) > 1:
            lengths = [m.codes.numel() for m in moments]
            old = [m.codes.view(-1) for m in moments] + [m.scale for m in moments]
            blocks = [n // BLOCK for n in lengths]
            torch._foreach_copy_(
                old, [*torch.split(self.codes, lengths), *torch.split(self.scale, blocks)]
            )

    def pieces(self) -> Iterator[Codes]:
        """Views of at most PIECE entries."""
        parts = torch.split(self.codes, PIECE), torch.split(self.scale, PIECE // BLOCK)
        for codes, scale in zip(*parts, strict=True):
            yield Codes(codes, scale, self.table)

    def decode(self) -> Tensor:
        """The entries in float32."""
        values = self.table.index_select(0, self.codes.int())
        values.view(-1, BLOCK).mul_(self.scale[:, None])
        return values

    def encode_(self, values: Tensor) -> None:
        """Set the codes and scales to those of float32 entries."""
        blocks = values.view(-1, BLOCK)
        scale = torch.linalg.vector_norm(blocks, torch.inf, dim=1).clamp_(min=SMALLEST_SCALE)
        middles = (self.table[1:] + self.table[:-1]) / 2
        codes = torch.bucketize(blocks / scale[:, None], middles, right=True, out_int32=True)
        self.codes.copy_(codes.view(-1))
        self.scale.copy_(scale)


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
    pieces = torch.split(N, PIECE), torch.split(R, PIECE), first.pieces(), second.pieces()
    for n, r, m, v in zip(*pieces, strict=True):
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
    parts = torch.split(W.view(-1), PIECE), torch.split(G.reshape(-1), PIECE)
    for w, g, coded_m, coded_v in zip(*parts, m.pieces(), v.pieces(), strict=True):
        n = torch.zeros_like(g, dtype=torch.float32)
        _update_(n, g.float(), coded_m, coded_v, group["betas"], group["eps"])
        w.add_(n, alpha=-step_size)


def direction(
    g: Tensor, state: dict[str, Any], group: dict[str, Any], out: Tensor | None = None
) -> Tensor:
    """`adam.adam_direction` of a gradient in `to_state_precision`, with the group's moments."""
    if not quantizes(group, g.numel()):
        return adam_direction(g, state, group["betas"], group["eps"], out)
    N = torch.zeros_like(g, memory_format=torch.contiguous_format) if out is None else out.zero_()
    zero_moments_(state, g)
    R = g.contiguous()
    update_moments_(N.view(-1), R.view(-1), [state], group["betas"], group["eps"])
    return N


def read_moment(moment: Tensor) -> Tensor:
    """A moment as an ordinary tensor: itself, or decoded to float32."""
    if not is_quantized(moment):
        return moment
    return Codes.of([moment]).decode().view(moment.shape)


def write_moment_(moment: Tensor, values: Tensor) -> None:
    """Set a moment, in place, to values of its shape."""
    if is_quantized(moment):
        Codes.of([moment]).encode_(values.float().contiguous().view(-1))
    else:
        moment.copy_(values)


def in_precision(moment: Tensor, name: str, group: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """A copy of a moment as a group stores it: in 8 bits, or as an ordinary tensor of a dtype."""
    if not quantizes(group, moment.numel()):
        return read_moment(moment).to(dtype, copy=True)
    state: dict[str, Any] = {}
    zero_moments_(state, moment)
    copied: Tensor = state[name]
    if is_quantized(moment):
        copied.copy_(moment)  # the same bits
    else:
        write_moment_(copied, moment)
    return copied
