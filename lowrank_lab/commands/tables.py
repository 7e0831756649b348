"""The tables of a study in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click


def show_table(folder: Path, as_json: bool = False, pairs: Sequence[tuple[str, str]] = ()) -> None:
    """Print the table of a study, then its paired differences: those in `pairs`, or all."""
    from lowrank_lab.analysis.rates import robustness
    from lowrank_lab.analysis.tables import differences, formatted, structure, summary, verdicts
    from lowrank_lab.runs.run import final_table, find_runs, load_runs

    finals = final_table(load_runs(folder))
    if as_json:
        click.echo(summary(finals).to_json(orient="records", indent=1))
        return
    click.echo(formatted(summary(finals)).to_string(index=False))
    table = verdicts(finals, pairs) if pairs else differences(finals)
    if len(table):
        click.echo(f"\nseed by seed:\n{formatted(table).to_string(index=False)}")
    robust = robustness(finals)
    if len(robust):
        click.echo(f"\nrobustness to the rate:\n{formatted(robust).to_string(index=False)}")
    ends = structure(find_runs(folder))
    if len(ends.columns) > 1:
        click.echo(f"\nrecorded layers at the end:\n{formatted(ends).to_string(index=False)}")
