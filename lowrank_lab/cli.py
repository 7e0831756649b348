"""The command line, `lowrank-lab …`. The flags of `train` are the fields of RunConfig.

Exit status: 0 success, 1 failure, 2 invalid input (one line on stderr), 130 interrupted by Ctrl-C,
143 stopped by SIGTERM after finishing and saving the current step.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import click

from lowrank_lab import __version__, distributed
from lowrank_lab.commands import (
    bench,
    ladder,
    listings,
    memory,
    report,
    runs,
    study,
    train,
)
from lowrank_lab.commands.one_line import OneLine


@click.group(cls=OneLine)
@click.version_option(__version__, prog_name="lowrank-lab")
@click.option(
    "--methods-from",
    type=click.Path(path_type=Path),
    help="Python file that registers your own methods; may be repeated",
    multiple=True,
)
def main(methods_from: tuple[Path, ...]) -> None:
    """Run, inspect and compare methods for pretraining language models with less memory."""
    logging.basicConfig(format="%(message)s")
    level = logging.INFO if distributed.is_rank_zero() else logging.WARNING
    logging.getLogger("lowrank_lab").setLevel(level)
    if methods_from:
        from lowrank_lab.methods.own import load_own_methods

        load_own_methods(os.pathsep.join(str(path.resolve()) for path in methods_from))


for command in (
    listings.methods, listings.data, train.train, study.study, listings.notebooks, runs.merge,
    report.report, ladder.ladder, runs.sample, runs.export, memory.memory, bench.bench,
):  # fmt: skip
    main.add_command(command)


if __name__ == "__main__":
    main()
