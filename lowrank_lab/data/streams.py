"""Texts of C4's shards and of datasets, streamed."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lowrank_lab.config import InputError


def c4_shards(source: Path) -> list[Path]:
    """The .json.gz files of a folder, at every depth, or the one file."""
    found = sorted(source.rglob("*.json.gz")) if source.is_dir() else [source]
    if not found:
        raise InputError("corpus", f"c4:{source}", "there is no .json.gz file in it")
    return found


def c4_identity(source: Path) -> list[tuple[str, int, str]]:
    """Name, size and gzip's final CRC of each shard: they differ if a shard has changed."""
    found = []
    for file in c4_shards(source):
        with file.open("rb") as raw:
            size = raw.seek(0, 2)
            raw.seek(max(0, size - 8))
            found.append((file.name, size, raw.read().hex()))
    return found


def c4_documents(source: Path) -> Iterator[str]:
    """The texts of .json.gz shards: one JSON object with "text" per line."""
    for file in c4_shards(source):
        number = 0
        try:
            with gzip.open(file, "rb") as lines:
                for number, line in enumerate(lines, 1):  # noqa: B007
                    if line.strip():
                        yield _text_of(line)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            allowed = f"{file.name} line {number + 1}: damaged gzip: {error}"
            raise InputError("corpus", f"c4:{source}", allowed) from None
        except _BadLine as error:
            allowed = f"{file.name} line {number}: {error}"
            raise InputError("corpus", f"c4:{source}", allowed) from None


class _BadLine(ValueError):
    pass


def _text_of(line: bytes) -> str:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _BadLine(f"not UTF-8 at byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise _BadLine(f"not JSON: {error}") from None
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise _BadLine('it has no "text"')
    return text


class Hub(NamedTuple):
    """The dataset of `hub:NAME[,CONFIG][@SPLIT]`: one of the hub, or a local folder."""

    name: str
    config: str | None
    split: str

    @classmethod
    def parse(cls, text: str) -> Hub:
        if Path(text).expanduser().is_dir():
            return cls(str(Path(text).expanduser()), None, "train")
        rest, at, split = text.rpartition("@")
        name, _, config = (rest if at else text).partition(",")
        local = Path(name).expanduser()
        name = str(local) if local.is_dir() else name
        return cls(name, config or None, split if at else "train")

    def identity(self) -> list[Any]:
        """Name, configuration and split, and names, sizes and times of local files."""
        files = sorted(p for p in Path(self.name).rglob("*") if p.is_file())
        facts = [(p.relative_to(self.name).as_posix(), p.stat()) for p in files]
        return [*self, [(name, stat.st_size, stat.st_mtime_ns) for name, stat in facts]]


def hub_documents(hub: Hub) -> Iterator[str]:
    """The texts of a dataset, streamed by `datasets`.

    Raises:
        InputError: `datasets` isn't installed, no such dataset, no column "text", damaged files.
    """
    shown = f"hub:{hub.name}"
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
    except ImportError:
        allowed = "it needs datasets: pip install 'lowrank-lab[hub]'"
        raise InputError("corpus", shown, allowed) from None
    try:
        rows = load_dataset(hub.name, hub.config, split=hub.split, streaming=True)
        for number, row in enumerate(rows, 1):
            text = row.get("text")
            if not isinstance(text, str):
                columns = ", ".join(map(str, row))
                allowed = f'row {number} has no "text"; its columns: {columns}'
                raise InputError("corpus", shown, allowed)
            yield text
    except InputError:
        raise
    except StopIteration:  # raised by `datasets` for an empty file
        raise InputError("corpus", shown, "it has no text") from None
    except (DatasetsError, ValueError, FileNotFoundError) as error:
        raise InputError("corpus", shown, f"{type(error).__name__}: {error}") from None
