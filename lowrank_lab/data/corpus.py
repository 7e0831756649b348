"""A prepared corpus: packed token files → batches that are pure functions of (seed, step)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lowrank_lab.config import InputError
from lowrank_lab.data.splits import SPLITS, Split
from lowrank_lab.data.token_files import TokenShards
from lowrank_lab.data.tokenizer import end_of_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer


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
        """Exact entropy rate in nats per token, where known: the lower bound of every loss."""
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
        return Tokenizer.from_buffer(path.read_bytes())

    def num_windows(self, split: Split, sequence_length: int) -> int:
        """Windows of `sequence_length` inputs, each with the token that follows them."""
        return max(0, (self.length(split) - 1) // sequence_length)

    def batch(
        self, split: Split, step: int, *, batch: int, sequence_length: int, seed: int = 0,
        rank: int = 0, world_size: int = 1,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Inputs and targets of one step, each (batch, sequence_length), int64.

        Windows are visited in a keyed permutation, a new one for every pass: none repeats before
        all were visited, and a resumed run needs no replay.

        Args:
            rank, world_size: read part `rank` of `world_size` equal parts of the batch; the parts
                of all ranks make up the batch of world size 1.
        """
        count = self.num_windows(split, sequence_length)
        if count == 0:
            raise InputError("sequence_length", sequence_length, f"too long for the {split} part")
        rows = np.arange(
            batch * rank // world_size, batch * (rank + 1) // world_size, dtype=np.int64
        )
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

    def documents(
        self, split: Split, indices: np.ndarray, sequence_length: int
    ) -> np.ndarray | None:
        """The number of the document, from 0, that each target of the windows belongs to.

        An end-of-text token belongs to the document that it ends. (len(indices), sequence_length);
        None for a corpus of numbers, which has no documents.
        """
        if not (self.folder / "tokenizer.json").exists():
            return None
        offsets = indices[:, None] * sequence_length + np.arange(1, sequence_length + 1)
        return np.searchsorted(self._ends(split), offsets)

    def _ends(self, split: Split) -> np.ndarray:
        """The offsets of a split's end-of-text tokens."""
        end = self.tokenizer.token_to_id(end_of_text(self.tokenizer))
        shards = self._shards[split]
        parts = zip(shards.starts, shards.parts, strict=False)
        return np.concatenate([start + np.flatnonzero(part == end) for start, part in parts])


def permute(indices: np.ndarray, size: int, key: tuple[int, int]) -> np.ndarray:
    """Where a keyed pseudo-random permutation of range(size) sends `indices`; O(1) memory.

    A four-round Feistel network on the smallest even number of bits that can represent `size`,
    repeated until the value is less than `size` again.
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
