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
LADDER = tuple(KEPT / name for name in ("ladder_s1", "ladder_s2", "ladder_s3"))
TRENDS = [3, 4]  # hypotheses about gaps over sizes
# Rows to which gaps may be taken instead of full rank's, by size: the best rate that was tried at
# S3, and the β₂ that seeds of tuning prefer at S2.
TRIED, OTHER_BETA2 = "full-rank at 8.05e-4", "full-rank at beta2 0.95"
INSTEAD = {
    f"*{TRIED}* at S3, the best rate that was tried there": (REFERENCE, REFERENCE, TRIED),
    f"*{OTHER_BETA2}* at S2, the β₂ that tuning prefers there": (
        REFERENCE,
        OTHER_BETA2,
        REFERENCE,
    ),
}
BOTH, TRANSPORT = "low-rank + refactor + reset", "low-rank + transport"
LEVEL = 0.05  # of all five tests together
FEWEST_SEEDS = 5


def hypotheses(
    folders: Sequence[Path] = LADDER, references: Sequence[str] = (REFERENCE,) * len(LADDER)
) -> pd.DataFrame:
    """One row per hypothesis: statement, estimate, ±, n (seeds), p, p (Holm), verdict.

    Estimates are negative where a hypothesis says *below*, positive where it says *grows* or
    *shrinks*: differences at the largest size in nats per token, slopes per factor of ten in
    parameters. The verdict is *yes* (p (Holm) < LEVEL) or *not shown*.

    Args:
        folders: the ladder's studies, smallest size first.
        references: the row to which gaps are taken, by size.

    Raises:
        ValueError: a hypothesis has fewer than FEWEST_SEEDS seeds.
    """
    finals = final_table(load_runs(folders[-1]))
    pairs = zip(folders, references, strict=True)
    gaps = pd.concat([gaps_of([folder], reference) for folder, reference in pairs])
    rows = [
        _below(finals, BOTH, "low-rank"),
        _below(finals, TRANSPORT, BOTH),
        _slope(gaps, "low-rank", "low-rank's gap grows with size"),
        _slope(gaps, "muon", "Muon's gain shrinks with size"),
        _below(finals, "full-rank, 64 × 5", "low-rank"),
    ]
    names = ["statement", "estimate", "±", "n", "p"]
    table = pd.DataFrame(rows, columns=names, index=pd.RangeIndex(1, 6, name="hypothesis"))
    if (table["n"] < FEWEST_SEEDS).any():
        raise ValueError(f"n: {table['n'].tolist()} is not allowed; {FEWEST_SEEDS} seeds or more")
    smallest = gaps["parameters"].min()
    of_muon = gaps[(gaps["label"] == "muon") & (gaps["parameters"] == smallest)]
    if of_muon["gap"].mean() >= 0:  # no gain that could shrink: counts as not rejected
        table.loc[4, "p"] = 1.0
    table["p (Holm)"] = corrected(table["p"].tolist(), "holm")
    table["verdict"] = np.where(table["p (Holm)"] < LEVEL, "yes", "not shown")
    return table


def _below(finals: pd.DataFrame, a: str, b: str) -> tuple[object, ...]:
    row = claims(finals, [(a, b)]).iloc[0]
    return f"{a} ends below {b}", *row[["A − B", "±", "n", "p (A < B)"]]


def _slope(gaps: pd.DataFrame, label: str, words: str) -> tuple[object, ...]:
    row = slopes(gaps).set_index("label").loc[label]
    return words, *row[["slope", "±", "n", "p (above 0)"]]


if __name__ == "__main__":
    sys.stdout.write(f"{hypotheses().to_string()}\n")
    for words, references in INSTEAD.items():
        table = hypotheses(references=references).loc[TRENDS]
        sys.stdout.write(f"\nwith gaps to {words}:\n{table.to_string()}\n")
