"""Gaps over model sizes."""

from __future__ import annotations

from pathlib import Path

import click

from lowrank_lab.config import InputError


@click.command()
@click.argument(
    "folders", nargs=-1, required=True, metavar="FOLDER...", type=click.Path(path_type=Path)
)
@click.option("--reference", default="full-rank", show_default=True, help="label of no gap")
@click.option(
    "--to", type=float, default=60e6, show_default=True,
    help="parameters at which the gaps of three or more sizes are extrapolated",
)  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), help="also write tables and the figure")
@click.option("--json", "as_json", is_flag=True, help="print the tables as JSON")
def ladder(
    folders: tuple[Path, ...], reference: str, to: float, out: Path | None, as_json: bool
) -> None:
    """Compare gaps to full rank over model sizes: one FOLDER of finished runs per size.

    Prints each label's gap in test loss at each size, then its slope over log10 of the
    parameters, and the gap that a line predicts at a larger size.
    """
    from lowrank_lab import figures
    from lowrank_lab.analysis.ladder import extrapolation_table, gap_table, gaps_of
    from lowrank_lab.analysis.tables import formatted

    gaps = gaps_of(folders, reference)
    largest = int(gaps["parameters"].max())
    if not to > largest:
        raise InputError("to", to, f"more than the {largest} parameters of the largest size")
    tables = {"gaps": gap_table(gaps), "slopes": extrapolation_table(gaps, to)}
    if as_json:
        parts = (f'"{name}": {table.to_json(orient="records")}' for name, table in tables.items())
        click.echo("{" + ", ".join(parts) + "}")
    else:
        click.echo("\n\n".join(formatted(t).to_string(index=False) for t in tables.values()))
    if out is not None:
        figures.save(figures.gap_over_size(gaps, to), tables["gaps"], out / "gap_over_size")
        tables["slopes"].to_csv(out / "slopes.csv", index=False)
