"""The figures of a folder of runs, chosen by what its runs vary."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd

from lowrank_lab import figures
from lowrank_lab.analysis import grid
from lowrank_lab.analysis.tables import (
    comparable,
    summary,
)
from lowrank_lab.figures.positions import MOST_PANELS
from lowrank_lab.report.picture import Picture
from lowrank_lab.report.spectra import spectra_pictures
from lowrank_lab.runs.run import (
    Run,
    complete_runs,
    final_table,
    finals_of,
    find_runs,
    momentum_of,
    positions_of,
    table_of,
)

MOST_LABELS = 20  # labels per figure
MOST_ROWS = 32  # labels in a figure with one row per label
FEWEST_RANKS = 3  # ranks per variant, in a study over ranks
FEWEST_RATES = 3  # learning rates per label, in a study over learning rates
SPEED = ("device", "threads", "processes")  # seconds are compared only if all runs agree in these


def best(runs: pd.DataFrame, most: int = MOST_LABELS) -> pd.DataFrame:
    """The runs of the `most` labels with the lowest test loss, as many as a figure can show."""
    labels = summary(final_table(runs))["label"].head(most)
    return runs[runs["label"].isin(labels)]


def pictures(folder: Path | str, *about: str) -> Iterator[Picture]:
    """Draw the figures of finished runs one by one; most show the best MOST_LABELS labels.

    Args:
        about: prefixes of figure names; only matching figures are returned. By default all.
    """
    runs = complete_runs(folder)
    finals = finals_of(runs, folder)
    for picture in drawn(runs, finals, summary(finals)["label"], folder):
        if not about or picture.name.startswith(about):
            yield picture


def drawn(
    runs: Sequence[Run],
    finals: pd.DataFrame,
    ranking: pd.Series[str],
    folder: Path | str,
    pairs: Sequence[tuple[str, str]] = (),
) -> Iterator[Picture]:
    """The figures of runs, given the ranking of their labels; reads only the runs shown."""
    yield from _comparisons(runs, finals, ranking, pairs)
    labels = set(ranking.head(MOST_LABELS))
    shown = [run for run in runs if run.label in labels]
    table, finals = table_of(shown, folder), finals[finals["label"].isin(labels)]
    which = f" The {MOST_LABELS} best of {len(ranking)}." if len(ranking) > MOST_LABELS else ""
    curves = figures.curve_table(table)
    courses = bool((curves.groupby("label").size() > 1).any())  # a curve needs two evaluations
    if courses:
        yield Picture(
            "loss_by_tokens", figures.loss_curves(table), curves,
            f"Validation loss against training tokens; the steep start is cut off.{which}",
        )  # fmt: skip
    if courses and not set(SPEED) & set(origins(shown)):
        yield Picture(
            "loss_by_time", figures.loss_curves(table, "seconds"),
            figures.curve_table(table, "seconds"),
            f"Validation loss against time spent in training steps.{which}",
        )  # fmt: skip
    best_first = ranking.tolist()
    ranked = sorted(shown, key=lambda run: best_first.index(run.label))
    positions = positions_of(ranked)
    if not positions.empty:
        cut = positions["label"].nunique() > MOST_PANELS
        few = f" The {MOST_PANELS} best of {len(ranking)}." if cut else which
        yield Picture(
            "positions", figures.position_curves(positions), positions,
            f"Validation loss by position in the window, from light to dark over training.{few}",
        )  # fmt: skip
    cosines = figures.cosine_table(finals, momentum_of(shown), pairs) if pairs else pd.DataFrame()
    if len(cosines) > 1:
        yield Picture(
            "cosine", figures.cosine_beside_gain(cosines), cosines,
            "Cosine of the momentum before and after events, and what they change in test loss.",
        )  # fmt: skip
    yield Picture(
        "tradeoff", figures.tradeoff(finals), figures.tradeoff_table(finals),
        "Test perplexity against the bytes of weights and optimizer states; markers of the same "
        f"bytes stand side by side.{which}",
    )  # fmt: skip
    whole = _with_peaks(finals, shown)
    if whole["peak_bytes"].notna().all():
        yield Picture(
            "tradeoff_peak", figures.tradeoff(whole, peak=True),
            figures.tradeoff_table(whole, peak=True),
            "Test perplexity against the peak of a whole step: weights, gradients, states, "
            f"activations and temporaries.{which}",
        )  # fmt: skip
    yield from _map(runs, folder)
    memory = _memory_of(shown)
    yield Picture(
        "memory", figures.memory_bars(memory), figures.memory_table(memory),
        "Measured bytes of weights, gradients and optimizer states; projections apart.",
    )  # fmt: skip
    if "peak_memory_bytes" in table and table["peak_memory_bytes"].notna().any():
        yield Picture(
            "memory_course", figures.memory_course(table), figures.memory_course_table(table),
            "Peak memory of each step, above the weights and states that are held between steps.",
        )  # fmt: skip
    yield from spectra_pictures(ranked)


def _with_peaks(finals: pd.DataFrame, runs: Sequence[Run]) -> pd.DataFrame:
    """Add the column peak_bytes: the peak over all steps of a run, NaN if not recorded."""
    peaks: dict[str, float] = {}
    for run in runs:
        rows = (row.get("peak_memory_bytes") for row in run.records.metrics)
        found = [peak for peak in rows if peak]
        peaks[run.folder.name] = max(found, default=math.nan)
    names = [name.rpartition("/")[2] for name in finals["run"]]
    return finals.assign(peak_bytes=[peaks.get(name, math.nan) for name in names])


def _comparisons(
    runs: Sequence[Run],
    finals: pd.DataFrame,
    ranking: pd.Series[str],
    pairs: Sequence[tuple[str, str]],
) -> Iterator[Picture]:
    """Figures of final losses: over learning rates, else over ranks and as paired differences."""
    rates = figures.rate_table(finals)
    if (rates.groupby("label")["lr"].nunique() >= FEWEST_RATES).any():
        yield Picture(
            "rates", figures.rates(finals), rates,
            "Validation loss over peak learning rates, with the best one of each variant.",
        )  # fmt: skip
        return
    ranks = figures.rank_table(finals)
    tried = ranks.groupby("variant")["rank"].nunique()
    if len(tried) <= MOST_LABELS and (tried >= FEWEST_RANKS).any():
        whole = _with_peaks(finals, runs)
        finals = whole if whole["peak_bytes"].notna().all() else finals
        yield Picture(
            "over_ranks", figures.over_ranks(finals), figures.rank_table(finals),
            "Test loss against the bytes of weights and optimizer states, over ranks.",
        )  # fmt: skip
    labels = comparable(finals, ranking)
    asked = [(a, b) for a, b in pairs if {a, b} <= set(labels)]
    if asked and finals["seed"].nunique() > 1:
        compared = finals[finals["label"].isin(labels)]
        yield Picture(
            "claims", figures.claims(compared, asked), figures.claim_table(compared, asked),
            "What the study asks: test loss of one variant less another's with the same seed.",
        )  # fmt: skip
    if finals["seed"].nunique() > 1 and 1 < len(labels) <= MOST_ROWS:
        measures = Counter(b for _, b in pairs if b in labels).most_common(1)
        reference = measures[0][0] if measures else labels[0]
        reference = "full-rank" if "full-rank" in labels else reference
        compared = finals[finals["label"].isin(labels)]
        yield Picture(
            "differences", figures.differences(compared, reference),
            figures.difference_table(compared, reference),
            f"Test loss less that of {reference} with the same seed: all seeds and their mean.",
        )  # fmt: skip


def _map(runs: Sequence[Run], folder: Path | str) -> Iterator[Picture]:
    """Heat maps of the perplexity, if the runs are a grid of one method over two or more knobs."""
    if len({run.config.method for run in runs}) > 1:
        return
    table = grid.settings(folder)
    knobs = list(grid.varying(table))
    if len(knobs) < 2:
        return
    maps = list(grid.maps(table, *knobs[:2]))[: figures.MAX_MAPS]
    yield Picture(
        "map", figures.heat_maps(maps), pd.concat([cells.assign(**at) for at, cells in maps]),
        "Test perplexity over the knobs of the study: mean, half of the 95 % interval, and seeds.",
    )  # fmt: skip


def memory_of(folder: Path | str) -> pd.DataFrame:
    """Bytes by category, with the label, of every run with measured memory."""
    return _memory_of(find_runs(folder))


def _memory_of(runs: Sequence[Run]) -> pd.DataFrame:
    measured = [run for run in runs if run.has_memory]
    return pd.DataFrame([{"label": run.label, **run.memory} for run in measured])


def origins(runs: Sequence[Run]) -> dict[str, dict[str, int]]:
    """Differences in environment among the runs: name → value → number of runs."""
    names = {name: None for run in runs for name in run.ran_on}
    counted = {
        name: Counter(str(run.ran_on.get(name, "not recorded")) for run in runs) for name in names
    }
    return {name: dict(counts) for name, counts in counted.items() if len(counts) > 1}
