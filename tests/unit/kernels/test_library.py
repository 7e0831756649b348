"""The cache of compiled kernels: nothing in it can end a process or take the kernels away."""

import os
import time
import tomllib

import pytest
import torch
from paths import ROOT

from lowrank_lab.kernels import library as made
from lowrank_lab.kernels import operators as kernels
from lowrank_lab.training import provenance

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no C++ compiler")


@pytest.fixture(scope="module")
def whole():
    """A library in the user's cache that this process can load; others have other versions."""
    folder = made._cache_folder()
    assert folder is not None
    made.library()
    return next(f for f in folder.glob("kernels-*-*.so") if made._cached(folder, stem_of(f)))


@pytest.fixture
def cached(whole, tmp_path, monkeypatch):
    """The library's file in a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "lowrank-lab").mkdir()
    file = tmp_path / "lowrank-lab" / whole.name
    file.write_bytes(whole.read_bytes())
    return file


def stem_of(file):
    return file.stem.rpartition("-")[0]


def test_a_library_in_the_cache_is_loaded(cached):
    assert made._cached(cached.parent, stem_of(cached)) is not None


@pytest.mark.parametrize("part", [0, 0.5, 0.99])
def test_a_library_without_its_end_is_not_loaded(cached, part):
    content = cached.read_bytes()
    cached.write_bytes(content[: int(part * len(content))])
    assert made._cached(cached.parent, stem_of(cached)) is None


def test_a_file_that_is_no_library_is_not_loaded(cached):
    content = b"no library"
    other = cached.with_name(f"{stem_of(cached)}-{made._digest(content)}.so")
    cached.rename(other)
    other.write_bytes(content)
    assert made._cached(cached.parent, stem_of(cached)) is None


def test_an_older_torch_is_given_no_instructions_that_its_cache_cannot_tell_apart(monkeypatch):
    monkeypatch.delattr(made.torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(made.platform, "machine", lambda: "x86_64")
    for capability in ("AVX512", "AVX2", "DEFAULT"):
        monkeypatch.setattr(made.torch.backends.cpu, "get_cpu_capability", lambda c=capability: c)
        assert made._instructions().startswith("-march=x86-64")


@pytest.mark.parametrize(("name", "value"), [(made.SWITCH, "0"), ("CXX", "/bin/false")])
def test_kernels_are_left_to_torch_if_asked_or_if_none_can_be_compiled(
    name, value, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(name, value)
    assert made.library.__wrapped__() is None


def test_a_wheel_has_the_sources_of_the_kernels():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["lowrank_lab"]
    package = ROOT / "lowrank_lab"
    packed = {file for pattern in patterns for file in package.glob(pattern)}
    assert packed >= {f for f in package.rglob("*.*") if f.suffix in (".cpp", ".h")}


def test_a_change_of_a_kernel_changes_the_source_of_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path)
    file = tmp_path / "kernels" / "pointwise.cpp"
    file.parent.mkdir()
    hashes = set()
    for text in ("one", "other"):
        file.write_text(text)
        hashes.add(provenance.source_hash(("kernels",)))
    assert len(hashes) == 2


def test_a_compiler_that_fails_is_reported_in_one_line(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiler = tmp_path / "compiler"
    said = "echo 'In file x:' >&2; echo 'x.h:1: error: no such thing' >&2"
    compiler.write_text(f"#!/bin/sh\n{said}; exit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", f"{compiler} -m64")
    assert made.library.__wrapped__() is None
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(
        f"kernels: {compiler} -m64 failed (x.h:1: error: no such thing); torch's"
    )


def test_the_next_compiler_is_tried_if_one_fails(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    usual = made._compilers()[0]
    monkeypatch.setattr(made, "_compilers", lambda: [["/bin/false"], usual])
    assert made.library.__wrapped__() is not None
    assert not caplog.records


@pytest.mark.parametrize("full", [True, False])
def test_a_cache_that_cannot_be_written_is_read(full, tmp_path, monkeypatch):
    usual = os.access
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda p, mode: mode != os.W_OK and usual(p, mode))
    monkeypatch.setattr(made, "_cached", lambda folder, stem: (full and (folder, stem)) or None)
    monkeypatch.setattr(made, "_typed", lambda file: file.parent)
    monkeypatch.setattr(made.subprocess, "run", lambda *args, **kwargs: None)
    found = made.library.__wrapped__()
    assert (
        found[0] == tmp_path / "lowrank-lab" if full else found.parent != tmp_path / "lowrank-lab"
    )


@pytest.mark.parametrize(("there", "name"), [(True, "own"), (False, "torch")])
def test_a_run_records_which_kernels_it_has(there, name, monkeypatch):
    monkeypatch.setattr(provenance, "available", lambda: there)
    corpus = type("Corpus", (), {"facts": {"sha256": "0"}})
    assert provenance.ran_on(torch.device("cpu"), corpus)["kernels"] == name


def aged(path, seconds):
    """The path, last changed so many seconds ago."""
    then = time.time() - seconds
    os.utime(path, (then, then))
    return path


def test_a_build_removes_what_killed_ones_left_and_the_libraries_used_least_recently(tmp_path):
    libraries = [tmp_path / f"kernels-{i}-{i}.so" for i in range(made.KEPT + 3)]
    for age, file in enumerate(libraries):
        file.touch()
        aged(file, age)
    for name in ("building-a", "building-b", "tmp_old", "tmp_new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part.o").touch()
    others = [tmp_path / "notes", tmp_path / "tmp-file"]
    others[0].mkdir()
    others[1].touch()
    for path in (tmp_path / "building-a", tmp_path / "tmp_old", *others):
        aged(path, 2 * made.ABANDONED)
    made._clean(tmp_path)
    kept = {"building-b", "tmp_new", "notes", "tmp-file"}
    kept |= {file.name for file in libraries[: made.KEPT - 1]}
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_a_library_that_is_loaded_counts_as_used(cached):
    aged(cached, 1000)
    assert made._cached(cached.parent, stem_of(cached)) is not None
    assert time.time() - cached.stat().st_mtime < 500


def test_a_file_that_another_process_removes_meanwhile_is_no_fault(tmp_path):
    assert made._last_use(tmp_path / "gone") == 0
    made._clean(tmp_path / "gone")
