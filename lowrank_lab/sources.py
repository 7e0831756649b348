"""Where text comes from: documents of the `python` corpus, of files, and a synthetic source.

A document is a pair (name, text). Its name decides its split, so it has to be the same everywhere.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from lowrank_lab.config import InputError

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


def text_documents(source: Path) -> Iterator[tuple[str, str]]:
    """Every text file of a folder as one document, or one file cut at line ends."""
    files = [source]
    if source.is_dir():
        files = sorted(p for p in source.rglob("*") if p.suffix in TEXT_SUFFIXES and p.is_file())
    for file in files:
        raw = file.read_bytes()
        if b"\0" in raw[:65536]:
            raise InputError("corpus", f"text:{file}", "it is binary, not text")
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError("corpus", f"text:{file}", f"not UTF-8 at byte {error.start}") from None
        if source.is_dir():
            yield str(file.relative_to(source)), text
        else:
            yield from ((f"{file.name}#{i}", chunk) for i, chunk in enumerate(_chunks(text)))


def _chunks(text: str) -> Iterator[str]:
    low, high = CHUNK_CHARACTERS
    size = min(max(len(text) // CHUNKS, low), high)
    start = 0
    while start < len(text):
        end = text.find("\n", start + size) + 1
        if end == 0 or end > start + 2 * size:  # no line end near
            end = start + size
        yield text[start:end]
        start = end


def distinct(documents: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Non-empty documents, the first of each set of identical ones, in the order of their hash."""
    seen: dict[bytes, tuple[str, str]] = {}
    for name, text in documents:
        if text.strip():
            seen.setdefault(hashlib.sha256(text.encode()).digest(), (name, text))
    return sorted(seen.values(), key=lambda document: hashlib.sha256(document[0].encode()).digest())


def markov_source(alphabet: int, seed: int = 0) -> tuple[np.ndarray, float, float]:
    """A random second-order Markov source.

    Returns:
        transitions (alphabet, alphabet, alphabet): P[a, b, c] = P(next = c | last two = a, b);
        its entropy rate; the entropy of single symbols. Both in nats a token.
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
