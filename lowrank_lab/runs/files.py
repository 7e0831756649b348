"""Files of a run folder: JSON written atomically, rows of JSON, and a lock on the folder."""

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

Row = dict[str, Any]  # of a file of JSON lines


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make a run folder, and hold it: the system lets go of it when this process ends, however.

    Raises:
        InputError: another process holds it, or nothing can be written there.
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
                with suppress(OSError):  # something was written
                    folder.rmdir()


def _hold(path: Path) -> TextIO:
    """Open a file and lock it; BlockingIOError if another process has."""
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except BaseException:
            file.close()
            raise
        file.close()  # whoever held it has just removed it


def write_json(path: Path, value: object) -> None:
    """Write a JSON file so that it is there whole or not at all."""
    partial = path.with_name(f".{path.name}-{os.getpid()}")
    with partial.open("w") as file:
        file.write(json.dumps(value, indent=1, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_jsonl(path: Path) -> list[Row]:
    """All whole rows; a last line that was cut off is left out."""
    lines = path.read_text().splitlines() if path.exists() else []
    if all(line[:1] == "{" and line[-1:] == "}" for line in lines):
        try:  # all at once: a call a line takes longer
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
    """Drop the rows after `last_step`, so that a resumed run neither repeats nor skips one.

    Returns:
        The steps of the rows that are left. What can't be read ends the table; it is gone.
    """
    rows = [row for row in read_jsonl(path) if row["step"] <= last_step]
    partial = path.with_name(f".{path.name}-{os.getpid()}")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
    partial.replace(path)
    return [row["step"] for row in rows]
