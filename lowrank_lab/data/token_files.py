"""Token files of bounded size: written as a stream, resumed after a kill, read memory-mapped.

A split is `train.bin`, then `train.1.bin`, `train.2.bin` …: uint16, all but the last full.
"""

from __future__ import annotations

import fcntl
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lowrank_lab.config import InputError
from lowrank_lab.data.splits import SPLITS, Split

SHARD_TOKENS = 1 << 27  # 256 MiB
SAVE_EVERY = 1 << 24  # tokens between two records of progress
GROUP = (256, 1 << 20)  # at most so many documents and characters are encoded at once
PROGRESS = "progress.json"


def shard_path(folder: Path, split: Split, index: int) -> Path:
    return folder / (f"{split}.{index}.bin" if index else f"{split}.bin")


def shard_paths(folder: Path, split: Split) -> list[Path]:
    """The existing files of a split, in order."""
    found: list[Path] = []
    while (path := shard_path(folder, split, len(found))).exists():
        found.append(path)
    return found


class TokenShards:
    """The tokens of a split, memory-mapped, as if they were in one file."""

    def __init__(self, folder: Path, split: Split) -> None:
        self.parts = [np.memmap(path, np.uint16, "r") for path in shard_paths(folder, split)]
        self.starts = np.cumsum([0, *map(len, self.parts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def take(self, offsets: np.ndarray) -> np.ndarray:
        """The tokens at these offsets; only their shards are read."""
        out = np.empty(offsets.shape, np.uint16)
        shard = np.searchsorted(self.starts, offsets, side="right") - 1
        for index in np.unique(shard):
            here = shard == index
            out[here] = self.parts[index][offsets[here] - self.starts[index]]
        return out


class ShardWriter:
    """Appends to the files of a split after its first `written` tokens; later ones are cut off."""

    def __init__(self, folder: Path, split: Split, written: int) -> None:
        self.folder, self.split, self.written = folder, split, written
        self._file: BinaryIO | None = None
        for index, path in enumerate(shard_paths(folder, split)):
            keep = min(max(written - index * SHARD_TOKENS, 0), SHARD_TOKENS)
            os.truncate(path, 2 * keep)
            if index and not keep:
                path.unlink()
        self._open()

    def _open(self) -> None:
        self.close()
        path = shard_path(self.folder, self.split, self.written // SHARD_TOKENS)
        self._file = path.open("ab")

    def write(self, tokens: np.ndarray) -> None:
        while len(tokens):
            piece = tokens[: SHARD_TOKENS - self.written % SHARD_TOKENS]
            assert self._file is not None
            self._file.write(piece.tobytes())
            self.written += len(piece)
            tokens = tokens[len(piece) :]
            if len(tokens) and self.written % SHARD_TOKENS == 0:
                self._open()

    def sync(self) -> None:
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self.sync()
            self._file.close()


def pack(
    folder: Path,
    texts: Iterable[tuple[Split, str]],
    encode: Callable[[list[str]], np.ndarray],
    on_progress: Callable[[dict[str, Any]], None] = lambda counts: None,
) -> dict[str, Any]:
    """Write texts as token files, in order; resumes from `folder`/progress.json.

    Memory doesn't grow with their number.

    Args:
        texts: the same in each call, from the first; those packed before are skipped.

    Returns:
        Counts: `documents`, `bytes` and `tokens` of each split.
    """
    counts = progress_of(folder) or new_counts()
    writers = {split: ShardWriter(folder, split, counts["tokens"][split]) for split in SPLITS}
    due = sum(counts["tokens"].values()) + SAVE_EVERY
    try:
        for group in _groups(islice(texts, sum(counts["documents"].values()), None)):
            for split in SPLITS:
                own = [text for s, text in group if s == split]
                writers[split].write(encode(own))
                counts["documents"][split] += len(own)
                counts["bytes"][split] += sum(len(text.encode()) for text in own)
                counts["tokens"][split] = writers[split].written
            if sum(counts["tokens"].values()) >= due:
                due += SAVE_EVERY
                for writer in writers.values():
                    writer.sync()
                save_progress(folder, counts)
                on_progress(counts)
    finally:
        for writer in writers.values():
            writer.close()
    return counts


def _groups(texts: Iterable[tuple[Split, str]]) -> Iterator[list[tuple[Split, str]]]:
    most, largest = GROUP
    group: list[tuple[Split, str]] = []
    characters = 0
    for item in texts:
        group.append(item)
        characters += len(item[1])
        if len(group) == most or characters >= largest:
            yield group
            group, characters = [], 0
    if group:
        yield group


def new_counts() -> dict[str, Any]:
    return {kind: dict.fromkeys(SPLITS, 0) for kind in ("documents", "bytes", "tokens")}


def progress_of(folder: Path) -> dict[str, Any] | None:
    """The counts that a killed build recorded; None if it recorded none."""
    path = folder / PROGRESS
    counts: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
    return counts


def save_progress(folder: Path, counts: dict[str, Any]) -> None:
    partial = folder / f".{PROGRESS}"
    with partial.open("w") as file:
        json.dump(counts, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / PROGRESS)


def forget_progress(folder: Path) -> None:
    """Remove the record of progress, and an unfinished one."""
    for name in (PROGRESS, f".{PROGRESS}"):
        (folder / name).unlink(missing_ok=True)


@contextmanager
def workplace(folder: Path) -> Iterator[Path]:
    """A hidden folder beside `folder` to build it in: one that a killed process left, or a new one.

    It is locked while this process lives. Afterwards it is removed, unless anything but wrong input
    interrupted the build after it had recorded progress.
    """
    place, lock = _claim(folder)
    keep = False
    try:
        yield place
    except BaseException as error:
        counts = progress_of(place) or new_counts()
        keep = not isinstance(error, InputError) and any(counts["documents"].values())
        raise
    finally:
        if not keep:
            shutil.rmtree(place, ignore_errors=True)
        os.close(lock)


def _claim(folder: Path) -> tuple[Path, int]:
    """A folder to build `folder` in, and its lock."""
    abandoned = folder.parent.glob(f".{glob.escape(folder.name)}-*")
    new = (tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent) for _ in repeat(None))
    for place in chain(abandoned, map(Path, new)):
        lock = _lock(place)
        if lock is not None:
            return place, lock
    raise AssertionError("new places never end")


def _lock(place: Path) -> int | None:
    """A lock on a folder for the life of this process; None if another has it, or it is gone."""
    try:
        lock = os.open(place, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    if not place.exists():  # renamed since: it is a corpus now
        os.close(lock)
        return None
    return lock
