"""Ctrl-C at many moments of each command; readers that leave before the work is done."""

import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
from paths import NOTEBOOKS
from signals import halves, run_until

from lowrank_lab.runs.run import Run

TRAIN = (
    "train --model tiny --num-layers 1 --corpus {text} --vocab-size 300 --sequence-length 16 "
    "--batch 2 --steps 30 --eval-tokens 64 --test-tokens 64 --out {tmp}/run --checkpoint-every 3"
)
DATA = "data --corpus {text} --vocab-size 300"


@pytest.mark.parametrize("moment", ["import numpy", "import lowrank_lab.cli", "import yaml"])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_before_anything_has_begun(moment, number, status, tmp_path):
    found, error = run_until(tmp_path, ["study", "none"], moment, number)
    assert (found, error.count("\n")) == (status, 1)


@pytest.mark.parametrize(
    ("command", "moment"),
    [(DATA, "import tokenizers"), (DATA, "train.bin"), (DATA, "corpus.json"), (TRAIN, "train.bin"),
     (TRAIN, "memory.json"), (TRAIN, "step-00000003"), (TRAIN, "result.json")],
)  # fmt: skip
def test_ctrl_c_leaves_nothing_half_written(command, moment, tmp_path, text_corpus):
    words = command.format(text=text_corpus, tmp=tmp_path).split()
    status, error = run_until(tmp_path, words, moment)
    assert status == 130
    assert error.startswith("interrupted; started again, it goes on")
    assert error.count("\n") == 1
    assert not halves(tmp_path / "data")
    assert not halves(tmp_path / "run")
    assert run_until(tmp_path, words, "never")[0] == 0


def test_a_study_that_is_interrupted_leaves_no_process(tmp_path, study_file):
    path = study_file("import time; time.sleep(600)", seeds=[0, 1])
    command = ["study", path, "--out", tmp_path / "out", "--jobs", 2]
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        found, error = run_until(tmp_path, command, "papermill.log", number)
        assert found == status
        assert error.splitlines()[-1].endswith("it goes on from the last checkpoint")
        assert "Traceback" not in error
    left = [p for p in psutil.process_iter(["cmdline"])
            if str(tmp_path) in " ".join(p.info["cmdline"] or ())]  # fmt: skip
    assert not left


def test_a_report_on_all_kept_studies_ends_its_processes(tmp_path):
    shutil.copytree(
        NOTEBOOKS.parent / "data" / "study" / "ladder_s2", tmp_path / "data/study/ladder_s2"
    )
    started = time.monotonic()
    status, error = run_until(tmp_path, ["report"], "import multiprocessing.popen_spawn_posix")
    assert (status, error) == (130, "interrupted\n")
    assert time.monotonic() - started < 60
    assert not halves(tmp_path / "data")


def test_a_reader_that_leaves_stops_no_work(tmp_path, text_corpus):
    words = TRAIN.format(text=text_corpus, tmp=tmp_path)
    command = f"set -o pipefail; {sys.executable} -m lowrank_lab {words} 2>&1 | true"
    assert subprocess.run(["bash", "-c", command], capture_output=True).returncode == 0
    assert Run(tmp_path / "run").finished
    report = f"set -o pipefail; {sys.executable} -m lowrank_lab report {tmp_path}/run | head -1"
    assert subprocess.run(["bash", "-c", report], capture_output=True).returncode == 0
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize("seconds", [1, 4, 10])
def test_ctrl_c_in_a_terminal_reaches_all_processes_and_prints_one_line(seconds, tmp_path):
    """The processes of a report are in the group that the terminal sends the signal to."""
    process = subprocess.Popen(
        [sys.executable, "-m", "lowrank_lab", "report"], stderr=subprocess.PIPE, text=True,
        stdout=subprocess.DEVNULL, start_new_session=True, cwd=tmp_path,
        env=os.environ | {"LOWRANK_LAB_DATA": str(tmp_path / "data")},
    )  # fmt: skip
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=60)[1] == "interrupted\n"
    assert process.returncode == 130
    assert not halves(tmp_path)
