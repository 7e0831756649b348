"""Training one run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from lowrank_lab import distributed
from lowrank_lab.commands.flags import config_flags, config_of


@click.command()
@config_flags
@click.option("--out", type=click.Path(path_type=Path), help="run folder; continues a run in it")
@click.option("--label", help="name of the run in tables and figures")
@click.option(
    "--tracker",
    "trackers",
    metavar="NAME",
    multiple=True,
    help="mirror the metrics to tensorboard, or to a class module.Class; may be repeated",
)
def train(out: Path | None, label: str | None, trackers: tuple[str, ...], **flags: Any) -> None:
    """Train one run, or continue it."""
    from tqdm import tqdm

    from lowrank_lab.training.loop import train as train_run

    config = config_of(flags)
    hidden = None if distributed.is_rank_zero() else True  # None: hidden without a terminal
    with tqdm(total=config.total_steps, unit="step", disable=hidden, smoothing=0.05) as bar:

        def show(row: dict[str, Any]) -> None:
            bar.update(row["step"] - bar.n)
            bar.set_postfix_str(f"loss {row['loss'] or math.nan:.3f}", refresh=False)

        run = train_run(config, out, label=label, on_step=show, trackers=trackers or None)
    if not distributed.is_rank_zero():
        return
    result = run.result
    click.echo(
        f"test loss {result['test_loss']:.4f} (perplexity {result['test_perplexity']:.4g}), "
        f"{result['seconds']:.0f} s, in {run.folder}"
    )
