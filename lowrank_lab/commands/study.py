"""Running a study."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import click

from lowrank_lab.commands.tables import show_table
from lowrank_lab.config import InputError


@click.command()
@click.argument("file", metavar="NAME|FILE", required=False)
@click.option("--out", type=click.Path(path_type=Path), help="folder of the study's runs")
@click.option("--jobs", type=click.IntRange(1), help="parallel notebooks; default: one per core")
@click.option("--retry", is_flag=True, help="rerun failed runs")
@click.option("--seeds", help="seeds, like 0,1,2; default: those in the study file")
@click.option("--only", metavar="VARIANT", multiple=True, help="only this variant; may be repeated")
@click.option(
    "--reuse",
    is_flag=True,
    help="reuse finished runs with the same configuration from other studies and from kept "
    "studies, made by any version of the library",
)
@click.option(
    "--time-limit", metavar="TIME", help="stop a run after this time, like 90s, 30m or 2h"
)
@click.option(
    "--dask",
    metavar="ADDRESS",
    help="run on this Dask cluster (tcp://host:8786); needs a shared file system",
)
@click.option("--dry-run", is_flag=True, help="list the runs, their memory and disk; run nothing")
@click.option(
    "--flops",
    type=float,
    metavar="RATE",
    help="with --dry-run: memory and hours on a CUDA card with RATE FLOP/s, like 400e12; needs "
    "neither the card nor the corpus",
)
@click.option("--json", "as_json", is_flag=True, help="print the table as JSON")
def study(
    file: str | None,
    out: Path | None,
    retry: bool,
    seeds: str | None,
    only: tuple[str, ...],
    reuse: bool,
    time_limit: str | None,
    dry_run: bool,
    flops: float | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Run a study with papermill: a study of the library by NAME, or a study FILE.

    Finished runs are not repeated; an interrupted study continues when started again.
    """
    from lowrank_lab.report import asked_in
    from lowrank_lab.studies import progress
    from lowrank_lab.studies.plan import plan_study
    from lowrank_lab.studies.shipped import find_study, shipped_studies
    from lowrank_lab.studies.study import run_study
    from lowrank_lab.studies.study_file import seconds_of

    if file is None:
        raise click.UsageError(f"study: give a file or a name: {', '.join(shipped_studies())}")
    try:
        numbers = [int(seed) for seed in seeds.split(",")] if seeds is not None else None
    except ValueError:
        raise InputError("seeds", seeds, "must be whole numbers with commas between") from None
    limit = None if time_limit is None else seconds_of(time_limit)
    if flops is not None and not (dry_run and 0 < flops < math.inf):
        raise InputError("flops", flops, "FLOP/s above 0, like 400e12, and --dry-run with it")
    path = find_study(file)
    chosen: dict[str, Any] = {"out": out, "retry": retry, "seeds": numbers, "only": only}
    chosen["reuse"] = reuse
    if dry_run:
        elsewhere = flops is not None
        plan = plan_study(path, elsewhere=elsewhere, **chosen)
        facts = progress.plan_facts(plan, flops)
        text = progress.card_text if elsewhere else progress.plan_text
        click.echo(json.dumps(facts, indent=1) if as_json else text(facts))
        return
    view = progress.View()
    todo, page = run_study(path, report=view.show, time_limit=limit, **chosen, **options)
    view.close()
    for job in todo:
        if job.state == "failed":
            line = " ".join(f"failed: {job.name}: {job.error}; see {job.folder}".split())
            click.echo(line, err=True)
    if page is None:
        sys.exit(1)
    show_table(page.parent, as_json, asked_in(path)[1])
    if not as_json:
        click.echo(f"\nreport   {page}\nfigures  {page.parent / 'figures'}")
