"""Notebooks and studies → one folder of pages that work from a disk, a stick or any web server.

Notebooks are executed headless, each in a process of its own (`runner.execute`); what they show is
put into the page. A page makes no request at all, and its own policy forbids it to.
"""

from __future__ import annotations

import html
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pygments.formatters import HtmlFormatter

from lowrank_lab.config import InputError
from lowrank_lab.pages import NotebookPage, read_notebook
from lowrank_lab.paths import data_folder
from lowrank_lab.report import asked_in, write_report
from lowrank_lab.studies.job import Job, parameter_names
from lowrank_lab.studies.local_executor import execute
from lowrank_lab.widgets.slider import Slider, slider

__all__ = ["QUICK", "Published", "Slider", "publish", "slider"]

# Parameters with which a notebook is executed in minutes; the others are executed as they are.
# {work} is a folder of the notebook's own, which is gone afterwards.
QUICK: Mapping[str, dict[str, Any]] = {
    "00_start_here": {"steps": 150},
    "02_run": {"steps": 100, "folder": "{work}/run"},
    "03_compare": {"out": "{work}/compared"},
    "06_memory": {"model": "130m", "rank": 256},
    "08_your_own_method": {"steps": 150, "folder": "{work}/runs"},
}


@dataclass(frozen=True)
class Published:
    """What was written, and which notebooks failed, with the line that says why."""

    index: Path
    pages: list[Path]
    failed: dict[str, str]


def publish(
    out: Path | str,
    studies: Sequence[Path | str] = (),
    notebooks: Path | str | None = None,
    quick: bool = True,
    jobs: int | None = None,
    report: Callable[[list[Job]], None] = lambda todo: None,
) -> Published:
    """Write pages of all notebooks and studies, and an index.html, into one folder.

    Args:
        out: the folder.
        studies: folders of finished runs; every kept study (data/study) if there are none.
        notebooks: the folder of notebooks; the checkout's if None.
        quick: with the parameters of `QUICK`; otherwise with the notebooks' own.
        jobs: notebooks at a time; one a core if None.
        report: called twice a second with the state of all notebooks.

    Raises:
        InputError: no notebooks, no runs in a study, or two studies of the same name.
    """
    out = Path(out).resolve()
    folders = _studies(studies)
    sources = _notebooks(notebooks)
    todo = _jobs(sources, out / ".executed", quick)
    out.mkdir(parents=True, exist_ok=True)
    asked = sources[0].parent / "studies"
    rows = [
        _study_page(folder, out, asked) for folder in folders
    ]  # wrong input shows before the wait
    execute(todo, jobs, True, report)
    links = {f"{job.name}.ipynb": f"{job.name}.html" for job in todo}
    found = {job.name: _notebook_page(job, out, links) for job in todo}
    failed = {job.name: job.error for job in todo if job.state == "failed"}
    entries = [_entry(name, page, failed.get(name, "")) for name, page in found.items()]
    index = _write(out / "index.html", "lowrank_lab", _INDEX.format(
        notebooks="\n".join(entries), studies="\n".join(rows), made=html.escape(_made()),
    ))  # fmt: skip
    if not failed:  # else the logs are kept
        shutil.rmtree(out / ".executed", ignore_errors=True)
    pages = [out / f"{name}.html" for name in found]
    return Published(index, [*pages, *(_report_of(f, out) for f in folders)], failed)


def _notebooks(folder: Path | str | None) -> list[Path]:
    checkout = Path(__file__).resolve().parent.parent / "notebooks"
    folder = Path(folder if folder is not None else checkout).resolve()
    found = sorted(folder.glob("*.ipynb"))
    if not found:
        raise InputError("notebooks", str(folder), "a folder with notebooks; use a checkout")
    return found


def _studies(given: Sequence[Path | str]) -> list[Path]:
    kept = sorted(p for p in (data_folder() / "study").glob("*") if p.is_dir())
    folders = [Path(folder).resolve() for folder in given] or kept
    names = [folder.name for folder in folders]
    for name in names:
        if names.count(name) > 1:
            raise InputError("folder", name, "two studies of one name can't share a page")
    return folders


def _jobs(notebooks: Sequence[Path], work: Path, quick: bool) -> list[Job]:
    """A job a notebook, in the notebooks' own folder, whose relative paths they use."""
    shutil.rmtree(work, ignore_errors=True)
    todo = []
    for notebook in notebooks:
        folder = work / notebook.stem
        values: dict[str, Any] = {"headless": True} if _has(notebook, "headless") else {}
        if quick:
            values |= {
                name: value.replace("{work}", str(folder)) if isinstance(value, str) else value
                for name, value in QUICK.get(notebook.stem, {}).items()
            }
        todo.append(Job(notebook.stem, folder, notebook, values, works_in=notebook.parent))
    return todo


def _has(notebook: Path, parameter: str) -> bool:
    return parameter in parameter_names(notebook)


def _notebook_page(job: Job, out: Path, links: Mapping[str, str]) -> NotebookPage:
    """The page of one executed notebook; of a failed one as far as it went."""
    executed = job.folder / "notebook.ipynb"
    made = executed if executed.exists() else job.notebook
    page = read_notebook(made, links, job.notebook.parent)
    body = page.body
    if job.state == "failed":
        words = f"This notebook failed and is shown as far as it went: {html.escape(job.error)}"
        body = f'<p class="failed" role="alert">{words}</p>\n{body}'
    body = body.replace(str(job.folder), "…").replace(str(job.notebook.parent.parent), "…")
    name = html.escape(job.notebook.name)
    top = f'<nav><a href="index.html">All pages</a> · <code>{name}</code></nav>'
    _write(out / f"{job.name}.html", page.title, f"{top}\n{body}\n{top}")
    return page


def _report_of(folder: Path, out: Path) -> Path:
    return out / "studies" / folder.name / "report.html"


def _study_page(folder: Path, out: Path, asked: Path) -> str:
    """Write the report of a study; its line in the index.

    Args:
        asked: folder of study files: one of this name says what the study is about.
    """
    file = asked / f"{folder.name}.yaml"
    what, pairs = asked_in(file)
    page = write_report(folder, folder.name, what, _report_of(folder, out).parent, pairs=pairs)
    text = page.read_text()
    top = '<nav><a href="../../index.html">All pages</a></nav>'
    page.write_text(
        text.replace("<body>", f"<body>\n{top}", 1).replace("<head>", f"<head>{_POLICY}")
    )
    facts = text.partition("</h1>")[2].partition("<div")[0].strip()
    name = html.escape(folder.name)
    href = html.escape(f"studies/{quote(folder.name)}/report.html")
    return f'<li><a href="{href}">{name}</a>{facts}</li>'


def _entry(name: str, page: NotebookPage, error: str) -> str:
    failed = f'<p class="failed">failed: {html.escape(error)}</p>' if error else ""
    href = html.escape(quote(f"{name}.html"))
    return f'<li><a href="{href}">{html.escape(page.title)}</a>{failed}{page.summary}</li>'


def _made() -> str:
    try:
        ours = version("lowrank-lab")
    except PackageNotFoundError:  # used from a folder, not installed
        ours = "not installed"
    return f"lowrank_lab {ours}, torch {version('torch')}, Python {platform.python_version()}"


def _write(path: Path, title: str, body: str) -> Path:
    partial = path.with_name(f".{path.name}")
    colours = HtmlFormatter(style="default").get_style_defs(".code")  # type: ignore[no-untyped-call]
    partial.write_text(_PAGE.format(
        policy=_POLICY, title=html.escape(title), colours=colours, body=body,
    ))  # fmt: skip
    partial.replace(path)
    return path


# What the browser itself then refuses: every request, whatever a notebook's output contains.
_POLICY = (
    '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
)

_INDEX = """<h1>lowrank_lab</h1>
<p>Pretraining language models with less memory: notebooks that explain and measure, and studies
that compare. Everything here was computed beforehand and needs no network; sliders move over
pictures that are in the page. What needs a running kernel says so: for that, get the code and say
<code>make lab</code>.</p>
<h2>Notebooks</h2>
<ul class="index">
{notebooks}
</ul>
<h2>Studies</h2>
<ul class="index">
{studies}
</ul>
<p class="note">Made by <code>lowrank-lab report --publish</code> with {made}.</p>"""

_PAGE = """<!doctype html>
<html lang="en"><head>{policy}<meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 16px/1.55 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff; }}
h1, h2, h3 {{ line-height: 1.25; }}
h2 {{ margin-top: 2.2rem; }}
nav {{ font-size: 14px; margin: 1rem 0; }}
a {{ color: #0b5394; }}
a:focus-visible, input:focus-visible, pre:focus-visible, .scroll:focus-visible {{
  outline: 3px solid #0072B2; outline-offset: 2px; }}
code, pre {{ font-family: ui-monospace, monospace; }}
code {{ font-size: 92%; }}
pre {{ padding: .7rem; overflow-x: auto; font-size: 13px; line-height: 1.45; }}
pre.code {{ background: #f6f6f6; border-left: 3px solid #ccc; }}
pre.text {{ padding: 0 .7rem; }}
pre.error {{ background: #fff0f0; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; border: 0; font-size: 14px; margin: 1rem 0; }}
th, td {{ padding: .25rem .7rem; text-align: right; border: 0; border-bottom: 1px solid #ddd;
          white-space: nowrap; }}
figure {{ margin: 1.5rem 0; }}
img {{ max-width: 100%; height: auto; }}
img[hidden] {{ display: none; }}
math[display=block] {{ margin: 1rem 0; }}
.slider {{ border: 1px solid #ccc; border-radius: 6px; padding: .8rem 1rem; }}
.slider img {{ display: block; margin-top: .6rem; }}
.slider img[hidden] {{ display: none; }}
.slider output {{ font-weight: 600; margin-left: .5rem; }}
.note {{ color: #555; font-size: 14px; }}
.failed {{ background: #fff0f0; border-left: 3px solid #c00; padding: .4rem .8rem; }}
.index > li {{ margin-bottom: .8rem; }}
.index p {{ margin: .1rem 0; }}
{colours}
</style></head>
<body>
{body}
</body></html>
"""
