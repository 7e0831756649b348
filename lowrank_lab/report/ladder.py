"""The figures of a ladder: several folders of runs, one per model size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from lowrank_lab import figures
from lowrank_lab.analysis.costs import costs_of
from lowrank_lab.analysis.ladder import REFERENCE, gap_table, gaps_of
from lowrank_lab.report.picture import Picture


def ladder_pictures(
    folders: Sequence[Path | str], reference: str = REFERENCE, to: float = 60e6
) -> Iterator[Picture]:
    """The gap over sizes, of each row, and losses over costs.

    Args:
        folders: those of `gaps_of`.
        to: parameters up to which lines are drawn.
    """
    gaps = gaps_of(folders, reference)
    yield Picture(
        "gap_over_size", figures.gap_over_size(gaps, to), gap_table(gaps),
        f"Gap to {reference} over the size of the model.",
    )  # fmt: skip
    yield Picture(
        "gaps_by_row", figures.gaps_by_row(gaps), gap_table(gaps),
        f"Gap to {reference}, a line per row and a marker per size.",
    )  # fmt: skip
    costs = costs_of(folders, reference)
    yield Picture(
        "loss_over_costs", figures.loss_over_costs(costs, reference), costs,
        f"Test loss over bytes and FLOPs; the thick line is {reference}.",
    )  # fmt: skip
