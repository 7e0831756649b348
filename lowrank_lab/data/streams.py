"""Texts of C4's shards and of datasets, streamed."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from lowrank_lab.config import InputError, nearest
from lowrank_lab.data.files import files_in, once_each, readable
from lowrank_lab.data.sources import is_saved_dataset, refuse_saved_dataset

# In any letters, at the end of a name.
SHARDS = (".json.gz", ".jsonl", ".jsonl.gz", ".json.zst", ".jsonl.zst")
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"  # their first bytes
LONGEST_LINE = 1 << 28  # bytes
SPACES = b" \t\r\n\xef\xbb\xbf"  # of an empty line; the last three are a byte order mark


def c4_shards(source: Path) -> list[Path]:
    """The shards of a folder, at every depth, or the one file.

    A plain `.json` is a shard only where there is no other: it may describe the others.

    Raises:
        InputError: there is none.
    """
    refuse_saved_dataset("c4", source)
    if not source.is_dir():
        return [source]
    files = files_in(source)
    found = [p for p in files if p.name.lower().endswith(SHARDS)]
    found = found or [p for p in files if p.name.lower().endswith(".json")]
    if not found:
        allowed = f"there is no shard in it: {' '.join(('.json', *SHARDS))}"
        raise InputError("corpus", f"c4:{source}", allowed)
    return found


def c4_identity(source: Path) -> list[tuple[str, int, str]]:
    """How earlier versions told shards apart: name, size, and the CRC that ends a gzip file."""
    found = []
    for file in c4_shards(source):
        with readable(f"c4:{source}", file), file.open("rb") as raw:
            size = raw.seek(0, 2)
            raw.seek(max(0, size - 8))
            found.append((file.name, size, raw.read().hex()))
    return found


def c4_documents(source: Path) -> Iterator[str]:
    """The texts of shards: one JSON object with "text" per line, plain or compressed.

    A text that is null is empty.

    Raises:
        InputError: a shard is damaged or can't be read; its name and line.
    """
    for file in c4_shards(source):
        number, shown = 0, f"c4:{source}"
        try:
            with readable(shown, file), _opened(file) as lines:
                while line := lines.readline(LONGEST_LINE + 1):
                    number += 1
                    if len(line) > LONGEST_LINE:
                        raise _BadLine(f"longer than {LONGEST_LINE >> 20} MiB")
                    if line.strip(SPACES):
                        yield _text_of(line)
        except _Damaged as error:
            allowed = f"{file.name} line {number + 1}: damaged {error}"
            raise InputError("corpus", shown, allowed) from None
        except _BadLine as error:
            raise InputError("corpus", shown, f"{file.name} line {number}: {error}") from None


@contextmanager
def _opened(file: Path) -> Iterator[BinaryIO]:
    """A shard, decompressed as its first bytes or its name say.

    Raises:
        _Damaged: it is not what they say.
    """
    with file.open("rb") as raw:
        begin = raw.read(4)
    if begin.startswith(GZIP) or file.suffix.lower() == ".gz":
        try:
            with gzip.open(file, "rb") as lines:
                yield cast(BinaryIO, lines)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise _Damaged(f"gzip: {error}") from None
    elif begin == ZSTD or file.suffix.lower() == ".zst":
        import pyarrow as pa

        try:
            with pa.input_stream(str(file), compression="zstd") as lines:
                yield cast(BinaryIO, io.BufferedReader(lines))
        except OSError as error:
            raise _Damaged(f"zstd: {error}") from None
    else:
        with file.open("rb") as plain:
            yield plain


class _Damaged(ValueError):
    pass


class _BadLine(ValueError):
    pass


def _text_of(line: bytes) -> str:
    line = line.removeprefix(codecs.BOM_UTF8)
    hook = once_each if line.count(b'"text"') > 1 else None
    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=hook)
    except UnicodeDecodeError as error:
        raise _BadLine(f"not UTF-8 at byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise _BadLine(f"not JSON: {error}") from None
    text = row.get("text", 0) if isinstance(row, dict) else 0
    if text is not None and not isinstance(text, str):
        raise _BadLine('it has no "text"')
    return text or ""


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

    def files(self) -> list[Path]:
        """The files of a local folder; none of a dataset of the hub."""
        return files_in(Path(self.name)) if Path(self.name).is_dir() else []

    def identity(self) -> list[Any]:
        """How earlier versions told datasets apart: by names, sizes and times of local files."""
        facts = [(p.relative_to(self.name).as_posix(), p.stat()) for p in self.files()]
        return [*self, [(name, stat.st_size, stat.st_mtime_ns) for name, stat in facts]]


def hub_documents(hub: Hub) -> Iterator[str]:
    """The texts of a dataset, streamed by `datasets`. A text that is null is empty.

    Raises:
        InputError: `datasets` isn't installed, no such dataset, no column "text", damaged files.
    """
    shown = f"hub:{hub.name}"
    try:
        from datasets import load_dataset, load_from_disk
        from datasets.exceptions import DatasetsError
    except ImportError:
        allowed = "it needs datasets: pip install 'lowrank-lab[hub]'"
        raise InputError("corpus", shown, allowed) from None
    try:
        if is_saved_dataset(Path(hub.name)):
            rows = _split_of(load_from_disk(hub.name), hub)
        else:
            rows = load_dataset(hub.name, hub.config, split=hub.split, streaming=True)
        for number, row in enumerate(rows, 1):
            text = row.get("text", 0)
            if text is not None and not isinstance(text, str):
                columns = ", ".join(map(str, row))
                allowed = f'row {number} has no "text"; its columns: {columns}'
                raise InputError("corpus", shown, allowed)
            yield text or ""
    except InputError:
        raise
    except StopIteration:  # raised by `datasets` for an empty file
        raise InputError("corpus", shown, "it has no text") from None
    except (DatasetsError, ValueError, OSError) as error:
        raise InputError("corpus", shown, f"{type(error).__name__}: {error}") from None


def _split_of(saved: Any, hub: Hub) -> Any:
    """The split of what `load_from_disk` returns: a dataset of one split, or of several by name."""
    splits = saved if isinstance(saved, dict) else {str(saved.split or "train"): saved}
    if hub.split not in splits:
        if len(splits) > 1 or hub.split != "train":
            known = nearest(hub.split, splits)
            raise InputError("corpus", f"hub:{hub.name}@{hub.split}", f"no such split; {known}")
        return next(iter(splits.values()))
    return splits[hub.split]
