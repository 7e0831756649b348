"""The page of a report: tables, figures and the configuration of each run."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from lowrank_lab import figures
from lowrank_lab.analysis.rates import WITHIN, robustness
from lowrank_lab.analysis.tables import (
    MARGIN,
    by_documents,
    differences,
    formatted,
    structure,
    summary,
    verdicts,
)
from lowrank_lab.report.drawings import SPEED, drawn, origins
from lowrank_lab.report.picture import Picture
from lowrank_lab.runs.files import replacing
from lowrank_lab.runs.run import (
    Run,
    complete_runs,
    finals_of,
)
from lowrank_lab.studies.plain_yaml import read_yaml


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
        asked = verdicts(finals, pairs)
        parts += ["<h2>Is A below B?</h2>", _VERDICTS, _html_table(formatted(asked))]
        _write_csv(asked, out / "claims.csv")
        documents = by_documents(runs, pairs)
        if len(documents):
            _write_csv(documents, out / "documents.csv")
            parts += ["<h2>Over seeds and documents</h2>", _html_table(formatted(documents))]
    every = differences(finals, table["label"])
    if len(every):
        parts += ["<h2>Differences, seed by seed</h2>", _html_table(formatted(every))]
        _write_csv(every, out / "differences.csv")
    robust = robustness(finals)
    if len(robust):
        _write_csv(robust, out / "robustness.csv")
        parts += [
            "<h2>Robustness to the learning rate</h2>",
            _ROBUST,
            _html_table(formatted(robust)),
        ]
    ends = structure(runs)
    if len(ends.columns) > 1:
        _write_csv(ends, out / "structure.csv")
        parts += ["<h2>How the recorded layers ended</h2>", _html_table(formatted(ends))]
    for picture in drawn(runs, finals, table["label"], folder, pairs):
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


_VERDICTS = f"""<p>Paired by seed. <i>below</i>, <i>above</i>: p of the one-sided t-test, corrected
over the rows (Benjamini–Hochberg), is under 0.05; <i>equal</i>: two one-sided tests put the
difference within ±{MARGIN} with p under 0.05 (not corrected); <i>open</i>: none of these.
<i>separated</i>: the interval does not contain 0 (not corrected).</p>"""

_ROBUST = f"""<p><i>down</i>, <i>up</i>: by what factor the learning rate may be lower or higher
than the best before the validation loss has risen by {WITHIN}; –: no rate that was tried is so bad.
</p>"""

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
