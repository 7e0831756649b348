"""The split of each document: train, validation or test, by a hash that never moves it."""

from __future__ import annotations

import hashlib
from typing import Literal

FORMAT = 1  # part of every corpus's hash: raise it when the same text gives other tokens

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
HELD_OUT_SHARE = {"validation": 0.025, "test": 0.025}


def digest_of(name: str) -> bytes:
    """SHA-256 of a name, also of a file's name that is not UTF-8."""
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()


def split_of(name: str) -> Split:
    """The split a document belongs to, by the hash of its name."""
    share = int.from_bytes(digest_of(name)[:8], "big") / 2**64
    if share < HELD_OUT_SHARE["test"]:
        return "test"
    return "validation" if share < sum(HELD_OUT_SHARE.values()) else "train"
