"""Benchmarks against other packages."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import click

from lowrank_lab.config import InputError


@click.command()
@click.argument("suites", nargs=-1)
@click.option("--quick", is_flag=True, help="tiny sizes, to check that everything runs")
@click.option("--json", "as_json", is_flag=True, help="print the rows as JSON")
def bench(suites: tuple[str, ...], quick: bool, as_json: bool) -> None:
    """Benchmark this library against alternative packages (needs a checkout)."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "benchmarks" / "run.py").exists():
        raise InputError("bench", str(root), "there is no benchmarks folder; use a checkout")
    sys.path.insert(0, str(root))
    running = importlib.import_module("benchmarks.run")
    unknown = [name for name in suites if name not in running.SUITES]
    if unknown:
        raise InputError("suites", unknown[0], f"one of {', '.join(running.SUITES)}")
    found = running.run(suites, quick, lambda row: click.echo(running.line(row), err=as_json))
    if as_json:
        click.echo(json.dumps(found, indent=1, ensure_ascii=False))
