"""Files that texts are read from: finding them, and telling whether they are the same as before."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lowrank_lab.config import InputError

SOURCES = "sources.json"  # in the folder of a corpus: the Facts of the files it was built from
Facts = dict[str, list[Any]]  # path → [size, mtime_ns, ctime_ns, SHA-256]


def files_in(folder: Path) -> list[Path]:
    """The files at every depth, sorted; links are followed, and each folder is visited once.

    Raises:
        InputError: a folder can't be read, or a link leads nowhere.
    """
    found, seen = [], set()

    def refuse(error: OSError) -> None:
        raise InputError("corpus", error.filename, f"it can't be read: {error.strerror}")

    for here, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        stat = Path(here).stat()
        if (stat.st_dev, stat.st_ino) in seen:  # by another link, or by a loop of links
            folders.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        folders.sort()
        found += [Path(here, name) for name in names]
    for path in found:
        if path.is_symlink() and not path.exists():
            raise InputError("corpus", str(path), "it is a link to nothing")
    return sorted(path for path in found if path.is_file())


@contextmanager
def readable(corpus: str, file: Path) -> Iterator[None]:
    """Refuse a file that can't be read, in one line.

    Raises:
        InputError: of the corpus, naming the file and the reason.
    """
    try:
        if not file.is_file():
            raise OSError(0, "it is no file")
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError("corpus", corpus, f"{file.name} can't be read: {reason}") from None


def stamp(path: Path) -> list[int]:
    """Size and times of a file. A change sets its ctime, also if size and mtime stay the same."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def facts_of(files: Iterable[Path], known: Mapping[str, list[Any]]) -> Facts:
    """Stamp and SHA-256 of each file; files with a known stamp are not read again."""
    found: Facts = {}
    for path in files:
        before, now = known.get(str(path), []), stamp(path)
        if before[:-1] == now:
            found[str(path)] = before
            continue
        with readable(str(path), path), path.open("rb") as file:
            found[str(path)] = [*now, hashlib.file_digest(file, "sha256").hexdigest()]
    return found


def known_facts(folders: Iterable[Path]) -> Facts:
    """What the corpora in these folders recorded of the files they were built from."""
    found: Facts = {}
    for folder in folders:
        if (folder / SOURCES).exists():
            found |= json.loads((folder / SOURCES).read_text())
    return found


def once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object of these pairs (`object_pairs_hook`); ValueError if a key stands twice."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice")
    return row
