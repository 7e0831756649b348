"""How the gap of a method to full rank changes with the size of the model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from lowrank_lab.analysis.stats import mean_interval
from lowrank_lab.config import InputError
from lowrank_lab.paths import kept_folders
from lowrank_lab.runs.run import final_table, load_runs

FEWEST_SIZES = 3  # two points lie on a line, whatever the law is


def kept_sizes(pattern: str, otherwise: Iterable[str] = ()) -> list[Path | str]:
    """Folders of kept studies whose name matches, one per size; `otherwise` for fewer than two."""
    named = {path.name: path for place in kept_folders() for path in place.glob(pattern)}
    found = [path for _, path in sorted(named.items()) if path.is_dir()]
    return [*found] if len(found) > 1 else [*otherwise]


def gaps(folders: Iterable[Path | str], baseline: str = "full-rank") -> pd.DataFrame:
    """Test loss minus the baseline's at the same seed, one row per size, label and seed.

    Columns: label, parameters (of the baseline), tokens, seed, gap (nats per token). Labels are
    those that every folder has.

    Raises:
        InputError: no folder, or a folder without the baseline.
    """
    tables = []
    for folder in folders:
        finals = final_table(load_runs(folder)).set_index("seed")
        base = finals[finals["label"] == baseline]
        if base.empty:
            raise InputError("baseline", baseline, f"one of the labels in {folder}")
        others = finals[finals["label"] != baseline].join(base["test_loss"].rename("base"))
        found = others.assign(
            gap=others["test_loss"] - others["base"],
            parameters=int(base["parameters"].iloc[0]),
            tokens=int(base["tokens_seen"].iloc[0]),
        ).dropna(subset="gap")
        tables.append(found.reset_index()[["label", "parameters", "tokens", "seed", "gap"]])
    if not tables:
        raise InputError("folders", "[]", "at least one folder of runs")
    common = set.intersection(*(set(table["label"]) for table in tables))
    table = pd.concat(tables, ignore_index=True)
    return table[table["label"].isin(common)].reset_index(drop=True)


def gap_table(gaps: pd.DataFrame) -> pd.DataFrame:
    """Mean gap per label and size with the half-width of its 95 % interval (Student's t), and n."""
    rows = [
        (label, parameters, *mean_interval(group["gap"].tolist()))
        for (label, parameters), group in gaps.groupby(["label", "parameters"], sort=True)
    ]
    return pd.DataFrame(rows, columns=["label", "parameters", "gap", "half_width", "n"])


def extrapolated(gaps: pd.DataFrame, parameters: Sequence[float]) -> pd.DataFrame:
    """A straight line of the gap over log₁₀(parameters), with its 95 % prediction interval.

    Columns: label, parameters, gap, low, high. Labels at fewer than three sizes have no rows: two
    sizes determine a line, and nothing says whether the law is one. The interval covers the scatter
    of seeds around the line, and not that the law may be another one.

    Args:
        gaps: returned by `gaps`.
        parameters: sizes for which the line is computed.
    """
    import statsmodels.api as sm

    tables = []
    for label, group in gaps.groupby("label", sort=True):
        if group["parameters"].nunique() < FEWEST_SIZES:
            continue
        line = sm.OLS(group["gap"], sm.add_constant(np.log10(group["parameters"]))).fit()
        at = sm.add_constant(np.log10(np.asarray(parameters, float)), has_constant="add")
        found = line.get_prediction(at).summary_frame(alpha=0.05)
        columns = {"mean": "gap", "obs_ci_lower": "low", "obs_ci_upper": "high"}
        found = found[[*columns]].rename(columns=columns)
        tables.append(found.assign(label=label, parameters=parameters))
    names = ["label", "parameters", "gap", "low", "high"]
    return pd.concat(tables, ignore_index=True)[names] if tables else pd.DataFrame(columns=names)
