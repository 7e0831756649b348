"""Tokenizers of corpora, and texts as arrays of tokens."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from lowrank_lab.config import InputError
from lowrank_lab.paths import located

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
END_NAMES = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>")  # its names in other tokenizers
NO_TEXT = "\U0010ffff" * 3  # noncharacters
THREAD = "train-bpe"
BPE_SAMPLE_BYTES = 20_000_000
LARGEST_VOCABULARY = 1 << 16  # tokens are uint16


def byte_tokenizer() -> Tokenizer:
    """256 bytes and END_OF_TEXT: a BPE without merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([END_OF_TEXT, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.add_special_tokens([END_OF_TEXT])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _byte_ids() -> np.ndarray:
    """The byte tokenizer's token of each byte (256): printable bytes come first."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    ids = np.empty(256, np.uint16)
    ids[[*printable, *sorted(set(range(256)) - set(printable))]] = np.arange(1, 257)
    return ids


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE from the first BPE_SAMPLE_BYTES of the texts."""
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
    sample = _sample(texts, BPE_SAMPLE_BYTES)
    _interruptible(lambda: tokenizer.train_from_iterator(sample, trainer))
    return tokenizer


def _interruptible(work: Callable[[], None]) -> None:
    """Call a function in a thread: Ctrl-C ends the wait for it, but not code outside of Python."""
    errors: list[BaseException] = []
    done = threading.Event()

    def run() -> None:
        try:
            work()
        except BaseException as error:  # raised again below
            errors.append(error)
        finally:
            done.set()

    threading.Thread(target=run, name=THREAD, daemon=True).start()
    done.wait()
    if errors:
        raise errors[0]


def _sample(texts: Iterable[str], limit: int) -> Iterator[str]:
    """The first documents, up to about `limit` characters (their order is random already)."""
    taken = 0
    for text in texts:
        taken += len(text)
        yield text
        if taken >= limit:
            return


def read_tokenizer(path: str) -> Tokenizer:
    """The tokenizer of a tokenizer.json, without truncation and padding.

    Raises:
        InputError: no such file, not a tokenizer, no end-of-text token, too many entries.
    """
    from tokenizers import Tokenizer

    file = located(path)
    if not file.is_file():
        raise InputError("tokenizer", path, "there is no such file")
    try:
        tokenizer = Tokenizer.from_buffer(file.read_bytes())
    except Exception as error:  # tokenizers raises no narrower one
        raise InputError("tokenizer", path, f"not a tokenizer.json: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    try:
        end_of_text(tokenizer)
    except ValueError as error:
        raise InputError("tokenizer", path, str(error)) from None
    if vocabulary_of(tokenizer) > LARGEST_VOCABULARY:
        allowed = f"it has more than {LARGEST_VOCABULARY} entries, which uint16 can't hold"
        raise InputError("tokenizer", path, allowed)
    return tokenizer


def vocabulary_of(tokenizer: Tokenizer) -> int:
    """The number of embedding rows that its tokens need: ids may have gaps."""
    return 1 + max(tokenizer.get_vocab().values(), default=-1)


def end_of_text(tokenizer: Tokenizer) -> str:
    """The token that ends documents; ValueError if it has none."""
    for name in END_NAMES:
        if tokenizer.token_to_id(name) is not None:
            return name
    raise ValueError(f"it has no token that ends a text: {' '.join(END_NAMES)}")


class TextEncoder(NamedTuple):
    """A tokenizer whose special tokens match no text, and the token that ends a text."""

    plain: Tokenizer
    end: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> TextEncoder:
        """The encoder of a tokenizer: `<s>` in a text is three characters, not a special token."""
        from tokenizers import Tokenizer

        facts = json.loads(tokenizer.to_str())
        end = end_of_text(tokenizer)  # which the vocabulary alone may have
        special = {end, *(t["content"] for t in facts["added_tokens"] if t["special"])}
        # Under these names their ids stay, and no text has them.
        renamed = {t: f"{NO_TEXT}{i}{NO_TEXT}" for i, t in enumerate(sorted(special))}
        for token in facts["added_tokens"]:
            token["content"] = renamed.get(token["content"], token["content"])
        facts["post_processor"] = None  # it adds special tokens
        _rename(facts["model"], renamed)
        return cls(Tokenizer.from_str(json.dumps(facts)), tokenizer.get_vocab()[end])


def _rename(model: dict[str, Any], renamed: dict[str, str]) -> None:
    """Rename tokens of a model; merges that would build one are dropped."""
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {renamed.get(token, token): i for token, i in vocab.items()}
    else:  # Unigram: pairs with scores
        model["vocab"] = [[renamed.get(token, token), score] for token, score in vocab]
    if model.get("unk_token") in renamed:
        model["unk_token"] = renamed[model["unk_token"]]
    if "merges" in model:
        pairs = [m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"]]
        model["merges"] = [p for p in pairs if not {*p, "".join(p)} & renamed.keys()]


def encode(texts: list[str], tokenizer: TextEncoder | Literal["byte"]) -> np.ndarray:
    """All texts as one uint16 array, each followed by the end-of-text token.

    Special tokens that stand in a text are encoded as the text they are.
    """
    if tokenizer == "byte":  # END_OF_TEXT is its token 0
        raw = [np.frombuffer(text.encode(), np.uint8) for text in texts]
        ids = [np.append(_BYTE_IDS[r], np.uint16(0)) for r in raw]
    else:
        encoded = tokenizer.plain.encode_batch_fast(texts, add_special_tokens=False)
        ids = [np.array([*e.ids, tokenizer.end], np.uint16) for e in encoded]
    return np.concatenate(ids) if ids else np.empty(0, np.uint16)


_BYTE_IDS = _byte_ids()
