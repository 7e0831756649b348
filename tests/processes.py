"""Runs of two gloo processes, for tests: a program that trains many configurations in one start.

python tests/processes.py WHAT JOBS.json FOLDER, as rank $RANK of $WORLD_SIZE. JOBS is a list of
pairs: a name and fields of RunConfig, beside which `stop` is a step after which the run is broken
off, and `sent` asks for a list of what its optimizer steps and events exchange. WHAT is `train`:
each run goes to FOLDER/name, what it raised to FOLDER/name.RANK.error and what it exchanged to
FOLDER/name.RANK.sent; or `measure`: the memory that steps take goes to FOLDER/name.RANK.json, and
beside the fields `expected` has the simulated peaks of each rank, by kind of step.
"""

import faulthandler
import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

SIZE = 2
CLOSE = 0.03  # of simulated and measured peaks
# Where one process raises and the other waits for it, the other raises after this time.
LONGEST_WAIT = timedelta(seconds=120)
# One process may still write down what it found while the other has ended.
LONGEST_END = timedelta(minutes=10)


class Stopped(Exception):
    """The run was to be broken off here."""


def train_all(jobs, folder, timeout=600, size=SIZE):
    """Train each of the pairs of a name and fields with that many processes.

    Returns what they raised, by name and rank.
    """
    _start("train", jobs, folder, timeout, size)
    return {p.name.removesuffix(".error"): p.read_text() for p in folder.glob("*.error")}


def measure_all(jobs, folder, timeout=1500, size=SIZE):
    """Measure the memory of each of the pairs of a name and fields, in each of the processes.

    Returns facts by name and rank: peaks by kind of step (`allocated`), and `at_rest`.
    """
    _start("measure", jobs, folder, timeout, size)
    found = {tuple(p.name.split(".")[:2]): json.loads(p.read_text()) for p in folder.glob("*.json")}
    return {(name, int(rank)): facts for (name, rank), facts in found.items() if rank != "json"}


def phase_peaks(trace):
    """The most bytes in each phase of a step."""
    total, found = trace.total(), {}
    ends = [first for first, _ in trace.phases[1:]] + [len(total)]
    for (first, name), end in zip(trace.phases, ends, strict=True):
        found[name] = max(found.get(name, 0), *map(int, total[first:end]), 0)
    return found


def _start(what, jobs, folder, timeout, size):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(list(jobs)))
    (folder / ".store").unlink(missing_ok=True)  # of a start that failed
    command = [sys.executable, __file__, what, str(folder / "jobs.json"), str(folder)]
    run_all(command, size, timeout)


def run_all(command, size=SIZE, timeout=600):
    """Run a command as that many processes; each knows its rank as torchrun's do."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(size)}
    started = [
        subprocess.Popen(command, env=env | {"RANK": str(r), "LOCAL_RANK": str(r)})
        for r in range(size)
    ]
    try:
        end = time.monotonic() + timeout
        while any(process.poll() is None for process in started) and time.monotonic() < end:
            if any(process.returncode for process in started):
                break  # the others would wait for it
            time.sleep(0.1)
        assert [process.returncode for process in started] == size * [0]
    finally:
        for process in started:
            process.kill()


@contextmanager
def gloo(file, **options):
    """A gloo process group of $WORLD_SIZE processes that meet by a file; they end together.

    The end goes by the file: whoever leaves a barrier of gloo first closes connections from which
    others still read.
    """
    import torch.distributed as dist

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.FileStore(str(file), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, **options)
    yield
    sys.stdout.flush()
    store.set(f"ended {rank}", "")
    store.wait([f"ended {other}" for other in range(size)], LONGEST_END)
    os._exit(0)  # gloo's own end sometimes hangs


def _main(what, jobs, folder):
    faulthandler.enable()  # where native code was called that ended the process
    rank, folder = int(os.environ["RANK"]), Path(folder)
    with gloo(folder / ".store", timeout=LONGEST_WAIT):
        for name, fields in json.loads(Path(jobs).read_text()):
            (_train if what == "train" else _measure)(name, fields, folder, rank)


def _train(name, fields, folder, rank):
    from exchanges import listed

    from lowrank_lab import RunConfig, train

    stop, found = fields.pop("stop", None), []
    listing = listed(found) if fields.pop("sent", False) else nullcontext()

    def on_step(row):
        if row["step"] == stop:
            raise Stopped

    try:
        with listing:
            train(RunConfig(**fields), folder / name, on_step=on_step)
    except Stopped:
        pass
    except Exception as error:
        (folder / f"{name}.{rank}.error").write_text(f"{type(error).__name__}: {error}")
    if found:
        (folder / f"{name}.{rank}.sent").write_text(json.dumps(found))


def _measure(name, fields, folder, rank):
    from lowrank_lab import RunConfig
    from lowrank_lab.planning.simulate import measure

    # A release by one of gloo's threads is often not recorded, and its bytes then still count: the
    # least of three measurements was not always right. More can only lower it.
    expected, least = fields.pop("expected")[rank], {}
    few, many = (1, 1) if fields["method"] == "adamw-8bit" else (4, 12)  # it compiles for long
    for times in range(1, many + 1):
        account = measure(RunConfig(**fields))
        least = {kind: min(n, least.get(kind, n)) for kind, n in account.allocated.items()}
        near = all(abs(expected[kind] / n - 1) < CLOSE for kind, n in least.items())
        if times >= few and _all_agree(near):
            break
    facts = {"allocated": least, "at_rest": account.persistent.as_dict()}
    (folder / f"{name}.{rank}.json").write_text(json.dumps(facts))


def _all_agree(yes):
    import torch
    import torch.distributed as dist

    found = torch.tensor(int(yes))
    dist.all_reduce(found, dist.ReduceOp.MIN)
    return bool(found)


if __name__ == "__main__":
    _main(*sys.argv[1:])
