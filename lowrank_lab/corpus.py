"""Text → documents → packed token files → batches that are pure functions of (seed, step).

`prepare` builds a corpus once, atomically, under `data/corpora/<name>-<hash>/`:

    train.bin validation.bin test.bin   uint16 tokens, documents separated by END_OF_TEXT
    tokenizer.json                      byte-level BPE trained on the training part (text corpora)
    corpus.json README.md               counts, SHA-256 of the token files, entropy (markov)

A document's split follows from the hash of its name, so that nothing moves between splits when
another document changes.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import math
import shutil
import sys
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from lowrank_lab.config import InputError, RunConfig, data_folder, nearest
from lowrank_lab.sources import (
    FORMAT,
    PACKAGES,
    distinct,
    markov_source,
    python_documents,
    text_documents,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LOG = logging.getLogger(__name__)

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
HELD_OUT_SHARE = {"validation": 0.025, "test": 0.025}
END_OF_TEXT = "<|endoftext|>"
BPE_SAMPLE_BYTES = 20_000_000

MARKOV_ALPHABET = 16
MARKOV_TOKENS = {"train": 4_000_000, "validation": 300_000, "test": 300_000}


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
        """Exact entropy rate in nats a token, where it is known: the floor of every loss."""
        return self.facts.get("entropy")

    def tokens(self, split: Split) -> np.ndarray:
        """All tokens of a split (uint16, memory-mapped)."""
        return self._maps[split]

    @cached_property
    def _maps(self) -> dict[Split, np.ndarray]:
        return {s: np.memmap(self.folder / f"{s}.bin", np.uint16, "r") for s in SPLITS}

    @cached_property
    def tokenizer(self) -> Tokenizer:
        from tokenizers import Tokenizer

        path = self.folder / "tokenizer.json"
        if not path.exists():
            raise InputError("corpus", self.facts["name"], "it is numbers, not text: no tokenizer")
        return Tokenizer.from_file(str(path))

    def num_windows(self, split: Split, sequence_length: int) -> int:
        """Windows of `sequence_length` inputs, each with the token that follows them."""
        return max(0, (len(self.tokens(split)) - 1) // sequence_length)

    def batch(
        self, split: Split, step: int, *, batch: int, sequence_length: int, seed: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Inputs and targets of one step, each (batch, sequence_length), int64.

        Windows are visited in a keyed permutation, another one for every pass, so that nothing
        repeats before everything was seen and a resumed run needs no replay.
        """
        count = self.num_windows(split, sequence_length)
        if count == 0:
            raise InputError("sequence_length", sequence_length, f"too long for the {split} part")
        position = step * batch + np.arange(batch, dtype=np.int64)
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
        tokens = torch.from_numpy(self.tokens(split)[offsets].astype(np.int64))
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
    """The vocabulary asked for: the configuration's, else the corpus's, else the model size's."""
    if config.vocab_size is not None:
        return config.vocab_size
    return MARKOV_ALPHABET if config.corpus == "markov" else config.size.vocab_size


def prepare(config: RunConfig, root: Path | None = None) -> Corpus:
    """The corpus a configuration asks for, built if it isn't there yet.

    Args:
        root: the folder of all corpora; by default data/corpora.

    Raises:
        InputError: an unknown corpus, or text that is empty, binary, not UTF-8 or too short.
    """
    kind, _, path = config.corpus.partition(":")
    root = root if root is not None else data_folder() / "corpora"
    if config.corpus == "python":
        return _prepare_text("python", python_documents, config, root)
    if config.corpus == "markov":
        return _prepare_markov(config, root)
    if kind == "text":
        source = Path(path).expanduser()
        if not path or not source.exists():
            raise InputError("corpus", config.corpus, "there is no such file or folder")
        name = f"text-{source.resolve().name}"
        return _prepare_text(name, lambda: text_documents(source), config, root)
    raise InputError("corpus", config.corpus, nearest(kind, ("python", "markov", "text:PATH")))


def split_of(name: str) -> Split:
    """The split a document belongs to, by the hash of its name."""
    share = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    if share < HELD_OUT_SHARE["test"]:
        return "test"
    return "validation" if share < sum(HELD_OUT_SHARE.values()) else "train"


def _prepare_text(
    name: str, documents: Callable[[], Iterable[tuple[str, str]]], config: RunConfig, root: Path
) -> Corpus:
    vocab = vocabulary(config)
    if isinstance(vocab, int) and vocab < 257:
        raise InputError(
            "vocab_size", vocab, "a BPE has at least 257 entries (256 bytes and an end)"
        )
    # `python` is decided by its pins, so its hash needs no look at 100 MB of text.
    pins = [sys.version_info[:3], [(p, importlib.metadata.version(p)) for p in PACKAGES]]
    found = None if name == "python" else distinct(documents())
    content = pins if found is None else [hashlib.sha256(t.encode()).hexdigest() for _, t in found]
    folder = root / f"{name}-{_short_hash([FORMAT, name, vocab, content])}"

    def build(target: Path) -> dict[str, Any]:
        if found is None:
            LOG.info("building the %s corpus, once; it takes half a minute", name)
        texts = found if found is not None else distinct(documents())
        if not texts:
            raise InputError("corpus", config.corpus, "it holds no text")
        parts: dict[Split, list[str]] = {split: [] for split in SPLITS}
        for document, text in texts:
            parts[split_of(document)].append(text)
        for split in SPLITS:
            if sum(map(len, parts[split])) < 512:
                raise InputError("corpus", config.corpus, f"too short: its {split} part is empty")
        tokenizer = _byte_tokenizer() if vocab == "byte" else _train_bpe(parts["train"], int(vocab))
        if vocab != "byte" and tokenizer.get_vocab_size() < int(vocab):
            reached = f"the text is too short: it gives {tokenizer.get_vocab_size()} entries"
            raise InputError("vocab_size", vocab, reached)
        tokenizer.save(str(target / "tokenizer.json"))
        for split in SPLITS:
            _write_tokens(target / f"{split}.bin", parts[split], tokenizer)
        facts: dict[str, Any] = {"vocab_size": tokenizer.get_vocab_size()}
        facts["documents"] = {s: len(parts[s]) for s in SPLITS}
        facts["bytes"] = {s: sum(len(t.encode()) for t in parts[s]) for s in SPLITS}
        return facts

    return _open_or_build(folder, name, build)


def _byte_tokenizer() -> Tokenizer:
    """256 bytes and END_OF_TEXT: a BPE without merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([END_OF_TEXT, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.add_special_tokens([END_OF_TEXT])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _train_bpe(texts: list[str], vocab_size: int) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(texts, BPE_SAMPLE_BYTES), trainer)
    return tokenizer


def _sample(texts: list[str], limit: int) -> Iterator[str]:
    """The first documents, up to about `limit` characters (their order is random already)."""
    taken = 0
    for text in texts:
        if taken >= limit:
            return
        taken += len(text)
        yield text


def _write_tokens(path: Path, texts: list[str], tokenizer: Tokenizer) -> None:
    end = tokenizer.token_to_id(END_OF_TEXT)
    with path.open("wb") as file:
        for start in range(0, len(texts), 256):
            # END_OF_TEXT written out in a document must not become the token that ends documents.
            pieces = [t.replace(END_OF_TEXT, "<|end of text|>") for t in texts[start : start + 256]]
            for encoding in tokenizer.encode_batch_fast(pieces):
                np.array([*encoding.ids, end], dtype=np.uint16).tofile(file)


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
        target = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            facts = build(target)
            files = [target / f"{s}.bin" for s in SPLITS]
            facts["name"] = name
            facts["tokens"] = {f.stem: f.stat().st_size // 2 for f in files}
            facts["sha256"] = hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()
            (target / "corpus.json").write_text(json.dumps(facts, indent=2) + "\n")
            (target / "README.md").write_text(_readme(facts))
            target.chmod(0o755)
            try:
                target.rename(folder)
            except OSError:  # another process was faster; its corpus is the same
                if not (folder / "corpus.json").exists():
                    raise
        finally:
            shutil.rmtree(target, ignore_errors=True)
    return Corpus(folder, json.loads((folder / "corpus.json").read_text()))


def _readme(facts: dict[str, Any]) -> str:
    lines = [f"# Corpus {facts['name']}", "", "Packed uint16 tokens, one file a split.", ""]
    kinds = [kind for kind in ("documents", "bytes", "tokens") if kind in facts]
    lines += ["| split | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    lines += [f"| {s} | " + " | ".join(f"{facts[k][s]:,}" for k in kinds) + " |" for s in SPLITS]
    lines += ["", f"Vocabulary: {facts['vocab_size']}. SHA-256: `{facts['sha256']}`."]
    if "entropy" in facts:
        lines += [
            f"Entropy rate {facts['entropy']:.6f}, of single symbols "
            f"{facts['unigram_entropy']:.6f} nats a token."
        ]
    return "\n".join(lines) + "\n"
