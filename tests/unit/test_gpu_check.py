"""The check of a card does what it says, as far as a machine without one can tell.

`make gpu-check DRY=1`, which CI runs, takes all of its sections on the CPU.
"""

import json
import math
import stat
import subprocess
import sys
import threading
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import gpu
from benchmarks.gpu_checks import card, corpus, counting, optimizers, peers, prepare
from benchmarks.gpu_checks.results import Results, all_passed, at_least, at_most, table
from benchmarks.gpu_checks.session import Session

CPU = torch.device("cpu")


@pytest.fixture
def session(tmp_path):
    results = Results(tmp_path / "out.jsonl")
    results.section = "card"
    tokens = corpus.random_corpus(tmp_path / "corpus", 512, 8192)
    return Session(CPU, True, results, tmp_path, tokens)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_fact_is_on_disk_before_the_next_one_is_measured(session):
    session.results.fact("bandwidth", 3.0, "GB/s", bytes=5)
    (row,) = lines_of(session.scratch / "out.jsonl")
    assert (row["section"], row["what"], row["value"], row["bytes"]) == (
        "card",
        "bandwidth",
        3.0,
        5,
    )
    assert row["status"] == ""


@pytest.mark.parametrize(
    ("value", "limit", "status"),
    [(1.0, at_most(1), "passed"), (1.1, at_most(1), "failed"), (0.9, at_least(1), "failed"),
     (1, at_least(1), "passed"), (math.nan, at_most(1), "failed"),
     (-math.inf, at_most(1), "failed"), (None, at_most(1), "failed")],
)  # fmt: skip
def test_a_check_compares_its_value_with_its_limit(session, value, limit, status):
    session.results.fact("x", value, limit=limit)
    assert session.results.rows[-1]["status"] == status
    assert all_passed(session.results.rows) == (status == "passed")


def test_an_item_that_never_ends_ends_the_check(session, monkeypatch, capsys):
    ended = threading.Event()
    statuses = []
    monkeypatch.setattr(gpu.os, "_exit", lambda status: (statuses.append(status), ended.set()))
    monkeypatch.setattr(card, "items", lambda session: [("stuck", lambda: ended.wait(20))])
    gpu.end_after(0.2, session.results, {"card": 0.0})
    gpu.run_section(session, "card", time.monotonic() + 60)
    assert statuses == [1]
    assert lines_of(session.scratch / "out.jsonl")[-1]["what"] == "stuck"
    assert not all_passed(session.results.rows)
    assert "stuck" in capsys.readouterr().out


def test_an_item_that_raises_is_a_failed_check_and_the_next_ones_go_on(session, monkeypatch):
    def broken():
        raise ValueError("of two\nlines")

    def items(session):
        yield "first", broken
        yield "second", lambda: session.results.fact("second", 1.0, limit=at_most(2))

    monkeypatch.setattr(card, "items", items)
    gpu.run_section(session, "card", time.monotonic() + 60)
    first, second = session.results.rows
    assert (first["what"], first["status"]) == ("first", "failed")
    assert first["reason"] == "ValueError: of two lines"
    assert second["status"] == "passed"
    assert not all_passed(session.results.rows)


def test_a_card_that_is_lost_fails_all_checks_that_follow(session, monkeypatch):
    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(session, "free", lost)
    monkeypatch.setattr(card, "items", lambda session: [("first", lost), ("second", lost)])
    gpu.run_section(session, "card", time.monotonic() + 60)
    assert {row["status"] for row in session.results.rows} == {"failed"}
    assert {row["what"] for row in session.results.rows} == {"first", "second"}


def test_after_its_deadline_a_section_keeps_what_it_measured_and_names_what_is_left(
    session, monkeypatch
):
    clock = iter([0.0, 2.0, 2.0])
    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(
        card, "items",
        lambda s: [(n, lambda n=n: s.results.fact(n, 1.0, limit=at_most(1))) for n in "abc"],
    )  # fmt: skip
    gpu.run_section(session, "card", 1.0)
    rows = session.results.rows
    assert [(r["what"], r["status"]) for r in rows] == [
        ("a", "passed"), ("b", "not finished"), ("c", "not finished"),
    ]  # fmt: skip
    assert not all_passed(rows)
    shown = table(rows, {"card": 3.0})
    assert shown[2].split() == ["card", "1", "0", "2", "3", "3"]
    assert [line[:1] for line in shown[3:]] == ["!", "!"]


def test_sections_take_less_than_eight_minutes_and_each_has_items(session):
    assert sum(gpu.SECTIONS.values()) <= gpu.SECONDS < 8 * 60
    for name in gpu.SECTIONS:
        module = __import__(f"benchmarks.gpu_checks.{name}", fromlist=["items"])
        assert len(list(module.items(session))) >= 2


def test_sections_run_on_a_cpu_and_their_lines_and_table_are_written(tmp_path):
    out = tmp_path / "results" / "out.jsonl"
    words = ["--dry-run", "--only", "card", "--only", "refreshes", "--out", str(out)]
    done = CliRunner().invoke(gpu.main, words)
    assert done.exit_code == 0, done.output
    assert {row["section"] for row in lines_of(out)} == {"card", "refreshes"}
    assert "passed" in done.output
    assert "not finished" in done.output  # the head of the table


def test_without_a_card_the_command_says_so_in_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(gpu.main, [])
    assert done.exit_code == 2
    assert done.output.startswith("device: 'cuda' is not allowed; ")
    assert len(done.output.splitlines()) == 1


def test_a_folder_that_is_not_prepared_is_refused(tmp_path, monkeypatch):
    done = CliRunner().invoke(gpu.main, ["--device", "cpu", "--prepared", str(tmp_path)])
    assert done.exit_code == 2
    assert "make gpu-check" in done.output


class FakeEvent:
    clock = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = FakeEvent.clock

    def elapsed_time(self, end):
        return end.at - self.at


@pytest.fixture
def on_cuda(session, monkeypatch):
    """A session whose card is not there: torch's functions for it do nothing."""
    session.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: None)
    return session


def test_seconds_on_cuda_are_those_between_two_events(on_cuda):
    def run():
        FakeEvent.clock += 7.0  # milliseconds

    assert on_cuda.seconds(run) == pytest.approx(7e-3)
    on_cuda.free()


def test_facts_of_a_card_are_read_from_its_properties(on_cuda, monkeypatch):
    found = SimpleNamespace(name="A card", total_memory=80, multi_processor_count=132, major=9,
                            minor=0)  # fmt: skip
    known = vars(torch._C).get("_CudaDeviceProperties")
    if known is not None:  # a CUDA build: the names are real
        assert all(hasattr(known, name) for name in vars(found))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    card.facts(on_cuda)
    row = on_cuda.results.rows[-1]
    assert (row["value"], row["bytes"], row["capability"]) == ("A card", 80, "9.0")


def event(cat, name, ts, dur=1.0, **args):
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "args": args}


def test_kernels_belong_to_the_range_that_launched_them(tmp_path):
    events = [
        {"ph": "M", "name": "process_name", "args": {"name": "python"}},
        event("user_annotation", counting.COUNTED, 10, 90),
        event("gpu_user_annotation", counting.COUNTED, 10, 500),
        event("user_annotation", "loss", 20, 10),
        event("user_annotation", "optimizer", 50, 10),
        event("cuda_runtime", "cudaLaunchKernel", 5, correlation=1),  # before the range
        event("cuda_runtime", "cudaLaunchKernel", 25, correlation=2),
        event("cuda_driver", "cuLaunchKernelEx", 55, correlation=3),
        event("cuda_runtime", "cudaMemcpyAsync", 70, correlation=4),
        event("cuda_runtime", "cudaStreamSynchronize", 71, correlation=5),
        event("cuda_runtime", "cudaMemcpyAsync", 75, correlation=6),
        event("cuda_runtime", "cudaDeviceSynchronize", 150, correlation=7),  # the profiler's own
        event("kernel", "gemm", 300, correlation=1),
        event("kernel", "softmax", 301, correlation=2),
        event("kernel", "triton_adam", 302, correlation=3),
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pageable)", 303, correlation=4),
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 304, correlation=6),
    ]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": events}))
    assert counting.counts_of(path) == Counter({
        "kernels": 2, "loss kernels": 1, "optimizer kernels": 1, "syncs": 1, "copies to host": 1,
    })  # fmt: skip


def test_ranges_are_found_in_a_trace_that_torch_wrote(tmp_path, monkeypatch):
    monkeypatch.setenv("KINETO_LOG_LEVEL", "6")
    with profile(activities=[ProfilerActivity.CPU]) as record, record_function("loss"):
        torch.ones(3).sum()
    path = tmp_path / "trace.json"
    record.export_chrome_trace(str(path))
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("ph") == "X"]
    ((begin, end),) = counting._spans(events, "loss")
    assert [e for e in events if e["name"] == "aten::sum" and begin <= e["ts"] <= end]


def test_a_profile_without_kernels_is_refused(on_cuda):
    if torch.cuda.is_available():
        pytest.skip("here the profiler records kernels")
    with (
        pytest.warns(UserWarning, match="CUDA"),
        pytest.raises(RuntimeError, match="no kernels"),
        counting.counted(on_cuda),
    ):
        torch.ones(3).sum()


def test_operators_are_counted_in_the_range_that_is_open(session):
    with counting.counted(session) as counts:
        x = torch.ones(3) * 2
        with record_function("loss"):
            (x * 3).sum().item()
    assert counts["loss kernels"] == 2
    assert counts["kernels"] == 4
    assert counts["syncs"] == 1


def test_another_device_draws_the_numbers_of_the_cpu():
    elsewhere = SimpleNamespace(device=torch.device("meta"), initial_seed=lambda: 5)
    drawn = []

    def draw(*size, generator=None, device=None):
        drawn.append(torch.randn(*size, generator=generator))
        return drawn[-1]

    out = optimizers._drawn_on_cpu(draw)(4, generator=elsewhere, device="meta")
    assert out.device.type == "meta"
    assert torch.equal(drawn[0], torch.randn(4, generator=torch.Generator().manual_seed(5)))


@pytest.mark.parametrize("package", peers.EXPORTED)
def test_a_package_is_imported_where_bitsandbytes_is_missing(package, monkeypatch):
    exported = peers.EXPORTED[package][2]
    for name in [n for n in sys.modules if n.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    for name in [n for n in sys.modules if n.split(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, package)
    found = peers.published(package)
    assert issubclass(found, torch.optim.Optimizer)
    assert getattr(sys.modules[package], exported) is found
    assert peers.published(package) is found
    for name in [n for n in sys.modules if n.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)


def test_a_cut_corpus_has_the_first_tokens_of_its_source(tmp_path):
    source = corpus.random_corpus(tmp_path / "source", 512, 200_000)
    corpus.cut(source, tmp_path / "prepared" / "corpus", 100_000)
    found = corpus.opened(tmp_path / "prepared", tmp_path, tiny=False)
    assert found.vocab_size == 512
    assert found.length("train") == 100_000
    assert np.array_equal(found.tokens("train"), source.tokens("train")[:100_000])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A prepared folder, without what the network and minutes of computing give."""
    for name in ("write_wheels", "write_corpus"):
        monkeypatch.setattr(prepare, name, lambda target: None)
    monkeypatch.setattr(prepare, "write_expected", lambda target, report: None)
    prepare.prepare(tmp_path / "gpu-check")
    return tmp_path / "gpu-check"


def test_a_prepared_folder_has_the_code_and_is_written_anew(folder, tmp_path):
    (folder / "old").touch()
    prepare.prepare(folder)
    assert not (folder / "old").exists()
    assert (folder / "benchmarks" / "gpu.py").exists()
    assert (folder / "lowrank_lab" / "training" / "loop.py").exists()
    assert "./run --out results.jsonl" in (folder / "README.txt").read_text()
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").touch()
    with pytest.raises(prepare.InputError, match="folder: "):
        prepare.prepare(other)
    assert (other / "thesis.tex").exists()


def test_the_script_of_the_folder_installs_the_wheels_aside_and_starts_the_check(folder, tmp_path):
    stand_in = tmp_path / "python"
    stand_in.write_text('#!/bin/sh\necho "$PYTHONPATH" "$@"\ncase "$*" in *fail*) exit 7;; esac\n')
    stand_in.chmod(stand_in.stat().st_mode | stat.S_IXUSR)
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(stand_in)}
    words = [str(folder / "run"), "--out", "with space.jsonl"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    installing, checking = done.stdout.splitlines()
    assert f"--no-index --no-deps --no-compile --find-links {folder}/wheels" in installing
    assert all(name in installing for name in (*prepare.PURE, *prepare.COMPILED))
    assert checking.startswith(f"{folder}:")
    assert checking.endswith(f"-m benchmarks.gpu --prepared {folder} --out with space.jsonl")
    failing = subprocess.run([str(folder / "run"), "fail"], capture_output=True, env=environment)
    assert failing.returncode == 7


def test_readme_and_book_say_whether_a_card_has_run_it():
    kept = (prepare.ROOT / "benchmarks" / "gpu_results.json").exists()
    page = (prepare.ROOT / "docs" / "how-to" / "gpus.md").read_text()
    assert ("**No card has run it**" in page) != kept
    assert ("which none has run yet" in (prepare.ROOT / "README.md").read_text()) != kept


def test_every_package_of_the_folder_is_pinned():
    pins = {line.split("==")[0].lower().replace("_", "-")
            for line in (prepare.ROOT / "constraints.txt").read_text().splitlines()}  # fmt: skip
    assert {*prepare.PURE, *prepare.COMPILED} <= pins
