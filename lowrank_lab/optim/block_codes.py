"""Entries in 8 bits, in blocks (2110.02861), with torchao's tables: encoding and decoding.

A block of 256 entries has a float32 scale, its largest absolute value. Each entry, divided by it,
is stored as the number of the nearest of 256 values: one table is signed, the other one isn't.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from lowrank_lab.device import prefers_few_kernels
from lowrank_lab.optim.found_inf import old_if_off

BLOCK = 256  # entries of a block
# entries that are decoded at a time: few kernels on a GPU, the caches of a CPU
PIECE_ON_GPU, PIECE_ON_CPU = 1 << 23, 1 << 18
SMALLEST_SCALE = 1e-12


def piece_of(t: Tensor) -> int:
    """How many entries like a tensor's are decoded at a time."""
    return PIECE_ON_GPU if prefers_few_kernels(t) else PIECE_ON_CPU


class Codes(NamedTuple):
    """Encoded entries, one-dimensional: whole blocks with their scales, and the table."""

    codes: Tensor  # uint8
    scale: Tensor  # float32, one for each block
    table: Tensor  # float32, 256 values, ascending
    signed: bool  # which of the two tables it is

    @classmethod
    def of(cls, moments: list[Any]) -> Codes:
        """Those of one moment, or copies of those of many of a kind, one after the other."""
        first = moments[0]
        if len(moments) == 1:
            return cls(first.codes.view(-1), first.scale, first.qmap, first.signed)
        codes = torch.cat([m.codes.view(-1) for m in moments])
        scale = torch.cat([m.scale for m in moments])
        return cls(codes, scale, first.qmap, first.signed)

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
        """Views of the pieces (`piece_of`)."""
        piece = piece_of(self.codes)
        parts = torch.split(self.codes, piece), torch.split(self.scale, piece // BLOCK)
        for codes, scale in zip(*parts, strict=True):
            yield Codes(codes, scale, self.table, self.signed)

    def decode(self) -> Tensor:
        """The entries in float32."""
        values = self.table.index_select(0, self.codes.int())
        values.view(-1, BLOCK).mul_(self.scale[:, None])
        return values

    def encode_(self, values: Tensor) -> None:
        """Set the codes and scales to those of float32 entries, unless updates are off."""
        blocks = values.view(-1, BLOCK)
        scale = blocks.abs().amax(1).clamp_(min=SMALLEST_SCALE)
        codes = self._nearest((blocks / scale[:, None]).view(-1))
        self.codes.copy_(old_if_off(codes, self.codes))
        self.scale.copy_(old_if_off(scale, self.scale))

    def _nearest(self, x: Tensor) -> Tensor:
        """The numbers of the table's values that are nearest to x, of two the larger one."""
        middles = (self.table[1:] + self.table[:-1]) / 2
        if prefers_few_kernels(x):
            return torch.bucketize(x, middles, right=True, out_int32=True)
        # On a CPU that search takes 75 ns per entry. The upper half of a float32 decides between
        # two values, and one comparison between these: 5 ns.
        halves = (x.view(torch.int32) >> 16).bitwise_and_(0xFFFF)
        lower = _lower_codes(self.signed, x.device, getattr(x, "fake_mode", None))
        codes = lower.index_select(0, halves)
        middle = F.pad(middles, (0, 1), value=torch.inf).index_select(0, codes.int())
        return codes.add_(x >= middle)


@lru_cache(maxsize=8)
def _lower_codes(signed: bool, device: torch.device, fake_mode: Any) -> Tensor:
    """For each upper half of a float32 up to 1, the code of the least number that has it (uint8).

    The greatest has this code or the next one. Made outside of all modes, as `adam._long_ago`.
    """
    with _disable_current_modes(), torch.inference_mode(False):
        if fake_mode is not None:
            empty = torch.empty(1 << 16, dtype=torch.uint8, device="meta")
            return FakeTensor(fake_mode, empty, device)
        halves = torch.arange(1 << 16, dtype=torch.int32)
        bits = halves << 16
        least = torch.where(halves < 1 << 15, bits, bits | 0xFFFF).view(torch.float32)
        table = torch.tensor(_table(signed))
        middles = (table[1:] + table[:-1]) / 2
        return torch.bucketize(least, middles, right=True).to(torch.uint8).to(device)


def _table(signed: bool) -> tuple[float, ...]:
    subclass = torchao_optim().subclass_8bit
    found: tuple[float, ...] = (
        subclass.get_qmap_signed() if signed else subclass.get_qmap_unsigned()
    )
    return found


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
