"""Reports on finished runs and kept studies."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import click

from lowrank_lab.commands.interrupts import processes
from lowrank_lab.commands.tables import show_table
from lowrank_lab.config import InputError


@click.command()
@click.argument("folders", nargs=-1, metavar="FOLDER", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="output folder; default: FOLDER")
@click.option(
    "--figures", type=click.Path(path_type=Path), help="folder of the figures; default: OUT/figures"
)
@click.option("--title", help="title of the page")
@click.option(
    "--keep", type=click.Path(path_type=Path), help="also add the runs' records to this kept study"
)
@click.option(
    "--keep-rows", type=click.IntRange(0), default=200, show_default=True,
    help="with --keep: training steps per run, besides evaluations and events",
)  # fmt: skip
@click.option(
    "--keep-spectra", type=click.Choice(["all", "one-seed"]), default="all", show_default=True,
    help="with --keep: one-seed keeps the last step's alone of a label's other seeds",
)  # fmt: skip
@click.option("--publish", hidden=True, expose_value=False, callback=lambda *at: _no_pages(at[2]))
@click.option("--json", "as_json", is_flag=True, help="print the table as JSON")
def report(
    folders: tuple[Path, ...],
    out: Path | None,
    figures: Path | None,
    title: str | None,
    keep: Path | None,
    keep_rows: int,
    keep_spectra: str,
    as_json: bool,
) -> None:
    """Write tables, figures and a self-contained HTML page for a folder of finished runs.

    Without FOLDER, report on every kept study in data/study. Unless --figures is given, this
    also updates the existing pictures in figures/NAME. Reports on kept studies are written to
    data/runs/kept, unless --out is given.
    """
    from lowrank_lab import report as reporting
    from lowrank_lab.paths import data_folder, kept_folders, located

    if not folders:
        _report_kept(out, figures)
        return
    if len(folders) != 1:
        raise InputError("folder", [str(f) for f in folders], "one folder")
    (folder,) = folders
    what, pairs = "", list[tuple[str, str]]()
    if (found := located(folder)).exists():  # else its error names the path as it was typed
        folder = found
    place = folder.resolve()
    for kept in map(Path.resolve, kept_folders()):
        if place.parent == kept:
            what, pairs = _questions(folder)
        if place.is_relative_to(kept):
            out = out or data_folder() / "runs" / "kept" / place.relative_to(kept)
    page = reporting.write_report(folder, title, what, out, figures, pairs)
    if keep is not None:
        homes = reporting.keep(folder, keep, keep_rows, one_seed=keep_spectra == "one-seed")
    show_table(folder, as_json, pairs)
    if not as_json:
        click.echo(f"\nreport   {page}")
        if keep is not None:
            click.echo(f"kept     {keep}: {_kept_words(keep.resolve().name, homes)}")


def _kept_words(name: str, homes: dict[str, str]) -> str:
    """The number of runs kept, and the number stored in each other study."""
    shared = Counter(home for home in homes.values() if home != name)
    parts = (f"{count} of them stored in {home}" for home, count in sorted(shared.items()))
    return ", ".join([f"{len(homes)} runs", *parts])


def _no_pages(out: str | None) -> None:
    """Reject --publish, an option of earlier versions, and name its replacement."""
    if out is not None:
        raise InputError("publish", out, "make docs builds the book, which replaces these pages")


def _questions(kept: Path) -> tuple[str, list[tuple[str, str]]]:
    """The description and the pairs of the study file of a kept study."""
    from lowrank_lab.paths import shipped_notebooks
    from lowrank_lab.report import asked_in

    return asked_in(shipped_notebooks() / "studies" / f"{kept.resolve().name}.yaml")


def _report_kept(out: Path | None, figures: Path | None) -> None:
    """Report on every kept study, and update the pictures in figures/.

    Kept studies are taken from the data folder, else from the library's own files. Studies are
    independent, so they are drawn in parallel, one process per core.
    """
    from lowrank_lab import report as reporting
    from lowrank_lab.analysis.ladder import kept_sizes
    from lowrank_lab.figures import ideas, refresh, save
    from lowrank_lab.paths import data_folder, kept_folders
    from lowrank_lab.runs.kept import is_study
    from lowrank_lab.studies.local_executor import cores

    for folder in kept_folders():  # the data folder first, else the library's own
        kept = sorted(p for p in folder.glob("*/") if is_study(p) or any(p.glob("*/")))
        if kept:
            break
    else:
        raise InputError("folder", str(data_folder() / "study"), "it holds no kept studies")
    pages = out or data_folder() / "runs" / "kept"
    questions = [_questions(folder) for folder in kept]
    with processes(min(cores(), len(kept))) as pool:
        written = [
            pool.submit(
                reporting.write_report, folder, None, what,
                pages / folder.name, None if figures is None else figures / folder.name, pairs,
            )
            for folder, (what, pairs) in zip(kept, questions, strict=True)
        ]  # fmt: skip
        for folder, page, (_, pairs) in zip(kept, written, questions, strict=True):
            click.echo(f"\n{folder.name}: {page.result()}")
            if figures is None:
                refresh(Path("figures") / folder.name, page.result().parent / "figures")
            show_table(folder, pairs=pairs)
    sizes = kept_sizes("ladder_s*")
    drawn = (figures or pages) / "ladder"
    for picture in reporting.ladder_pictures(sizes) if sizes else ():
        save(picture.figure, picture.table, drawn / picture.name)
    if figures is None:
        refresh(Path("figures") / "ladder", drawn)
        ideas.redraw(Path("figures") / "ideas")
