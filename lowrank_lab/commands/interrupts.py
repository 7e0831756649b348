"""Ctrl-C, SIGTERM and closed pipes: a command ends with one line, at any moment.

The package imports this module first, because importing torch takes seconds: until then a signal
ends a process of the command line at once. While a command runs, `handled` raises exceptions
instead, so that the command can clean up.
"""

from __future__ import annotations

import atexit
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from itertools import pairwise
from multiprocessing import active_children, get_context
from multiprocessing.process import BaseProcess
from multiprocessing.resource_tracker import ensure_running
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SECONDS_TO_END = 5.0  # of a pool's process, before it is killed
WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "stopped by SIGTERM"}


class Stopped(BaseException):
    """SIGTERM came: raised in the main thread, as Python raises KeyboardInterrupt for SIGINT."""


def is_command_line() -> bool:
    """Whether this process is the command line: neither one of its children nor another program."""
    modules = ("lowrank_lab", "lowrank_lab.cli")
    by_module = any(a == "-m" and b in modules for a, b in pairwise(sys.orig_argv))
    by_name = Path(sys.argv[0] if sys.argv else "").name == "lowrank-lab"
    return (by_module or by_name) and "--multiprocessing-fork" not in sys.orig_argv


def exit_quietly_until_handled() -> None:
    """In a process of the command line, end at a signal with one line and without a traceback."""
    if is_command_line() and _in_main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
                signal.signal(number, _leave)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    os.write(2, f"{WORDS[signal.Signals(number)]}\n".encode())
    os._exit(128 + number)


def leave(status: int) -> NoReturn:
    """End the process after a signal, when the command has cleaned up.

    Python's own end may abort: threads of torch or of a library may still be at work.
    """
    if is_command_line() and _in_main_thread():
        atexit._run_exitfuncs()  # temporary folders, semaphores
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)
    sys.exit(status)


@contextmanager
def handled() -> Iterator[None]:
    """Within the block, SIGINT raises KeyboardInterrupt and SIGTERM raises Stopped."""
    if not _in_main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise Stopped

    before = {number: signal.getsignal(number) for number in SIGNALS}
    usual = sys.unraisablehook
    for number, handler in zip(SIGNALS, (signal.default_int_handler, stop), strict=True):
        if before[number] not in (signal.SIG_IGN, None):
            signal.signal(number, handler)
    sys.unraisablehook = _raise_again
    try:
        yield
    finally:
        sys.unraisablehook = usual
        for number, old in before.items():
            if old is not None:
                signal.signal(number, old)


def _raise_again(unraisable: Any) -> None:
    """A signal that came within a destructor is lost there: send it again."""
    for kind, number in zip((KeyboardInterrupt, Stopped), SIGNALS, strict=True):
        if issubclass(unraisable.exc_type, kind):
            signal.raise_signal(number)
            return
    sys.__unraisablehook__(unraisable)


@contextmanager
def processes(count: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of spawned processes, which end with the block, also when it is interrupted.

    A terminal sends Ctrl-C to all its processes; those of the pool block it.
    """
    ensure_running()  # else the first process starts it, and that unblocks the signal
    others = set(threading.enumerate())
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # processes inherit it
    pool = ProcessPoolExecutor(count, get_context("spawn"), initializer=_end_at_sigterm)
    try:
        for _ in range(count):
            pool.submit(int)  # starts a process
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        yield pool
        pool.shutdown()
    except BaseException:
        _end(active_children())  # before the pool: else they report closed pipes
        pool.shutdown(wait=False, cancel_futures=True)
        _wait_for_threads(others)
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_at_sigterm() -> None:
    """Let SIGTERM end this process of the pool, and remove its half-written files."""
    from lowrank_lab.runs.files import remove_partial_files

    def end(number: int, frame: FrameType | None) -> NoReturn:
        remove_partial_files()
        os._exit(128 + number)

    signal.signal(signal.SIGTERM, end)


def _end(children: list[BaseProcess]) -> None:
    """Terminate the processes; kill those that have not ended after SECONDS_TO_END."""
    for child in children:
        child.terminate()
    for child in children:
        child.join(SECONDS_TO_END)
        child.kill()  # does nothing to a process that has ended


def _wait_for_threads(others: set[threading.Thread]) -> None:
    """Wait until all threads but these have ended, at most SECONDS_TO_END.

    The threads of a pool close pipes, and so does the end of Python: whoever is second raises. A
    thread that is only starting when an exception comes can't be joined.
    """
    until = time.monotonic() + SECONDS_TO_END
    while set(threading.enumerate()) - others and time.monotonic() < until:
        time.sleep(0.01)


class _Forgiving(io.FileIO):
    """A file descriptor that drops output after its reader has closed, or after an error."""

    _ended = False

    def write(self, data: Any) -> int:
        if self._ended:
            return len(data)
        try:
            return super().write(data)
        except BrokenPipeError:
            self._ended = True
            return len(data)
        except OSError:
            self._ended = True
            raise


def let_readers_leave() -> None:
    """Let `| head -1` end the output but not the command; print names that are not UTF-8 as bytes.

    Streams that something else has replaced stay as they are.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper) or stream is not getattr(sys, f"__{name}__"):
            continue
        stream.flush()
        raw = io.BufferedWriter(_Forgiving(stream.fileno(), "w", closefd=False))
        errors = "surrogateescape" if name == "stdout" else stream.errors
        lines = stream.line_buffering
        new = io.TextIOWrapper(
            raw, stream.encoding, errors, line_buffering=lines, write_through=name == "stderr"
        )
        setattr(sys, name, new)
