"""Report on a folder of runs: a table, figures and a self-contained HTML page."""

from __future__ import annotations

import html
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from lowrank_lab import figures
from lowrank_lab.analysis import grid
from lowrank_lab.analysis.tables import (
    claims,
    comparable,
    differences,
    formatted,
    structure,
    summary,
)
from lowrank_lab.config import InputError
from lowrank_lab.runs.files import replacing
from lowrank_lab.runs.kept import KeptRecords, is_study, open_study, write_study
from lowrank_lab.runs.records import Records, Thinned
from lowrank_lab.runs.run import (
    Run,
    complete_runs,
    final_table,
    finals_of,
    find_runs,
    first_runs,
    spectra_of,
    table_of,
)
from lowrank_lab.studies.plain_yaml import read_yaml

MOST_LABELS = 20  # labels per figure
MOST_FIGURES = 12  # figures with one label each
MOST_ROWS = 32  # labels in a figure with one row per label
FEWEST_RANKS = 3  # ranks per variant, in a study over ranks
FEWEST_RATES = 3  # learning rates per label, in a study over learning rates
SPEED = ("device", "threads", "processes")  # seconds are compared only if all runs agree in these
KEPT_ROWS = 200  # training steps per run that `keep` copies, besides evaluations and events


@dataclass(frozen=True)
class Picture:
    """A figure, its data and its caption."""

    name: str
    figure: Figure
    table: pd.DataFrame
    caption: str


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
    for picture in _pictures(runs, finals, summary(finals)["label"], folder):
        if not about or picture.name.startswith(about):
            yield picture


def _pictures(
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
    recorded = first_runs(run for run in shown if run.has_spectra)
    best_first = ranking.tolist()
    spectra = spectra_of(sorted(recorded, key=lambda run: best_first.index(run.label)))
    if spectra.empty:
        return
    if len(ranking) > 1:
        last = figures.last_spectra(spectra)
        yield Picture(
            "spectra", figures.compared_spectra(last), last,
            "Singular values of the weights at the end of training "
            f"(one layer of each kind; one seed).{which}",
        )  # fmt: skip
    if len(ranking) > MOST_FIGURES:
        return  # too many figures: notebooks show them per run
    for label, part in spectra.groupby("label", sort=False):
        name = "".join(c if c.isalnum() else "_" for c in str(label))
        table = part.drop(columns="label")
        yield Picture(
            f"spectra_{name}", figures.spectrum_curves(table), table,
            f"Singular values of the weights while {label} trains, from light to dark "
            "(one layer of each kind; one seed).",
        )  # fmt: skip


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


def write_report(
    folder: Path | str,
    title: str | None = None,
    description: str = "",
    out: Path | str | None = None,
    figures_in: Path | str | None = None,
    pairs: Sequence[tuple[str, str]] = (),
) -> Path:
    """Write report.html (self-contained), CSV tables and figures/ into the folder of the runs.

    Args:
        out: output folder; by default `folder`.
        figures_in: folder of the figures; by default `out`/figures.
        pairs: pairs of labels (A, B) for the study's claims A < B; see `claims`.

    Returns:
        The path of report.html.

    Raises:
        InputError: there are no runs, or unfinished runs.
    """
    folder = Path(folder)
    out = Path(out) if out is not None else folder
    figures_in = Path(figures_in) if figures_in is not None else out / "figures"
    runs = complete_runs(folder)
    finals = finals_of(runs, folder)
    table = summary(finals)
    out.mkdir(parents=True, exist_ok=True)
    _write_csv(table, out / "table.csv")
    parts = [_heading(title or folder.name, description, finals), *_origins_section(runs)]
    parts.append(_html_table(formatted(table)))
    if pairs:
        asked = claims(finals, pairs)
        parts += ["<h2>Is A below B?</h2>", _html_table(formatted(asked))]
        _write_csv(asked, out / "claims.csv")
    every = differences(finals, table["label"])
    if len(every):
        parts += ["<h2>Differences, seed by seed</h2>", _html_table(formatted(every))]
        _write_csv(every, out / "differences.csv")
    ends = structure(runs)
    if len(ends.columns) > 1:
        _write_csv(ends, out / "structure.csv")
        parts += ["<h2>How the recorded layers ended</h2>", _html_table(formatted(ends))]
    for picture in _pictures(runs, finals, table["label"], folder, pairs):
        png, *_ = figures.save(picture.figure, picture.table, figures_in / picture.name)
        parts.append(_html_figure(picture, png))
    parts.append(_runs_section(runs, out))
    page = out / "report.html"
    with replacing(page) as partial:
        filled = _PAGE.format(title=html.escape(title or folder.name), body="\n".join(parts))
        partial.write_text(filled)
    return page


def _write_csv(table: pd.DataFrame, path: Path) -> None:
    with replacing(path) as partial:
        table.to_csv(partial, index=False)


def asked_in(file: Path) -> tuple[str, list[tuple[str, str]]]:
    """The description and the pairs of a study file; both empty if there is no such file."""
    content = read_yaml(file, "study") if file.is_file() else {}
    return content.get("description", ""), [(a, b) for a, b in content.get("pairs", ())]


def keep(folder: Path | str, out: Path | str, rows: int = KEPT_ROWS) -> dict[str, str]:
    """Add the records of finished runs, without weights, to a kept study.

    Other runs in `out` stay; runs with the same name are replaced.

    Args:
        out: the folder of the kept study. Steps that a sibling study already stores are not
            stored again.
        rows: training steps to keep per run, besides evaluations and events.

    Returns:
        For each run name, the study that stores its steps.

    Raises:
        InputError: a run is unfinished, two runs share a name, or `out` has run folders; also the
            errors of `write_study`.
    """
    runs, out = find_runs(folder), Path(out).resolve()
    complete_runs(folder)  # raises on unfinished runs
    records: dict[str, Records] = {}
    if is_study(out):
        kept = open_study(out)
        records |= {name: KeptRecords(kept, name) for name in kept.runs}
    elif any(out.glob("*/config.json")):
        raise InputError("keep", str(out), "it has run folders; tables need a folder of their own")
    names = [run.folder.resolve().name for run in runs]
    for run, name in zip(runs, names, strict=True):
        if names.count(name) > 1:
            raise InputError("keep", str(folder), f"two of its runs have the name {name}")
        records[name] = Thinned(run.records, rows)
    shared = write_study(out, records)
    return {name: shared.get(name, out.name) for name in names}


def _heading(title: str, description: str, finals: pd.DataFrame) -> str:
    facts = [
        f"{len(finals)} runs",
        f"model {', '.join(sorted(finals['model'].unique()))}",
        f"corpus {', '.join(sorted(finals['corpus'].unique()))}",
        f"{finals['tokens_seen'].min():,}–{finals['tokens_seen'].max():,} tokens per run"
        if finals["tokens_seen"].nunique() > 1
        else f"{finals['tokens_seen'].iloc[0]:,} tokens per run",
    ]
    lines = [f"<p>{html.escape(part)}</p>" for part in description.split("\n\n") if part.strip()]
    lines.append(f"<p>{html.escape('; '.join(facts))}.</p>")
    return f"<h1>{html.escape(title)}</h1>\n" + "\n".join(lines)


def origins(runs: Sequence[Run]) -> dict[str, dict[str, int]]:
    """Differences in environment among the runs: name → value → number of runs."""
    names = {name: None for run in runs for name in run.ran_on}
    counted = {
        name: Counter(str(run.ran_on.get(name, "not recorded")) for run in runs) for name in names
    }
    return {name: dict(counts) for name, counts in counted.items() if len(counts) > 1}


def _origins_section(runs: Sequence[Run]) -> Iterator[str]:
    differing = origins(runs)
    if differing:
        yield "<p>These runs come from different machines or versions:</p>\n<ul>"
        for name, counts in differing.items():
            words = "; ".join(f"{value[:60]} ({n} runs)" for value, n in counts.items())
            yield f"<li>{html.escape(name.replace('_', ' '))}: {html.escape(words)}</li>"
        yield "</ul>"
        if set(SPEED) & set(differing):
            yield "<p>Their seconds can't be compared, so there is no figure over time.</p>"


def _html_table(table: pd.DataFrame) -> str:
    return f'<div class="scroll">{table.to_html(index=False, border=0, escape=True)}</div>'


def _html_figure(picture: Picture, png: Path) -> str:
    source = figures.data_uri(png.read_bytes())
    caption = html.escape(picture.caption)
    return (
        f'<figure><img alt="{caption}" src="{source}">'
        f"<figcaption>{caption} Data: {html.escape(picture.name)}.csv</figcaption></figure>"
    )


def _runs_section(runs: Sequence[Run], out: Path) -> str:
    """The configuration of each run, with a link to its executed notebook, if any."""
    items = []
    for run in runs:
        notebook = run.folder / "notebook.ipynb"
        link = ""
        if notebook.exists() and notebook.is_relative_to(out):
            href = html.escape(notebook.relative_to(out).as_posix(), quote=True)
            link = f' · <a href="{href}">executed notebook</a>'
        shown = html.escape(
            json.dumps(_changed(run.facts["config"]) | {"ran_on": run.ran_on}, indent=1)
        )
        items.append(
            f"<details><summary>{html.escape(run.label)} · {html.escape(run.folder.name)}{link}"
            f"</summary><pre>{shown}</pre></details>"
        )
    return "<h2>Runs</h2>\n" + "\n".join(items)


def _changed(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of a configuration that are not None, {}, False or 0."""
    return {k: v for k, v in config.items() if v not in (None, {}, False)}


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff; }}
h1 {{ margin-bottom: 0; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 14px; margin: 1rem 0; }}
th, td {{ padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }}
td {{ white-space: nowrap; }}
th {{ vertical-align: bottom; }}
th:first-child, td:first-child {{ text-align: left; }}
figure {{ margin: 2rem 0; }}
img {{ max-width: 100%; height: auto; }}
figcaption {{ color: #555; font-size: 14px; }}
pre {{ background: #f6f6f6; padding: .7rem; overflow-x: auto; font-size: 12.5px; }}
summary {{ cursor: pointer; padding: .15rem 0; }}
</style></head>
<body>
{body}
</body></html>
"""
