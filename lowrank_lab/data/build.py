"""Texts → a tokenizer and token files, in a folder where a killed build may have begun."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lowrank_lab.config import InputError, RunConfig
from lowrank_lab.data.splits import SPLITS, Split
from lowrank_lab.data.token_files import new_counts, pack, progress_of, save_progress
from lowrank_lab.data.tokenizer import (
    TextEncoder,
    byte_tokenizer,
    encode,
    read_tokenizer,
    train_bpe,
    vocabulary_of,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LOG = logging.getLogger(__name__)

SMALLEST_PART = 512  # bytes of text
Texts = Callable[[], Iterator[tuple[Split, str]]]  # yields the same texts in each call


def check_sizes(config: RunConfig, sizes: dict[Split, int]) -> None:
    """Refuse text that is empty, or of which a split has less than SMALLEST_PART bytes."""
    if not any(sizes.values()):
        raise InputError("corpus", config.corpus, "it has no text")
    for split in SPLITS:
        if sizes[split] < SMALLEST_PART:
            raise InputError("corpus", config.corpus, f"too short: its {split} part is empty")


def build_text(
    target: Path, config: RunConfig, vocab: int | Literal["byte"], texts: Texts
) -> dict[str, Any]:
    """Tokenizer and token files in `target`; a killed build is resumed."""
    file = target / "tokenizer.json"
    if progress_of(target) is None:
        tokenizer = _tokenizer_for(config, vocab, texts)
        file.write_text(tokenizer.to_str(pretty=True), "utf-8")
        save_progress(target, new_counts())
    tokenizer = read_tokenizer(str(file))
    counts = pack(
        target,
        texts(),
        partial(encode, tokenizer="byte" if vocab == "byte" else TextEncoder.of(tokenizer)),
        lambda so_far: LOG.info(
            "%s: %s documents, %s tokens so far", config.corpus,
            *(f"{sum(so_far[kind].values()):,}" for kind in ("documents", "tokens")),
        ),
    )  # fmt: skip
    check_sizes(config, counts["bytes"])
    return {"vocab_size": vocabulary_of(tokenizer), **counts}


def _tokenizer_for(config: RunConfig, vocab: int | Literal["byte"], texts: Texts) -> Tokenizer:
    if config.tokenizer is not None:
        return read_tokenizer(config.tokenizer)
    if vocab == "byte":
        return byte_tokenizer()
    training = (text for split, text in texts() if split == "train")
    first = next(training, None)
    if first is None:
        raise InputError("corpus", config.corpus, "it has no text")
    tokenizer = train_bpe(chain([first], training), vocab)
    if tokenizer.get_vocab_size() < vocab:
        reached = f"the text is too short: it gives {tokenizer.get_vocab_size()} entries"
        raise InputError("vocab_size", vocab, reached)
    return tokenizer
