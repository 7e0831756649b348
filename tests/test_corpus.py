"""Batches are pure functions, splits don't move, a corpus is built once, whole or not at all."""

import hashlib
import json
import math
import multiprocessing
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_lab import corpus as corpora
from lowrank_lab.config import InputError, RunConfig
from lowrank_lab.corpus import (
    END_OF_TEXT,
    SPLITS,
    Corpus,
    _byte_tokenizer,
    _train_bpe,
    _write_tokens,
    permute,
    prepare,
    split_of,
)
from lowrank_lab.sources import markov_source, text_documents


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
    """A corpus whose training tokens are 0, 1, 2, …, so that a token tells its place."""
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
    monkeypatch.setattr(corpora, "MARKOV_TOKENS", dict.fromkeys(SPLITS, 1000))
    corpus = prepare(RunConfig(model="tiny", corpus="markov", vocab_size=vocab), tmp_path)
    assert corpus.vocab_size == vocab
    assert corpus.facts["unigram_entropy"] >= 1.5 * corpus.entropy


# Building once, whole


def test_a_failure_while_building_leaves_nothing(text_folder, tmp_path, monkeypatch):
    def fails(*_):
        raise OSError("disk full")

    monkeypatch.setattr(corpora, "_write_tokens", fails)
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
    write = corpora._write_tokens

    def slower(*arguments):
        monkeypatch.setattr(corpora, "_write_tokens", write)
        prepare(byte_config(texts), tmp_path / "corpora")
        write(*arguments)

    monkeypatch.setattr(corpora, "_write_tokens", slower)
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


# Tokenizers

UTF8 = st.text(st.characters(exclude_categories=["Cs"]))
LITERALS = ("<|endoftext|>", "<|<|endoftext|>endoftext|>", "<|endoftext|><|endoftext|>")


@given(UTF8)
@settings(max_examples=100, deadline=None)
def test_bytes_survive_the_byte_tokenizer(text):
    tokenizer = _byte_tokenizer()
    ids = tokenizer.encode(text).ids
    if END_OF_TEXT not in text:
        assert len(ids) == len(text.encode())
        assert tokenizer.decode(ids) == text


@pytest.fixture(scope="module")
def bpe():
    words = ["gradients of weights", "naïve café ünï 漢字\n\t", "moments", "def update(self):"]
    return _train_bpe(["the rank of the gradient is low " * 30, *(w * 9 for w in words)], 300)


@given(text=UTF8.filter(lambda t: END_OF_TEXT not in t))
@settings(max_examples=100, deadline=None)
def test_text_survives_bpe(bpe, text):
    assert bpe.decode(bpe.encode(text).ids) == text


def test_bpe_has_the_entries_asked_for_and_shortens_its_own_text(bpe):
    assert bpe.get_vocab_size() == 300
    text = "the rank of the gradient is low"
    assert len(bpe.encode(text).ids) < len(text) / 2


@pytest.mark.parametrize("middle", LITERALS)
def test_an_end_token_written_out_in_a_document_does_not_end_it(bpe, tmp_path, middle):
    texts = [f"a{middle}b", middle, "plain"]
    for tokenizer in (bpe, _byte_tokenizer()):
        _write_tokens(tmp_path / "out.bin", texts, tokenizer)
        tokens = np.fromfile(tmp_path / "out.bin", np.uint16)
        ends = np.flatnonzero(tokens == tokenizer.token_to_id(END_OF_TEXT))
        assert len(ends) == len(texts)
        parts = [part[part != tokens[-1]] for part in np.split(tokens, ends + 1)[:-1]]
        shown = [text.replace("<|endoftext|>", "<|end of text|>") for text in texts]
        assert [tokenizer.decode(part.tolist()) for part in parts] == shown


def test_no_documents_give_no_tokens(tmp_path):
    _write_tokens(tmp_path / "out.bin", [], _byte_tokenizer())
    assert (tmp_path / "out.bin").read_bytes() == b""


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
