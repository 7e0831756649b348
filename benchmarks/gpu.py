"""The check of a card: does everything work on CUDA, is it equal to the CPU, and how fast is it.

One process, sections with deadlines, a line of JSON per measured fact, a table at the end, and a
non-zero exit status unless every check has passed. `make gpu-check` prepares what it needs on a
machine with network; `--dry-run` takes every section at tiny sizes on a CPU.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import tempfile
import threading
import time
from contextlib import nullcontext
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler writes to stderr otherwise
if __package__ in (None, ""):  # started by its path, from any folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import click
import torch

from benchmarks.gpu_checks import corpus
from benchmarks.gpu_checks.results import Results, all_passed, table
from benchmarks.gpu_checks.session import Session
from benchmarks.harness import threads
from lowrank_lab.config import InputError
from lowrank_lab.device import cuda_path
from lowrank_lab.training.loop import fast_process

# Module of benchmarks.gpu_checks → seconds. What a section leaves, later ones may use.
SECTIONS = {
    "card": 10, "optimizers": 30, "gradients": 75, "runs": 50, "speed": 120, "steps": 45,
    "refreshes": 25, "memory": 40, "training": 45,
}  # fmt: skip
SECONDS = 440  # of all sections together
LONGER = 30  # seconds by which an item that has begun may pass them; then the check ends


def run_section(session: Session, name: str, until: float) -> None:
    """All items of a section; one that raises is a failed check, and the next one goes on.

    No item begins after `until`, by time.monotonic: the items that are left are reported.
    """
    results = session.results
    results.section = name
    try:
        items = list(importlib.import_module(f"benchmarks.gpu_checks.{name}").items(session))
    except Exception as error:
        results.failed(name, _reason(error))
        return
    for what, run in items:
        results.item = what
        if time.monotonic() >= until:
            results.unfinished(what)
            continue
        for action in (run, session.free):  # after a fault of the card, freeing memory raises too
            try:
                action()
            except Exception as error:
                results.failed(what, _reason(error))


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def check_device(
    device: torch.device, tiny: bool, names: list[str], results: Results, spent: dict[str, float],
    prepared: Path | None = None, seconds: float = SECONDS,
) -> None:  # fmt: skip
    """Run the named sections; `spent` gets the seconds that each took."""
    begun, allotted = time.monotonic(), 0.0
    scratch = Path(tempfile.mkdtemp(prefix="gpu-check-"))
    try:
        tokens = corpus.opened(prepared, scratch, tiny)
        session = Session(device, tiny, results, scratch, tokens, prepared)
        path = cuda_path() if device.type == "cpu" else nullcontext()  # a CPU stands in for a card
        with fast_process(), path, threads(1) if tiny else nullcontext():
            for name in names:
                allotted += SECTIONS[name]
                started = time.monotonic()
                # A dry run has no need of deadlines, which a busy machine would miss.
                until = seconds if tiny else min(allotted, seconds)
                run_section(session, name, begun + until)
                spent[name] = time.monotonic() - started
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def end_after(seconds: float, results: Results, spent: dict[str, float]) -> threading.Timer:
    """End the process after so many seconds, with the table and status 1, unless cancelled.

    A kernel that never returns can't be interrupted.
    """

    def end() -> None:
        results.unfinished(results.item)
        results.close()
        click.echo("\n" + "\n".join(table(results.rows, spent)))
        sys.stdout.flush()
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    return timer


def chosen_device(name: str) -> torch.device:
    """The device to check.

    Raises:
        InputError: CUDA is wanted and not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device", name, "there is no CUDA device here; cpu, or --dry-run")
    return torch.device(name)


@click.command()
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option("--tiny", is_flag=True, help="tiny sizes")
@click.option("--dry-run", is_flag=True, help="--device cpu --tiny: checks the script, not a card")
@click.option("--only", multiple=True, type=click.Choice(list(SECTIONS)), help="sections to run")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="JSON lines")
@click.option("--prepared", type=click.Path(file_okay=False, path_type=Path), help="folder")
@click.option("--deadline", type=float, default=SECONDS, show_default=True, help="seconds in all")
def main(
    device: str, tiny: bool, dry_run: bool, only: tuple[str, ...], out: Path | None,
    prepared: Path | None, deadline: float,
) -> None:  # fmt: skip
    """Check a card: results as JSON lines in --out, a table at the end, exit status 0 or 1."""
    try:
        where = torch.device("cpu") if dry_run else chosen_device(device)
    except InputError as error:
        click.echo(str(error), err=True)
        sys.exit(2)
    names = [name for name in SECTIONS if not only or name in only]
    results, spent = Results(out, click.echo), dict.fromkeys(names, 0.0)
    timer = None if tiny or dry_run else end_after(deadline + LONGER, results, spent)
    try:
        check_device(where, tiny or dry_run, names, results, spent, prepared, deadline)
    except InputError as error:
        click.echo(str(error), err=True)
        sys.exit(2)
    finally:  # after an interruption too
        if timer is not None:
            timer.cancel()
        results.close()
        click.echo("\n" + "\n".join(table(results.rows, spent)))
    sys.exit(0 if all_passed(results.rows) else 1)


if __name__ == "__main__":
    main()
