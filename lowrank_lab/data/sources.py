"""Documents with names: the `python` corpus and text files; each distinct document once.

A document is a pair (name, text). Its name decides its split, so names have to be the same on every
machine. Documents of streams have no name: their text decides.
"""

from __future__ import annotations

import codecs
import hashlib
import importlib.metadata
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from lowrank_lab.config import InputError
from lowrank_lab.data.files import files_in, readable
from lowrank_lab.data.splits import Split, digest_of, split_of

# Packages whose sources make up the `python` corpus beside the standard library. Their wheels
# have the same .py files on every platform, except the generated ones in GENERATED.
PACKAGES = ("torch", "sympy", "networkx", "numpy", "pandas", "matplotlib", "seaborn")
GENERATED = ("version.py", "_version.py", "_version_meson.py", "__config__.py")
# Parts of the standard library that some systems ship separately, or that are tests.
NOT_EVERYWHERE = frozenset(
    "test tests idle_test idlelib tkinter turtledemo turtle lib2to3 ensurepip distutils venv "
    "site-packages dist-packages __pycache__ sitecustomize usercustomize antigravity".split()
)
TEXT_SUFFIXES = frozenset(".txt .md .rst .py .tex .csv .json .jsonl .html .xml .c .h .js".split())
CHUNKS = 400  # a single file is cut into about so many documents, at line ends if it has any
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


def text_documents(source: Path) -> Iterator[tuple[str, str]]:
    """Each text file of a folder as a document, or one file cut at line ends.

    Raises:
        InputError: a file can't be read, or isn't UTF-8 text.
    """
    refuse_saved_dataset("text", source)
    if not source.is_dir():
        size = sum(map(len, _decoded(source)))
        chunks = _chunks(_decoded(source), size)
        yield from ((f"{source.name}#{i}", chunk) for i, chunk in enumerate(chunks))
        return
    for file in files_in(source):
        if file.suffix.lower() in TEXT_SUFFIXES:
            yield str(file.relative_to(source)), "".join(_decoded(file))


def refuse_saved_dataset(kind: str, source: Path) -> None:
    """Refuse a folder of `Dataset.save_to_disk`, whose JSON files are no texts."""
    if is_saved_dataset(source):
        allowed = f"`datasets` has saved it there: hub:{source}"
        raise InputError("corpus", f"{kind}:{source}", allowed)


def is_saved_dataset(folder: Path) -> bool:
    """Whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote a folder."""
    one = all((folder / name).is_file() for name in ("state.json", "dataset_info.json"))
    return one or (folder / "dataset_dict.json").is_file()


def _decoded(file: Path) -> Iterator[str]:
    """The text of a file without its byte order mark, some 1 MiB at a time."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with readable(f"text:{file}", file), file.open("rb") as raw:
        begin = raw.read(65536)
        if begin.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise InputError("corpus", f"text:{file}", "it is UTF-16; convert it to UTF-8")
        if b"\0" in begin:
            raise InputError("corpus", f"text:{file}", "it is binary, not text")
        position = len(codecs.BOM_UTF8) if begin.startswith(codecs.BOM_UTF8) else 0
        raw.seek(position)
        piece = b"\0"
        while piece:
            piece = raw.read(1 << 20)
            begins = position - len(decoder.getstate()[0])  # bytes of an incomplete character
            try:
                yield decoder.decode(piece, final=not piece)
            except UnicodeDecodeError as error:
                allowed = f"not UTF-8 at byte {begins + error.start}"
                raise InputError("corpus", f"text:{file}", allowed) from None
            position += len(piece)


def _chunks(pieces: Iterable[str], characters: int) -> Iterator[str]:
    """The concatenated pieces, cut into about CHUNKS documents."""
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
    """The end of the line that reaches `size` characters, if before 2 · `size`; else `size`."""
    end = text.find("\n", start + size, start + 2 * size) + 1
    return end or start + size


class Entry(NamedTuple):
    """A distinct document: its hashes, its split, and the place of its bytes in a spill file."""

    key: bytes  # SHA-256 of its name: documents are sorted by it
    digest: bytes  # SHA-256 of its text
    split: Split
    start: int
    size: int


def distinct(documents: Iterable[tuple[str, str]], spill: BinaryIO | None = None) -> list[Entry]:
    """Non-empty documents, the first of each set of identical ones, in the order of their hash.

    Args:
        spill: a file to write their texts to, so that none stays in memory.
    """
    seen: dict[bytes, Entry] = {}
    written = 0
    for name, text in documents:
        raw = text.encode()
        digest = hashlib.sha256(raw).digest()
        if digest in seen or not text.strip():
            continue
        key = digest_of(name)
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
    """Non-empty texts, each with the split of its own hash, so equal texts share a split."""
    for text in texts:
        if text.strip():
            whole = text.encode("utf-8", "replace").decode()  # JSON can have unpaired surrogates
            yield split_of(whole), whole
