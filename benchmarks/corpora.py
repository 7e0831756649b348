"""Building corpora of up to 500 MB of text: peak memory and time, each in a fresh process.

The text is synthetic: words of random letters, drawn by Zipf's law. A corpus is compared with one a
tenth of its size; the floor is the memory of a process that only imports the library.
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from benchmarks.harness import Row

LIMIT = 1.25  # peak memory of a corpus over that of a tenth of it
# kind, vocabulary, MB of text (a BPE takes minutes for hundreds of MB)
CASES = (("text", "byte", 500), ("c4", "byte", 500), ("c4", "1024", 500))
WORDS, DOCUMENT = 20_000, 400  # different words; words of a document
SHARDS = 5
PROGRAM = """
import json, resource, sys, time
from pathlib import Path
import lowrank_lab
from lowrank_lab.data.prepare import prepare
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before, started = peak(), time.perf_counter()
config = lowrank_lab.RunConfig(corpus=sys.argv[1], vocab_size=sys.argv[2])
corpus = prepare(config, Path(sys.argv[3]))
seconds = time.perf_counter() - started
corpus.batch("train", 0, batch=16, sequence_length=256)
print(json.dumps([before, peak(), seconds, sum(corpus.facts["tokens"].values())]))
"""


def rows(quick: bool = False) -> list[Row]:
    """One row per kind of corpus and tokenizer: peak memory in MiB."""
    return [row(kind, vocab, 2 if quick else megabytes) for kind, vocab, megabytes in CASES]


def row(kind: str, vocab: str, megabytes: int) -> Row:
    tenth = max(1, megabytes // 10)
    with tempfile.TemporaryDirectory() as place:
        for size in (tenth, megabytes):
            write_text(Path(place), kind, size)
        _, small, _, _ = build(Path(place), kind, tenth, vocab)
        before, peak, seconds, tokens = build(Path(place), kind, megabytes, vocab)
    return Row(
        f"corpus {kind} of {megabytes} MB, vocabulary {vocab}: peak memory", peak, small, before,
        "MiB", peak / small, f"≤ {LIMIT:g}", peer_name=f"of {tenth} MB",
        note=f"{seconds:.0f} s, {tokens / 1e6:.0f} M tokens",
    )  # fmt: skip


def build(place: Path, kind: str, megabytes: int, vocab: str) -> tuple[float, float, float, float]:
    """MiB before, peak MiB, seconds, tokens."""
    arguments = [f"{kind}:{source(place, kind, megabytes)}", vocab, str(place / "corpora")]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=True
    )
    before, peak, seconds, tokens = json.loads(done.stdout)
    return before, peak, seconds, tokens


def source(place: Path, kind: str, megabytes: int) -> Path:
    return place / (f"{megabytes}.txt" if kind == "text" else f"{megabytes}")


def write_text(place: Path, kind: str, megabytes: int) -> None:
    """A text file, or a folder of .json.gz shards, with `megabytes` · 10⁶ bytes of text."""
    path = source(place, kind, megabytes)
    if kind == "text":
        with path.open("wb") as file:
            for document in documents(megabytes * 10**6):
                file.write(document.encode() + b"\n")
        return
    path.mkdir()
    for shard in range(SHARDS):
        with gzip.open(path / f"{shard}.json.gz", "wb", compresslevel=1) as raw:
            file = cast(BinaryIO, raw)
            for document in documents(megabytes * 10**6 // SHARDS, seed=1 + shard):
                file.write(json.dumps({"text": document}).encode() + b"\n")


def documents(size: int, seed: int = 0) -> Iterator[str]:
    chance = np.random.default_rng(seed)
    letters = np.array(list("eeettaaooiinnsshrdlu"))
    words = np.array(
        ["".join(chance.choice(letters, 1 + length)) for length in chance.poisson(4, WORDS)]
    )
    while size > 0:
        document = " ".join(words[np.minimum(chance.zipf(1.3, DOCUMENT), WORDS) - 1])
        size -= len(document) + 1
        yield document
