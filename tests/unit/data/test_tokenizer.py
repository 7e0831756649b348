"""Special tokens that stand in a text are text, with tokenizers of every kind."""

import json
import os
import random
import signal
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from lowrank_lab.config import InputError
from lowrank_lab.data.tokenizer import (
    END_OF_TEXT,
    THREAD,
    TextEncoder,
    byte_tokenizer,
    encode,
    train_bpe,
)

SPECIAL = ("<|endoftext|>", "<s>", "</s>", "<pad>", "<unk>", "[MASK]")
PIECES = st.sampled_from(
    [*SPECIAL, "<|", "endoftext", "|>", "<", "s>", "a ", "\n", "漢", "</", "pad"]
)
TEXTS = st.lists(PIECES | st.text(st.characters(exclude_categories=["Cs"]), max_size=5)).map(
    "".join
)


def with_special(tokenizer, names=SPECIAL):
    tokenizer.add_special_tokens(list(names))
    return tokenizer


def trained():
    tokenizer = with_special(train_bpe(["the rank of <s> and <pad> " * 40, "a</s>b" * 9], 280))
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    return tokenizer


def merging():
    """A BPE whose merges, and whose vocabulary as a whole, have special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", "</s>", *alphabet, "<s", "</", "</s"]
    merges = [("<", "s"), ("<s", ">"), ("<", "/"), ("</", "s"), ("</s", ">")]
    bpe = models.BPE({t: i for i, t in enumerate(tokens)}, merges, ignore_merges=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return with_special(tokenizer, ("<s>", "<pad>"))  # that </s> is special is not said


def unigram():
    """As sentencepiece's: control pieces have the score 0, the best of all."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("<s>", 0.0), ("▁", -3.0)]
    pieces += [(chr(c), -4.0) for c in range(33, 127)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Replace("▁", " ")
    return with_special(tokenizer, ("<pad>", "</s>", "<unk>", "<s>"))


def words(model):
    vocab = {t: i for i, t in enumerate(["[UNK]", "</s>", "<pad>", "the", "<s>", "rank"])}
    tokenizer = Tokenizer(model(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return with_special(tokenizer, ("</s>", "<pad>", "<s>", "[UNK]"))


BYTES = {"trained": trained(), "bytes": with_special(byte_tokenizer()), "merging": merging()}
OTHERS = {"unigram": unigram(), "words": words(models.WordLevel), "pieces": words(models.WordPiece)}


def special_ids(tokenizer):
    facts = json.loads(tokenizer.to_str())
    return {t["id"] for t in facts["added_tokens"] if t["special"]}


@pytest.mark.parametrize("name", BYTES)
@given(texts=st.lists(TEXTS, max_size=4))
@settings(max_examples=60, deadline=None)
def test_every_text_decodes_to_itself(name, texts):
    tokenizer = BYTES[name]
    encoder = TextEncoder.of(tokenizer)
    tokens = encode(texts, encoder)
    ends = np.flatnonzero(tokens == encoder.end)
    assert len(ends) == len(texts)
    parts = [part[:-1].tolist() for part in np.split(tokens, ends + 1)[:-1]]
    assert [tokenizer.decode(part) for part in parts] == texts
    assert not {i for part in parts for i in part} & special_ids(tokenizer)


@given(texts=st.lists(TEXTS, max_size=4))
@settings(max_examples=60, deadline=None)
def test_bytes_decode_to_themselves(texts):
    tokens = encode(texts, "byte")
    parts = np.split(tokens, np.flatnonzero(tokens == 0) + 1)[:-1]
    assert [byte_tokenizer().decode(part[:-1].tolist()) for part in parts] == texts


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("special", ["</s>", "<pad>", "<s>"])
def test_no_special_token_comes_out_of_a_text(name, special):
    tokenizer = OTHERS[name]
    encoder = TextEncoder.of(tokenizer)
    assert encoder.end == tokenizer.token_to_id("</s>")
    tokens = encode([f"the {special} rank", special], encoder).tolist()
    unknown = {tokenizer.token_to_id(name) for name in ("<unk>", "[UNK]")}
    found = set(tokens) & special_ids(tokenizer) - unknown - {encoder.end}
    assert not found
    assert tokens.count(encoder.end) == 2
    if name == "unigram":
        assert tokenizer.decode(tokens[: tokens.index(encoder.end)]) == f"the {special} rank"


@pytest.mark.parametrize("tokenizer", [*BYTES.values(), *OTHERS.values()], ids=[*BYTES, *OTHERS])
def test_other_text_is_encoded_as_by_the_tokenizer(tokenizer):
    text = "the rank of\n the <tool> gradient!"
    expected = tokenizer.encode(text, add_special_tokens=False).ids
    assert TextEncoder.of(tokenizer).plain.encode(text, add_special_tokens=False).ids == expected
    assert TextEncoder.of(tokenizer).plain.get_vocab_size() == tokenizer.get_vocab_size()


def test_a_token_that_was_added_as_text_stays_one():
    tokenizer = BYTES["trained"]
    tokens = encode(["a <tool> b"], TextEncoder.of(tokenizer)).tolist()
    assert tokenizer.token_to_id("<tool>") in tokens
    assert tokenizer.token_to_id(END_OF_TEXT) == tokens[-1]


def test_ctrl_c_ends_the_training_of_a_tokenizer_at_once():
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefgh", k=9)) for _ in range(60_000)]

    def texts():
        yield " ".join(words)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train_bpe(texts(), 8000)
    (thread,) = (t for t in threading.enumerate() if t.name == THREAD)
    assert thread.is_alive()  # it had not ended
    thread.join()


def test_an_error_of_the_texts_is_an_error_of_the_training():
    def texts():
        yield "text"
        raise InputError("corpus", "x", "a file")

    with pytest.raises(InputError, match="a file"):
        train_bpe(texts(), 300)
