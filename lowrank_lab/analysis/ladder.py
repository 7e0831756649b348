"""Gaps over model sizes: their slopes, and extrapolations to larger models.

A gap is the test loss of a label minus that of the reference at the same size and with the same
seed, in nats per token. Sizes are parameters of the reference.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lowrank_lab.analysis.stats import corrected, mean_interval, p_below, p_differs
from lowrank_lab.analysis.tables import intervals, paired
from lowrank_lab.config import InputError
from lowrank_lab.paths import kept_folders, located
from lowrank_lab.runs.run import Run, complete_runs, finals_of

REFERENCE = "full-rank"
FEWEST_SIZES = 3  # for an extrapolation: two sizes determine any line


def gaps_of(folders: Iterable[Path | str], reference: str = REFERENCE) -> pd.DataFrame:
    """One row per label, size and seed: label, parameters, seed, gap.

    Args:
        folders: one folder of finished runs per model size.
        reference: the label to which gaps are taken.

    Raises:
        InputError: a folder lacks the reference or has it in several configurations, or two folders
            have it at the same size.
    """
    tables = [
        _gaps(finals, reference).assign(parameters=parameters)
        for _, finals, parameters in sizes_of(folders, reference)
    ]
    return pd.concat(tables, ignore_index=True)[["label", "parameters", "seed", "gap"]]


def sizes_of(
    folders: Iterable[Path | str], reference: str = REFERENCE
) -> Iterator[tuple[list[Run], pd.DataFrame, int]]:
    """The runs of each folder, their `final_table`, and the parameters of its reference.

    Args and errors: those of `gaps_of`.
    """
    sizes: dict[int, str] = {}
    for folder in folders:
        folder = place if (place := located(folder)).exists() else Path(folder)
        runs = complete_runs(folder)
        finals = finals_of(runs, folder)
        parameters = _size(finals, reference, folder)
        if parameters in sizes:
            allowed = f"each folder has another size; {sizes[parameters]} has this one"
            raise InputError("folder", str(folder), allowed)
        sizes[parameters] = str(folder)
        yield runs, finals, parameters
    if not sizes:
        raise InputError("folders", [], "at least one folder of finished runs")


def _size(finals: pd.DataFrame, reference: str, folder: Path) -> int:
    found = finals.loc[finals["label"] == reference]
    if found.empty:
        labels = ", ".join(dict.fromkeys(finals["label"]))
        raise InputError("reference", reference, f"a label of {folder}: {labels}")
    if found["parameters"].nunique() > 1 or found["seed"].duplicated().any():
        raise InputError("reference", reference, f"one configuration in {folder}; it has several")
    return int(found["parameters"].iloc[0])


def _gaps(finals: pd.DataFrame, reference: str) -> pd.DataFrame:
    labels = [label for label in dict.fromkeys(finals["label"]) if label != reference]
    wide = paired(finals, [(label, reference) for label in labels])
    wide.index = pd.Index(labels, name="label")
    long = wide.reset_index().melt(id_vars="label", var_name="seed", value_name="gap")
    return long.dropna(ignore_index=True)


def gap_table(gaps: pd.DataFrame) -> pd.DataFrame:
    """One row per label and size: label, parameters, gap (mean), ± (95 %, Student's t), n, p (BH).

    The last is that of a two-sided t-test that the gap isn't 0, corrected by Benjamini and Hochberg
    over the labels of a size.
    """
    table = intervals(gaps, ["label", "parameters"], "gap").rename(columns={"mean": "gap"})
    tests = gaps.groupby(["label", "parameters"], sort=False)["gap"].agg(lambda x: p_differs([*x]))
    table["p (BH)"] = [tests[label, size] for label, size in table[["label", "parameters"]].values]
    by_size = table.groupby("parameters")["p (BH)"]
    table["p (BH)"] = by_size.transform(lambda p: corrected(p.tolist(), "fdr_bh"))
    return table


def slopes(gaps: pd.DataFrame) -> pd.DataFrame:
    """How each label's gap changes with size: one least-squares line per seed, and their slopes.

    Columns: label, sizes, n (seeds that are there at all of the label's sizes), slope (nats per
    factor of ten in parameters), ±, `p (above 0)` of a one-sided t-test over the seeds, and the
    same corrected by Benjamini and Hochberg. Labels with a single size are left out.
    """
    rows: list[tuple[Any, ...]] = []
    for label, sizes, lines in _lines(gaps, fewest_sizes=2):
        found = lines[0].tolist()
        mean, half_width, n = mean_interval(found)
        rows.append((label, sizes, n, mean, half_width, p_below([-s for s in found])))
    names = ["label", "sizes", "n", "slope", "±", "p (above 0)"]
    table = pd.DataFrame(rows, columns=names)
    return table.assign(**{"p (BH)": corrected(table["p (above 0)"].tolist(), "fdr_bh")})


def _lines(gaps: pd.DataFrame, fewest_sizes: int) -> Iterator[tuple[Any, int, np.ndarray]]:
    """For each label that is at so many sizes: label, sizes, and a line for each seed.

    Lines are straight over log₁₀(parameters): an array (2, seeds) of slopes and of heights at one
    parameter. A seed that is missing at one of the label's sizes has none.
    """
    for label, part in gaps.groupby("label", sort=False):
        wide = part.pivot(index="seed", columns="parameters", values="gap").dropna()
        if wide.shape[1] >= fewest_sizes and not wide.empty:
            sizes = np.log10(wide.columns.to_numpy(float))
            yield label, len(sizes), np.polyfit(sizes, wide.to_numpy().T, 1)


def extrapolated(gaps: pd.DataFrame, parameters: Sequence[float]) -> pd.DataFrame:
    """Straight lines of the gap over log₁₀(parameters), one per seed: their mean, and ± (95 %).

    Columns: label, parameters, gap, ± (Student's t over the seeds). Labels without a seed at all of
    their sizes, or at fewer than FEWEST_SIZES, have no rows. The interval is that of the mean line;
    it does not cover that the law may be another one.

    Args:
        gaps: returned by `gaps_of`.
        parameters: sizes for which the lines are computed.
    """
    rows: list[tuple[Any, ...]] = []
    for label, _, (slope, height) in _lines(gaps, FEWEST_SIZES):
        for size in parameters:
            mean, half_width, _ = mean_interval((height + slope * math.log10(size)).tolist())
            rows.append((label, size, mean, half_width))
    return pd.DataFrame(rows, columns=["label", "parameters", "gap", "±"])


def extrapolation_table(gaps: pd.DataFrame, parameters: float) -> pd.DataFrame:
    """`slopes`, with the mean line's gap at one size: `predicted`, and its ± (95 %).

    NaN where `extrapolated` has no row.
    """
    line = extrapolated(gaps, [parameters]).drop(columns="parameters")
    line = line.rename(columns={"gap": "predicted", "±": "± predicted"})
    return slopes(gaps).merge(line, on="label", how="left")


def kept_sizes(pattern: str) -> list[Path | str]:
    """Folders of kept studies whose name matches, one per size, sorted by name."""
    named = {path.name: path for place in kept_folders() for path in place.glob(pattern)}
    return [path for _, path in sorted(named.items()) if path.is_dir()]
