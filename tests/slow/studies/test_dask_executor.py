"""Studies on a Dask cluster of processes on this machine: records, lost workers, interruptions."""

import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
from studies import TRAIN, processes_in, runner_of, wait_for

from lowrank_lab.runs.files import read_jsonl
from lowrank_lab.runs.run import Run
from lowrank_lab.studies.study import run_study
from lowrank_lab.studies.study_file import load_study
from lowrank_lab.training.loop import train

pytest.importorskip("distributed")


def answers(host, port):
    try:
        socket.create_connection((host, port), 1).close()
        return True
    except OSError:
        return False


def start(module, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", f"distributed.cli.{module}", "--no-dashboard", *arguments],
        env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.fixture
def cluster(tmp_path_factory):
    """A scheduler's address, and a function that starts a worker, which it returns."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    host, port = "127.0.0.1", address.rpartition(":")[2]
    started = [start("dask_scheduler", "--host", host, "--port", port)]

    def work():
        place = ["--local-directory", str(tmp_path_factory.mktemp("dask"))]
        arguments = ["--nthreads", "1", "--no-nanny", "--host", host, *place]
        started.append(start("dask_worker", address, *arguments))
        return started[-1]

    wait_for(lambda: answers(host, int(port)))
    yield address, work
    for process in started[::-1]:
        process.kill()
        process.wait()


def executes(worker, folder):
    children = psutil.Process(worker.pid).children()
    return any(str(folder) in " ".join(child.cmdline()) for child in children)


def begun(out):
    return {p.parent.name for p in out.glob("*/.partial.ipynb")}


def test_a_lost_workers_run_goes_on_elsewhere_and_all_runs_equal_local_ones(
    cluster,
    study_file,
    tmp_path,
):
    address, work = cluster
    fields = {"tokens": 3200, "checkpoint_every": 20, "eval_every": 100, "spectra_every": 100}
    path, out = study_file(TRAIN, base=fields, seeds=[0, 1]), tmp_path / "out"
    workers, first_rows = [work(), work()], {}

    def watch(jobs):
        halfway = [p.parents[1] for p in out.glob("*/checkpoints/step-*")]
        if halfway and not first_rows:
            first_rows[halfway[0]] = read_jsonl(halfway[0] / "metrics.jsonl")[0]
            next(w for w in workers if executes(w, halfway[0])).send_signal(signal.SIGKILL)

    jobs, _ = run_study(path, out=out, dask=address, report=watch)
    assert [job.state for job in jobs] == ["done"] * 3
    for job, (_, config) in zip(jobs, load_study(path).runs.values(), strict=False):
        run, local = Run(job.folder), train(config, tmp_path / f"{config.seed}")
        assert run.result["test_loss"] == local.result["test_loss"]
        assert run.metrics["step"].tolist() == list(range(1, 101))
        assert (job.folder / "done.json").exists()
        assert (job.folder / "notebook.ipynb").exists()
    ((lost, row),) = first_rows.items()
    assert read_jsonl(lost / "metrics.jsonl")[0] == row  # it went on, and did not begin again
    assert {job.state for job in run_study(path, out=out)[0]} == {"done"}  # known as done here too


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
def test_a_failing_run_is_recorded_and_a_study_that_ends_takes_what_runs_with_it(
    cluster,
    study_file,
    tmp_path,
    sign,
):
    address, work = cluster
    code = "import time\nassert seed != 0, 'seed 0'\ntime.sleep(300)"
    path, out = study_file(code, seeds=[0, 1, 2]), tmp_path / "out"
    worker = work()
    runner = runner_of(path, out, "--dask", address)
    try:
        wait_for(lambda: any(out.glob("*/failed.json")))
        wait_for(lambda: begun(out))
        runner.send_signal(sign)
        _, said = runner.communicate(timeout=30)
    finally:
        runner.kill()
    if sign == signal.SIGINT:
        assert runner.returncode == 130
        assert said.splitlines()[-1].startswith("interrupted")
    wait_for(lambda: not set(processes_in(tmp_path)), 20)
    assert len(list(out.glob("*/failed.json"))) == 1
    assert worker.poll() is None
    time.sleep(1)
    assert len(list(out.glob("*/papermill.log"))) == 2  # what was queued never begins
