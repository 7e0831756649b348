"""Sphinx directives that write tables from the kept studies."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import pandas as pd
from hypotheses import LADDER, LEVEL, hypotheses
from markdown_directive import ROOT, MarkdownDirective, markdown_table
from sphinx.application import Sphinx

if TYPE_CHECKING:
    from lowrank_lab.runs.run import Run

BENCHMARKS = ROOT / "benchmarks" / "results.json"
# Gaps of perplexities to AdamW at 60m on C4, as differences of their logarithms. Muon: the table of
# SCALE's repository (28.86 and 30.05); low-rank: GaLore's paper (78.18 and 34.06; random factors).
PUBLISHED = {"muon": -0.040, "low-rank": 0.831}


class KeptStudy(MarkdownDirective):
    """The tables of a kept study: its rows, the answers to its questions, its recorded layers."""

    required_arguments = 1
    classes: ClassVar[list[str]] = ["kept"]

    def sources(self) -> Iterable[Path]:
        return records_of(self.arguments[0])

    def lines(self) -> list[str]:
        from lowrank_lab.analysis.tables import formatted, structure, summary
        from lowrank_lab.report import asked_in
        from lowrank_lab.runs.run import complete_runs

        name = self.arguments[0]
        runs = complete_runs(ROOT / "data" / "study" / name)
        finals = finals_of(name)
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


def answers(runs: list[Run], finals: pd.DataFrame, pairs: list[tuple[str, str]]) -> pd.DataFrame:
    """The verdicts on a study's pairs that have runs, and their bootstrap intervals."""
    from lowrank_lab.analysis.tables import by_documents, verdicts

    table = verdicts(finals, pairs, how="fdr_bh")
    table = table[table["n"] > 0]
    drawn = by_documents(runs, pairs)
    if drawn.empty:
        return table
    ends = drawn[["low", "high"]].map("{:+.3f}".format).replace("-", "−", regex=True)
    drawn["over seeds and documents"] = ends["low"] + " to " + ends["high"]
    return table.merge(drawn[["A", "B", "over seeds and documents"]], on=["A", "B"], how="left")


def finals_of(name: str) -> pd.DataFrame:
    """How each run of a kept study ended."""
    from lowrank_lab.runs.run import final_table, load_runs

    return final_table(load_runs(ROOT / "data" / "study" / name))


def records_of(name: str) -> list[Path]:
    """The files of a kept study, and its study file."""
    kept = ROOT / "data" / "study"
    found = [*kept.glob(f"{name}/**/*"), *kept.glob(f"{name}[._-]*")]
    return [*(p for p in found if p.is_file()), ROOT / "notebooks" / "studies" / f"{name}.yaml"]


SHARED = 0.25  # share of filled cells; an emptier table lists each row's own values


class KeptRates(MarkdownDirective):
    """Validation loss over the values of a setting, one row per variant of a kept study.

    The setting is the learning rate; a second argument names another, as it stands in labels.
    """

    required_arguments = 1
    optional_arguments = 1

    def sources(self) -> Iterable[Path]:
        return records_of(self.arguments[0])

    def lines(self) -> list[str]:
        from lowrank_lab.figures import rate_table

        name, *setting = self.arguments
        finals = finals_of(name)
        if setting:
            parts = finals["label"].str.rpartition(f", {setting[0]} ")
            table = finals.assign(variant=parts[0], at=parts[2].astype(float)).pivot_table(
                index="variant", columns="at", values="validation_loss"
            )
        else:
            table = rate_table(finals).pivot_table(index="label", columns="lr", values="mean")
        table = table.loc[table.min(axis=1).sort_values().index]
        if table.notna().to_numpy().mean() < SHARED:
            return self.by_row(table)
        shown = table.map(lambda loss: f"{loss:.3f}").where(table.notna(), "")
        head = ["variant", *(f"{value:g}" for value in shown.columns)]
        return markdown_table(head, shown.reset_index().to_numpy().tolist())

    @staticmethod
    def by_row(table: pd.DataFrame) -> list[str]:
        """The table for rows that share few values: each row lists its own, in ascending order."""
        cells = [[f"{loss:.3f} at {value:.3g}" for value, loss in row.dropna().items()]
                 for _, row in table.iterrows()]  # fmt: skip
        most = max(map(len, cells))
        filled = ([label, *own, *[""] * (most - len(own))]
                  for label, own in zip(table.index, cells, strict=True))  # fmt: skip
        return markdown_table(["variant", "lowest", *["…"] * (most - 1)], filled)


class KeptRobustness(KeptRates):
    """Each variant of a kept study at its best setting, and how far its rate may be off there."""

    def lines(self) -> list[str]:
        from lowrank_lab.analysis.rates import robustness

        found = robustness(finals_of(self.arguments[0]))
        named = found["label"].str.partition(", ")
        best = found.assign(variant=named[0], setting=named[2]).drop_duplicates("variant")
        head = ["variant", "setting", "best rate", "validation loss"]
        head += ["÷", "×", "width", "diverges at"]
        rows = []
        for _, row in best.iterrows():
            reach = [row["down"], row["up"], row["width"], row["diverges at"]]
            shown = ["" if math.isnan(value) else f"{value:.3g}" for value in reach]
            found_at = (f"{row['best rate']:g}", f"{row['validation loss']:.3f}")
            rows.append([row["variant"], row["setting"], *found_at, *shown])
        if not best["setting"].any():
            head, rows = head[:1] + head[2:], [row[:1] + row[2:] for row in rows]
        return markdown_table(head, rows)


class KeptGaps(MarkdownDirective):
    """Each row's gap to full rank in kept studies of the ladder, one column per size.

    A star marks gaps that differ from 0 after Benjamini and Hochberg's correction over the rows of
    a size. Two or more sizes add the slope of the gap over log₁₀ of the parameters, and the p-value
    of a one-sided test that the slope is above 0, uncorrected and corrected over the rows.
    """

    required_arguments = 1
    optional_arguments = 3

    def sources(self) -> Iterable[Path]:
        return [path for name in self.arguments for path in records_of(name)]

    def lines(self) -> list[str]:
        from lowrank_lab.analysis.ladder import gap_table, gaps_of, slopes

        gaps = gaps_of([ROOT / "data" / "study" / name for name in self.arguments])
        table = gap_table(gaps)
        means = table.pivot_table(index="label", columns="parameters", values="gap")
        table["shown"] = table.apply(
            lambda row: (
                f"{with_interval(row['gap'], row['±'])} ({row['n']})"
                + (" *" if row["p (BH)"] < LEVEL else "")
            ),
            axis=1,
        )
        shown = table.pivot_table(
            index="label", columns="parameters", values="shown", aggfunc="first"
        )
        head = ["row", *(f"{size:,}" for size in shown.columns)]
        if len(shown.columns) > 1:
            steep = slopes(gaps).set_index("label")
            shown["slope"] = steep.apply(lambda x: with_interval(x["slope"], x["±"]), axis=1)
            for name in ("p (above 0)", "p (BH)"):
                shown[name] = steep[name].map(lambda p: "" if math.isnan(p) else f"{p:.3g}")
            head += ["slope", "p", "p (BH)"]
        shown = shown.loc[means.iloc[:, 0].sort_values().index].fillna("")
        return markdown_table(head, shown.reset_index().to_numpy().tolist())


class KeptHypotheses(MarkdownDirective):
    """The registered tests (`hypotheses.py`), as the kept ladders answer them."""

    def sources(self) -> Iterable[Path]:
        return [path for folder in LADDER for path in records_of(folder.name)]

    def lines(self) -> list[str]:
        table = hypotheses()
        table.insert(1, "measured", list(map(with_interval, table["estimate"], table["±"])))
        for name in ("p", "p (Holm)"):
            table[name] = table[name].map("{:.3g}".format)
        return frame(table.drop(columns=["estimate", "±"]).reset_index())


class KeptExtrapolation(KeptGaps):
    """The gap at 60 M parameters that a line through three sizes predicts, and published ones."""

    def lines(self) -> list[str]:
        from lowrank_lab.analysis.ladder import extrapolation_table, gaps_of

        gaps = gaps_of([ROOT / "data" / "study" / name for name in self.arguments])
        table = extrapolation_table(gaps, 60e6).dropna(subset=["predicted"])
        rows = [
            (
                row["label"],
                with_interval(row["slope"], row["±"]),
                with_interval(row["predicted"], math.nan),
                " to ".join(with_interval(row[end], math.nan) for end in ("low", "high")),
                with_interval(PUBLISHED[label], math.nan) if label in PUBLISHED else "",
            )
            for label, row in zip(table["label"], table.to_dict("records"), strict=True)
        ]
        head = ("row", "slope", "at 60 M", "95 % prediction interval", "published at 60m")
        return markdown_table(head, rows)


class KeptCosts(KeptGaps):
    """Each row of kept ladders against a dense model of the same bytes, FLOPs and time.

    Time is the steps of a run times what `lowrank-lab bench steps` measured; rows that it has not
    measured have none. At the smallest size there is no smaller dense model: its rows are left out.
    """

    def sources(self) -> Iterable[Path]:
        return [*super().sources(), BENCHMARKS]

    def lines(self) -> list[str]:
        from lowrank_lab.analysis.costs import at_equal_cost, costs_of

        costs = costs_of([ROOT / "data" / "study" / name for name in self.arguments])
        sizes = dict(zip(costs["parameters"].unique(), self.arguments, strict=True))
        taken = step_times()
        costs["time"] = costs["steps"] * [
            taken.get(f"step at {sizes[size].rpartition('_')[2].upper()}, {label}", math.nan)
            for label, size in zip(costs["label"], costs["parameters"], strict=True)
        ]
        both = costs[["parameters", "label"]].drop_duplicates()
        both = both[both["parameters"] > min(sizes)]
        head = ["parameters at full rank", "row"]
        for cost, title in (("bytes", "bytes"), ("flops", "FLOPs"), ("time", "time")):
            table = at_equal_cost(costs.dropna(subset=[cost]), cost)
            shown = {
                f"share of {title}": table["share"].map("{:.0%}".format),
                f"A − dense, equal {title}": table.apply(
                    lambda row: with_interval(row["A − dense"], row["±"]), axis=1
                ),
            }
            head += shown
            found = table[["label", "parameters"]].assign(**shown)
            both = both.merge(found, on=["label", "parameters"], how="left")
        both = both.dropna(subset=head[2:], how="all").fillna("")
        both["parameters"] = both["parameters"].map("{:,}".format)
        return markdown_table(head, both[["parameters", "label", *head[2:]]].to_numpy().tolist())


def step_times() -> dict[str, float]:
    """Milliseconds by row of the benchmark `steps`, of the kind of machine that has them.

    Full rank's are the mean over the rounds that it took beside other rows.
    """
    kept = json.loads(BENCHMARKS.read_text())
    found: dict[str, list[float]] = {}
    for kind in (kept, *kept.get("machines", {}).values()):
        for row in kind["rows"]:
            if row["name"].startswith("step at S"):
                title, _, _ = row["name"].partition(", ")
                found.setdefault(row["name"], []).append(row["ours"])
                found.setdefault(f"{title}, full-rank", []).append(row["peer"])
        if found:
            break
    return {name: sum(taken) / len(taken) for name, taken in found.items()}


def with_interval(mean: float, half_width: float) -> str:
    """A signed number ± its interval, with minus signs."""
    width = "" if math.isnan(half_width) else f" ± {half_width:.3f}"
    return f"{mean:+.3f}{width}".replace("-", "−")


def frame(table: pd.DataFrame) -> list[str]:
    """A table of pandas as Markdown."""
    shown = table.astype(object).where(table.notna(), "")
    return markdown_table([str(c) for c in shown.columns], shown.to_numpy().tolist())


def add_directives(app: Sphinx) -> None:
    """Register them."""
    app.add_directive("kept-study", KeptStudy)
    app.add_directive("kept-rates", KeptRates)
    app.add_directive("kept-robustness", KeptRobustness)
    app.add_directive("kept-gaps", KeptGaps)
    app.add_directive("kept-costs", KeptCosts)
    app.add_directive("kept-hypotheses", KeptHypotheses)
    app.add_directive("kept-extrapolation", KeptExtrapolation)
