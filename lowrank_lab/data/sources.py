"""Where text comes from: the `python` corpus, files, shards, datasets; and a synthetic source.

A document is a pair (name, text). Its name decides its split, so it has to be the same everywhere.
Documents of streams have no name: their text decides.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import importlib.metadata
import json
import sys
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np

from lowrank_lab.config import InputError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
HELD_OUT_SHARE = {"validation": 0.025, "test": 0.025}

FORMAT = 1  # part of every corpus's hash: raise it when the same text gives other tokens

# Packages whose sources make up the `python` corpus beside the standard library. Their wheels hold
# the same .py files on every platform, but for the generated ones in GENERATED.
PACKAGES = ("torch", "sympy", "networkx", "numpy", "pandas", "matplotlib", "seaborn")
GENERATED = ("version.py", "_version.py", "_version_meson.py", "__config__.py")
# Parts of the standard library that some systems ship separately, or that are tests.
NOT_EVERYWHERE = frozenset(
    "test tests idle_test idlelib tkinter turtledemo turtle lib2to3 ensurepip distutils venv "
    "site-packages dist-packages __pycache__ sitecustomize usercustomize antigravity".split()
)
TEXT_SUFFIXES = frozenset(".txt .md .rst .py .tex .csv .json .jsonl .html .xml .c .h .js".split())
CHUNKS = 400  # a single file is cut into about as many documents, at line ends where it has them
CHUNK_CHARACTERS = (256, 8192)  # their smallest and largest size


def python_documents() -> Iterator[tuple[str, str]]:
    """Sources of the standard library and of PACKAGES, without tests and generated files."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        known = parts[0] in sys.stdlib_module_names and not parts[0].startswith("_sysconfigdata")
        if known and not NOT_EVERYWHERE.intersection(parts):
            yield f"python/{'/'.join(parts)}.py", path.read_text("utf-8", "replace")
    for package in PACKAGES:
        distribution = importlib.metadata.distribution(package)
        for file in sorted(distribution.files or [], key=str):
            if file.suffix != ".py" or file.name in GENERATED or ".." in file.parts:
                continue
            if NOT_EVERYWHERE.intersection(file.parts):
                continue
            yield (
                f"{package}/{file.as_posix()}",
                Path(str(file.locate())).read_text("utf-8", "replace"),
            )


def split_of(name: str) -> Split:
    """The split a document belongs to, by the hash of its name."""
    share = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    if share < HELD_OUT_SHARE["test"]:
        return "test"
    return "validation" if share < sum(HELD_OUT_SHARE.values()) else "train"


def text_documents(source: Path) -> Iterator[tuple[str, str]]:
    """Every text file of a folder as one document, or one file cut at line ends."""
    if not source.is_dir():
        size = sum(map(len, _decoded(source)))
        chunks = _chunks(_decoded(source), size)
        yield from ((f"{source.name}#{i}", chunk) for i, chunk in enumerate(chunks))
        return
    for file in sorted(p for p in source.rglob("*") if p.suffix in TEXT_SUFFIXES and p.is_file()):
        yield str(file.relative_to(source)), "".join(_decoded(file))


def _decoded(file: Path) -> Iterator[str]:
    """The text of a file, some 1 MiB at a time."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with file.open("rb") as raw:
        if b"\0" in raw.read(65536):
            raise InputError("corpus", f"text:{file}", "it is binary, not text")
        raw.seek(0)
        position, piece = 0, b"\0"
        while piece:
            piece = raw.read(1 << 20)
            begins = position - len(decoder.getstate()[0])  # bytes of a character not yet whole
            try:
                yield decoder.decode(piece, final=not piece)
            except UnicodeDecodeError as error:
                allowed = f"not UTF-8 at byte {begins + error.start}"
                raise InputError("corpus", f"text:{file}", allowed) from None
            position += len(piece)


def _chunks(pieces: Iterable[str], characters: int) -> Iterator[str]:
    """The text that the pieces make up, cut into about CHUNKS documents."""
    low, high = CHUNK_CHARACTERS
    size = min(max(characters // CHUNKS, low), high)
    rest = ""
    for piece in pieces:
        text, start = rest + piece, 0
        while len(text) - start > 2 * size:
            end = _chunk_end(text, start, size)
            yield text[start:end]
            start = end
        rest = text[start:]
    start = 0
    while start < len(rest):
        end = _chunk_end(rest, start, size)
        yield rest[start:end]
        start = end


def _chunk_end(text: str, start: int, size: int) -> int:
    """After the first line end beyond `size` characters, if it comes within twice as many."""
    end = text.find("\n", start + size, start + 2 * size) + 1
    return end or start + size


class Entry(NamedTuple):
    """A distinct document: where its bytes are in a spill file, and what is known about them."""

    key: bytes  # SHA-256 of its name: their order
    digest: bytes  # SHA-256 of its text
    split: Split
    start: int
    size: int


def distinct(documents: Iterable[tuple[str, str]], spill: BinaryIO | None = None) -> list[Entry]:
    """Non-empty documents, the first of each set of identical ones, in the order of their hash.

    Args:
        spill: a file that their texts are written to, so that none stays in memory.
    """
    seen: dict[bytes, Entry] = {}
    written = 0
    for name, text in documents:
        raw = text.encode()
        digest = hashlib.sha256(raw).digest()
        if digest in seen or not text.strip():
            continue
        key = hashlib.sha256(name.encode()).digest()
        seen[digest] = Entry(key, digest, split_of(name), written, len(raw))
        written += len(raw)
        if spill is not None:
            spill.write(raw)
    return sorted(seen.values(), key=lambda entry: entry.key)


def spilled(spill: BinaryIO, entries: Iterable[Entry]) -> Iterator[tuple[Split, str]]:
    """The texts of entries, read back from their spill file."""
    for entry in entries:
        spill.seek(entry.start)
        yield entry.split, spill.read(entry.size).decode()


def by_text(texts: Iterable[str]) -> Iterator[tuple[Split, str]]:
    """Non-empty texts with their split, which their own hash decides: equal texts stay together."""
    for text in texts:
        if text.strip():
            whole = text.encode("utf-8", "replace").decode()  # JSON can hold halves of characters
            yield split_of(whole), whole


def c4_shards(source: Path) -> list[Path]:
    """The .json.gz files of a folder, at every depth, or the one file."""
    found = sorted(source.rglob("*.json.gz")) if source.is_dir() else [source]
    if not found:
        raise InputError("corpus", f"c4:{source}", "there is no .json.gz file in it")
    return found


def c4_identity(source: Path) -> list[tuple[str, int, str]]:
    """Name, size and the CRC that gzip ends with of each shard: tells whether one has changed."""
    found = []
    for file in c4_shards(source):
        with file.open("rb") as raw:
            size = raw.seek(0, 2)
            raw.seek(max(0, size - 8))
            found.append((file.name, size, raw.read().hex()))
    return found


def c4_documents(source: Path) -> Iterator[str]:
    """The texts of .json.gz shards: one JSON object with "text" a line."""
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
    """What `hub:NAME[,CONFIG][@SPLIT]` names: a dataset of the hub, or a local folder."""

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
        """What tells this dataset from others: of local files their names, sizes and times."""
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
    except StopIteration:  # its way to say that a file is empty
        raise InputError("corpus", shown, "it holds no text") from None
    except (DatasetsError, ValueError, FileNotFoundError) as error:
        raise InputError("corpus", shown, f"{type(error).__name__}: {error}") from None


def markov_source(alphabet: int, seed: int = 0) -> tuple[np.ndarray, float, float]:
    """A random second-order Markov source.

    Returns:
        transitions (alphabet, alphabet, alphabet): P[a, b, c] = P(next = c | last two = a, b);
        its entropy rate; the entropy of single symbols. Both in nats per token.
    """
    generator = np.random.default_rng([FORMAT, alphabet, seed])
    P = generator.dirichlet(np.full(alphabet, 3.0 / alphabet), size=(alphabet, alphabet))
    P = 0.99 * P + 0.01 / alphabet  # every pair can follow every pair: one stationary distribution
    pairs = np.full((alphabet, alphabet), alphabet**-2.0)
    for _ in range(10_000):  # π(b, c) = Σ_a π(a, b) P(c | a, b)
        following = np.einsum("ab,abc->bc", pairs, P)
        if np.abs(following - pairs).max() < 1e-15:
            break
        pairs = following
    rate = float(-(pairs[:, :, None] * P * np.log(P)).sum())
    single = pairs.sum(0)
    return P, rate, float(-(single * np.log(single)).sum())
