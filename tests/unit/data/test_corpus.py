"""Batches are pure functions, splits don't move, a corpus is built once, whole or not at all."""

import gzip
import hashlib
import json
import math
import multiprocessing
import os
import random
import signal
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_lab.config import InputError, RunConfig
from lowrank_lab.data import build as preparing
from lowrank_lab.data import markov as markov_corpus
from lowrank_lab.data import sources, streams, token_files
from lowrank_lab.data.corpus import Corpus, permute
from lowrank_lab.data.markov import markov_source
from lowrank_lab.data.prepare import prepare
from lowrank_lab.data.sources import text_documents
from lowrank_lab.data.splits import SPLITS, split_of
from lowrank_lab.data.tokenizer import (
    END_OF_TEXT,
    TextEncoder,
    byte_tokenizer,
    encode,
    train_bpe,
)
from lowrank_lab.methods.resolve import resolve


def byte_config(path, **values):
    return RunConfig(model="tiny", corpus=f"text:{path}", **{"vocab_size": "byte", **values})


def refusal(config, root):
    """The one line a corpus is refused with, nothing being left behind."""
    with pytest.raises(InputError) as caught:
        prepare(config, root)
    assert "\n" not in str(caught.value)
    assert not root.exists() or not list(root.iterdir())
    return str(caught.value)


def numbers(tmp_path, count):
    """A corpus whose training tokens are 0, 1, 2, …, so that each token is its offset."""
    for split in SPLITS:
        np.arange(count, dtype=np.uint16).tofile(tmp_path / f"{split}.bin")
    return Corpus(tmp_path, {"vocab_size": 65536})


@pytest.fixture(scope="module")
def byte_corpus(text_corpus):
    return prepare(RunConfig(model="tiny", corpus=text_corpus, vocab_size="byte"))


@pytest.fixture(scope="module")
def bpe_corpus(text_corpus):
    return prepare(RunConfig(model="tiny", corpus=text_corpus, vocab_size=300))


@pytest.fixture(scope="module")
def markov():
    return prepare(RunConfig(model="tiny", corpus="markov"))


# The permutation


@pytest.mark.parametrize("size", [*range(1, 70), 127, 128, 129, 255, 257, 1000, 4097])
def test_permute_visits_each_number_once(size):
    out = permute(np.arange(size), size, key=(0, 0))
    assert sorted(out.tolist()) == list(range(size))


@given(st.integers(1, 3000), st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**20)))
@settings(max_examples=60, deadline=None)
def test_permute_is_a_permutation_under_every_key(size, key):
    out = permute(np.arange(size), size, key)
    assert sorted(out.tolist()) == list(range(size))
    some = np.arange(size)[:: max(1, size // 7)]
    assert np.array_equal(permute(some, size, key), out[some])


@pytest.mark.parametrize("other", [(0, 1), (1, 0), (2**32 - 1, 0)])
def test_another_key_gives_another_order(other):
    first, second = (permute(np.arange(1000), 1000, key) for key in ((0, 0), other))
    assert (first == second).mean() < 0.02


def test_a_permuted_order_is_not_a_shifted_one():
    out = permute(np.arange(1000), 1000, key=(0, 0))
    assert abs(np.corrcoef(out, np.arange(1000))[0, 1]) < 0.1
    assert (np.diff(out) == 1).sum() < 10


def test_permuting_nothing_gives_nothing():
    assert permute(np.array([], dtype=np.int64), 5, key=(0, 0)).size == 0


def test_sizes_beyond_32_bits_stay_in_range():
    indices = np.arange(1000) + (1 << 40)
    out = permute(indices, (1 << 40) + 1000, key=(3, 4))
    assert len(set(out.tolist())) == 1000
    assert 0 <= out.min() <= out.max() < (1 << 40) + 1000


# Batches


def starts(corpus, step, batch, length=4, seed=0):
    inputs, _ = corpus.batch("train", step, batch=batch, sequence_length=length, seed=seed)
    return inputs[:, 0].tolist()


@pytest.mark.parametrize("batch", [1, 2, 5, 7, 20, 33])
def test_every_pass_covers_each_window_exactly_once(tmp_path, batch):
    corpus = numbers(tmp_path, 20 * 4 + 3)  # 20 windows and a rest
    assert corpus.num_windows("train", 4) == 20
    visited = [s for step in range(60) for s in starts(corpus, step, batch)]
    for begin in range(0, len(visited) - 20 + 1, 20):
        assert sorted(visited[begin : begin + 20]) == list(range(0, 80, 4))


def test_each_pass_and_each_seed_has_its_own_order(tmp_path):
    corpus = numbers(tmp_path, 401)
    orders = [starts(corpus, step, 100, seed=seed) for step in (0, 1) for seed in (0, 1)]
    assert len(set(map(tuple, orders))) == 4


def test_targets_are_inputs_shifted_by_one(byte_corpus):
    inputs, targets = byte_corpus.batch("train", 3, batch=5, sequence_length=33, seed=1)
    assert inputs.shape == targets.shape == (5, 33)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    stream = byte_corpus.tokens("train").astype(np.int64).tobytes()
    for row, last in zip(inputs, targets[:, -1:], strict=True):
        assert torch.cat([row, last]).numpy().tobytes() in stream


def test_the_last_target_of_the_last_window_is_the_last_token(tmp_path):
    inputs, targets = numbers(tmp_path, 9).windows("train", np.array([0, 1]), 4)
    assert inputs.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert targets.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]


def test_a_batch_depends_on_nothing_but_its_arguments(byte_corpus):
    arguments = {"batch": 3, "sequence_length": 16, "seed": 5}
    before = [byte_corpus.batch("train", step, **arguments) for step in range(4)]
    torch.manual_seed(123)
    again = Corpus(byte_corpus.folder, byte_corpus.facts)
    for step in (3, 0, 2, 1):
        for ours, theirs in zip(before[step], again.batch("train", step, **arguments), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("tokens", "windows"), [(1, 0), (4, 0), (5, 1), (8, 1), (9, 2)])
def test_a_window_needs_the_token_after_it(tmp_path, tokens, windows):
    assert numbers(tmp_path, tokens).num_windows("train", 4) == windows


def test_a_sequence_longer_than_a_split_is_refused(tmp_path):
    with pytest.raises(InputError, match="sequence_length: 9 is not allowed; too long"):
        numbers(tmp_path, 9).batch("train", 0, batch=1, sequence_length=9)


# Splits and documents


def test_splits_have_their_shares():
    counts = Counter(split_of(f"document {i}") for i in range(20_000))
    assert counts["validation"] / 20_000 == pytest.approx(0.025, abs=0.005)
    assert counts["test"] / 20_000 == pytest.approx(0.025, abs=0.005)


def test_a_document_stays_in_its_split():
    names = [f"python/{i}.py" for i in range(400)]
    named = {split: [n for n in names if split_of(n) == split][:2] for split in SPLITS}
    assert named == {
        "train": ["python/0.py", "python/1.py"],
        "validation": ["python/21.py", "python/90.py"],
        "test": ["python/12.py", "python/22.py"],
    }


def documents_of(corpus, split):
    """The texts of a split, decoded from its tokens."""
    end = corpus.tokenizer.token_to_id(END_OF_TEXT)
    tokens = corpus.tokens(split)
    assert tokens[-1] == end
    parts = np.split(tokens, np.flatnonzero(tokens == end) + 1)[:-1]
    return [corpus.tokenizer.decode(part[:-1].tolist()) for part in parts]


@pytest.mark.parametrize("kind", ["byte_corpus", "bpe_corpus"])
def test_each_document_is_in_the_tokens_of_its_split_unchanged(kind, text_folder, request):
    corpus = request.getfixturevalue(kind)
    expected = {split: [] for split in SPLITS}
    for path in text_folder.iterdir():
        expected[split_of(path.name)].append(path.read_text())
    for split in SPLITS:
        assert sorted(documents_of(corpus, split)) == sorted(expected[split])


def test_the_facts_count_what_is_there(byte_corpus):
    facts = byte_corpus.facts
    assert sum(facts["documents"].values()) == 120
    for split in SPLITS:
        assert facts["tokens"][split] == len(byte_corpus.tokens(split))
        assert facts["tokens"][split] == facts["bytes"][split] + facts["documents"][split]


@pytest.fixture
def texts(tmp_path):
    """A folder of 200 short documents, enough for every split, and a place for corpora."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(200):
        (folder / f"{i}.txt").write_text(f"document {i}: " + f"{i * i} words " * 40)
    return folder


def test_identical_and_blank_documents_are_dropped(texts, tmp_path):
    once = prepare(byte_config(texts), tmp_path / "a")
    text = (texts / "7.txt").read_text()
    (texts / "zz.txt").write_text(text)
    (texts / "blank.txt").write_text(" \n\t\n")
    (texts / "empty.txt").write_text("")
    again = prepare(byte_config(texts), tmp_path / "a")
    assert sum(again.facts["documents"].values()) == sum(once.facts["documents"].values()) == 200
    assert [d for s in SPLITS for d in documents_of(again, s)].count(text) == 1


def test_a_new_document_moves_no_other_one(texts, tmp_path):
    before = prepare(byte_config(texts), tmp_path / "a")
    (texts / "new.txt").write_text("something new " * 50)
    after = prepare(byte_config(texts), tmp_path / "a")
    assert before.folder != after.folder
    added = [set(documents_of(after, s)) - set(documents_of(before, s)) for s in SPLITS]
    gone = [set(documents_of(before, s)) - set(documents_of(after, s)) for s in SPLITS]
    assert sorted(map(len, added)) == [0, 0, 1]
    assert not any(gone)


def test_a_file_is_cut_at_line_ends_and_loses_nothing(tmp_path):
    path = tmp_path / "one.txt"
    text = "".join(f"line {i} \u2028 of\x0c many\r\n" for i in range(20_000)) + "the last"
    path.write_bytes(text.encode())
    documents = list(text_documents(path))
    assert "".join(chunk for _, chunk in documents) == text
    assert len(documents) > 30
    assert len({name for name, _ in documents}) == len(documents)


def test_a_folder_gives_its_text_files_at_every_depth(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "deep.py").write_text("deep")
    (tmp_path / "top.md").write_text("top")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0")
    assert dict(text_documents(tmp_path)) == {"a/b/deep.py": "deep", "top.md": "top"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no text"),
        (b" \n\n \t", "no text"),
        (b"abc\0def" * 1000, "binary"),
        (b"caf\xe9\n" * 5000, "not UTF-8 at byte 3"),
        (b"short\n", "too short"),
        (b"one line " * 10_000, "too short"),
    ],
    ids=["empty", "blank", "binary", "latin-1", "short", "one line"],
)
def test_a_file_that_is_no_text_to_train_on_is_refused(tmp_path, content, said):
    path = tmp_path / "file.txt"
    path.write_bytes(content)
    message = refusal(byte_config(path), tmp_path / "corpora")
    assert message.startswith("corpus: ")
    assert said in message


@pytest.mark.parametrize("name", ["", "missing", "missing\nline", "\0"])
def test_a_missing_source_is_refused(tmp_path, name):
    path = f"{tmp_path}/{name}" if name else ""
    assert "no such file" in refusal(byte_config(path), tmp_path / "corpora")


def test_an_empty_folder_is_refused(tmp_path):
    (tmp_path / "texts").mkdir()
    assert "no text" in refusal(byte_config(tmp_path / "texts"), tmp_path / "corpora")


@pytest.mark.parametrize("name", ["pyton", "c5:x", "", "markov:3", "text"])
def test_an_unknown_corpus_is_refused(tmp_path, name):
    message = refusal(RunConfig(model="tiny", corpus=name), tmp_path / "corpora")
    assert message.startswith("corpus: ")


@pytest.mark.parametrize("vocab", [256, 2])
def test_a_vocabulary_without_room_for_all_bytes_is_refused(text_folder, tmp_path, vocab):
    message = refusal(byte_config(text_folder, vocab_size=vocab), tmp_path / "corpora")
    assert message.startswith(f"vocab_size: {vocab} ")


def test_a_vocabulary_that_the_text_cannot_fill_is_refused(text_folder, tmp_path):
    message = refusal(byte_config(text_folder, vocab_size=65536), tmp_path / "corpora")
    assert message.startswith("vocab_size: 65536 ")


@pytest.mark.parametrize("vocab", [3, 65, "byte"])
def test_markov_refuses_alphabets_it_has_not(tmp_path, vocab):
    config = RunConfig(model="tiny", corpus="markov", vocab_size=vocab)
    assert "alphabet of 7 to 64" in refusal(config, tmp_path)


@pytest.mark.parametrize("vocab", [7, 8, 64])
def test_markov_has_every_alphabet_it_says_it_has(tmp_path, monkeypatch, vocab):
    monkeypatch.setattr(markov_corpus, "TOKENS", dict.fromkeys(SPLITS, 1000))
    corpus = prepare(RunConfig(model="tiny", corpus="markov", vocab_size=vocab), tmp_path)
    assert corpus.vocab_size == vocab
    assert corpus.facts["unigram_entropy"] >= 1.5 * corpus.entropy


# Building once, whole


def test_a_failure_while_building_leaves_nothing(text_folder, tmp_path, monkeypatch):
    def fails(*_):
        raise OSError("disk full")

    monkeypatch.setattr(preparing, "pack", fails)
    with pytest.raises(OSError, match="disk full"):
        prepare(byte_config(text_folder), tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert prepare(byte_config(text_folder), tmp_path).facts["documents"]["train"] > 100


def test_a_corpus_is_built_once(text_folder, tmp_path):
    first = prepare(byte_config(text_folder), tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    second = prepare(byte_config(text_folder), tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert second.folder == first.folder
    assert second.facts == first.facts


def _prepare_when_both_are_there(barrier, folder, root):
    barrier.wait(timeout=30)
    prepare(byte_config(folder), root)


def test_two_processes_that_build_at_once_both_get_it(texts, tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, root = context.Barrier(2), tmp_path / "corpora"
    arguments = (barrier, texts, root)
    both = [context.Process(target=_prepare_when_both_are_there, args=arguments) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(timeout=60)
    assert [process.exitcode for process in both] == [0, 0]
    assert len(list(root.iterdir())) == 1
    assert len(documents_of(prepare(byte_config(texts), root), "train")) > 150


def test_who_loses_the_race_opens_what_the_winner_built(texts, tmp_path, monkeypatch):
    pack = preparing.pack

    def slower(*arguments):
        monkeypatch.setattr(preparing, "pack", pack)
        prepare(byte_config(texts), tmp_path / "corpora")
        return pack(*arguments)

    monkeypatch.setattr(preparing, "pack", slower)
    corpus = prepare(byte_config(texts), tmp_path / "corpora")
    assert [corpus.folder] == list((tmp_path / "corpora").iterdir())


@pytest.mark.parametrize("name", ["byte_corpus", "bpe_corpus", "markov"])
def test_sha256_and_readme_say_what_is_there(name, request):
    corpus = request.getfixturevalue(name)
    files = b"".join((corpus.folder / f"{split}.bin").read_bytes() for split in SPLITS)
    assert corpus.facts["sha256"] == hashlib.sha256(files).hexdigest()
    assert corpus.facts == json.loads((corpus.folder / "corpus.json").read_text())
    readme = (corpus.folder / "README.md").read_text()
    assert corpus.facts["sha256"] in readme
    for split in SPLITS:
        row = next(line for line in readme.splitlines() if line.startswith(f"| {split} |"))
        assert f"{len(corpus.tokens(split)):,} |" in row


def test_tokens_stay_below_the_vocabulary(byte_corpus, bpe_corpus, markov):
    sizes = [(byte_corpus, 257), (bpe_corpus, 300), (markov, 16)]
    for corpus, size in sizes:
        assert corpus.vocab_size == size
        assert max(int(corpus.tokens(split).max()) for split in SPLITS) < size


# A file is read in pieces


def chunks_of(text, size):
    """Documents of a whole text in memory, as corpora of one file have always been cut."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + size) + 1
        if end == 0 or end > start + 2 * size:
            end = start + size
        yield text[start:end]
        start = end


@given(st.text(st.sampled_from("ab\n"), max_size=4000), st.integers(1, 50), st.integers(1, 300))
@settings(max_examples=100, deadline=None)
def test_pieces_of_a_file_are_cut_as_the_whole_is(text, low, piece):
    pieces = [text[i : i + piece] for i in range(0, len(text), piece)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "CHUNK_CHARACTERS", (low, 8192))
        found = list(sources._chunks(pieces, len(text)))
    assert found == list(chunks_of(text, max(low, len(text) // 400)))


@pytest.mark.parametrize("place", [(1 << 20) - 1, 1 << 20, (1 << 20) + 5])
def test_a_bad_byte_is_named_by_its_place_in_the_file(tmp_path, place):
    text = ("é" * (1 << 20)).encode()[: place - place % 2] + b"x" * (place % 2)
    (tmp_path / "file.txt").write_bytes(text + b"\xff more")
    with pytest.raises(InputError, match=f"not UTF-8 at byte {place}"):
        list(text_documents(tmp_path / "file.txt"))


def test_a_character_cut_off_by_the_end_is_named(tmp_path):
    (tmp_path / "file.txt").write_bytes(b"abc" + "漢".encode()[:2])
    with pytest.raises(InputError, match="not UTF-8 at byte 3"):
        list(text_documents(tmp_path / "file.txt"))


# Tokenizers

UTF8 = st.text(st.characters(exclude_categories=["Cs"]))


@given(UTF8)
@settings(max_examples=100, deadline=None)
def test_bytes_survive_the_byte_tokenizer(text):
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(text).ids
    if END_OF_TEXT not in text:
        assert len(ids) == len(text.encode())
        assert tokenizer.decode(ids) == text


@pytest.fixture(scope="module")
def bpe():
    words = ["gradients of weights", "naïve café ünï 漢字\n\t", "moments", "def update(self):"]
    return train_bpe(["the rank of the gradient is low " * 30, *(w * 9 for w in words)], 300)


@given(text=UTF8.filter(lambda t: END_OF_TEXT not in t))
@settings(max_examples=100, deadline=None)
def test_text_survives_bpe(bpe, text):
    assert bpe.decode(bpe.encode(text).ids) == text


def test_bpe_has_the_entries_asked_for_and_shortens_its_own_text(bpe):
    assert bpe.get_vocab_size() == 300
    text = "the rank of the gradient is low"
    assert len(bpe.encode(text).ids) < len(text) / 2


def test_no_documents_give_no_tokens(bpe):
    for tokenizer in ("byte", TextEncoder.of(bpe)):
        assert encode([], tokenizer).shape == (0,)


@given(st.lists(UTF8, max_size=4))
@settings(max_examples=60, deadline=None)
def test_bytes_are_encoded_as_the_byte_tokenizer_does(texts):
    assert np.array_equal(encode(texts, "byte"), encode(texts, TextEncoder.of(byte_tokenizer())))


def test_every_byte_is_encoded_as_the_byte_tokenizer_does():
    texts = ["".join(map(chr, range(256))), "漢\u2028\U0001f600"]
    assert np.array_equal(encode(texts, "byte"), encode(texts, TextEncoder.of(byte_tokenizer())))


def test_markov_has_no_tokenizer(markov):
    with pytest.raises(InputError, match="numbers, not text"):
        _ = markov.tokenizer


# The synthetic source


def entropy_by_eigenvector(P):
    """Entropy rate and entropy of single symbols from the stationary vector of the pair chain."""
    k = len(P)
    pairs = np.zeros((k * k, k * k))  # (a, b) → (b, c)
    for a in range(k):
        for b in range(k):
            pairs[a * k + b, b * k : b * k + k] = P[a, b]
    values, vectors = np.linalg.eig(pairs.T)
    stationary = np.real(vectors[:, np.argmin(np.abs(values - 1))])
    stationary = (stationary / stationary.sum()).reshape(k, k)
    rate = -(stationary[:, :, None] * P * np.log(P)).sum()
    single = stationary.sum(0)
    return rate, -(single * np.log(single)).sum()


@pytest.mark.parametrize("alphabet", [4, 7, 16])
def test_the_entropy_of_the_source_is_that_of_its_stationary_distribution(alphabet):
    P, rate, unigram = markov_source(alphabet)
    assert P.sum(-1) == pytest.approx(np.ones((alphabet, alphabet)))
    assert (rate, unigram) == pytest.approx(entropy_by_eigenvector(P), rel=1e-9)


def test_the_source_remembers(markov):
    assert markov.facts["unigram_entropy"] >= 1.5 * markov.entropy
    assert 0.3 < markov.entropy < math.log(16)


@pytest.mark.parametrize("split", SPLITS)
def test_generated_tokens_have_the_entropy_that_is_promised(markov, split):
    tokens = markov.tokens(split).astype(np.int64)
    counts = np.bincount((tokens[:-2] * 16 + tokens[1:-1]) * 16 + tokens[2:], minlength=16**3)
    counts = counts.reshape(256, 16)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    plug_in = -(counts * np.log(np.where(share > 0, share, 1))).sum() / counts.sum()
    assert plug_in == pytest.approx(markov.entropy, rel=0.02)


@pytest.mark.parametrize("split", SPLITS)
def test_who_knows_the_source_loses_just_its_entropy(markov, split):
    P, tokens = markov_source(16)[0], markov.tokens(split)
    losses = -np.log(P[tokens[:-2], tokens[1:-1], tokens[2:]])
    assert losses.mean() == pytest.approx(markov.entropy, abs=4 / math.sqrt(len(losses)))


def test_splits_of_the_source_are_different_tokens(markov):
    first = [markov.tokens(split)[:1000].tobytes() for split in SPLITS]
    assert len(set(first)) == 3


# Shards of c4


def rows_of(count, seed=0):
    chance = random.Random(seed)
    return [f"page {seed}.{i}: " + "".join(chance.choices("abc é漢\n", k=60)) for i in range(count)]


def write_shard(path, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps({"text": text, "url": "none"}) + "\n" for text in texts]
    path.write_bytes(gzip.compress("".join(rows).encode(), mtime=0))


@pytest.fixture
def c4(tmp_path):
    """Three shards of 300 documents in all, at two depths."""
    for seed, name in enumerate(["a", "b", "deep/c"]):
        write_shard(tmp_path / "c4" / f"{name}.json.gz", rows_of(300, seed))
    return tmp_path / "c4"


def c4_config(path, **values):
    return RunConfig(model="tiny", corpus=f"c4:{path}", **{"vocab_size": "byte", **values})


@pytest.mark.parametrize("vocab", ["byte", 300])
def test_documents_of_shards_are_in_the_tokens_in_their_order(c4, tmp_path, vocab):
    corpus = prepare(c4_config(c4, vocab_size=vocab), tmp_path / "corpora")
    texts = [text for seed in range(3) for text in rows_of(300, seed)]
    for split in SPLITS:
        assert documents_of(corpus, split) == [t for t in texts if split_of(t) == split]
        assert corpus.facts["documents"][split] == len(documents_of(corpus, split))
    assert sum(corpus.facts["documents"].values()) == 900


def test_one_shard_is_a_corpus_too(c4, tmp_path):
    corpus = prepare(c4_config(c4 / "a.json.gz"), tmp_path / "corpora")
    assert sum(corpus.facts["documents"].values()) == 300


def test_relative_paths_are_those_from_here_or_else_in_the_data_folder(c4, tmp_path, monkeypatch):
    byte_tokenizer().save(str(c4 / "tokenizer.json"))
    config = c4_config("c4", vocab_size=None, tokenizer="c4/tokenizer.json")
    monkeypatch.setenv("LOWRANK_LAB_DATA", str(tmp_path))
    from_data = prepare(config, tmp_path / "corpora")
    monkeypatch.setenv("LOWRANK_LAB_DATA", str(tmp_path / "none"))
    with pytest.raises(InputError, match="no such file"):
        prepare(config, tmp_path / "corpora")
    monkeypatch.chdir(tmp_path)
    assert prepare(config, tmp_path / "corpora").folder == from_data.folder


def test_documents_stay_in_their_split_when_shards_are_cut_otherwise(c4, tmp_path):
    texts = [text for seed in range(3) for text in rows_of(300, seed)]
    random.Random(1).shuffle(texts)
    write_shard(tmp_path / "other" / "all.json.gz", [*texts, *rows_of(40, 9), texts[0]])
    before = prepare(c4_config(c4), tmp_path / "corpora")
    after = prepare(c4_config(tmp_path / "other"), tmp_path / "corpora")
    for split in SPLITS:
        assert set(documents_of(before, split)) <= set(documents_of(after, split))
    assert sum(texts[0] in documents_of(after, split) for split in SPLITS) == 1


def test_a_shard_that_changed_makes_another_corpus(c4, tmp_path):
    first = prepare(c4_config(c4), tmp_path / "corpora")
    assert prepare(c4_config(c4), tmp_path / "corpora").folder == first.folder
    texts = rows_of(300, 1)
    write_shard(c4 / "b.json.gz", [texts[0].swapcase(), *texts[1:]])
    assert prepare(c4_config(c4), tmp_path / "corpora").folder != first.folder


def test_blank_documents_blank_lines_and_halves_of_characters_do_no_harm(tmp_path):
    lines = [json.dumps({"text": text}) for text in ("", " \n", "half \ud83d", *rows_of(300))]
    data = "\n\n".join(lines).encode()  # no line end after the last
    (tmp_path / "c4").mkdir()
    (tmp_path / "c4" / "a.json.gz").write_bytes(
        gzip.compress(data[:999]) + gzip.compress(data[999:])
    )
    corpus = prepare(c4_config(tmp_path / "c4"), tmp_path / "corpora")
    found = [text for split in SPLITS for text in documents_of(corpus, split)]
    assert sorted(found) == sorted(["half ?", *rows_of(300)])


def damaged(path, kind):
    """A shard whose fourth line is wrong, or that is no whole gzip."""
    lines = [json.dumps({"text": text}).encode() for text in rows_of(400)]
    bad = {
        "cut JSON": lines[3][:20], "no JSON": b"<html>", "a list": b"[1]", "no text": b'{"a": 1}',
        "text is a number": b'{"text": 3}', "deep": b"[" * 100_000, "latin-1": b'{"text": "\xe9"}',
    }  # fmt: skip
    lines[3] = bad.get(kind, lines[3])
    data = gzip.compress(b"\n".join(lines))
    if kind == "cut gzip":
        data = data[: len(data) // 2]
    if kind == "no end":
        data = data[:-5]
    if kind == "flipped":
        data = data[: len(data) // 2] + bytes(64) + data[len(data) // 2 + 64 :]
    if kind == "no gzip":
        data = b"\n".join(lines)
    path.parent.mkdir()
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("cut JSON", "line 4: not JSON"),
        ("no JSON", "line 4: not JSON"),
        ("a list", 'line 4: it has no "text"'),
        ("no text", 'line 4: it has no "text"'),
        ("text is a number", 'line 4: it has no "text"'),
        ("deep", "line 4: not JSON"),
        ("latin-1", "line 4: not UTF-8 at byte 10"),
        ("cut gzip", ": damaged gzip"),
        ("no end", "line 400: damaged gzip"),
        ("flipped", ": "),
        ("no gzip", "line 1: damaged gzip"),
    ],
)
def test_a_damaged_shard_is_named_with_the_line(tmp_path, kind, said):
    damaged(tmp_path / "c4" / "c4-train.00001.json.gz", kind)
    message = refusal(c4_config(tmp_path / "c4"), tmp_path / "corpora")
    assert message.startswith("corpus: ")
    assert "c4-train.00001.json.gz line " in message
    assert said in message


@pytest.mark.parametrize(
    ("texts", "vocab", "said"),
    [
        ([], "byte", "no text"),
        ([" "], 300, "no text"),
        (["one short text"], "byte", "too short: its train part is empty"),
        (["one short text"] * 300, "byte", "part is empty"),
        (["one short text", "two"] * 300, 5000, "too short"),
    ],
)
def test_shards_with_too_little_in_them_are_refused(tmp_path, texts, vocab, said):
    write_shard(tmp_path / "c4" / "a.json.gz", texts)
    assert said in refusal(c4_config(tmp_path / "c4", vocab_size=vocab), tmp_path / "corpora")


def test_a_folder_without_shards_is_refused(text_folder, tmp_path):
    assert "no shard in it" in refusal(c4_config(text_folder), tmp_path / "corpora")
    assert "no such file" in refusal(c4_config(tmp_path / "none"), tmp_path / "corpora")


# Datasets


@pytest.fixture
def dataset(tmp_path):
    """A local folder as `datasets` knows them: a training and a test file."""
    for split in ("train", "test"):
        rows = [json.dumps({"text": text, "id": 1}) for text in rows_of(900, len(split))]
        (tmp_path / "local").mkdir(exist_ok=True)
        (tmp_path / "local" / f"{split}.jsonl").write_text("\n".join(rows))
    return tmp_path / "local"


def hub_config(name, **values):
    return RunConfig(model="tiny", corpus=f"hub:{name}", **{"vocab_size": "byte", **values})


@pytest.mark.parametrize(("suffix", "seed"), [("", 5), ("@train", 5), ("@test", 4)])
def test_a_dataset_is_streamed(dataset, tmp_path, monkeypatch, suffix, seed):
    import datasets

    seen, load = [], datasets.load_dataset
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *a, **k: seen.append(k["streaming"]) or load(*a, **k)
    )
    corpus = prepare(hub_config(f"{dataset}{suffix}"), tmp_path / "corpora")
    for split in SPLITS:
        expected = [t for t in rows_of(900, seed) if split_of(t) == split]
        assert documents_of(corpus, split) == expected
    assert seen == [True]
    assert prepare(hub_config(f"{dataset}{suffix}"), tmp_path / "corpora").facts == corpus.facts
    assert seen == [True]  # what is there is opened without a look at the dataset


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"content": "x"}', 'row 1 has no "text"; its columns: content'),
        ('{"text": 3}', 'row 1 has no "text"'),
        ("<html>", "hub:"),
        ("", "no text"),
    ],
)
def test_a_dataset_without_text_is_refused_in_one_line(tmp_path, line, said):
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "train.jsonl").write_text(line)
    assert said in refusal(hub_config(tmp_path / "local"), tmp_path / "corpora")


def test_a_split_that_a_dataset_has_not_is_refused_in_one_line(dataset, tmp_path):
    assert "nope" in refusal(hub_config(f"{dataset}@nope"), tmp_path / "corpora")


def test_datasets_that_is_not_installed_is_asked_for(dataset, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "lowrank-lab[hub]" in refusal(hub_config(dataset), tmp_path / "corpora")


def test_names_of_datasets_may_have_a_configuration_and_a_split(tmp_path):
    parse = streams.Hub.parse
    assert parse("allenai/c4,en@validation") == ("allenai/c4", "en", "validation")
    assert parse("allenai/c4") == ("allenai/c4", None, "train")
    (tmp_path / "a@b,c").mkdir()
    assert parse(f"{tmp_path}/a@b,c") == (f"{tmp_path}/a@b,c", None, "train")


# A tokenizer that is given


@pytest.fixture
def tokenizer_file(bpe, tmp_path):
    bpe.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_a_tokenizer_that_is_given_is_used_as_it_is(bpe, tokenizer_file, c4, tmp_path):
    config = c4_config(c4, vocab_size=None, tokenizer=str(tokenizer_file))
    assert resolve(config).vocab_size == 300
    corpus = prepare(config, tmp_path / "corpora")
    assert corpus.tokenizer.get_vocab() == bpe.get_vocab()
    assert corpus.tokens("test").tolist()[:50] == [
        i for t in documents_of(corpus, "test") for i in [*bpe.encode(t).ids, 0]
    ][:50]  # fmt: skip


def test_the_tokenizer_decides_which_corpus_it_is_by_its_content(bpe, tokenizer_file, c4, tmp_path):
    root, path = tmp_path / "corpora", tmp_path / "moved.json"
    config = c4_config(c4, vocab_size=None, tokenizer=str(tokenizer_file))
    first = prepare(config, root)
    path.write_bytes(tokenizer_file.read_bytes())
    assert prepare(config.replace(tokenizer=str(path)), root).folder == first.folder
    train_bpe(["another text " * 90, *rows_of(50)], 300).save(str(path))
    assert prepare(config.replace(tokenizer=str(path)), root).folder != first.folder
    assert config.run_id != c4_config(c4, vocab_size=None).run_id


def test_what_a_tokenizer_adds_cuts_or_fills_is_left_out(bpe, c4, tmp_path):
    from tokenizers import Tokenizer, processors

    other = Tokenizer.from_str(bpe.to_str().replace("<|endoftext|>", "</s>"))
    plain = prepare(c4_config(c4, vocab_size=None, tokenizer=save(other, tmp_path)), tmp_path / "a")
    other.enable_truncation(5)
    other.enable_padding(length=99)
    other.post_processor = processors.TemplateProcessing("</s> $A", special_tokens=[("</s>", 0)])
    again = prepare(c4_config(c4, vocab_size=None, tokenizer=save(other, tmp_path)), tmp_path / "b")
    assert plain.facts["sha256"] == again.facts["sha256"]


def save(tokenizer, folder):
    path = folder / f"{hashlib.sha256(tokenizer.to_str().encode()).hexdigest()}.json"
    tokenizer.save(str(path))
    return str(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file"),
        ("{}", "not a tokenizer.json"),
        ("", "not a tokenizer.json"),
        ("no end", "no token that ends a text"),
        ("large", "more than 65536 entries"),
    ],
)
def test_what_is_no_tokenizer_is_refused_in_one_line(bpe, c4, tmp_path, content, said):
    path = tmp_path / "tokenizer.json"
    if content == "no end":
        content = bpe.to_str().replace("<|endoftext|>", "stop")
    if content == "large":
        large = json.loads(bpe.to_str())
        large["model"]["vocab"]["last"] = 65536
        content = json.dumps(large)
    if content is not None:
        path.write_text(content)
    config = c4_config(c4, vocab_size=None, tokenizer=str(path))
    message = refusal(config, tmp_path / "corpora")
    assert message.startswith("tokenizer: ")
    assert said in message


def test_a_tokenizer_beside_another_choice_of_vocabulary_is_refused(tokenizer_file, c4, tmp_path):
    config = c4_config(c4, vocab_size=400, tokenizer=str(tokenizer_file))
    assert "the tokenizer has 300 entries" in refusal(config, tmp_path / "corpora")
    for values in ({"vocab_size": "byte"}, {"corpus": "markov"}):
        with pytest.raises(InputError, match="tokenizer: "):
            RunConfig(tokenizer=str(tokenizer_file), **values)


# Shards of tokens


@pytest.fixture
def in_shards(monkeypatch):
    monkeypatch.setattr(token_files, "SHARD_TOKENS", 1000)


def test_batches_do_not_depend_on_how_tokens_lie_in_files(c4, tmp_path, monkeypatch):
    whole = prepare(c4_config(c4), tmp_path / "whole")
    monkeypatch.setattr(token_files, "SHARD_TOKENS", 1000)
    cut = prepare(c4_config(c4), tmp_path / "cut")
    files = sorted(cut.folder.glob("train*.bin"))
    assert len(files) == math.ceil(whole.length("train") / 1000) > 20
    assert max(file.stat().st_size for file in files) == 2000
    assert cut.facts == whole.facts
    for split in SPLITS:
        assert np.array_equal(cut.tokens(split), whole.tokens(split))
    for step in range(20):
        for batches in zip(
            *(c.batch("train", step, batch=7, sequence_length=300, seed=3) for c in (cut, whole)),
            strict=True,
        ):
            assert torch.equal(*batches)


def test_a_split_that_fills_its_files_exactly_has_no_empty_one(tmp_path, in_shards):
    texts = [("train", "x" * 499)] * 4  # 2000 tokens
    counts = token_files.pack(tmp_path, texts, lambda t: encode(t, "byte"))
    assert counts["tokens"]["train"] == 2000
    assert [p.name for p in token_files.shard_paths(tmp_path, "train")] == [
        "train.bin",
        "train.1.bin",
    ]


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_parts_of_all_ranks_are_the_batch(byte_corpus, ranks):
    arguments = {"batch": 7, "sequence_length": 16, "seed": 2}
    parts = [
        byte_corpus.batch("train", 5, **arguments, rank=rank, world_size=ranks)
        for rank in range(ranks)
    ]
    for whole, pieces in zip(
        byte_corpus.batch("train", 5, **arguments), zip(*parts, strict=True), strict=True
    ):
        assert torch.equal(torch.cat(pieces), whole)


@pytest.mark.parametrize("kind", ["cut", "missing"])
def test_a_corpus_with_damaged_files_is_refused(c4, tmp_path, in_shards, kind):
    folder = prepare(c4_config(c4), tmp_path / "corpora").folder
    if kind == "cut":
        os.truncate(folder / "train.3.bin", 500)
    else:
        (folder / "train.3.bin").unlink()
    with pytest.raises(InputError, match="its train files are damaged"):
        prepare(c4_config(c4), tmp_path / "corpora").length("train")


# Killed while it builds


def _prepare_until_killed(config, root, groups):
    pack = token_files.pack
    token_files.SAVE_EVERY, token_files.GROUP = 3000, (8, 1 << 20)

    def killed(folder, texts, encode, on_progress):
        left = iter(range(groups))

        def then(tokens):
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return encode(tokens)

        return pack(folder, texts, then, on_progress)

    preparing.pack = killed
    prepare(config, root)


def kill_a_build(config, root, groups):
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_prepare_until_killed, args=(config, root, groups))
    process.start()
    process.join(timeout=60)
    assert process.exitcode == -signal.SIGKILL


def encoded_documents(monkeypatch):
    """Counts the documents that are encoded from now on."""
    counted = []
    monkeypatch.setattr(
        preparing,
        "encode",
        lambda texts, tokenizer: counted.extend(texts) or encode(texts, tokenizer),
    )
    return counted


@pytest.mark.parametrize("kind", ["c4", "text"])
@pytest.mark.parametrize("vocab", ["byte", 300])
def test_a_killed_build_goes_on_and_ends_the_same(
    kind, vocab, c4, texts, tmp_path, monkeypatch, in_shards
):
    make = c4_config if kind == "c4" else byte_config
    config = make(c4 if kind == "c4" else texts, vocab_size=vocab)
    root, whole = tmp_path / "corpora", prepare(config, tmp_path / "whole")
    root.mkdir()
    for groups in (3 * 30, 3 * 10):  # killed twice: each group is encoded once for each split
        kill_a_build(config, root, groups if kind == "c4" else groups // 6)
        assert not [p for p in root.iterdir() if not p.name.startswith(".")]
    counted = encoded_documents(monkeypatch)
    again = prepare(config, root)
    assert again.facts == whole.facts
    assert list(root.iterdir()) == [again.folder]
    names = {p.name for p in again.folder.iterdir()}
    assert names == {p.name for p in whole.folder.iterdir()}
    assert all((again.folder / n).read_bytes() == (whole.folder / n).read_bytes() for n in names)
    assert 0 < len(counted) < 0.9 * sum(whole.facts["documents"].values())


def test_a_build_that_is_under_way_is_not_gone_on_with_by_another(c4, tmp_path):
    root = tmp_path / "corpora"
    root.mkdir()
    with (
        token_files.workplace(root / "name") as ours,
        token_files.workplace(root / "name") as theirs,
    ):
        assert ours != theirs
    assert list(root.iterdir()) == []


def test_wrong_input_leaves_nothing_of_a_build_that_had_come_far(c4, tmp_path, monkeypatch):
    monkeypatch.setattr(token_files, "SAVE_EVERY", 3000)
    damaged(tmp_path / "c4" / "z" / "last.json.gz", "cut JSON")
    assert "last.json.gz line 4" in refusal(c4_config(c4), tmp_path / "corpora")


def test_a_full_disk_keeps_what_was_recorded(c4, tmp_path, monkeypatch):
    monkeypatch.setattr(token_files, "SAVE_EVERY", 3000)
    monkeypatch.setattr(token_files, "GROUP", (8, 1 << 20))
    left = iter(range(90))

    def fails(texts, tokenizer):
        if next(left, None) is None:
            raise OSError("disk full")
        return encode(texts, tokenizer)

    monkeypatch.setattr(preparing, "encode", fails)
    with pytest.raises(OSError, match="disk full"):
        prepare(c4_config(c4), tmp_path / "corpora")
    assert len(list((tmp_path / "corpora").iterdir())) == 1
    counted = encoded_documents(monkeypatch)
    prepare(c4_config(c4), tmp_path / "corpora")
    assert 0 < len(counted) < 900
