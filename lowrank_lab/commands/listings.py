"""Commands that list methods and notebooks, and that describe a corpus."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from lowrank_lab.config import RunConfig


@click.command()
@click.option("--json", "as_json", is_flag=True, help="as JSON")
def methods(as_json: bool) -> None:
    """List the methods with their sources, options and defaults."""
    from lowrank_lab.methods.registry import METHODS

    rows: list[dict[str, Any]] = [
        {
            "name": m.name,
            "summary": m.summary,
            "source": f"arXiv {m.source}" if m.source[:4].isdigit() else m.source,
            "layers": m.layers or "dense",
            "states": m.states,
            "lr": m.lr,
            "spectral_lr": m.spectral_lr,
            "options": {name: option.default for name, option in m.options.items()},
        }
        for m in METHODS.values()
    ]
    if as_json:
        for row in rows:
            row["lr"] = row["lr"].plain
        click.echo(json.dumps(rows, indent=1))
        return
    for row in rows:
        options = "; ".join(f"{k} {v}" for k, v in row["options"].items() if v is not None)
        spectral = f" (init spectral: {row['spectral_lr']})" if row["spectral_lr"] else ""
        click.echo(
            f"{row['name']:12} {row['summary']} ({row['source']}); states of an m×n weight: "
            f"{row['states'] or 'not known'}; lr {row['lr']}{spectral}; {options}"
        )


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
