"""Runs of two gloo processes, for tests: a program that trains many configurations in one start.

python tests/processes.py JOBS.json FOLDER, as rank $RANK of $WORLD_SIZE. JOBS is a list of pairs: a
name and fields of RunConfig, beside which `stop` is a step after which the run is broken off, and
`sent` asks for a list of what its optimizer steps and events exchange: FOLDER/name.RANK.sent. Each
run goes to FOLDER/name, and what it raised to FOLDER/name.RANK.error.
"""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

SIZE = 2


class Stopped(Exception):
    """The run was to be broken off here."""


def train_all(jobs, folder, timeout=600, size=SIZE):
    """Train each of the pairs of a name and fields with that many processes.

    Returns what they raised, by name and rank.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(list(jobs)))
    command = [sys.executable, __file__, str(folder / "jobs.json"), str(folder)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(size)}
    started = [
        subprocess.Popen(command, env=env | {"RANK": str(r), "LOCAL_RANK": str(r)})
        for r in range(size)
    ]
    try:
        for process in started:
            assert process.wait(timeout) == 0
    finally:
        for process in started:
            process.kill()
    return {p.name.removesuffix(".error"): p.read_text() for p in folder.glob("*.error")}


def _main(jobs, folder):
    import torch.distributed as dist
    from exchanges import listed

    from lowrank_lab import RunConfig, train

    rank = int(os.environ["RANK"])
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/.store", rank=rank,
        world_size=int(os.environ["WORLD_SIZE"]),
    )  # fmt: skip
    for name, fields in json.loads(Path(jobs).read_text()):
        stop, found = fields.pop("stop", None), []
        listing = listed(found) if fields.pop("sent", False) else nullcontext()

        def on_step(row, stop=stop):
            if row["step"] == stop:
                raise Stopped

        try:
            with listing:
                train(RunConfig(**fields), Path(folder) / name, on_step=on_step)
        except Stopped:
            pass
        except Exception as error:
            (Path(folder) / f"{name}.{rank}.error").write_text(f"{type(error).__name__}: {error}")
        if found:
            (Path(folder) / f"{name}.{rank}.sent").write_text(json.dumps(found))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's own end sometimes hangs


if __name__ == "__main__":
    _main(*sys.argv[1:])
