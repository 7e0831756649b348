"""Gaps over model sizes: their slopes, and extrapolations to larger models.

A gap is the test loss of a label minus that of the reference at the same size and with the same
seed, in nats per token. Sizes are parameters of the reference.
"""

from __future__ import annotations

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
    """How each label's gap changes with size: one least-squares slope per seed, and their mean.

    Columns: label, sizes, n (seeds that are there at all of the label's sizes), slope (nats per
    factor of ten in parameters), ±, `p (above 0)` of a one-sided t-test over the seeds, and the
    same corrected by Benjamini and Hochberg. Labels with a single size are left out.
    """
    rows: list[tuple[Any, ...]] = []
    for label, part in gaps.groupby("label", sort=False):
        wide = part.pivot(index="seed", columns="parameters", values="gap").dropna()
        if wide.shape[1] < 2 or wide.empty:
            continue
        sizes = np.log10(wide.columns.to_numpy(float))
        found = np.polyfit(sizes, wide.to_numpy().T, 1)[0].tolist()
        mean, half_width, n = mean_interval(found)
        rows.append((label, len(sizes), n, mean, half_width, p_below([-s for s in found])))
    names = ["label", "sizes", "n", "slope", "±", "p (above 0)"]
    table = pd.DataFrame(rows, columns=names)
    return table.assign(**{"p (BH)": corrected(table["p (above 0)"].tolist(), "fdr_bh")})


def extrapolated(gaps: pd.DataFrame, parameters: Sequence[float]) -> pd.DataFrame:
    """A straight line of the gap over log₁₀(parameters), with its 95 % prediction interval.

    Columns: label, parameters, gap, low, high. Labels at fewer than FEWEST_SIZES sizes have no
    rows. The interval covers the scatter of seeds around the line, and not that the law may be
    another one.

    Args:
        gaps: returned by `gaps_of`.
        parameters: sizes for which the line is computed.
    """
    from statsmodels.api import OLS, add_constant

    names = {"mean": "gap", "obs_ci_lower": "low", "obs_ci_upper": "high"}
    at = add_constant(np.log10(np.asarray(parameters, float)), has_constant="add")
    tables = []
    for label, part in gaps.groupby("label", sort=False):
        if part["parameters"].nunique() < FEWEST_SIZES:
            continue
        fit = OLS(part["gap"].to_numpy(), add_constant(np.log10(part["parameters"].to_numpy())))
        found = fit.fit().get_prediction(at).summary_frame(alpha=0.05).rename(columns=names)
        tables.append(found.assign(label=label, parameters=parameters))
    columns = ["label", "parameters", *names.values()]
    return (
        pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)
    )


def extrapolation_table(gaps: pd.DataFrame, parameters: float) -> pd.DataFrame:
    """`slopes`, with the gap that is predicted at one size: predicted, low, high (95 %).

    NaN where there are fewer than FEWEST_SIZES sizes.
    """
    line = extrapolated(gaps, [parameters]).drop(columns="parameters")
    return slopes(gaps).merge(line.rename(columns={"gap": "predicted"}), on="label", how="left")


def kept_sizes(pattern: str) -> list[Path | str]:
    """Folders of kept studies whose name matches, one per size, sorted by name."""
    named = {path.name: path for place in kept_folders() for path in place.glob(pattern)}
    return [path for _, path in sorted(named.items()) if path.is_dir()]
