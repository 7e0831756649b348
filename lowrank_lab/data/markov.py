"""The synthetic corpus: a second-order Markov source, of which the exact entropy rate is known."""

from __future__ import annotations

from bisect import bisect_right
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_lab.config import InputError
from lowrank_lab.data.corpus import Corpus
from lowrank_lab.data.splits import FORMAT, SPLITS
from lowrank_lab.data.store import open_or_build, short_hash

ALPHABET = 16
TOKENS = {"train": 4_000_000, "validation": 300_000, "test": 300_000}


def markov_source(alphabet: int, seed: int = 0) -> tuple[np.ndarray, float, float]:
    """A random second-order Markov source.

    Returns:
        transitions (alphabet, alphabet, alphabet): P[a, b, c] = P(next = c | last two = a, b);
        its entropy rate; the entropy of single symbols. Both in nats per token.
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


def prepare(alphabet: int | str, root: Path) -> Corpus:
    """The corpus of an alphabet, built if it doesn't exist yet.

    Raises:
        InputError: an alphabet of another size, or see `build`.
    """
    if not isinstance(alphabet, int) or not 7 <= alphabet <= 64:
        raise InputError("vocab_size", alphabet, "markov has an alphabet of 7 to 64 symbols")
    folder = root / f"markov-{short_hash([FORMAT, alphabet])}"
    return open_or_build(folder, "markov", lambda target: build(target, alphabet))


def build(target: Path, alphabet: int) -> dict[str, Any]:
    """Write the token files into `target`; vocabulary and entropies.

    Raises:
        InputError: this alphabet's source has nearly no memory.
    """
    P, rate, unigram = markov_source(alphabet)
    if unigram < 1.5 * rate:
        raise InputError("vocab_size", alphabet, "this source is nearly without memory")
    cumulative = np.cumsum(P, axis=-1)[:, :, :-1].tolist()
    for index, split in enumerate(SPLITS):
        a = b = 0
        sequence = []
        generator = np.random.default_rng([FORMAT, alphabet, 1 + index])
        for u in generator.random(TOKENS[split]):
            a, b = b, bisect_right(cumulative[a][b], u)
            sequence.append(b)
        np.array(sequence, dtype=np.uint16).tofile(target / f"{split}.bin")
    return {"vocab_size": alphabet, "entropy": rate, "unigram_entropy": unigram}
