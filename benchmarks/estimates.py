"""Memory and hours that study files and the book state, computed and written again.

`python -m benchmarks.estimates` takes minutes: it simulates every run of
notebooks/studies/paper_*.yaml, 1b, and 7b on 8 and 64 processes. Names of parts restrict it: 60m
130m 350m 1b (the heads of the study files; 60m also the page on GPUs), memory, shards (the page on
memory). Rows are found by their first column: a row that is new is written by hand, once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import click
from click.testing import CliRunner

from lowrank_lab.cli import main
from lowrank_lab.memory.formulas import GB
from lowrank_lab.methods.registry import METHODS

ROOT = Path(__file__).parent.parent
SIZES = ("60m", "130m", "350m", "1b")
RATE = "396e12"
GPUS = ROOT / "docs" / "how-to" / "gpus.md"
MEMORY = ROOT / "docs" / "explanation" / "memory.md"
ONE = "memory --model 1b --rank 512 --batch 16"
SHARDS = "memory --model 7b --batch 512 --activation-checkpointing --world-size"
HEAD_ROW = r"^#   (.+, seed \d+)  +[\d.]+ GB.*$"


@click.command()
@click.argument("parts", nargs=-1, type=click.Choice((*SIZES, "memory", "shards")))
def write(parts: tuple[str, ...]) -> None:
    """Write all estimates again, or those of some PARTS."""
    for size in SIZES:
        if not parts or size in parts:
            write_head(size)
    for part, columns in (("memory", one_process), ("shards", shards)):
        if not parts or part in parts:
            write_rows(MEMORY, columns)


def write_head(size: str) -> None:
    """The table in the head of a study file; of 60m also the table of the page on GPUs."""
    path = ROOT / "notebooks" / "studies" / f"paper_{size}.yaml"
    lines = command_output(f"study {path} --dry-run --flops {RATE}").splitlines()
    rows = {line.partition("  ")[0]: line for line in lines}
    rows |= {"runs": lines[-1]}

    def row(found: re.Match[str]) -> str:
        return f"#   {rows[found[1]]}"

    text = re.sub(HEAD_ROW, row, path.read_text(), flags=re.M)
    path.write_text(re.sub(r"^#   \d+ runs, .*$", f"#   {rows['runs']}", text, flags=re.M))
    click.echo(f"{path.name}: {rows['runs']}")
    if size == "60m":
        cells = {}
        for label, line in rows.items():
            numbers = re.findall(r"[\d.]+", line[len(label) :])
            states, peak, hours = (*numbers[:2], numbers[3]) if len(numbers) == 5 else ("",) * 3
            cells[label.removesuffix(", seed 0")] = [f"{states} GB", f"{peak} GB", hours]
        write_rows(GPUS, lambda label, columns: cells.get(label) if columns == 3 else None)


def write_rows(path: Path, columns: Callable[[str, int], list[str] | None]) -> None:
    """Rows of a page's tables, from a label and its number of columns; None leaves a row."""

    def row(found: re.Match[str]) -> str:
        label, *old = (cell.strip() for cell in found[1].split("|"))
        new = columns(label, len(old))
        if new is not None:
            click.echo(f"{path.name}: {label}: {' '.join(old)} → {' '.join(new)}")
        return found[0] if new is None else f"| {' | '.join([label, *new])} |"

    path.write_text(re.sub(r"^\| ([a-zA-Z].*) \|$", row, path.read_text(), flags=re.M))


def one_process(label: str, columns: int) -> list[str] | None:
    """Weights with states and the peak of 1b, of a row's first method."""
    if columns != 2 or label.split(",")[0].lower() not in METHODS:
        return None
    return gigabytes(f"{ONE} --method {label.split(',')[0].lower()}", (2, 1))


def shards(label: str, columns: int) -> list[str] | None:
    """The same of one process of 8 and of 64 that train 7b."""
    if columns != 4 or label.split(",")[0] not in METHODS:
        return None
    method = label.split(",")[0]
    command = f"--method {method} --rank {METHODS[method].rank or 1024}"
    return [cell for n in (8, 64) for cell in gigabytes(f"{SHARDS} {n} {command}", (2, 2))]


def gigabytes(command: str, digits: tuple[int, int]) -> list[str]:
    """Weights with states and the peak in GB, from a `memory` command."""
    found = json.loads(command_output(f"{command} --json"))
    values = (found["weights"] + found["optimizer_states"], found["peak"])
    return [f"{value / GB:.{d}f}" for value, d in zip(values, digits, strict=True)]


def command_output(command: str) -> str:
    """What a command of lowrank-lab prints."""
    result = CliRunner().invoke(main, command.split(), catch_exceptions=False)
    if result.exit_code:
        raise click.ClickException(f"lowrank-lab {command}: {result.stderr}")
    return result.stdout


if __name__ == "__main__":
    write()
