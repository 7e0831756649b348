"""Files of a run folder: atomic JSON files, JSON lines, and a lock on the folder."""

from __future__ import annotations

import fcntl
import json
import os
import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from lowrank_lab.config import InputError

Row = dict[str, Any]  # one row of a JSON lines file


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create a run folder and lock it; the system releases the lock when the process ends.

    Raises:
        InputError: another process has the lock, or the folder is not writable.
    """
    path, is_new = folder / ".lock", not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _hold(path)
    except BlockingIOError:
        allowed = f"another process trains in it: {path.read_text().strip()}"
        raise InputError("out", str(folder), allowed) from None
    except OSError as error:
        allowed = f"nothing can be written there: {error.strerror}"
        raise InputError("out", str(folder), allowed) from None
    with file:
        file.truncate(0)
        file.write(f"{os.getpid()} on {platform.node()}\n")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            if is_new:
                with suppress(OSError):  # the folder is not empty
                    folder.rmdir()


def lock_holder(folder: Path) -> tuple[int, str]:
    """Process id and machine that a locked run folder names (`locked`).

    Raises:
        OSError: it isn't locked.
        ValueError: its lock names no process, as while it is taken.
    """
    pid, _, node = (folder / ".lock").read_text().strip().partition(" on ")
    return int(pid), node


def _hold(path: Path) -> TextIO:
    """Open and lock a file; raises BlockingIOError if another process has the lock."""
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except BaseException:
            file.close()
            raise
        file.close()  # another process has just removed it: try again


_partial: set[Path] = set()  # files that this process is writing


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A hidden file to write beside `path`; it replaces `path` at the end of the block.

    If the block fails or is interrupted, it is removed and `path` stays as it is.
    """
    partial = path.with_name(f".{path.name}-{os.getpid()}")
    _partial.add(partial)
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
        _partial.discard(partial)


def remove_partial_files() -> None:
    """Remove the files of this process's open `replacing` blocks, before os._exit."""
    for partial in [*_partial]:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """Write a JSON file atomically."""
    with replacing(path) as partial, partial.open("w") as file:
        file.write(json.dumps(value, indent=1, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_jsonl(path: Path) -> list[Row]:
    """All complete rows; an incomplete line ends the table."""
    lines = path.read_text().splitlines() if path.exists() else []
    if all(line[:1] == "{" and line[-1:] == "}" for line in lines):
        try:  # parse all lines at once: faster than one call per line
            rows: list[Row] = json.loads(f"[{','.join(lines)}]")
        except json.JSONDecodeError:
            pass
        else:
            if len(rows) == len(lines):
                return rows
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def append_jsonl(path: Path, rows: Iterable[Row]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in rows)


def cut_jsonl(path: Path, last_step: int) -> list[int]:
    """Delete the rows after `last_step`, so that a resumed run neither repeats nor skips a row.

    An unreadable line, and all lines after it, are deleted too.

    Returns:
        The steps of the remaining rows.
    """
    rows = [row for row in read_jsonl(path) if row["step"] <= last_step]
    with replacing(path) as partial:
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [row["step"] for row in rows]
