"""The memory of training, simulated."""

from __future__ import annotations

import json
from typing import Any

import click

from lowrank_lab.commands.flags import config_flags, config_of, given_flags
from lowrank_lab.config import InputError, warn_renamed


@click.command()
@config_flags
@click.option(
    "--fits",
    help="check whether training fits in this much memory, and suggest changes if not: 24GB or "
    "24GiB (cards sold as 24 GB have 24GiB)",
)
@click.option("--all", "every", is_flag=True, help="compare all methods")
@click.option(
    "--formula",
    is_flag=True,
    help="weights and optimizer states by formula alone, in 8 bits as well; nothing is simulated",
)
@click.option(
    "--world-size", type=int, help="memory per process, with this many processes under FSDP2"
)
@click.option("--ranks", type=int, hidden=True)
@click.option("--measure", is_flag=True, help="also measure real steps on this machine")
@click.option("--json", "as_json", is_flag=True, help="as JSON")
def memory(
    fits: str | None,
    every: bool,
    formula: bool,
    world_size: int | None,
    ranks: int | None,
    measure: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Simulate the memory of training a configuration, without allocating it.

    The defaults are bfloat16, as in the paper, and a CUDA card; see --precision and --device.
    """
    from lowrank_lab.planning import describe, fit, states

    if ranks is not None:
        warn_renamed("--ranks", "--world-size")
        world_size = ranks if world_size is None else world_size
    capacity = fit.bytes_of(fits) if fits is not None else None
    given = {"precision": "bf16", "steps": fit.LONG, **given_flags(flags)}
    if given.get("per_layer") and "clip" not in given:
        given["clip"] = 0.0
    config = config_of(given)
    device = "cpu" if config.device == "cpu" else "cuda"
    if measure and world_size is not None:
        raise InputError("measure", measure, "it takes steps of one process; without world_size")
    if formula:
        for name, value in (("fits", fits), ("measure", measure), ("world_size", world_size)):
            if value:
                raise InputError(name, value, "a formula has no peak and one process; without it")
        found_by_formula = states.states(config, None if every else [config.method])
        as_text = states.text(found_by_formula)
        click.echo(json.dumps({"methods": found_by_formula}, indent=1) if as_json else as_text)
        return
    if every:
        rows = []
        for row in describe.comparison(config, capacity, device, measure, world_size):
            rows.append(row)
            click.echo(f"{row['method']}: {row['seconds']:.1f} s", err=True)
        click.echo(json.dumps({"methods": rows}, indent=1) if as_json else describe.table(rows))
        return
    config = fit.of_method(config, config.method)
    found = describe.facts(config, capacity, device, measure, world_size)
    click.echo(json.dumps(found, indent=1) if as_json else describe.text(found))
