"""Tables of kept studies, as lines of Markdown: what the directives of `kept_studies` write."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from hypotheses import INSTEAD, KEPT, LEVEL, ROOT, TRENDS, hypotheses
from markdown_tables import markdown_table

from lowrank_lab.analysis.ladder import REFERENCE, extrapolation_table, gap_table, gaps_of, slopes
from lowrank_lab.analysis.rates import rate_table, robustness
from lowrank_lab.analysis.tables import by_documents, formatted, structure, summary, verdicts
from lowrank_lab.report import asked_in
from lowrank_lab.runs.run import Run, complete_runs, final_table, load_runs
from lowrank_lab.studies.plain_yaml import read_yaml

NO_BREAK = "\u00a0"
SHARED = 0.25  # share of filled cells; an emptier table lists each row's own values
TO = 60e6  # parameters at which published gaps stand beside extrapolated ones
SIZES = ("60m", "130m", "350m", "1b")
# Published perplexities on C4 at these sizes: the table in the README of SCALE's repository.
PUBLISHED = {
    "full-rank": (30.05, 23.13, 18.77, 16.52),
    "muon": (28.86, 22.20, 16.70, 14.18),
    "galore": (34.58, 25.31, 19.37, 15.57),
    "fira": (30.34, 22.96, 16.82, 15.10),
    "apollo": (30.94, 22.93, 16.75, 14.20),
    "scale": (30.81, 22.57, 16.32, 14.25),
}


def study(name: str) -> list[str]:
    """A study's rows, the answers to its questions, its recorded layers."""
    runs, finals = complete_runs(KEPT / name), finals_of(name)
    what, pairs = asked_in(ROOT / "notebooks" / "studies" / f"{name}.yaml")
    found = [f"`notebooks/studies/{name}.yaml`, {len(finals)} runs. {' '.join(what.split())}"]
    found += ["", "**How each variant ended**", "", *frame(formatted(summary(finals)))]
    if pairs:
        found += ["", "**Differences in test loss, A − B, seed by seed**", ""]
        found += frame(formatted(answers(runs, finals, pairs)))
    ends = structure(runs)
    if len(ends.columns) > 1:
        found += ["", "**Recorded layers at the end of training**", "", *frame(formatted(ends))]
    return found


def answers(
    runs: Sequence[Run], finals: pd.DataFrame, pairs: Sequence[tuple[str, str]]
) -> pd.DataFrame:
    """The verdicts on a study's pairs that have runs, and their bootstrap intervals."""
    table = verdicts(finals, pairs)
    table = table[table["n"] > 0]
    drawn = by_documents(runs, pairs)
    if drawn.empty:
        return table
    ends = drawn[["low", "high"]].map(signed)
    drawn["over seeds and documents"] = ends["low"] + " to " + ends["high"]
    return table.merge(drawn[["A", "B", "over seeds and documents"]], on=["A", "B"], how="left")


def rates(name: str, setting: str = "") -> list[str]:
    """Validation loss over learning rates, or over another setting, as it stands in labels."""
    finals = finals_of(name)
    if setting:
        parts = finals["label"].str.rpartition(f", {setting} ")
        table = finals.assign(variant=parts[0], at=parts[2].astype(float)).pivot_table(
            index="variant", columns="at", values="validation_loss"
        )
    else:
        table = rate_table(finals).pivot_table(index="label", columns="lr", values="mean")
    table = table.loc[table.min(axis=1).sort_values().index]
    if table.notna().to_numpy().mean() < SHARED:
        return _by_row(table)
    shown = table.map(lambda loss: f"{loss:.3f}").where(table.notna(), "")
    head = ["variant", *(f"{value:g}" for value in shown.columns)]
    return markdown_table(head, shown.reset_index().to_numpy().tolist())


def _by_row(table: pd.DataFrame) -> list[str]:
    """The table for rows that share few values: each row lists its own, in ascending order."""
    cells = [[f"{loss:.3f} at {value:.3g}" for value, loss in row.dropna().items()]
             for _, row in table.iterrows()]  # fmt: skip
    most = max(map(len, cells))
    filled = ([label, *own, *[""] * (most - len(own))]
              for label, own in zip(table.index, cells, strict=True))  # fmt: skip
    return markdown_table(["variant", "lowest", *["…"] * (most - 1)], filled)


def robust(name: str) -> list[str]:
    """Each variant of a study file at its best setting, and how far its rate may be off there."""
    found = robustness(finals_of(name))
    given = read_yaml(ROOT / "notebooks" / "studies" / f"{name}.yaml", "study")["variants"]
    parts = [_variant_and_setting(label, given) for label in found["label"]]
    best = found.assign(variant=[v for v, _ in parts], setting=[s for _, s in parts])
    best = best.drop_duplicates("variant")
    head = ["variant", "setting", "best rate", "validation loss", "÷", "×", "width", "diverges at"]
    rows = []
    for _, row in best.iterrows():
        reach = [row[column] for column in ("down", "up", "width", "diverges at")]
        shown = ["" if math.isnan(value) else f"{value:.3g}" for value in reach]
        found_at = (f"{row['best rate']:g}", f"{row['validation loss']:.3f}")
        rows.append([row["variant"], row["setting"], *found_at, *shown])
    if not best["setting"].any():
        head, rows = head[:1] + head[2:], [row[:1] + row[2:] for row in rows]
    return markdown_table(head, rows)


def _variant_and_setting(label: str, variants: Iterable[str]) -> tuple[str, str]:
    """The variant that a label begins with, and the values of its grid."""
    variant = max((v for v in variants if f"{label}, ".startswith(f"{v}, ")), key=len)
    return variant, label.removeprefix(variant).removeprefix(", ")


def gaps(*names: str) -> list[str]:
    """Each row's gap to full rank, one column per size.

    A star marks gaps that differ from 0 after Benjamini and Hochberg's correction over the rows of
    a size.
    """
    table = gap_table(gaps_of([KEPT / name for name in names]))
    means = table.pivot_table(index="label", columns="parameters", values="gap")
    stars = np.where(table["p (BH)"] < LEVEL, " *", "")
    table["shown"] = [
        f"{with_interval(row['gap'], row['±'])} ({row['n']}){star}".replace(" ", NO_BREAK)
        for row, star in zip(table.to_dict("records"), stars, strict=True)
    ]
    shown = table.pivot_table(index="label", columns="parameters", values="shown", aggfunc="first")
    head = ["row", *(f"{size:,}" for size in shown.columns)]
    shown = shown.loc[means.iloc[:, 0].sort_values().index].fillna("")
    return markdown_table(head, shown.reset_index().to_numpy().tolist())


def trends(*names: str) -> list[str]:
    """The slope of each row's gap over log₁₀ of the parameters, from two sizes on.

    Its p-values are those of a one-sided test that it is above 0, uncorrected and corrected over
    the rows.
    """
    table = slopes(gaps_of([KEPT / name for name in names]))
    rows = [
        (row["label"], with_interval(row["slope"], row["±"]), row["n"],
         *("" if math.isnan(row[p]) else f"{row[p]:.3g}" for p in ("p (above 0)", "p (BH)")))
        for row in table.to_dict("records")
    ]  # fmt: skip
    return markdown_table(("row", "slope", "n", "p (above 0)", "p (BH)"), rows)


def registered() -> list[str]:
    """The registered tests (`hypotheses.py`), and the trends with other full ranks at a size."""
    found = _tests(hypotheses())
    for words, references in INSTEAD.items():
        trends = hypotheses(references=references).loc[TRENDS]
        found += ["", f"With gaps to {words}:", "", *_tests(trends)]
    return found


def _tests(table: pd.DataFrame) -> list[str]:
    table = table.assign(n=table["n"].astype(int))
    table.insert(1, "measured", list(map(with_interval, table["estimate"], table["±"])))
    for name in ("p", "p (Holm)"):
        table[name] = table[name].map("{:.3g}".format)
    return frame(table.drop(columns=["estimate", "±"]).reset_index())


def extrapolation(*names: str) -> list[str]:
    """Each row's gap at its largest size, what lines through three sizes say at 60 M, and gaps that
    were published.
    """
    gaps = gaps_of([KEPT / name for name in names])
    table = extrapolation_table(gaps, TO)
    table = table[table["predicted"].notna() | table["label"].isin(PUBLISHED)]
    ends = gap_table(gaps).sort_values("parameters").drop_duplicates("label", keep="last")
    rows = [
        (
            row["label"],
            f"{with_interval(row['gap'], row['±'])} ({row['parameters'] / 1e6:.2f} M)",
            "" if math.isnan(row["predicted"])
            else with_interval(row["predicted"], row["± predicted"]),
            *published(row["label"]),
        )
        for row in table[["label", "predicted", "± predicted"]].merge(ends).to_dict("records")
    ]  # fmt: skip
    head = ("row", "at its largest size", "at 60 M")
    return markdown_table((*head, *(f"published, {size}" for size in SIZES)), rows)


def published(label: str) -> list[str]:
    """Gaps in nats per token that were published for a method, one per size; empty if none were."""
    if label not in PUBLISHED:
        return [""] * len(SIZES)
    both = zip(PUBLISHED[label], PUBLISHED[REFERENCE], strict=True)
    return [signed(math.log(own / adamw)) for own, adamw in both]


def finals_of(name: str) -> pd.DataFrame:
    """How each run of a kept study ended."""
    return final_table(load_runs(KEPT / name))


def signed(value: float) -> str:
    """A number with its sign, a minus sign where it is below 0."""
    return f"{value:+.3f}".replace("-", "−")


def with_interval(mean: float, half_width: float) -> str:
    """A signed number ± its interval, if there is one."""
    return signed(mean) + ("" if math.isnan(half_width) else f" ± {half_width:.3f}")


def frame(table: pd.DataFrame) -> list[str]:
    """A table of pandas as Markdown."""
    shown = table.astype(object).where(table.notna(), "")
    return markdown_table([str(c) for c in shown.columns], shown.to_numpy().tolist())
