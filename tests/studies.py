"""What tests of studies share: small study files and notebooks, runners and their processes."""

import os
import signal
import subprocess
import sys
import time

import nbformat
import psutil

from lowrank_lab.runs.files import write_json

BASE = {
    "model": "tiny", "vocab_size": 300, "sequence_length": 16, "batch": 2, "tokens": 640,
    "eval_tokens": 64, "test_tokens": 64,
}  # fmt: skip
PARAMETERS = "seed: int = 0  # s\nlabel: str = ''  # l\nfolder: str = ''  # f\n"
PARAMETERS += "headless: bool = True  # h\nmore: dict = {}  # m\n"
TRAIN = """import time
import lowrank_lab as lab
pause = lambda row: time.sleep(0.02)
# %%
lab.train(lab.RunConfig(seed=seed, **more), folder, label=label, on_step=pause)"""
COMPARE = "folder = ''\nout = ''\ntitle = ''\ndescription = ''\nresults = ''\n"


def write_short_notebooks(folder, code=TRAIN):
    """Notebooks `short`, which trains and draws nothing, and `empty`, which compares nothing."""
    write_notebook(folder / "short.ipynb", PARAMETERS, code)
    write_notebook(folder / "empty.ipynb", COMPARE, "1")


def write_notebook(path, parameters, code):
    notebook = nbformat.v4.new_notebook()
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    cell = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    notebook.cells = [cell, *map(nbformat.v4.new_code_cell, code.split("# %%\n"))]
    nbformat.write(notebook, path)


def processes_in(folder):
    """Processes that work in a folder or name it in their command line."""
    found = []
    for process in psutil.process_iter(["cmdline", "cwd"]):
        words = " ".join(process.info["cmdline"] or [])
        inside = str(process.info["cwd"] or "").startswith(str(folder))
        if process.pid != os.getpid() and (str(folder) in words or inside):
            found.append(process.pid)
    return found


def wait_for(condition, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def runner_of(path, out, *arguments):
    command = [sys.executable, "-m", "lowrank_lab.cli", "study", str(path), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *arguments], env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
        text=True, preexec_fn=listening,
    )  # fmt: skip


def listening():
    """Heed Ctrl-C: what a shell starts in the background doesn't, nor do its children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def mark_done(job):
    """Mark a job's notebook as executed, without executing it."""
    job.folder.mkdir(parents=True)
    write_json(job.folder / "done.json", {"key": job.key})
    return job.folder / "done.json"
