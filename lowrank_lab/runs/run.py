"""Run folders: what a run writes while it trains, and the tables that are read from many of them.

config.json     the resolved configuration, and what it ran on
metrics.jsonl   one row a step, appended as it happens; evaluations and events in their step's row
spectra.jsonl   one row a layer and recorded step, and a layer and step in which something happened
memory.json     bytes by category, measured in the first step
checkpoints/    see checkpoint.py; gone when the run has ended well
progress.json   where a run in progress is
model.safetensors, tokenizer.json (of text), result.json   written last: a folder with result.json
                is a finished run
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from lowrank_lab.config import InputError, ResolvedConfig
from lowrank_lab.memory.formulas import embedding_bytes
from lowrank_lab.paths import located

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


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make a run folder, and hold it: the system lets go of it when this process ends, however.

    Raises:
        InputError: another process holds it, or nothing can be written there.
    """
    path, is_new = folder / ".lock", not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _hold(path)
    except BlockingIOError:
        allowed = f"another process trains in it: {path.read_text().strip()}"
        raise InputError("out", str(folder), allowed) from None
    except OSError as error:
        allowed = f"nothing can be written there: {error.strerror}"
        raise InputError("out", str(folder), allowed) from None
    with file:
        file.truncate(0)
        file.write(f"{os.getpid()} on {platform.node()}\n")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            if is_new:
                with suppress(OSError):  # something was written
                    folder.rmdir()


def _hold(path: Path) -> TextIO:
    """Open a file and lock it; BlockingIOError if another process has."""
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except BaseException:
            file.close()
            raise
        file.close()  # whoever held it has just removed it


def write_json(path: Path, value: object) -> None:
    """Write a JSON file so that it is there whole or not at all."""
    partial = path.with_name(f".{path.name}-{os.getpid()}")
    with partial.open("w") as file:
        file.write(json.dumps(value, indent=1, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All whole rows; a last line that was cut off is left out."""
    lines = path.read_text().splitlines() if path.exists() else []
    if all(line[:1] == "{" and line[-1:] == "}" for line in lines):
        try:  # all at once: a call a line takes longer
            rows: list[dict[str, Any]] = json.loads(f"[{','.join(lines)}]")
        except json.JSONDecodeError:
            pass
        else:
            if len(rows) == len(lines):
                return rows
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def append_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in rows)


def cut_jsonl(path: Path, last_step: int) -> list[int]:
    """Drop the rows after `last_step`, so that a resumed run neither repeats nor skips one.

    Returns:
        The steps of the rows that are left. What can't be read ends the table; it is gone.
    """
    rows = [row for row in read_jsonl(path) if row["step"] <= last_step]
    partial = path.with_name(f".{path.name}-{os.getpid()}")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
    partial.replace(path)
    return [row["step"] for row in rows]


LAYER_FACTS = ("captured_energy", "overlap", "condition_B", "condition_A", "imbalance")


class Run:
    """A run folder, finished or not."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        if not (self.folder / "config.json").exists():
            raise InputError("run", str(folder), "it is not a run folder: config.json is missing")

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}, {'finished' if self.finished else 'unfinished'})"

    @cached_property
    def config(self) -> ResolvedConfig:
        """What was trained, as it was resolved then."""
        return ResolvedConfig(**self._facts["config"])

    @cached_property
    def _facts(self) -> dict[str, Any]:
        try:
            facts = json.loads((self.folder / "config.json").read_text())
        except ValueError as error:  # not JSON, or not even text
            raise InputError("run", str(self.folder), f"config.json is damaged: {error}") from None
        if not isinstance(facts, dict) or not isinstance(facts.get("config"), dict):
            allowed = "it is not a run folder: its config.json is not a run's"
            raise InputError("run", str(self.folder), allowed)
        return facts

    @property
    def label(self) -> str:
        """What figures call the run: its variant in a study, else its method and techniques."""
        return self._facts.get("label") or describe(self.config)

    @property
    def ran_on(self) -> dict[str, Any]:
        """What it ran on: versions, hashes of source and corpus, the device."""
        facts: dict[str, Any] = self._facts.get("ran_on", {})
        return facts

    @property
    def finished(self) -> bool:
        return (self.folder / "result.json").exists()

    @property
    def is_export(self) -> bool:
        """Whether it is no run but what `lowrank-lab export` wrote, which has a config.json too."""
        return (self.folder / "generation_config.json").exists()

    @property
    def result(self) -> dict[str, Any]:
        """Final losses, sizes and times."""
        if not self.finished:
            raise InputError("run", str(self.folder), "it has not finished: result.json is missing")
        result: dict[str, Any] = json.loads((self.folder / "result.json").read_text())
        return result

    @property
    def metrics(self) -> pd.DataFrame:
        """One row a step."""
        import pandas as pd

        return pd.DataFrame(read_jsonl(self.folder / "metrics.jsonl"))

    @property
    def has_metrics(self) -> bool:
        """Whether it has trained a step: whether `metrics` has a row."""
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return False
        with path.open() as file:
            try:
                json.loads(file.readline())
            except json.JSONDecodeError:
                return False
        return True

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
            for row in self._spectra_rows
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

        rows = [row for row in self._spectra_rows if "momentum_cosine" in row]
        names = ["step", "layer", "event", "momentum_cosine", "momentum_ratio"]
        return pd.DataFrame(rows, columns=names)

    @property
    def _layer_rows(self) -> list[dict[str, Any]]:
        return [row for row in self._spectra_rows if "singular_values" in row]

    @property
    def _spectra_rows(self) -> list[dict[str, Any]]:
        return read_jsonl(self.folder / "spectra.jsonl")

    @property
    def memory(self) -> dict[str, int]:
        """Bytes by category (memory.Breakdown)."""
        memory: dict[str, int] = json.loads((self.folder / "memory.json").read_text())
        return memory

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
    """All run folders at or below `folder`, hidden ones left out, in the order of their names."""
    folder = located(folder)
    if not folder.is_dir():
        raise InputError("folder", str(folder), "there is no such folder")
    found = sorted(folder.rglob("config.json"))
    hidden = (any(part.startswith(".") for part in p.relative_to(folder).parts) for p in found)
    runs = [Run(path.parent) for path, out in zip(found, hidden, strict=True) if not out]
    return [run for run in runs if not run.is_export]


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
    inside = run.folder.relative_to(located(folder)).as_posix()
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
