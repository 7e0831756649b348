"""Runs: the files of a run folder, and tables over many runs.

config.json     the resolved configuration, and the machine and versions (`ran_on`)
metrics.jsonl   one row per step, appended during training, with its evaluation and events
spectra.jsonl   one row per layer and recorded step, and per layer and step with an event
memory.json     bytes by category, measured in the first step
checkpoints/    see checkpoint.py; deleted when the run finishes
progress.json   the progress of a running run
model.safetensors, tokenizer.json (text corpora only), result.json   written last: a folder with
                result.json is a finished run

A kept study (kept.py) may have the records of a finished run instead; a Run reads either.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowrank_lab.config import InputError, ResolvedConfig
from lowrank_lab.memory.formulas import embedding_bytes
from lowrank_lab.paths import data_folder, located
from lowrank_lab.runs.kept import RUNS, KeptRecords, kept_run, open_study
from lowrank_lab.runs.records import FolderRecords

if TYPE_CHECKING:
    import pandas as pd
    from tokenizers import Tokenizer

    from lowrank_lab.models.llama import Llama

# Files of the study runner in the same folder.
RUNNER_FILES = frozenset({"notebook.ipynb", "papermill.log", "done.json", "failed.json"})

# Configuration fields that are columns of every table.
DESCRIBES = (
    "model", "corpus", "method", "rank", "init", "lr", "refactor_every", "reset_every",
    "reset_strength", "seed",
)  # fmt: skip


LAYER_FACTS = ("captured_energy", "overlap", "condition_B", "condition_A", "imbalance")


class Run:
    """A finished or unfinished run, in a run folder or a kept study."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.records = _records_of(self.folder)

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}, {'finished' if self.finished else 'unfinished'})"

    @cached_property
    def config(self) -> ResolvedConfig:
        """The configuration, as resolved when the run started."""
        return ResolvedConfig(**self.facts["config"])

    @property
    def facts(self) -> dict[str, Any]:
        """The contents of config.json: `config`, `label` and `ran_on`."""
        return self.records.facts

    @property
    def label(self) -> str:
        """The run's name in figures: its variant in a study, else its method and techniques."""
        return self.facts.get("label") or describe(self.config)

    @property
    def ran_on(self) -> dict[str, Any]:
        """The run's environment: versions, hashes of source and corpus, and the device."""
        facts: dict[str, Any] = self.facts.get("ran_on", {})
        return facts

    @property
    def finished(self) -> bool:
        if isinstance(self.records, FolderRecords):
            return (self.folder / "result.json").exists()
        return self.records.result is not None

    @property
    def is_export(self) -> bool:
        """Whether the folder is an export (`lowrank-lab export`), which has a config.json too."""
        return (self.folder / "generation_config.json").exists()

    @property
    def result(self) -> dict[str, Any]:
        """Final losses, sizes and times."""
        if (result := self.records.result) is None:
            raise InputError("run", str(self.folder), "it has not finished: result.json is missing")
        return dict(result)

    @property
    def documents(self) -> pd.DataFrame:
        """One row per evaluated document of the test split: document, tokens, loss (nats a token).

        Empty for a corpus without documents, and for runs before version 0.2.
        """
        import pandas as pd

        names = {"document": "test_documents", "tokens": "test_document_tokens",
                 "loss": "test_document_losses"}  # fmt: skip
        columns = {column: self.result.get(name, []) for column, name in names.items()}
        return pd.DataFrame(columns).astype({"document": int, "tokens": int, "loss": float})

    @property
    def by_position(self) -> pd.DataFrame:
        """Validation loss by position in the window: step, position, loss; one row per group.

        `position` is the first of a group, from 1: 1, 2–3, 4–7, 8–15 … (`position_starts`).
        """
        import pandas as pd

        rows = [
            (row["step"], 2**k, loss)
            for row in self.records.metrics
            for k, loss in enumerate(row.get("validation_loss_by_position") or ())
        ]
        return pd.DataFrame(rows, columns=["step", "position", "loss"])

    @property
    def metrics(self) -> pd.DataFrame:
        """One row per step."""
        import pandas as pd

        return pd.DataFrame(self.records.metrics)

    @property
    def has_metrics(self) -> bool:
        """Whether the run has trained a step, i.e. `metrics` has a row."""
        return self.records.has_metrics

    @property
    def has_spectra(self) -> bool:
        """Whether the run records spectra."""
        return self.records.has_spectra

    @property
    def spectra(self) -> pd.DataFrame:
        """One row per singular value of a weight: step, layer, index, singular_value."""
        return self.spectra_of("singular_values")

    def spectra_of(self, what: str) -> pd.DataFrame:
        """One row per singular value: step, layer, index, singular_value; empty if not recorded.

        Args:
            what: `singular_values` (of weights), `update` (of W − W₀), `gradient`, or
                `low_rank_share` (for SLTrain: the low-rank part's share of each singular value).
        """
        import pandas as pd

        rows = [
            (row["step"], row["layer"], i, value)
            for row in self.records.spectra
            for i, value in enumerate(row.get(what, ()))
        ]
        return pd.DataFrame(rows, columns=["step", "layer", "index", "singular_value"])

    @property
    def layer_facts(self) -> pd.DataFrame:
        """One row per layer and recorded step: step, layer and the columns of LAYER_FACTS."""
        import pandas as pd

        names = ("step", "layer", *LAYER_FACTS)
        facts = [{name: row.get(name) for name in names} for row in self._layer_rows]
        return pd.DataFrame(facts, columns=names)

    @property
    def last_layers(self) -> list[dict[str, Any]]:
        """The rows of spectra.jsonl for the last recorded step, one per layer; may be empty."""
        rows = self._layer_rows
        return [row for row in rows if row["step"] == rows[-1]["step"]]

    @property
    def momentum(self) -> pd.DataFrame:
        """One row per layer and step with an event: event, momentum_cosine, momentum_ratio."""
        import pandas as pd

        rows = [row for row in self.records.spectra if "event" in row]
        names = ["step", "layer", "event", "momentum_cosine", "momentum_ratio"]
        return pd.DataFrame(rows, columns=names)

    @property
    def _layer_rows(self) -> list[dict[str, Any]]:
        return [row for row in self.records.spectra if "singular_values" in row]

    @property
    def has_memory(self) -> bool:
        """Whether memory has been measured (in the first step)."""
        return self.records.memory is not None

    @property
    def memory(self) -> dict[str, int]:
        """Bytes by category (memory.Breakdown)."""
        if (memory := self.records.memory) is None:
            raise InputError("run", str(self.folder), "its memory has not been measured")
        return dict(memory)

    @cached_property
    def model(self) -> Llama:
        """The trained model, on the CPU, in eval mode. Safe for untrusted folders."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        from lowrank_lab.methods.build import build_to_load
        from lowrank_lab.methods.resolve import resolve

        path = self.folder / "model.safetensors"
        if not path.exists():
            raise InputError("run", str(self.folder), "it has no trained model yet")
        model = build_to_load(resolve(self.config))  # with today's defaults for newer options
        try:
            model.load_state_dict(load_file(path))
        except (SafetensorError, RuntimeError) as error:  # no safetensors file, or another model
            reason = str(error).splitlines()[0]
            allowed = f"its model.safetensors does not hold its model: {reason}"
            raise InputError("run", str(self.folder), allowed) from None
        return model.eval()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer: its own copy, else the tokenizer of its corpus."""
        from tokenizers import Tokenizer

        from lowrank_lab.data.prepare import prepare

        path = self.folder / "tokenizer.json"
        if path.exists():
            return Tokenizer.from_buffer(path.read_bytes())
        corpus = prepare(self.config)
        if self.ran_on.get("corpus_sha256") not in (None, corpus.facts["sha256"]):
            allowed = "it has changed since the run, which kept no tokenizer of its own"
            raise InputError("corpus", self.config.corpus, allowed)
        return corpus.tokenizer


def load(run: Run | Path | str) -> Llama:
    """The trained model of a run, on the CPU, in eval mode.

    Args:
        run: a run, or its folder.

    Raises:
        InputError: the folder is not a run folder, or has no trained model yet.
    """
    return (run if isinstance(run, Run) else Run(run)).model


def describe(config: ResolvedConfig) -> str:
    """A short name for a configuration: method, initialisation and techniques."""
    parts = [config.method]
    if config.init == "spectral":
        parts.append("spectral")
    if config.refactor_every:
        parts.append("refactor")
    if config.reset_every:
        parts.append("reset")
    return " + ".join(parts)


def find_runs(folder: Path | str) -> list[Run]:
    """All runs at or below `folder`, sorted by path.

    Both run folders and kept studies are searched; hidden folders are skipped.
    """
    given, folder = folder, runs_folder(folder)
    if not folder.is_dir():
        if kept_run(folder) is not None:
            return [Run(folder)]
        places = "" if Path(given).is_absolute() else f", here or in {data_folder()}"
        raise InputError("folder", str(given), f"there is no such folder{places}")
    found = {path.parent for path in folder.rglob("config.json")}
    found |= {
        path.parent / run for path in folder.rglob(RUNS) for run in open_study(path.parent).runs
    }
    seen = (
        path for path in sorted(found)
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )  # fmt: skip
    return [run for run in map(Run, seen) if not run.is_export]


def runs_folder(folder: Path | str) -> Path:
    """Resolve a folder of runs (`paths.located`), or the path STUDY/RUN of a kept run."""
    found = located(folder)
    inside = located(Path(folder).parent) / Path(folder).name
    return inside if not found.exists() and kept_run(inside) is not None else found


def _records_of(folder: Path) -> FolderRecords | KeptRecords:
    """The records of a run folder, or of a kept run STUDY/RUN."""
    if not (folder / "config.json").exists() and (kept := kept_run(folder)) is not None:
        return kept
    return FolderRecords(folder)


def first_runs(runs: Iterable[Run]) -> list[Run]:
    """The first run of each label."""
    first: dict[str, Run] = {}
    for run in runs:
        first.setdefault(run.label, run)
    return list(first.values())


def spectra_of(runs: Iterable[Run], what: str = "singular_values") -> pd.DataFrame:
    """`Run.spectra_of` for several runs in one table, with a label column."""
    return stacked(run.spectra_of(what).assign(label=run.label) for run in runs)


def momentum_of(runs: Iterable[Run]) -> pd.DataFrame:
    """`Run.momentum` for several runs in one table, with columns for label and seed."""
    return stacked(run.momentum.assign(label=run.label, seed=run.config.seed) for run in runs)


def positions_of(runs: Iterable[Run]) -> pd.DataFrame:
    """`Run.by_position` for several runs in one table, with label and seed columns."""
    return stacked(run.by_position.assign(label=run.label, seed=run.config.seed) for run in runs)


def stacked(tables: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """Tables below one another. Those without rows are left out: their columns have no type."""
    import pandas as pd

    tables = list(tables)
    filled = [table for table in tables if len(table)] or tables[:1]
    return pd.concat(filled, ignore_index=True) if filled else pd.DataFrame()


def load_runs(folder: Path | str, strict: bool = True) -> pd.DataFrame:
    """A tidy table of all runs at or below a folder: one row per run and step.

    Columns: run (folder name), label, the configuration (model, corpus, method, rank, …, seed) and
    the columns of metrics.jsonl. The current learning rate is `lr_now`; `lr` is the peak. Finished
    runs also have `final_*`: validation and test loss and perplexity, parameters and bytes.

    Args:
        folder: a path. A relative path is looked up in the working directory, the data folder and
            the library's own data, which has for example `study/quick`.
        strict: raise on unfinished runs; False includes them, for live views.

    Raises:
        InputError: there are no runs, or, with `strict`, unfinished runs.
    """
    return table_of(complete_runs(folder, strict), folder)


def complete_runs(folder: Path | str, strict: bool = True) -> list[Run]:
    """The runs at or below a folder with at least one step; raises like `load_runs`."""
    runs = find_runs(folder)
    if not runs:
        raise InputError("folder", str(folder), "it holds no runs")
    unfinished = [run.folder.name for run in runs if not run.finished]
    if strict and unfinished:
        raise InputError("folder", str(folder), f"runs have not finished: {', '.join(unfinished)}")
    trained = [run for run in runs if run.has_metrics]
    if not trained:
        raise InputError("folder", str(folder), "no run in it has trained a step yet")
    return trained


def table_of(runs: Sequence[Run], folder: Path | str) -> pd.DataFrame:
    """The table of `load_runs` for the given runs, all at or below `folder`."""
    import pandas as pd

    metrics, facts = [run.metrics for run in runs], [_facts_of(run, folder) for run in runs]
    new_names = {"lr": "lr_now"}
    order: dict[str, None] = {}  # columns in order of first appearance
    for table, fact in zip(metrics, facts, strict=True):
        order |= dict.fromkeys([*(new_names.get(str(c), str(c)) for c in table), *fact])
    described = _described(facts)
    repeated = described.loc[described.index.repeat([len(table) for table in metrics])]
    steps = pd.concat(metrics, ignore_index=True).rename(columns=new_names)
    steps = steps.drop(columns=described.columns, errors="ignore")
    return pd.concat([steps, repeated.reset_index(drop=True)], axis="columns")[list(order)]


def finals_of(runs: Sequence[Run], folder: Path | str) -> pd.DataFrame:
    """`final_table(table_of(…))`, but reads only config.json and result.json."""
    return final_table(_described([_facts_of(run, folder) for run in runs]))


def _facts_of(run: Run, folder: Path | str) -> dict[str, Any]:
    """The columns that are constant within a run."""
    inside = run.folder.relative_to(runs_folder(folder)).as_posix()
    config = run.config
    name = run.folder.name if inside == "." else inside
    shown = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    facts = {"run": shown, "label": run.label}
    facts |= {name: getattr(config, name) for name in DESCRIBES}
    if not run.finished:
        return facts
    result = run.result
    result["bytes_without_embeddings"] = _bytes_without_embeddings(config, result)
    single = {name: value for name, value in result.items() if not isinstance(value, list)}
    return facts | {f"final_{name}": value for name, value in single.items()}


def _bytes_without_embeddings(config: ResolvedConfig, result: dict[str, Any]) -> float:
    """Bytes of weights and optimizer states, without embedding and head.

    NaN if there is no formula for the embedding's bytes, or if FSDP2 sharded the model.
    """
    if config.parallel == "fsdp2":
        return math.nan
    try:
        ends = embedding_bytes(config)
    except InputError:
        return math.nan
    held = (result.get(name, math.nan) for name in ("weight_bytes", "optimizer_state_bytes"))
    return float(sum(held) - ends)


def _described(facts: list[dict[str, Any]]) -> pd.DataFrame:
    """One row per run. Columns with None keep their integers (dtype object)."""
    import pandas as pd

    table = pd.DataFrame(facts)
    for column in table:
        values = [row.get(str(column), math.nan) for row in facts]
        if None in values:
            table[column] = pd.Series(values, dtype=object)
    return table


def final_table(runs: pd.DataFrame) -> pd.DataFrame:
    """One row per run of a `load_runs` table: its configuration and final results."""
    columns = ["run", "label", *DESCRIBES, *[c for c in runs.columns if c.startswith("final_")]]
    return runs[columns].drop_duplicates("run").rename(columns=lambda c: c.removeprefix("final_"))
