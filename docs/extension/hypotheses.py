"""The five registered hypotheses (data/study/README.md) and what the kept records answer.

python docs/extension/hypotheses.py
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from lowrank_lab.analysis.ladder import REFERENCE, gaps_of, slopes
from lowrank_lab.analysis.stats import corrected
from lowrank_lab.analysis.tables import claims
from lowrank_lab.runs.run import final_table, load_runs

ROOT = Path(__file__).resolve().parent.parent.parent
KEPT = ROOT / "data" / "study"
# hypotheses_s3 is the part of ladder_s3 that is trained.
LADDER = (KEPT / "ladder_s1", KEPT / "ladder_s2", KEPT / "hypotheses_s3")
BOTH, TRANSPORT = "low-rank + refactor + reset", "low-rank + transport"
LEVEL = 0.05  # of all five tests together
FEWEST_SEEDS = 5


def hypotheses(folders: Sequence[Path] = LADDER) -> pd.DataFrame:
    """One row per hypothesis: statement, estimate, ±, n (seeds), p, p (Holm), verdict.

    Estimates are negative where a hypothesis says *below*, positive where it says *grows* or
    *shrinks*: differences at the largest size in nats per token, slopes per factor of ten in
    parameters. The verdict is *yes* (p (Holm) < LEVEL) or *not shown*; *not trained* where the
    largest size lacks a row, which counts as a p of 1 in the correction of the others.

    Args:
        folders: the ladder's studies, smallest size first.

    Raises:
        ValueError: a hypothesis has fewer than FEWEST_SEEDS seeds.
    """
    finals = final_table(load_runs(folders[-1]))
    compared = folders if REFERENCE in {*finals["label"]} else folders[:-1]
    gaps = gaps_of(compared)
    rows = [
        _below(finals, BOTH, "low-rank"),
        _below(finals, TRANSPORT, BOTH),
        _slope(gaps, "low-rank", "low-rank's gap grows with size", len(folders)),
        _slope(gaps, "muon", "Muon's gain shrinks with size", len(folders)),
        _below(finals, "full-rank, 64 × 5", "low-rank"),
    ]
    names = ["statement", "estimate", "±", "n", "p"]
    table = pd.DataFrame(rows, columns=names, index=pd.RangeIndex(1, 6, name="hypothesis"))
    trained = table["n"] > 0
    if (table.loc[trained, "n"] < FEWEST_SEEDS).any():
        raise ValueError(f"n: {table['n'].tolist()} is not allowed; {FEWEST_SEEDS} seeds or more")
    smallest = gaps["parameters"].min()
    of_muon = gaps[(gaps["label"] == "muon") & (gaps["parameters"] == smallest)]
    if of_muon["gap"].mean() >= 0:  # no gain that could shrink: counts as not rejected
        table.loc[4, "p"] = 1.0
    table["p (Holm)"] = corrected(table["p"].fillna(1.0).tolist(), "holm")
    table["verdict"] = np.where(table["p (Holm)"] < LEVEL, "yes", "not shown")
    table.loc[~trained, ["p (Holm)", "verdict"]] = [np.nan, "not trained"]
    return table


def _below(finals: pd.DataFrame, a: str, b: str) -> tuple[object, ...]:
    if not {a, b} <= {*finals["label"]}:
        return f"{a} ends below {b}", np.nan, np.nan, 0, np.nan
    row = claims(finals, [(a, b)]).iloc[0]
    return f"{a} ends below {b}", *row[["A − B", "±", "n", "p (A < B)"]]


def _slope(gaps: pd.DataFrame, label: str, words: str, sizes: int) -> tuple[object, ...]:
    row = slopes(gaps).set_index("label").loc[label]
    if row["sizes"] < sizes:
        return words, np.nan, np.nan, 0, np.nan
    return words, *row[["slope", "±", "n", "p (above 0)"]]


if __name__ == "__main__":
    sys.stdout.write(f"{hypotheses().to_string()}\n")
