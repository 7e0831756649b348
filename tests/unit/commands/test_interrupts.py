"""Ctrl-C, SIGTERM and readers that leave end a command with one line (more: tests/slow)."""

import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from signals import halves, run_until, write_slowly

from lowrank_lab.commands.interrupts import processes
from lowrank_lab.runs.files import replacing


@pytest.mark.parametrize(
    ("number", "status", "line"),
    [(signal.SIGINT, 130, "interrupted\n"), (signal.SIGTERM, 143, "stopped by SIGTERM\n")],
)
def test_before_anything_has_begun(number, status, line, tmp_path):
    assert run_until(tmp_path, ["methods"], "import torch", number) == (status, line)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_corpus_that_is_prepared_leaves_nothing_half_written(
    number, status, tmp_path, text_corpus
):
    command = ["data", "--corpus", text_corpus, "--vocab-size", 300]
    found, error = run_until(tmp_path, command, "validation.bin", number)
    assert found == status
    assert error.endswith("; started again, it goes on\n")
    assert error.count("\n") == 1
    assert not halves(tmp_path / "data")


def test_an_interrupted_file_is_not_replaced(tmp_path):
    (tmp_path / "a.json").write_text("1")

    def interrupted():
        with replacing(tmp_path / "a.json") as partial:
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [p.read_text() for p in tmp_path.iterdir()] == ["1"]


def test_a_reader_that_leaves_ends_the_output_with_status_0():
    command = f"set -o pipefail; {sys.executable} -m lowrank_lab methods --json | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[\n", "")


def test_output_that_cannot_be_written_is_an_error_in_one_line():
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "lowrank_lab", "methods"], stdout=full, stderr=subprocess.PIPE
        )
    assert (done.returncode, done.stderr.count(b"\n")) == (1, 1)


def test_a_command_in_a_notebook_leaves_signals_as_they_were():
    program = (
        "import signal, lowrank_lab, click.testing, lowrank_lab.cli as c\n"
        "before = [signal.getsignal(n) for n in (2, 15)]\n"
        "click.testing.CliRunner().invoke(c.main, ['notebooks', 'list', '--json'])\n"
        "assert before == [signal.getsignal(n) for n in (2, 15)]\n"
        "assert before == [signal.default_int_handler, signal.SIG_DFL]"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_a_process_of_an_interrupted_pool_removes_the_file_that_it_writes(tmp_path):
    started = time.monotonic()
    with suppress(KeyboardInterrupt), processes(1) as pool:
        pool.submit(write_slowly, tmp_path / "page")
        while not any(tmp_path.iterdir()):
            time.sleep(0.01)
            assert time.monotonic() - started < 30
        raise KeyboardInterrupt
    assert not [*tmp_path.iterdir()]
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("count", [1, 3])
def test_an_interrupted_pool_leaves_no_thread_that_could_write_an_error_later(count):
    before = set(threading.enumerate())
    with suppress(KeyboardInterrupt), processes(count) as pool:
        for _ in range(8):
            pool.submit(time.sleep, 600)
        raise KeyboardInterrupt
    assert set(threading.enumerate()) <= before
