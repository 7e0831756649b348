"""Text → documents → packed token files.

`prepare` builds a corpus once, atomically, under `data/corpora/<name>-<hash>/`:

    train.bin validation.bin test.bin   uint16 tokens, documents separated by an end-of-text token;
                                        large splits continue in train.1.bin … (token_files.py)
    tokenizer.json                      byte-level BPE of the training part, or the one given
    corpus.json README.md               counts, SHA-256 of the token files, entropy (markov)
    sources.json                        of c4 and hub: stamps and SHA-256 of the files read

Hashed are all text of `text:`, each time; the files of `c4` and of a local `hub` when their size,
mtime or ctime is new; of a dataset of the hub its name alone.

A document's split follows from the hash of its name, or of its text where it has none, so that
nothing moves between splits when another document changes.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.metadata
import json
import logging
import sys
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lowrank_lab.config import InputError, RunConfig, nearest
from lowrank_lab.data import markov
from lowrank_lab.data.build import Texts, build_text, check_sizes
from lowrank_lab.data.corpus import Corpus
from lowrank_lab.data.files import SOURCES, facts_of, known_facts, stamp
from lowrank_lab.data.sources import (
    PACKAGES,
    by_text,
    distinct,
    python_documents,
    spilled,
    text_documents,
)
from lowrank_lab.data.splits import FORMAT, SPLITS
from lowrank_lab.data.store import open_or_build, short_hash
from lowrank_lab.data.streams import Hub, c4_documents, c4_identity, c4_shards, hub_documents
from lowrank_lab.data.tokenizer import read_tokenizer, vocabulary_of
from lowrank_lab.paths import data_folder, located

LOG = logging.getLogger(__name__)


def vocabulary(config: RunConfig) -> int | Literal["byte"]:
    """The vocabulary size: the configuration's, else the tokenizer's, the corpus's or the model
    size's.
    """
    if config.vocab_size is not None:
        return config.vocab_size
    if config.tokenizer is not None:
        return vocabulary_of(read_tokenizer(config.tokenizer))
    return markov.ALPHABET if config.corpus == "markov" else config.size.vocab_size


def prepare(config: RunConfig, root: Path | None = None) -> Corpus:
    """The corpus of a configuration, built if it doesn't exist yet.

    A killed build is resumed. Memory doesn't grow with the text, except by some 300 bytes per
    document of `text:` and `python`, where duplicates are dropped.

    Args:
        root: the folder of all corpora; by default data/corpora.

    Raises:
        InputError: an unknown corpus, or text that is empty, damaged, not UTF-8 or too short.
    """
    kind, _, path = config.corpus.partition(":")
    root = root if root is not None else data_folder() / "corpora"
    if config.corpus == "markov":
        return markov.prepare(vocabulary(config), root)
    if config.corpus == "python":
        return _prepare_text("python", python_documents, config, root)
    if kind in ("text", "c4"):
        source = located(path)
        if not path or not source.exists():
            what = {"text": "text files", "c4": ".json.gz shards of C4"}[kind]
            allowed = (
                f"there is no such file or folder, here or in {data_folder()}; put {what} there"
            )
            raise InputError("corpus", config.corpus, allowed)
        name = f"{kind}-{source.resolve().name}"
        if kind == "text":
            return _prepare_text(name, lambda: text_documents(source), config, root)
        stream = Stream(
            lambda: by_text(c4_documents(source)), c4_shards(source), source, c4_identity(source)
        )
        return _prepare_stream(name, stream, config, root)
    if kind == "hub" and path:
        hub = Hub.parse(path)
        name = f"hub-{hub.name.rstrip('/').rpartition('/')[2]}"
        stream = Stream(
            lambda: by_text(hub_documents(hub)),
            hub.files(),
            Path(hub.name),
            hub.identity(),
            (hub.config, hub.split),
        )
        return _prepare_stream(name, stream, config, root)
    known = ("python", "markov", "text:PATH", "c4:PATH", "hub:NAME")
    raise InputError("corpus", config.corpus, nearest(kind, known))


def _prepare_text(
    name: str, documents: Callable[[], Iterable[tuple[str, str]]], config: RunConfig, root: Path
) -> Corpus:
    """A corpus of named documents without duplicates, in the order of the hash of their names."""
    vocab = _checked_vocabulary(config)
    # Pinned versions decide `python`, so its hash doesn't need its 100 MB of text.
    pins = [sys.version_info[:3], [(p, importlib.metadata.version(p)) for p in PACKAGES]]
    known = name == "python"
    content = pins if known else [entry.digest.hex() for entry in distinct(documents())]
    folder = root / f"{name}-{_text_hash(name, vocab, content, config)}"

    def build(target: Path) -> dict[str, Any]:
        if known:
            LOG.info("building the %s corpus, once; it takes half a minute", name)
        with tempfile.TemporaryFile(dir=target) as spill:
            entries = distinct(documents(), spill)
            if not known and content != [entry.digest.hex() for entry in entries]:
                raise RuntimeError(f"{config.corpus} changed while it was read")
            sizes = dict.fromkeys(SPLITS, 0)
            for entry in entries:
                sizes[entry.split] += entry.size
            check_sizes(config, sizes)
            return build_text(target, config, vocab, lambda: spilled(spill, entries))

    return open_or_build(folder, name, build)


class Stream(NamedTuple):
    """Texts in the order of their stream, and what tells them from others.

    Attributes:
        files: that the texts are read from; none of a dataset of the hub.
        source: the folder of the files, or the one file.
        earlier: the identity by which earlier versions told corpora apart.
        part: of the files' content that is read.
    """

    texts: Texts
    files: list[Path]
    source: Path
    earlier: list[Any]
    part: tuple[str | None, ...] = ()


def _prepare_stream(name: str, stream: Stream, config: RunConfig, root: Path) -> Corpus:
    """A corpus of a stream: built again if the content of one of its files has changed."""
    vocab = _checked_vocabulary(config)
    earlier = root / f"{name}-{_text_hash(name, vocab, stream.earlier, config)}"
    whole = partial(build_text, config=config, vocab=vocab, texts=stream.texts)
    if not stream.files or _is_earlier(earlier):
        return open_or_build(earlier, name, whole)
    facts = facts_of(stream.files, known_facts(root.glob(f"{glob.escape(name)}-*")))
    named = [path.relative_to(stream.source).as_posix() for path in stream.files]
    content = [*zip(named, (facts[str(path)][-1] for path in stream.files), strict=True)]
    folder = root / f"{name}-{_text_hash(name, vocab, [*stream.part, content], config)}"

    def build(target: Path) -> dict[str, Any]:
        found = whole(target)
        if any(stamp(path) != facts[str(path)][:-1] for path in stream.files):
            raise RuntimeError(f"{config.corpus} changed while it was read")
        (target / SOURCES).write_text(json.dumps(facts))
        return found

    return open_or_build(folder, name, build)


def _is_earlier(folder: Path) -> bool:
    """Whether an earlier version, which recorded no sources, built a corpus there."""
    return (folder / "corpus.json").exists() and not (folder / SOURCES).exists()


def _checked_vocabulary(config: RunConfig) -> int | Literal["byte"]:
    vocab = vocabulary(config)
    if config.tokenizer is not None:
        own = vocabulary_of(read_tokenizer(config.tokenizer))
        if vocab != own:
            raise InputError("vocab_size", vocab, f"the tokenizer has {own} entries")
    elif isinstance(vocab, int) and vocab < 257:
        raise InputError(
            "vocab_size", vocab, "a BPE has at least 257 entries (256 bytes and an end)"
        )
    return vocab


def _text_hash(name: str, vocab: object, content: object, config: RunConfig) -> str:
    given = []
    if config.tokenizer is not None:
        given = [hashlib.sha256(located(config.tokenizer).read_bytes()).hexdigest()]
    return short_hash([FORMAT, name, vocab, content, *given])
