"""Token files to train on: those that `prepare` wrote, or random ones of the same kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_lab.config import InputError
from lowrank_lab.data.corpus import Corpus
from lowrank_lab.data.splits import SPLITS
from lowrank_lab.data.store import open_or_build

VOCABULARY = 32_000
TOKENS = 10_000_000
TINY_VOCABULARY = 512  # of the size `tiny`


def opened(prepared: Path | None, scratch: Path, tiny: bool) -> Corpus:
    """The corpus of a check.

    Raises:
        InputError: the folder has no prepared corpus.
    """
    if tiny:
        return random_corpus(scratch / "corpus", TINY_VOCABULARY, 60_000)
    if prepared is None:
        return random_corpus(scratch / "corpus", VOCABULARY, TOKENS)
    folder = prepared / "corpus"
    if not (folder / "corpus.json").exists():
        raise InputError("prepared", str(prepared), "a folder that `make gpu-check` has written")
    return Corpus(folder, json.loads((folder / "corpus.json").read_text()))


def random_corpus(folder: Path, vocabulary: int, tokens: int) -> Corpus:
    """Tokens with the frequencies of words (Zipf), every other one a function of the one before."""

    def build(target: Path) -> dict[str, Any]:
        generator = np.random.default_rng(0)
        following = generator.permutation(vocabulary)
        frequencies = 1 / np.arange(1, vocabulary + 1)
        cumulative = np.cumsum(frequencies / frequencies.sum())
        for split in SPLITS:
            count = tokens if split == "train" else max(tokens // 40, 4096)
            drawn = np.searchsorted(cumulative, generator.random(count // 2)).clip(
                0, vocabulary - 1
            )
            pairs = np.stack([drawn, following[drawn]], 1).astype(np.uint16)
            pairs.tofile(target / f"{split}.bin")
        return {"vocab_size": vocabulary}

    return open_or_build(folder, "random", build)


def cut(source: Corpus, folder: Path, tokens: int) -> None:
    """Write the first tokens of a corpus as one of its own; of each held-out part a fortieth."""

    def build(target: Path) -> dict[str, Any]:
        for split in SPLITS:
            count = tokens if split == "train" else tokens // 40
            source.tokens(split)[:count].astype(np.uint16).tofile(target / f"{split}.bin")
        return {"vocab_size": source.vocab_size}

    open_or_build(folder, source.facts["name"], build)
