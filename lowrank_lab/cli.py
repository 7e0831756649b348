"""The command line, `lowrank-lab …`. The flags of `train` are the fields of RunConfig.

Exit status: 0 success, 1 failure, 2 invalid input (one line on stderr), 130 interrupted by Ctrl-C,
143 stopped by SIGTERM after finishing and saving the current step.
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NoReturn

import click
import yaml

from lowrank_lab import __version__, distributed
from lowrank_lab.config import RENAMED, InputError, RunConfig, warn_renamed


class _OneLine(click.Group):
    """A command group that reports each failure in one line, with its exit status."""

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        kwargs["standalone_mode"] = False
        try:
            with _one_line_warnings():
                sys.exit(super().main(*args, **kwargs) or 0)
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message())
            sys.exit(0)
        except click.ClickException as error:
            _fail(" ".join(error.format_message().split()), 2)
        except InputError as error:
            _fail(str(error), 2)
        except (KeyboardInterrupt, click.Abort):
            _fail("interrupted; started again, it goes on from the last checkpoint", 130)
        except BrokenPipeError:
            sys.exit(0)
        except (RuntimeError, OSError) as error:
            status: int = getattr(error, "exit_status", 1)
            _fail(f"{'failed: ' if status == 1 else ''}{' '.join(str(error).split())}", status)


@contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Show a FutureWarning (a renamed option) without its source location."""
    usual = warnings.formatwarning

    def short(message: Warning | str, category: type[Warning], *args: Any, **kwargs: Any) -> str:
        future = issubclass(category, FutureWarning)
        return f"{message}\n" if future else usual(message, category, *args, **kwargs)

    warnings.formatwarning = short
    try:
        yield
    finally:
        warnings.formatwarning = usual


def _fail(line: str, status: int) -> NoReturn:
    """Print one line and exit. For invalid input, only local rank 0 of each machine prints."""
    if status == 2 and distributed.local_rank():
        time.sleep(2)  # torchrun stops all processes when one exits: let local rank 0 print first
    else:
        click.echo(line, err=True)
    sys.exit(status)


# Fields that are dictionaries: what they are options of, and their short flags.
PAIRS = {
    "method_options": ("method", "--option"),
    "optimizer_options": ("optimizer", "--optimizer-option"),
}


def _config_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add one option per field of RunConfig, and hidden options for earlier field names."""
    for name, field in reversed(RunConfig.model_fields.items()):
        flag, text = f"--{name.replace('_', '-')}", field.description or ""
        if field.annotation is bool:
            option = click.option(f"{flag}/--no-{flag[2:]}", name, default=None, help=text)
        elif name in PAIRS:
            whose, short = PAIRS[name]
            text = f"option of the {whose} as NAME=VALUE; may be repeated"
            option = click.option(flag, short, name, multiple=True, help=text)
        else:
            if field.default is not None:
                text += f" [default: {field.default}]"
            option = click.option(flag, name, default=None, metavar="VALUE", help=text)
        command = option(command)
    for old in RENAMED:
        flag = f"--{old.replace('_', '-')}"
        if RunConfig.model_fields[RENAMED[old]].annotation is bool:
            flag += f"/--no-{flag[2:]}"
        command = click.option(flag, old, default=None, hidden=True)(command)
    return command


def _given(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags set on the command line."""
    return {name: value for name, value in flags.items() if value not in (None, ())}


def _config(flags: dict[str, Any]) -> RunConfig:
    given = _given(flags)
    for name in PAIRS.keys() & given.keys():
        given[name] = dict(_pair(name, text) for text in given[name])
    return RunConfig(**given)


def _pair(field: str, text: str) -> tuple[str, Any]:
    """Name and value of NAME=VALUE: a number, a truth value, a list or a text."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise InputError(field, text, "must be NAME=VALUE")
    with suppress(ValueError):
        if "e" in value.lower():  # YAML 1.1 reads 1e-3 as text
            return name, float(value)
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError:
        return name, value


@click.group(cls=_OneLine)
@click.version_option(__version__, prog_name="lowrank-lab")
@click.option(
    "--methods-from",
    type=click.Path(path_type=Path),
    help="Python file that registers your own methods; may be repeated",
    multiple=True,
)
def main(methods_from: tuple[Path, ...]) -> None:
    """Run, inspect and compare methods for pretraining language models with less memory."""
    logging.basicConfig(format="%(message)s")
    level = logging.INFO if distributed.is_rank_zero() else logging.WARNING
    logging.getLogger("lowrank_lab").setLevel(level)
    if methods_from:
        from lowrank_lab.methods.own import load_own_methods

        load_own_methods(os.pathsep.join(str(path.resolve()) for path in methods_from))


@main.command()
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


@main.command()
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


@main.command()
@_config_flags
@click.option("--out", type=click.Path(path_type=Path), help="run folder; continues a run in it")
@click.option("--label", help="name of the run in tables and figures")
def train(out: Path | None, label: str | None, **flags: Any) -> None:
    """Train one run, or continue it."""
    from tqdm import tqdm

    from lowrank_lab.training.loop import train as train_run

    config = _config(flags)
    hidden = None if distributed.is_rank_zero() else True  # None: hidden without a terminal
    with tqdm(total=config.total_steps, unit="step", disable=hidden, smoothing=0.05) as bar:

        def show(row: dict[str, Any]) -> None:
            bar.update(row["step"] - bar.n)
            bar.set_postfix_str(f"loss {row['loss'] or math.nan:.3f}", refresh=False)

        run = train_run(config, out, label=label, on_step=show)
    if not distributed.is_rank_zero():
        return
    result = run.result
    click.echo(
        f"test loss {result['test_loss']:.4f} (perplexity {result['test_perplexity']:.4g}), "
        f"{result['seconds']:.0f} s, in {run.folder}"
    )


@main.command()
@click.argument("file", metavar="NAME|FILE", required=False)
@click.option("--out", type=click.Path(path_type=Path), help="folder of the study's runs")
@click.option("--jobs", type=click.IntRange(1), help="parallel notebooks; default: one per core")
@click.option("--retry", is_flag=True, help="rerun failed runs")
@click.option("--seeds", help="seeds, like 0,1,2; default: those in the study file")
@click.option("--only", metavar="VARIANT", multiple=True, help="only this variant; may be repeated")
@click.option(
    "--reuse",
    is_flag=True,
    help="reuse finished runs with the same configuration from other studies and from kept "
    "studies, made by any version of the library",
)
@click.option(
    "--time-limit", metavar="TIME", help="stop a run after this time, like 90s, 30m or 2h"
)
@click.option(
    "--dask",
    metavar="ADDRESS",
    help="run on this Dask cluster (tcp://host:8786); needs a shared file system",
)
@click.option("--dry-run", is_flag=True, help="list the runs, their memory and disk; run nothing")
@click.option(
    "--flops",
    type=float,
    metavar="RATE",
    help="with --dry-run: memory and hours on a CUDA card with RATE FLOP/s, like 400e12; needs "
    "neither the card nor the corpus",
)
@click.option("--json", "as_json", is_flag=True, help="print the table as JSON")
def study(
    file: str | None,
    out: Path | None,
    retry: bool,
    seeds: str | None,
    only: tuple[str, ...],
    reuse: bool,
    time_limit: str | None,
    dry_run: bool,
    flops: float | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Run a study with papermill: a study of the library by NAME, or a study FILE.

    Finished runs are not repeated; an interrupted study continues when started again.
    """
    from lowrank_lab.report import asked_in
    from lowrank_lab.studies import progress
    from lowrank_lab.studies.plan import plan_study
    from lowrank_lab.studies.shipped import find_study, shipped_studies
    from lowrank_lab.studies.study import run_study
    from lowrank_lab.studies.study_file import seconds_of

    if file is None:
        raise click.UsageError(f"study: give a file or a name: {', '.join(shipped_studies())}")
    try:
        numbers = [int(seed) for seed in seeds.split(",")] if seeds is not None else None
    except ValueError:
        raise InputError("seeds", seeds, "must be whole numbers with commas between") from None
    limit = None if time_limit is None else seconds_of(time_limit)
    if flops is not None and not (dry_run and 0 < flops < math.inf):
        raise InputError("flops", flops, "FLOP/s above 0, like 400e12, and --dry-run with it")
    path = find_study(file)
    chosen: dict[str, Any] = {"out": out, "retry": retry, "seeds": numbers, "only": only}
    chosen["reuse"] = reuse
    if dry_run:
        elsewhere = flops is not None
        plan = plan_study(path, elsewhere=elsewhere, **chosen)
        facts = progress.plan_facts(plan, flops)
        text = progress.card_text if elsewhere else progress.plan_text
        click.echo(json.dumps(facts, indent=1) if as_json else text(facts))
        return
    view = progress.View()
    todo, page = run_study(path, report=view.show, time_limit=limit, **chosen, **options)
    view.close()
    for job in todo:
        if job.state == "failed":
            line = " ".join(f"failed: {job.name}: {job.error}; see {job.folder}".split())
            click.echo(line, err=True)
    if page is None:
        sys.exit(1)
    _show_table(page.parent, as_json, asked_in(path)[1])
    if not as_json:
        click.echo(f"\nreport   {page}\nfigures  {page.parent / 'figures'}")


@main.group()
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


@main.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.argument(
    "folders", nargs=-1, required=True, metavar="FOLDER…", type=click.Path(path_type=Path)
)
@click.option("--json", "as_json", is_flag=True, help="as JSON")
def merge(out: Path, folders: tuple[Path, ...], as_json: bool) -> None:
    """Copy the finished runs of several folders, e.g. from several machines, into OUT."""
    from lowrank_lab.runs.collect import merge as merge_runs

    merged = merge_runs(out, folders)
    if as_json:
        unfinished = [str(folder) for folder in merged.unfinished]
        facts = {"copied": merged.copied, "there": merged.there, "unfinished": unfinished}
        click.echo(json.dumps(facts, indent=1))
        return
    for folder in merged.unfinished:
        click.echo(f"not finished, left out: {folder}", err=True)
    click.echo(
        f"{len(merged.copied)} runs copied into {out}, {len(merged.there)} were there already"
    )


@main.command()
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
@click.option("--publish", hidden=True, expose_value=False, callback=lambda *at: _no_pages(at[2]))
@click.option("--json", "as_json", is_flag=True, help="print the table as JSON")
def report(
    folders: tuple[Path, ...],
    out: Path | None,
    figures: Path | None,
    title: str | None,
    keep: Path | None,
    keep_rows: int,
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
    folder = located(folder)
    place = folder.resolve()
    for kept in map(Path.resolve, kept_folders()):
        if place.parent == kept:
            what, pairs = _questions(folder)
        if place.is_relative_to(kept):
            out = out or data_folder() / "runs" / "kept" / place.relative_to(kept)
    page = reporting.write_report(folder, title, what, out, figures, pairs)
    if keep is not None:
        homes = reporting.keep(folder, keep, keep_rows)
    _show_table(folder, as_json, pairs)
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
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    from lowrank_lab import report as reporting
    from lowrank_lab.figures import refresh
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
    with ProcessPoolExecutor(min(cores(), len(kept)), get_context("spawn")) as pool:
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
            _show_table(folder, pairs=pairs)


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--prompt", default="", help="text to continue")
@click.option("--tokens", type=click.IntRange(1, 100_000), default=200, show_default=True)
@click.option("--temperature", type=click.FloatRange(0), default=0.8, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def sample(run: Path, **options: Any) -> None:
    """Sample text from a trained run."""
    from lowrank_lab.runs.generate import sample as sample_text
    from lowrank_lab.runs.run import Run

    click.echo(sample_text(Run(run), **options))


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "bf16"]),
    help="dtype of the weights; default: the run's, or fp32 if factors are merged",
)
def export(run: Path, out: Path, dtype: Literal["fp32", "bf16"] | None) -> None:
    """Write a finished run as a Hugging Face LLaMA folder."""
    from lowrank_lab.runs.hf_export import export as export_run

    done = export_run(run, out, dtype)
    without = "" if (done / "tokenizer.json").exists() else ", without a tokenizer: it is numbers"
    click.echo(f"{done}{without}")


@main.command()
@_config_flags
@click.option(
    "--fits",
    help="check whether training fits in this much memory, and suggest changes if not: 24GB or "
    "24GiB (cards sold as 24 GB have 24GiB)",
)
@click.option("--all", "every", is_flag=True, help="compare all methods")
@click.option(
    "--world-size", type=int, help="memory per process, with this many processes under FSDP2"
)
@click.option("--ranks", type=int, hidden=True)
@click.option("--measure", is_flag=True, help="also measure real steps on this machine")
@click.option("--json", "as_json", is_flag=True, help="as JSON")
def memory(
    fits: str | None,
    every: bool,
    world_size: int | None,
    ranks: int | None,
    measure: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Simulate the memory of training a configuration, without allocating it.

    The defaults are bfloat16, as in the paper, and a CUDA card; see --precision and --device.
    """
    from lowrank_lab.planning import describe, fit

    if ranks is not None:
        warn_renamed("--ranks", "--world-size")
        world_size = ranks if world_size is None else world_size
    capacity = fit.bytes_of(fits) if fits is not None else None
    given = {"precision": "bf16", "steps": fit.LONG, **_given(flags)}
    if given.get("per_layer") and "clip" not in given:
        given["clip"] = 0.0
    config = _config(given)
    device = "cpu" if config.device == "cpu" else "cuda"
    if measure and world_size is not None:
        raise InputError("measure", measure, "it takes steps of one process; without world_size")
    if every:
        rows = []
        for row in describe.comparison(config, capacity, device, measure, world_size):
            rows.append(row)
            click.echo(f"{row['method']}: {row['seconds']:.1f} s", err=True)
        click.echo(json.dumps({"methods": rows}, indent=1) if as_json else describe.table(rows))
        return
    config = fit.of_method(config, config.method)
    found = describe.facts(config, capacity, device, measure, world_size)
    click.echo(json.dumps(found, indent=1) if as_json else describe.text(found))


@main.command()
@click.argument("suites", nargs=-1)
@click.option("--quick", is_flag=True, help="tiny sizes, to check that everything runs")
@click.option("--json", "as_json", is_flag=True, help="print the rows as JSON")
def bench(suites: tuple[str, ...], quick: bool, as_json: bool) -> None:
    """Benchmark this library against alternative packages (needs a checkout)."""
    root = Path(__file__).resolve().parent.parent
    if not (root / "benchmarks" / "run.py").exists():
        raise InputError("bench", str(root), "there is no benchmarks folder; use a checkout")
    sys.path.insert(0, str(root))
    running = importlib.import_module("benchmarks.run")
    unknown = [name for name in suites if name not in running.SUITES]
    if unknown:
        raise InputError("suites", unknown[0], f"one of {', '.join(running.SUITES)}")
    found = running.run(suites, quick, lambda row: click.echo(running.line(row), err=as_json))
    if as_json:
        click.echo(json.dumps(found, indent=1, ensure_ascii=False))


def _show_table(folder: Path, as_json: bool = False, pairs: Sequence[tuple[str, str]] = ()) -> None:
    """Print the table of a study, and its claims, else all paired differences."""
    from lowrank_lab.analysis.tables import claims, differences, formatted, structure, summary
    from lowrank_lab.runs.run import final_table, find_runs, load_runs

    finals = final_table(load_runs(folder))
    if as_json:
        click.echo(summary(finals).to_json(orient="records", indent=1))
        return
    click.echo(formatted(summary(finals)).to_string(index=False))
    table = claims(finals, pairs) if pairs else differences(finals)
    if len(table):
        click.echo(f"\nseed by seed:\n{formatted(table).to_string(index=False)}")
    ends = structure(find_runs(folder))
    if len(ends.columns) > 1:
        click.echo(f"\nrecorded layers at the end:\n{formatted(ends).to_string(index=False)}")


if __name__ == "__main__":
    main()
