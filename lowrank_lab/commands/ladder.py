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
@click.option("--out", type=click.Path(path_type=Path), help="also write tables and figures")
@click.option("--json", "as_json", is_flag=True, help="print the tables as JSON")
def ladder(
    folders: tuple[Path, ...], reference: str, to: float, out: Path | None, as_json: bool
) -> None:
    """Compare gaps to full rank over model sizes: one FOLDER of finished runs per size.

    Prints each label's gap in test loss at each size, then its slope over log10 of the
    parameters, and the gap that a line predicts at a larger size; then the differences to dense
    models of the same bytes (weights + optimizer states) and of the same training FLOPs.
    """
    from lowrank_lab.analysis.costs import COSTS, at_equal_cost, costs_of
    from lowrank_lab.analysis.ladder import extrapolation_table, gap_table, gaps_of
    from lowrank_lab.analysis.tables import formatted
    from lowrank_lab.figures import save
    from lowrank_lab.report import ladder_pictures

    gaps = gaps_of(folders, reference)
    largest = int(gaps["parameters"].max())
    if not to > largest:
        raise InputError("to", to, f"more than the {largest} parameters of the largest size")
    tables = {"gaps": gap_table(gaps), "slopes": extrapolation_table(gaps, to)}
    costs = costs_of(folders, reference)
    tables |= {f"equal_{cost}": at_equal_cost(costs, cost, reference) for cost in COSTS}
    if as_json:
        parts = (f'"{name}": {table.to_json(orient="records")}' for name, table in tables.items())
        click.echo("{" + ", ".join(parts) + "}")
    else:
        titles = (
            f"Gap to {reference}",
            "Gap over log10(parameters)",
            f"Minus {reference} of the same bytes",
            f"Minus {reference} of the same FLOPs",
        )
        for title, table in zip(titles, tables.values(), strict=True):
            click.echo(f"{title}\n{formatted(table).to_string(index=False)}\n")
    if out is not None:
        for picture in ladder_pictures(folders, reference, to):
            save(picture.figure, picture.table, out / picture.name)
        for name in set(tables) - {"gaps"}:  # which the first figure has
            tables[name].to_csv(out / f"{name}.csv", index=False)
