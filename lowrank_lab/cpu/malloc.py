"""Keeping memory that a training step frees for the next step."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # parameters of glibc's mallopt
LARGEST = 2**31 - 1  # bytes: the most that mallopt accepts
USUAL = 1 << 25  # bytes: the largest threshold that glibc sets by itself
SETTINGS = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_")


@contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Keep memory that is freed in this block for later allocations; return it at the end.

    Each training step allocates and frees the same tensors. By default glibc returns large ones to
    the system, which has to find and clear their pages again in the next step: up to a quarter of
    its time on a CPU. Applies to the whole process. Does nothing with another C library, or where
    the environment configures malloc (`SETTINGS`).
    """
    malloc = _glibc()
    if malloc is None or any(name in os.environ for name in SETTINGS):
        yield
        return
    _set(malloc, mmap=LARGEST, trim=LARGEST)
    try:
        yield
    finally:
        _set(malloc, mmap=USUAL, trim=2 * USUAL)
        malloc.malloc_trim(0)


def _set(malloc: ctypes.CDLL, mmap: int, trim: int) -> None:
    """Map blocks of `mmap` bytes or more one by one; keep up to `trim` free bytes of the heap."""
    if not malloc.mallopt(MMAP_THRESHOLD, mmap):  # an older glibc accepts no more than USUAL
        malloc.mallopt(MMAP_THRESHOLD, USUAL)
    malloc.mallopt(TRIM_THRESHOLD, trim)


def _glibc() -> ctypes.CDLL | None:
    """The C library of this process, if it is glibc."""
    try:
        version = os.confstr("CS_GNU_LIBC_VERSION")  # type: ignore[attr-defined,unused-ignore]
    except (AttributeError, ValueError):  # not on Windows; not with musl, not on macOS
        return None
    return ctypes.CDLL(None) if version else None
