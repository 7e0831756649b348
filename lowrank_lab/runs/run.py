"""Runs: what each writes into its folder while it trains, and the tables that are read from many.

config.json     the resolved configuration, and what it ran on
metrics.jsonl   one row a step, appended as it happens; evaluations and events in their step's row
spectra.jsonl   one row a layer and recorded step, and a layer and step in which something happened
memory.json     bytes by category, measured in the first step
checkpoints/    see checkpoint.py; gone when the run has ended well
progress.json   where a run in progress is
model.safetensors, tokenizer.json (of text), result.json   written last: a folder with result.json
                is a finished run

Of finished runs, the same records may lie in a kept study instead (kept.py); a Run reads either.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowrank_lab.config import InputError, ResolvedConfig
from lowrank_lab.memory.formulas import embedding_bytes
from lowrank_lab.paths import located
from lowrank_lab.runs.kept import RUNS, KeptRecords, kept_run, open_study
from lowrank_lab.runs.records import FolderRecords

if TYPE_CHECKING:
    import pandas as pd
    from tokenizers import Tokenizer

    from lowrank_lab.models.llama import Llama

# What the study runner keeps in the same folder.
RUNNER_FILES = frozenset({"notebook.ipynb", "papermill.log", "done.json", "failed.json"})

# Columns of a run's configuration that describe it in every table.
DESCRIBES = (
    "model", "corpus", "method", "rank", "init", "lr", "refactor_every", "reset_every",
    "reset_strength", "seed",
)  # fmt: skip


LAYER_FACTS = ("captured_energy", "overlap", "condition_B", "condition_A", "imbalance")


class Run:
    """A run, finished or not: its folder, or its place in a kept study."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.records = _records_of(self.folder)

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}, {'finished' if self.finished else 'unfinished'})"

    @cached_property
    def config(self) -> ResolvedConfig:
        """What was trained, as it was resolved then."""
        return ResolvedConfig(**self.facts["config"])

    @property
    def facts(self) -> dict[str, Any]:
        """What config.json says: `config` as it was written, `label` and `ran_on`."""
        return self.records.facts

    @property
    def label(self) -> str:
        """What figures call the run: its variant in a study, else its method and techniques."""
        return self.facts.get("label") or describe(self.config)

    @property
    def ran_on(self) -> dict[str, Any]:
        """What it ran on: versions, hashes of source and corpus, the device."""
        facts: dict[str, Any] = self.facts.get("ran_on", {})
        return facts

    @property
    def finished(self) -> bool:
        if isinstance(self.records, FolderRecords):
            return (self.folder / "result.json").exists()
        return self.records.result is not None

    @property
    def is_export(self) -> bool:
        """Whether it is no run but what `lowrank-lab export` wrote, which has a config.json too."""
        return (self.folder / "generation_config.json").exists()

    @property
    def result(self) -> dict[str, Any]:
        """Final losses, sizes and times."""
        if (result := self.records.result) is None:
            raise InputError("run", str(self.folder), "it has not finished: result.json is missing")
        return dict(result)

    @property
    def metrics(self) -> pd.DataFrame:
        """One row a step."""
        import pandas as pd

        return pd.DataFrame(self.records.metrics)

    @property
    def has_metrics(self) -> bool:
        """Whether it has trained a step: whether `metrics` has a row."""
        return self.records.has_metrics

    @property
    def has_spectra(self) -> bool:
        """Whether spectra were recorded, or will be."""
        return self.records.has_spectra

    @property
    def spectra(self) -> pd.DataFrame:
        """One row a singular value of a weight: step, layer, index, singular_value."""
        return self.spectra_of("singular_values")

    def spectra_of(self, what: str) -> pd.DataFrame:
        """One row a singular value: step, layer, index, singular_value.

        Args:
            what: `singular_values` (of weights), `update` (of W − W₀), `gradient`, or
                `low_rank_share` (of each of SLTrain's singular values); empty if not recorded.
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
        """One row a layer and recorded step: captured_energy, overlap, conditions, imbalance."""
        import pandas as pd

        names = ("step", "layer", *LAYER_FACTS)
        facts = [{name: row.get(name) for name in names} for row in self._layer_rows]
        return pd.DataFrame(facts, columns=names)

    @property
    def last_layers(self) -> list[dict[str, Any]]:
        """What spectra.jsonl has of each layer at the last recorded step; maybe nothing."""
        rows = self._layer_rows
        return [row for row in rows if row["step"] == rows[-1]["step"]]

    @property
    def momentum(self) -> pd.DataFrame:
        """One row a layer and eventful step: event, momentum_cosine, momentum_ratio."""
        import pandas as pd

        rows = [row for row in self.records.spectra if "event" in row]
        names = ["step", "layer", "event", "momentum_cosine", "momentum_ratio"]
        return pd.DataFrame(rows, columns=names)

    @property
    def _layer_rows(self) -> list[dict[str, Any]]:
        return [row for row in self.records.spectra if "singular_values" in row]

    @property
    def has_memory(self) -> bool:
        """Whether its first step has measured its bytes."""
        return self.records.memory is not None

    @property
    def memory(self) -> dict[str, int]:
        """Bytes by category (memory.Breakdown)."""
        if (memory := self.records.memory) is None:
            raise InputError("run", str(self.folder), "its memory has not been measured")
        return dict(memory)

    @cached_property
    def model(self) -> Llama:
        """The trained model, on the CPU, in eval mode; safe to read from a folder of others."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        from lowrank_lab.methods.build import build_model
        from lowrank_lab.methods.resolve import resolve

        path = self.folder / "model.safetensors"
        if not path.exists():
            raise InputError("run", str(self.folder), "it has no trained model yet")
        model = build_model(resolve(self.config))  # with today's defaults for newer options
        try:
            model.load_state_dict(load_file(path))
        except (SafetensorError, RuntimeError) as error:  # not such a file, or of another model
            reason = str(error).splitlines()[0]
            allowed = f"its model.safetensors does not hold its model: {reason}"
            raise InputError("run", str(self.folder), allowed) from None
        return model.eval()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """What the run's text was made into tokens with: the run's own copy, else the corpus's."""
        from tokenizers import Tokenizer

        from lowrank_lab.data.prepare import prepare

        path = self.folder / "tokenizer.json"
        if path.exists():
            return Tokenizer.from_file(str(path))
        corpus = prepare(self.config)
        if self.ran_on.get("corpus_sha256") not in (None, corpus.facts["sha256"]):
            allowed = "it has changed since the run, which kept no tokenizer of its own"
            raise InputError("corpus", self.config.corpus, allowed)
        return corpus.tokenizer


def load(run: Run | Path | str) -> Llama:
    """The trained model of a run, on the CPU, in eval mode.

    Args:
        run: its folder, or the run.

    Raises:
        InputError: it is not a run folder, or has no trained model yet.
    """
    return (run if isinstance(run, Run) else Run(run)).model


def describe(config: ResolvedConfig) -> str:
    """A short name of what is trained: the method, its initialisation and its techniques."""
    parts = [config.method]
    if config.init == "spectral":
        parts.append("spectral")
    if config.refactor_every:
        parts.append("refactor")
    if config.reset_every:
        parts.append("reset")
    return " + ".join(parts)


def find_runs(folder: Path | str) -> list[Run]:
    """All runs at or below `folder`, in the order of their names.

    Those of run folders and of kept studies; what lies in a hidden folder is left out.
    """
    folder = runs_folder(folder)
    if not folder.is_dir():
        if kept_run(folder) is not None:
            return [Run(folder)]
        raise InputError("folder", str(folder), "there is no such folder")
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
    """Where a folder of runs is (`paths.located`), or STUDY/RUN of a kept study, which is none."""
    found = located(folder)
    inside = located(Path(folder).parent) / Path(folder).name
    return inside if not found.exists() and kept_run(inside) is not None else found


def _records_of(folder: Path) -> FolderRecords | KeptRecords:
    """The records of a run folder, or of the kept run that a path names: STUDY/RUN."""
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
    """`Run.spectra_of` of several runs in one table, with their labels."""
    import pandas as pd

    tables = [run.spectra_of(what).assign(label=run.label) for run in runs]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def momentum_of(runs: Iterable[Run]) -> pd.DataFrame:
    """`Run.momentum` of several runs in one table, with their labels."""
    import pandas as pd

    tables = [run.momentum.assign(label=run.label) for run in runs]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def load_runs(folder: Path | str, strict: bool = True) -> pd.DataFrame:
    """One tidy table of all runs at or below a folder: a row for each step of each run.

    Columns: run (folder name), label, the configuration (model, corpus, method, rank, …, seed),
    what metrics.jsonl holds (its `lr` as `lr_now`: `lr` is the peak), and, for finished runs,
    `final_*`: validation and test loss and perplexity, parameters and bytes.

    Args:
        folder: a path; a relative one is looked for in the working directory, in the data folder
            and in the data that the library ships, as `study/quick` is.
        strict: raise on runs that have not finished; False takes what there is, for live views.

    Raises:
        InputError: no runs, or unfinished ones with `strict`.
    """
    return table_of(complete_runs(folder, strict), folder)


def complete_runs(folder: Path | str, strict: bool = True) -> list[Run]:
    """The runs at or below a folder that have trained a step; raises as `load_runs` does."""
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
    """The table of `load_runs` for these runs, which are at or below a folder."""
    import pandas as pd

    metrics, facts = [run.metrics for run in runs], [_facts_of(run, folder) for run in runs]
    new_names = {"lr": "lr_now"}
    order: dict[str, None] = {}  # of the columns: as they are met, run by run
    for table, fact in zip(metrics, facts, strict=True):
        order |= dict.fromkeys([*(new_names.get(str(c), str(c)) for c in table), *fact])
    described = _described(facts)
    repeated = described.loc[described.index.repeat([len(table) for table in metrics])]
    steps = pd.concat(metrics, ignore_index=True).rename(columns=new_names)
    steps = steps.drop(columns=described.columns, errors="ignore")
    return pd.concat([steps, repeated.reset_index(drop=True)], axis="columns")[list(order)]


def finals_of(runs: Sequence[Run], folder: Path | str) -> pd.DataFrame:
    """`final_table` of `table_of`, from config.json and result.json alone."""
    return final_table(_described([_facts_of(run, folder) for run in runs]))


def _facts_of(run: Run, folder: Path | str) -> dict[str, Any]:
    """What is the same in all rows of a run."""
    inside = run.folder.relative_to(runs_folder(folder)).as_posix()
    config = run.config
    facts = {"run": run.folder.name if inside == "." else inside, "label": run.label}
    facts |= {name: getattr(config, name) for name in DESCRIBES}
    if not run.finished:
        return facts
    result = run.result
    result["bytes_without_embeddings"] = _bytes_without_embeddings(config, result)
    return facts | {f"final_{name}": value for name, value in result.items()}


def _bytes_without_embeddings(config: ResolvedConfig, result: dict[str, Any]) -> float:
    """Bytes of weights and optimizer states outside embedding and head.

    NaN where no formula knows those, or one process held a part of them.
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
    """One row a run. A number that may be None stays what it is, and does not become a float."""
    import pandas as pd

    table = pd.DataFrame(facts)
    for column in table:
        values = [row.get(str(column), math.nan) for row in facts]
        if None in values:
            table[column] = pd.Series(values, dtype=object)
    return table


def final_table(runs: pd.DataFrame) -> pd.DataFrame:
    """One row a run of a `load_runs` table: what described it and how it ended."""
    columns = ["run", "label", *DESCRIBES, *[c for c in runs.columns if c.startswith("final_")]]
    return runs[columns].drop_duplicates("run").rename(columns=lambda c: c.removeprefix("final_"))
