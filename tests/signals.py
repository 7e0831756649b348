"""Commands in a process of their own that send themselves a signal at a given moment."""

import os
import signal
import subprocess
import sys
import time

from lowrank_lab.runs.files import replacing

# In a child: a signal to itself at the first event whose words name the moment.
HOOK = """
import os, signal, sys
moment, number, sent = os.environ["MOMENT"], int(os.environ["NUMBER"]), []
def hook(event, arguments):
    known = event in ("import", "open", "os.rename")
    if known and not sent and moment in f"{event} {arguments[0]}":
        sent.append(event)
        os.kill(os.getpid(), number)
sys.addaudithook(hook)
"""


def run_until(folder, command, moment, number=signal.SIGINT):
    """Run a command of the library in `folder` until a moment; its status and its stderr."""
    (folder / "hook").mkdir(exist_ok=True)
    (folder / "hook" / "sitecustomize.py").write_text(HOOK)
    environment = os.environ | {
        "PYTHONPATH": str(folder / "hook"), "MOMENT": moment, "NUMBER": str(int(number)),
        "LOWRANK_LAB_DATA": str(folder / "data"), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "lowrank_lab", *map(str, command)], env=environment,
        capture_output=True, text=True, cwd=folder,
    )  # fmt: skip
    return done.returncode, done.stderr


def halves(folder):
    """Hidden files and folders, which were to be renamed when they are complete."""
    return [p for p in folder.rglob(".*") if p.name != ".lock"]


def write_slowly(path):
    """Leave half a file for a minute."""
    with replacing(path) as partial:
        partial.write_text("half")
        time.sleep(60)
