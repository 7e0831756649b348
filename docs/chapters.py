"""Notebooks → chapters: execute what has changed, and write docs/notebooks/*.ipynb for Sphinx.

A notebook is executed again if its source, its parameters, the library, or the kept records have
changed; otherwise its outputs in build/chapters are used.
"""

from __future__ import annotations

import hashlib
import html
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import nbformat

from lowrank_lab.studies.job import Job, parameter_names
from lowrank_lab.studies.local_executor import execute
from lowrank_lab.studies.progress import View
from lowrank_lab.studies.shipped import PICTURE

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "notebooks"
CHAPTERS = ROOT / "docs" / "notebooks"
WORK = ROOT / "build" / "chapters"

# Parameters with which a notebook runs in minutes; others run with their own.
# {work} is a folder of the notebook's own under build/chapters.
SHORT: Mapping[str, dict[str, Any]] = {
    "00_start_here": {"steps": 150},
    "02_run": {"steps": 100, "folder": "{work}/run"},
    "03_compare": {"out": "{work}/compared"},
    "06_memory": {"model": "130m", "rank": 256},
    "08_your_own_method": {"steps": 150, "folder": "{work}/runs"},
    "solutions/02_run": {"folder": "{work}/runs"},
    "solutions/05_spectra": {"folder": "{work}/runs"},
}
AT_ONCE = 2


def names() -> list[str]:
    """Names of all notebooks, `solutions/` included, in the order of the book."""
    found = [*sorted(SOURCES.glob("*.ipynb")), *sorted(SOURCES.glob("solutions/*.ipynb"))]
    return [path.relative_to(SOURCES).with_suffix("").as_posix() for path in found]


def parameters(name: str) -> dict[str, Any]:
    """The parameters with which a notebook is executed for the book."""
    folder = str(WORK / name)
    given = {
        key: value.replace("{work}", folder) if isinstance(value, str) else value
        for key, value in SHORT.get(name, {}).items()
    }
    headless = "headless" in parameter_names(SOURCES / f"{name}.ipynb")
    return given | ({"headless": True} if headless else {})


def jobs() -> list[Job]:
    """One job per notebook, which works in the notebook's own folder: its paths are relative."""
    todo = []
    for name in names():
        source = SOURCES / f"{name}.ipynb"
        job = Job(name, WORK / name, source, parameters(name), works_in=source.parent)
        if not job.finished:
            shutil.rmtree(job.folder, ignore_errors=True)
        todo.append(job)
    return todo


def records_hash() -> str:
    """Hash of what notebooks read beside the library: kept records and modules of their own."""
    found = hashlib.sha256()
    for path in sorted([*(ROOT / "data" / "study").rglob("*"), *SOURCES.rglob("*.py")]):
        if path.is_file() and path.suffix not in (".md", ".pyc"):
            found.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return found.hexdigest()


def forget_outdated() -> None:
    """Remove all outputs if the kept records have changed."""
    stamp, now = WORK / "records", records_hash()
    if not stamp.exists() or stamp.read_text() != now:
        shutil.rmtree(WORK, ignore_errors=True)
        WORK.mkdir(parents=True)
        stamp.write_text(now)


def chapter(notebook: nbformat.NotebookNode, name: str) -> nbformat.NotebookNode:
    """An executed notebook as a chapter: a line that says how it ran, and links to the others."""
    cells = [c for c in notebook.cells if "injected-parameters" not in c.metadata.get("tags", [])]
    for cell in cells:
        if cell.cell_type == "markdown":
            cell.source = linked(PICTURE.sub("", cell.source))  # a chapter has outputs
        elif cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("data", {}).get("text/markdown") != ""]
    cells.insert(1, nbformat.v4.new_markdown_cell(how_it_ran(name), id="how-it-ran"))
    notebook.cells = cells
    notebook.metadata.pop("papermill", None)
    for cell in cells:
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
    return notebook


def unfolded(notebook: nbformat.NotebookNode, answers: nbformat.NotebookNode) -> None:
    """Append the answers to the exercises of a chapter, each in a box that unfolds.

    A box opens in one cell and closes in another one; its title is the heading of the answer. What
    the answers share (imports, parameters) is the first box.
    """
    sources = [cell.source for cell in notebook.cells]
    end = next((i for i, s in enumerate(sources, 1) if "## Exercises" in s), len(sources))
    while end < len(notebook.cells) and not notebook.cells[end].source.startswith("#"):
        end += 1  # exercises that go on in another cell
    boxes: list[tuple[str, list[nbformat.NotebookNode]]] = [("What the answers share", [])]
    for cell in answers.cells[1:]:  # without the title
        cell.id = f"answer-{cell.id}"
        heading = re.match(r"## (\d+\. .*)\n", cell.source + "\n")
        if cell.cell_type == "markdown" and heading:
            boxes.append((heading[1], []))
            cell.source = cell.source.partition("\n")[2].strip()
        if cell.source and "injected-parameters" not in cell.metadata.get("tags", []):
            boxes[-1][1].append(cell)
    added = []
    for number, (title, cells) in enumerate(boxes):
        summary = f"<summary>{html.escape(title)}</summary>"
        text = f'<details class="answer">{summary}\n'
        added.append(nbformat.v4.new_markdown_cell(text, id=f"answer-opens-{number}"))
        added += cells
        added.append(nbformat.v4.new_markdown_cell("</details>", id=f"answer-closes-{number}"))
    notebook.cells[end:end] = added


def linked(markdown: str) -> str:
    """Names of notebooks in code style become links to their chapters."""
    return re.sub(
        r"(?<!\[)`((?:\.\./|solutions/)?\d\d_\w+)\.ipynb`(?!\])", r"[`\1`](\1.ipynb)", markdown
    )


def how_it_ran(name: str) -> str:
    """The line under a chapter's title."""
    given = {k: v for k, v in SHORT.get(name, {}).items() if "{work}" not in str(v)}
    values = ", ".join(f"`{key} = {value!r}`" for key, value in given.items())
    with_ = f" with {values}" if values else ""
    return (
        f":::{{note}}\nThis chapter is `notebooks/{name}.ipynb`, executed{with_}. `make lab` opens "
        "it in JupyterLab, where `headless = False` adds live controls.\n:::"
    )


def write_chapters(todo: list[Job]) -> Iterator[Path]:
    """Write each executed notebook into docs/notebooks, with its answers."""
    executed = {job.name: job.folder / "notebook.ipynb" for job in todo}
    for job in todo:
        notebook = read(executed[job.name])
        if (answers := executed.get(f"solutions/{job.name}")) is not None:
            unfolded(notebook, read(answers))
        made = nbformat.writes(chapter(notebook, job.name))
        path = CHAPTERS / f"{job.name}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text() != made:  # Sphinx reads again what is newer
            path.write_text(made)
        yield path


def read(path: Path) -> nbformat.NotebookNode:
    """An executed notebook, without the paths of this machine."""
    text = path.read_text().replace(str(path.parent), "…").replace(str(ROOT), "…")
    return nbformat.reads(text, as_version=4)


def main() -> int:
    """Execute and write; the exit status."""
    forget_outdated()
    todo, view = jobs(), View()
    execute(todo, AT_ONCE, retry=True, report=view.show)
    view.close()
    failed = [job for job in todo if job.state == "failed"]
    for job in failed:
        sys.stderr.write(f"{job.name}: {job.error}; see {job.folder}\n")
    if failed:
        return 1
    written = set(write_chapters(todo))
    for path in set(CHAPTERS.rglob("*.ipynb")) - written:
        path.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
