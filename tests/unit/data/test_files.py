"""Texts in files of every kind: what is read, what is refused in one line, what tells changes."""

import codecs
import gzip
import hashlib
import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from click.testing import CliRunner

from lowrank_lab.cli import main
from lowrank_lab.config import InputError, RunConfig
from lowrank_lab.data import streams
from lowrank_lab.data.files import SOURCES, files_in, once_each
from lowrank_lab.data.prepare import prepare
from lowrank_lab.data.sources import text_documents
from lowrank_lab.data.streams import c4_documents, c4_shards
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.runs.files import append_jsonl, write_json
from lowrank_lab.runs.run import Run, load_runs

ROWS = [f"page {i}: {'the rank of the gradient ' * 3}{i * i}" for i in range(400)]


def lines_of(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def zstd(raw):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(raw)
    return sink.getvalue().to_pybytes()


def config_of(corpus, **values):
    return RunConfig(model="tiny", corpus=corpus, **{"vocab_size": "byte", **values})


def refusal(work, *arguments):
    with pytest.raises(InputError) as caught:
        list(work(*arguments) or ())
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Names


def test_names_that_are_not_utf_8_are_names(tmp_path):
    texts, root = tmp_path / "texts", tmp_path / "corpora"
    texts.mkdir()
    for i, row in enumerate(ROWS):
        with open(os.fsencode(texts) + f"/gr\xf6\xdfe-{i}.TXT".encode("latin-1"), "w") as file:  # noqa: PTH123
            file.write(row)
    corpus = prepare(config_of(f"text:{texts}"), root)
    assert sum(corpus.facts["documents"].values()) == len(ROWS)
    assert prepare(config_of(f"text:{texts}"), root).folder == corpus.folder


def test_a_name_that_is_not_utf_8_is_refused_where_it_would_stand_in_a_record(tmp_path):
    with pytest.raises(InputError, match=r"corpus: .* is not allowed; it is not UTF-8"):
        config_of(f"text:{tmp_path}/\udcff.txt")
    for command in ("report", "data --corpus", "train --model tiny --out"):
        done = CliRunner().invoke(main, [*command.split(), f"text:{tmp_path}/\udcff.txt"])
        assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
        assert "it is not UTF-8" in done.stderr


def test_a_run_in_a_folder_whose_name_is_not_utf_8_is_in_tables(tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/r\xf6n"))
    folder.mkdir()
    config = resolve(RunConfig(model="tiny", corpus="markov"))
    write_json(folder / "config.json", {"config": config.model_dump()})
    append_jsonl(folder / "metrics.jsonl", [{"step": 1, "loss": 1.0, "events": []}])
    assert load_runs(tmp_path, strict=False)["run"].tolist() == ["r\\xf6n"]


@pytest.mark.parametrize("suffix", [".TXT", ".Md", ".JSON"])
def test_suffixes_may_be_in_capitals(suffix, tmp_path):
    (tmp_path / f"a{suffix}").write_text("text")
    assert [text for _, text in text_documents(tmp_path)] == ["text"]


# Kinds of shards


@pytest.mark.parametrize(
    ("name", "pack"),
    [("a.json.gz", gzip.compress), ("A.JSON.GZ", gzip.compress), ("a.jsonl.gz", gzip.compress),
     ("a.jsonl", bytes), ("a.JSONL", bytes), ("a.json", bytes), ("a.jsonl.zst", zstd),
     ("a.json.zst", zstd)],
)  # fmt: skip
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_shards_of_every_kind_have_the_same_texts(name, pack, mark, tmp_path):
    rows = lines_of(ROWS).replace(b"\n", b"\r\n", 5)
    (tmp_path / name).write_bytes(pack(mark + rows))
    assert list(c4_documents(tmp_path)) == ROWS
    shutil.move(tmp_path / name, tmp_path / "shard")  # what it is is seen in its first bytes
    assert list(c4_documents(tmp_path / "shard")) == ROWS


def test_a_json_beside_shards_describes_them(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines_of(ROWS))
    (tmp_path / "info.json").write_text("{}")
    assert [p.name for p in c4_shards(tmp_path)] == ["a.jsonl"]


@pytest.mark.parametrize(
    ("name", "raw", "said"),
    [
        ("a.jsonl.zst", zstd(lines_of(ROWS))[:-9], "damaged zstd"),
        ("a.jsonl.zst", lines_of(ROWS), "damaged zstd"),
        ("a.jsonl.gz", lines_of(ROWS), "damaged gzip"),
        ("a.jsonl", b'[{"text": "x"}]', 'it has no "text"'),
        ("a.jsonl", b"[\n", "not JSON"),
        ("a.jsonl", b'{"text": "x", "text": "y"}', "the key 'text' stands twice"),
    ],
)
def test_a_damaged_shard_is_named_with_its_line(name, raw, said, tmp_path):
    (tmp_path / name).write_bytes(raw)
    line = refusal(c4_documents, tmp_path)
    assert f"{name} line 1: " in line
    assert said in line


def test_one_null_among_texts_is_an_empty_text(tmp_path):
    rows = lines_of(ROWS) + b'{"text": null, "url": null}\n' + lines_of(["the last"])
    (tmp_path / "a.jsonl").write_bytes(rows)
    assert [text for text in c4_documents(tmp_path) if text] == [*ROWS, "the last"]
    corpus = prepare(config_of(f"hub:{tmp_path}"), tmp_path / "corpora")
    assert sum(corpus.facts["documents"].values()) == len(ROWS) + 1


def test_nothing_but_nulls_is_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": null}\n' * 9)
    assert "no text" in refusal(prepare, config_of(f"c4:{tmp_path}"), tmp_path / "corpora")


def test_an_endless_line_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "LONGEST_LINE", 1 << 20)
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(bytes(1 << 24)))
    assert "line 1: longer than 1 MiB" in refusal(c4_documents, tmp_path)


# Marks at the beginning


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF8 + "größer".encode())
    for source in (tmp_path, tmp_path / "a.txt"):
        assert "".join(text for _, text in text_documents(source)) == "größer"
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF8 + b"abc\xff")
    assert "not UTF-8 at byte 6" in refusal(text_documents, tmp_path)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_utf_16_is_named(encoding, tmp_path):
    mark = codecs.BOM_UTF16_BE if encoding == "utf-16-be" else b""
    (tmp_path / "a.txt").write_bytes(mark + ("größer " * 99).encode(encoding))
    assert "UTF-16" in refusal(text_documents, tmp_path)


# Folders, links and what can't be read


def test_links_are_followed_and_loops_end(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.txt").write_text("a")
    (tmp_path / "texts" / "b.txt").symlink_to(tmp_path / "elsewhere" / "a.txt")
    (tmp_path / "texts" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "texts" / "loop").symlink_to(tmp_path / "texts")
    (tmp_path / "texts" / "folder.txt").mkdir()
    found = [p.relative_to(tmp_path / "texts").as_posix() for p in files_in(tmp_path / "texts")]
    assert found == ["b.txt", "linked/a.txt"]


def test_a_link_to_nothing_is_named(tmp_path):
    (tmp_path / "a.txt").symlink_to(tmp_path / "none")
    assert "a.txt' is not allowed; it is a link to nothing" in refusal(text_documents, tmp_path)
    (tmp_path / "a.txt").unlink()
    (tmp_path / "a.txt").symlink_to("a.txt")
    assert "it is a link to nothing" in refusal(text_documents, tmp_path)


@pytest.mark.parametrize("kind", ["text", "c4"])
def test_a_file_that_cannot_be_read_is_named(kind, tmp_path, monkeypatch):
    name = {"text": "a.txt", "c4": "a.jsonl"}[kind]
    (tmp_path / name).write_bytes(lines_of(ROWS))

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(tmp_path), "open", denied)
    read = text_documents if kind == "text" else c4_documents
    assert f"{name} can't be read: Permission denied" in refusal(read, tmp_path)


def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "pipe can't be read: it is no file" in refusal(text_documents, tmp_path / "pipe")


# Changes


def changed(path, again):
    """Write a file of the same size, with the same mtime."""
    stat = path.stat()
    assert len(again) == stat.st_size
    path.write_bytes(again)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_mtime_ns == stat.st_mtime_ns


@pytest.mark.parametrize("kind", ["text", "c4", "hub"])
def test_a_file_that_changed_at_equal_size_and_time_makes_another_corpus(kind, tmp_path):
    source, root = tmp_path / "source", tmp_path / "corpora"
    source.mkdir()
    name = "a.txt" if kind == "text" else "a.jsonl"
    raw = "\n".join(ROWS * 40).encode() if kind == "text" else lines_of(ROWS)
    (source / name).write_bytes(raw)
    corpus = f"text:{source / name}" if kind == "text" else f"{kind}:{source}"
    first = prepare(config_of(corpus), root)
    assert prepare(config_of(corpus), root).folder == first.folder
    changed(source / name, raw.replace(b"page 7:", b"PAGE 7:"))
    second = prepare(config_of(corpus), root)
    assert second.folder != first.folder
    assert second.facts["sha256"] != first.facts["sha256"]
    changed(source / name, raw)
    assert prepare(config_of(corpus), root).folder == first.folder


def test_shards_are_read_again_only_where_their_stamp_is_new(tmp_path, monkeypatch):
    source, root = tmp_path / "source", tmp_path / "corpora"
    source.mkdir()
    (source / "a.jsonl").write_bytes(lines_of(ROWS))
    (source / "b.jsonl").write_bytes(lines_of(["another " * 30]))
    first = prepare(config_of(f"c4:{source}"), root)
    read, real = [], hashlib.file_digest
    monkeypatch.setattr("hashlib.file_digest", lambda f, k: read.append(f.name) or real(f, k))
    assert prepare(config_of(f"c4:{source}"), root).folder == first.folder
    assert not read
    os.utime(source / "b.jsonl")
    assert prepare(config_of(f"c4:{source}"), root).folder == first.folder
    assert read == [str(source / "b.jsonl")]
    (tmp_path / "other").mkdir()
    moved = shutil.move(source, tmp_path / "other" / "source")
    assert prepare(config_of(f"c4:{moved}"), root).folder == first.folder


def test_a_shard_that_changes_while_it_is_read_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(lines_of(ROWS))
    real = streams._text_of

    def touching(line):
        (tmp_path / "a.jsonl").touch()
        return real(line)

    monkeypatch.setattr(streams, "_text_of", touching)
    with pytest.raises(RuntimeError, match="changed while it was read"):
        prepare(config_of(f"c4:{tmp_path}"), tmp_path / "corpora")


def test_a_corpus_of_an_earlier_version_is_opened(tmp_path, monkeypatch):
    from lowrank_lab.data import prepare as preparing

    (tmp_path / "a.json.gz").write_bytes(gzip.compress(lines_of(ROWS)))
    config, root = config_of(f"c4:{tmp_path}"), tmp_path / "corpora"
    folder = prepare(config, root).folder
    content = [(p.name, p.stat().st_size, p.read_bytes()[-8:].hex()) for p in c4_shards(tmp_path)]
    name = folder.name.rpartition("-")[0]
    earlier = root / f"{name}-{preparing._text_hash(name, 'byte', content, config)}"
    folder.rename(earlier)
    (earlier / SOURCES).unlink()
    assert prepare(config, root).folder == earlier


# What `datasets` saves


@pytest.fixture
def saved(tmp_path):
    import datasets

    rows = datasets.Dataset.from_dict({"text": [*ROWS, None], "n": [*range(len(ROWS) + 1)]})
    rows.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": rows, "few": rows.select(range(200))}).save_to_disk(
        str(tmp_path / "several")
    )
    return tmp_path


@pytest.mark.parametrize(
    ("name", "count"), [("one", 400), ("several", 400), ("several@few", 200), ("one@train", 400)]
)
def test_a_saved_dataset_is_read(saved, name, count):
    corpus = prepare(config_of(f"hub:{saved}/{name}"), saved / "corpora")
    assert sum(corpus.facts["documents"].values()) == count


def test_what_a_saved_dataset_lacks_is_refused_in_one_line(saved):
    for name, said in {"several@tran": "did you mean 'train'", "one@few": "known: train"}.items():
        config = config_of(f"hub:{saved}/{name}")
        assert said in refusal(prepare, config, saved / "corpora")
    for kind in ("text", "c4"):
        config = config_of(f"{kind}:{saved}/one")
        line = refusal(prepare, config, saved / "corpora")
        assert f"hub:{saved}/one" in line


# Records


def test_a_key_that_stands_twice_in_a_record_is_damage(tmp_path):
    (tmp_path / "config.json").write_text('{"config": {"lr": 1, "lr": 2}}')
    with pytest.raises(InputError, match=r"config\.json is damaged: the key 'lr' stands twice"):
        _ = Run(tmp_path).config
    with pytest.raises(ValueError, match="'a' stands twice"):
        json.loads('{"a": 1, "a": 1}', object_pairs_hook=once_each)


def test_an_empty_file_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"")
    assert "no text" in refusal(prepare, config_of(f"text:{tmp_path}"), tmp_path / "corpora")
