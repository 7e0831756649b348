"""Text → documents → packed token files → batches that are pure functions of (seed, step).

`prepare` builds a corpus once, atomically, under `data/corpora/<name>-<hash>/`:

    train.bin validation.bin test.bin   uint16 tokens, documents separated by an end-of-text token;
                                        large splits go on in train.1.bin … (shards.py)
    tokenizer.json                      byte-level BPE of the training part, or the one given
    corpus.json README.md               counts, SHA-256 of the token files, entropy (markov)

A document's split follows from the hash of its name, or of its text where it has none, so that
nothing moves between splits when another document changes.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import math
import sys
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from lowrank_lab.config import InputError, RunConfig, nearest
from lowrank_lab.data.sources import (
    FORMAT,
    PACKAGES,
    SPLITS,
    Hub,
    Split,
    by_text,
    c4_documents,
    c4_identity,
    distinct,
    hub_documents,
    markov_source,
    python_documents,
    spilled,
    text_documents,
)
from lowrank_lab.data.token_files import (
    TokenShards,
    forget_progress,
    new_counts,
    pack,
    progress_of,
    save_progress,
    shard_paths,
    workplace,
)
from lowrank_lab.data.tokenizer import (
    byte_tokenizer,
    encode,
    read_tokenizer,
    train_bpe,
    vocabulary_of,
)
from lowrank_lab.paths import data_folder, located

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LOG = logging.getLogger(__name__)

SMALLEST_PART = 512  # bytes of text
MARKOV_ALPHABET = 16
MARKOV_TOKENS = {"train": 4_000_000, "validation": 300_000, "test": 300_000}

Texts = Callable[[], Iterator[tuple[Split, str]]]  # the same ones in each call


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus: memory-mapped token files and what is known about them."""

    folder: Path
    facts: dict[str, Any]

    @property
    def vocab_size(self) -> int:
        return int(self.facts["vocab_size"])

    @property
    def entropy(self) -> float | None:
        """Exact entropy rate in nats per token, where it is known: the floor of every loss."""
        return self.facts.get("entropy")

    def length(self, split: Split) -> int:
        """Tokens of a split."""
        return len(self._shards[split])

    def tokens(self, split: Split) -> np.ndarray:
        """All tokens of a split (uint16): memory-mapped, or a copy if they are in several files."""
        parts = self._shards[split].parts
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    @cached_property
    def _shards(self) -> dict[Split, TokenShards]:
        shards = {split: TokenShards(self.folder, split) for split in SPLITS}
        for split, count in self.facts.get("tokens", {}).items():
            if len(shards[split]) != count:
                allowed = f"its {split} files are damaged; remove the folder to build it again"
                raise InputError("corpus", str(self.folder), allowed)
        return shards

    @cached_property
    def tokenizer(self) -> Tokenizer:
        from tokenizers import Tokenizer

        path = self.folder / "tokenizer.json"
        if not path.exists():
            raise InputError("corpus", self.facts["name"], "it is numbers, not text: no tokenizer")
        return Tokenizer.from_file(str(path))

    def num_windows(self, split: Split, sequence_length: int) -> int:
        """Windows of `sequence_length` inputs, each with the token that follows them."""
        return max(0, (self.length(split) - 1) // sequence_length)

    def batch(
        self, split: Split, step: int, *, batch: int, sequence_length: int, seed: int = 0,
        rank: int = 0, ranks: int = 1,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Inputs and targets of one step, each (batch, sequence_length), int64.

        Windows are visited in a keyed permutation, another one for every pass, so that nothing
        repeats before everything was seen and a resumed run needs no replay.

        Args:
            rank: of `ranks` equal parts of the batch, the one to read: the others' shards are not
                touched, and all parts together are the batch of one reader.
        """
        count = self.num_windows(split, sequence_length)
        if count == 0:
            raise InputError("sequence_length", sequence_length, f"too long for the {split} part")
        rows = np.arange(batch * rank // ranks, batch * (rank + 1) // ranks, dtype=np.int64)
        position = step * batch + rows
        windows = np.concatenate(
            [
                permute(position[position // count == e] % count, count, key=(seed, int(e)))
                for e in np.unique(position // count)
            ]
        )
        return self.windows(split, windows, sequence_length)

    def windows(
        self, split: Split, indices: np.ndarray, sequence_length: int
    ) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the given windows, each (len(indices), sequence_length)."""
        offsets = indices[:, None] * sequence_length + np.arange(sequence_length + 1)
        tokens = torch.from_numpy(self._shards[split].take(offsets).astype(np.int64))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def permute(indices: np.ndarray, size: int, key: tuple[int, int]) -> np.ndarray:
    """Where a keyed pseudo-random permutation of range(size) sends `indices`; O(1) memory.

    A four-round Feistel network on the smallest even number of bits that holds `size`, walked
    along its cycles until the value is below `size` again.
    """
    half_bits = max(1, math.ceil((size - 1).bit_length() / 2))
    mask = np.uint64((1 << half_bits) - 1)
    round_keys = np.random.SeedSequence(key).generate_state(4, np.uint64)

    def scramble(x: np.ndarray) -> np.ndarray:
        left, right = x >> np.uint64(half_bits), x & mask
        for round_key in round_keys:
            mixed = (right ^ round_key) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
        return (left << np.uint64(half_bits)) | right

    out = scramble(indices.astype(np.uint64))
    while (outside := out >= size).any():
        out[outside] = scramble(out[outside])
    return out.astype(np.int64)


def vocabulary(config: RunConfig) -> int | Literal["byte"]:
    """The vocabulary asked for: the configuration's, else the tokenizer's, the corpus's, or the
    model size's."""
    if config.vocab_size is not None:
        return config.vocab_size
    if config.tokenizer is not None:
        return vocabulary_of(read_tokenizer(config.tokenizer))
    return MARKOV_ALPHABET if config.corpus == "markov" else config.size.vocab_size


def prepare(config: RunConfig, root: Path | None = None) -> Corpus:
    """The corpus a configuration asks for, built if it isn't there yet.

    A build that was killed is gone on with. Memory does not depend on the size of the text, but
    for some 300 bytes a document of `text:` and `python`, whose identical documents are dropped.

    Args:
        root: the folder of all corpora; by default data/corpora.

    Raises:
        InputError: an unknown corpus, or text that is empty, damaged, not UTF-8 or too short.
    """
    kind, _, path = config.corpus.partition(":")
    root = root if root is not None else data_folder() / "corpora"
    if config.corpus == "markov":
        return _prepare_markov(config, root)
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
        return _prepare_stream(
            name, lambda: by_text(c4_documents(source)), c4_identity(source), config, root
        )
    if kind == "hub" and path:
        hub = Hub.parse(path)
        name = f"hub-{hub.name.rstrip('/').rpartition('/')[2]}"
        return _prepare_stream(
            name, lambda: by_text(hub_documents(hub)), hub.identity(), config, root
        )
    known = ("python", "markov", "text:PATH", "c4:PATH", "hub:NAME")
    raise InputError("corpus", config.corpus, nearest(kind, known))


def _prepare_text(
    name: str, documents: Callable[[], Iterable[tuple[str, str]]], config: RunConfig, root: Path
) -> Corpus:
    """A corpus of named documents, each once, in the order of the hash of their names."""
    vocab = _checked_vocabulary(config)
    # `python` is decided by its pins, so its hash needs no look at 100 MB of text.
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
            _check_sizes(config, sizes)
            return _build_text(target, config, vocab, lambda: spilled(spill, entries))

    return _open_or_build(folder, name, build)


def _prepare_stream(
    name: str, texts: Texts, identity: object, config: RunConfig, root: Path
) -> Corpus:
    """A corpus of texts in the order in which they come."""
    vocab = _checked_vocabulary(config)
    folder = root / f"{name}-{_text_hash(name, vocab, identity, config)}"
    return _open_or_build(
        folder, name, partial(_build_text, config=config, vocab=vocab, texts=texts)
    )


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
    return _short_hash([FORMAT, name, vocab, content, *given])


def _check_sizes(config: RunConfig, sizes: dict[Split, int]) -> None:
    """Refuse text that is nothing, or whose parts (in bytes) are next to nothing."""
    if not any(sizes.values()):
        raise InputError("corpus", config.corpus, "it holds no text")
    for split in SPLITS:
        if sizes[split] < SMALLEST_PART:
            raise InputError("corpus", config.corpus, f"too short: its {split} part is empty")


def _build_text(
    target: Path, config: RunConfig, vocab: int | Literal["byte"], texts: Texts
) -> dict[str, Any]:
    """Tokenizer and token files in `target`, from the first text or from where it was killed."""
    file = target / "tokenizer.json"
    if progress_of(target) is None:
        _tokenizer_for(config, vocab, texts).save(str(file))
        save_progress(target, new_counts())
    tokenizer = read_tokenizer(str(file))
    counts = pack(
        target,
        texts(),
        partial(encode, tokenizer="byte" if vocab == "byte" else tokenizer),
        lambda so_far: LOG.info(
            "%s: %s documents, %s tokens so far", config.corpus,
            *(f"{sum(so_far[kind].values()):,}" for kind in ("documents", "tokens")),
        ),
    )  # fmt: skip
    _check_sizes(config, counts["bytes"])
    return {"vocab_size": vocabulary_of(tokenizer), **counts}


def _tokenizer_for(config: RunConfig, vocab: int | Literal["byte"], texts: Texts) -> Tokenizer:
    if config.tokenizer is not None:
        return read_tokenizer(config.tokenizer)
    if vocab == "byte":
        return byte_tokenizer()
    training = (text for split, text in texts() if split == "train")
    first = next(training, None)
    if first is None:
        raise InputError("corpus", config.corpus, "it holds no text")
    tokenizer = train_bpe(chain([first], training), vocab)
    if tokenizer.get_vocab_size() < vocab:
        reached = f"the text is too short: it gives {tokenizer.get_vocab_size()} entries"
        raise InputError("vocab_size", vocab, reached)
    return tokenizer


# The synthetic source


def _prepare_markov(config: RunConfig, root: Path) -> Corpus:
    alphabet = vocabulary(config)
    if not isinstance(alphabet, int) or not 7 <= alphabet <= 64:
        raise InputError("vocab_size", alphabet, "markov has an alphabet of 7 to 64 symbols")

    def build(target: Path) -> dict[str, Any]:
        P, rate, unigram = markov_source(alphabet)
        if unigram < 1.5 * rate:
            raise InputError("vocab_size", alphabet, "this source is nearly without memory")
        cumulative = np.cumsum(P, axis=-1)[:, :, :-1].tolist()
        for index, split in enumerate(SPLITS):
            a = b = 0
            sequence = []
            for u in np.random.default_rng([FORMAT, alphabet, 1 + index]).random(
                MARKOV_TOKENS[split]
            ):
                a, b = b, bisect_right(cumulative[a][b], u)
                sequence.append(b)
            np.array(sequence, dtype=np.uint16).tofile(target / f"{split}.bin")
        return {"vocab_size": alphabet, "entropy": rate, "unigram_entropy": unigram}

    return _open_or_build(root / f"markov-{_short_hash([FORMAT, alphabet])}", "markov", build)


# Building once


def _short_hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:10]


def _open_or_build(folder: Path, name: str, build: Callable[[Path], dict[str, Any]]) -> Corpus:
    """Open a corpus, or build it beside its place and move it there in one step."""
    if not (folder / "corpus.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with workplace(folder) as target:
            facts = {**build(target), "name": name}
            files = [path for split in SPLITS for path in shard_paths(target, split)]
            sizes = {s: sum(p.stat().st_size for p in shard_paths(target, s)) for s in SPLITS}
            facts["tokens"] = {split: size // 2 for split, size in sizes.items()}
            facts["sha256"] = _sha256(files)
            (target / "README.md").write_text(_readme(facts))
            forget_progress(target)
            (target / "corpus.json").write_text(json.dumps(facts, indent=2) + "\n")
            target.chmod(0o755)
            try:
                target.rename(folder)
            except OSError:  # another process was faster; its corpus is the same
                if not (folder / "corpus.json").exists():
                    raise
    return Corpus(folder, json.loads((folder / "corpus.json").read_text()))


def _sha256(files: Iterable[Path]) -> str:
    """SHA-256 of files one after the other."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()


def _readme(facts: dict[str, Any]) -> str:
    lines = [f"# Corpus {facts['name']}", "", "Packed uint16 tokens, one file a split.", ""]
    kinds = [kind for kind in ("documents", "bytes", "tokens") if kind in facts]
    lines += ["| split | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    lines += [f"| {s} | " + " | ".join(f"{facts[k][s]:,}" for k in kinds) + " |" for s in SPLITS]
    lines += ["", f"Vocabulary: {facts['vocab_size']}. SHA-256: `{facts['sha256']}`."]
    if "entropy" in facts:
        lines += [
            f"Entropy rate {facts['entropy']:.6f}, of single symbols "
            f"{facts['unigram_entropy']:.6f} nats per token."
        ]
    return "\n".join(lines) + "\n"
