"""Commands that list methods and notebooks, and that describe a corpus."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lowrank_lab.config import InputError, RunConfig, nearest

if TYPE_CHECKING:
    from lowrank_lab.methods.method import Method


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--json", "as_json", is_flag=True, help="as JSON, with the default of every option")
def methods(names: tuple[str, ...], as_json: bool) -> None:
    """Draw the family tree of the methods: year, what each stores, when to use it.

    With NAMEs, tell all about these: source, learning rates, options with their defaults.
    """
    from lowrank_lab.methods.registry import METHODS

    for name in names:
        if name not in METHODS:
            raise InputError("method", name, nearest(name, METHODS))
    found = [METHODS[name] for name in names] or list(METHODS.values())
    if as_json:
        click.echo(json.dumps([_facts(method) for method in found], indent=1))
    elif names:
        click.echo("\n\n".join(_described(method) for method in found))
    else:
        click.echo("\n".join(_tree(found)))
        click.echo("\nStates: elements of optimizer state of an m×n weight. More: NAME or --json")


def _facts(m: Method) -> dict[str, Any]:
    return {
        "name": m.name,
        "summary": m.summary,
        "source": f"arXiv {m.source}" if m.source[:4].isdigit() else m.source,
        "year": m.year,
        "parent": m.parent,
        "use": m.use,
        "layers": m.layers or "dense",
        "states": m.states,
        "lr": m.lr.plain,
        "spectral_lr": m.spectral_lr,
        "rest_lr": m.rest_lr,
        "options": {name: option.default for name, option in m.options.items()},
    }


def _described(m: Method) -> str:
    facts = _facts(m)
    spectral = f" (init spectral: {m.spectral_lr})" if m.spectral_lr else ""
    options = [f"    {k} {v}" for k, v in facts["options"].items() if v is not None]
    lines = [
        f"{m.name}: {m.summary}",
        f"  source   {facts['source']}",
        *([f"  year     {m.year}"] if m.year else []),
        f"  weights  {facts['layers']}",
        f"  states   {m.states or 'not known'} (elements, of an m×n weight)",
        f"  lr       {m.lr}{spectral}",
        *([f"  rest_lr  {m.rest_lr}; lr from width 512"] if m.rest_lr else []),
        *([f"  use      {m.use}"] if m.use else []),
        *(["  options"] if options else []),
    ]
    return "\n".join([*lines, *options])


def _tree(found: list[Method]) -> Iterator[str]:
    from lowrank_lab.methods.family import family_tree

    rows = [("method", "year", "states", "when to use it")]
    for branches, m in family_tree(found):
        states = m.states.split(";")[0] or "not known"
        rows.append((branches + m.name, str(m.year or ""), states, m.use or m.summary))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        yield "  ".join([*map(str.ljust, row[:3], widths), row[3]])


@click.command()
@click.option("--corpus", default="python", help="python | markov | text:PATH | c4:PATH | hub:NAME")
@click.option("--tokenizer", default=None, help="a tokenizer.json; default: trained on the corpus")
@click.option("--vocab-size", default=None, help="BPE vocabulary, or byte; default: the model's")
@click.option("--model", default="micro", help="model size that sets the default vocabulary size")
@click.option("--json", "as_json", is_flag=True, help="as JSON")
def data(as_json: bool, **fields: Any) -> None:
    """Prepare a corpus (once) and describe it."""
    from lowrank_lab.data.prepare import prepare

    corpus = prepare(RunConfig(**{k: v for k, v in fields.items() if v is not None}))
    if as_json:
        click.echo(json.dumps({"folder": str(corpus.folder), **corpus.facts}, indent=1))
    else:
        click.echo(f"{corpus.folder}\n\n{(corpus.folder / 'README.md').read_text()}", nl=False)


@click.group()
def notebooks() -> None:
    """List or copy the library's notebooks."""


@notebooks.command("list")
@click.option("--json", "as_json", is_flag=True, help="as JSON")
def list_notebooks(as_json: bool) -> None:
    """List the notebooks with their titles."""
    from lowrank_lab.studies.shipped import titles

    rows = [{"name": p.stem, "title": title, "path": str(p)} for p, title in titles().items()]
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    for row in rows:
        click.echo(f"{row['name']:20} {row['title']}")


@notebooks.command("copy")
@click.argument("folder", type=click.Path(path_type=Path))
def copy_notebooks(folder: Path) -> None:
    """Copy the notebooks, their solutions and the study files into FOLDER.

    Existing files are not overwritten.
    """
    from lowrank_lab.studies import shipped

    copied = shipped.copy_notebooks(folder)
    click.echo(f"{len(copied.files)} files in {folder}; corpora and runs go to {copied.data}")
