"""Finished runs: sample from them, export them, merge their folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import click


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--prompt", default="", help="text to continue")
@click.option("--tokens", type=click.IntRange(1, 100_000), default=200, show_default=True)
@click.option("--temperature", type=click.FloatRange(0), default=0.8, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def sample(run: Path, **options: Any) -> None:
    """Sample text from a trained run."""
    from lowrank_lab.runs.generate import sample as sample_text
    from lowrank_lab.runs.run import Run

    click.echo(sample_text(Run(run), **options))


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "bf16"]),
    help="dtype of the weights; default: the run's, or fp32 if factors are merged",
)
def export(run: Path, out: Path, dtype: Literal["fp32", "bf16"] | None) -> None:
    """Write a finished run as a Hugging Face LLaMA folder."""
    from lowrank_lab.runs.hf_export import export as export_run

    done = export_run(run, out, dtype)
    without = "" if (done / "tokenizer.json").exists() else ", without a tokenizer: it is numbers"
    click.echo(f"{done}{without}")


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.argument(
    "folders", nargs=-1, required=True, metavar="FOLDER…", type=click.Path(path_type=Path)
)
@click.option("--json", "as_json", is_flag=True, help="as JSON")
def merge(out: Path, folders: tuple[Path, ...], as_json: bool) -> None:
    """Copy the finished runs of several folders, e.g. from several machines, into OUT."""
    from lowrank_lab.runs.collect import merge as merge_runs

    merged = merge_runs(out, folders)
    if as_json:
        unfinished = [str(folder) for folder in merged.unfinished]
        facts = {"copied": merged.copied, "there": merged.there, "unfinished": unfinished}
        click.echo(json.dumps(facts, indent=1))
        return
    for folder in merged.unfinished:
        click.echo(f"not finished, left out: {folder}", err=True)
    click.echo(
        f"{len(merged.copied)} runs copied into {out}, {len(merged.there)} were there already"
    )
