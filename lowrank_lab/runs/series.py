"""Metrics and spectra of the runs in a catalogue, read once until a run's files change."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lowrank_lab.runs.catalogue import Entry, Stamp
from lowrank_lab.runs.run import Run

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

RUNS_IN_MEMORY = 256


class Spectra(NamedTuple):
    """The singular values of one layer at the recorded steps."""

    steps: np.ndarray  # (steps,)
    values: np.ndarray  # (steps, values)


def metrics_of(entry: Entry) -> pd.DataFrame:
    """The numbers in metrics.jsonl, as `load_runs` names them: `lr_now` is the learning rate."""
    return _metrics(entry.folder, entry.stamp)


def spectra_of(entry: Entry) -> dict[str, Spectra]:
    """Singular values of each recorded layer."""
    return _spectra(entry.folder, entry.stamp)


def memory_of(entry: Entry) -> dict[str, int]:
    """Bytes by category; empty if not measured."""
    return _memory(entry.folder, entry.stamp)


@lru_cache(maxsize=RUNS_IN_MEMORY)
def _metrics(folder: Path, stamp: Stamp) -> pd.DataFrame:
    found = _quickly(folder / "metrics.jsonl")
    found = Run(folder).metrics if found is None else found
    return found.select_dtypes("number").rename(columns={"lr": "lr_now"})


def _quickly(path: Path) -> pd.DataFrame | None:
    """A file of complete rows, read in half the time that Python's own parser takes; else None."""
    import pyarrow as pa
    from pyarrow import json

    try:
        table = json.read_json(path, json.ReadOptions(use_threads=False))
    except (OSError, pa.ArrowException):  # a kept run, or a row that is not complete
        return None
    numbers = (pa.types.is_integer, pa.types.is_floating)
    names = [f.name for f in table.schema if any(is_one(f.type) for is_one in numbers)]
    frame: pd.DataFrame = table.select(names).to_pandas()
    return frame


@lru_cache(maxsize=RUNS_IN_MEMORY)
def _spectra(folder: Path, stamp: Stamp) -> dict[str, Spectra]:
    import numpy as np

    rows: dict[str, dict[int, list[float]]] = {}
    for row in Run(folder).records.spectra:
        if row.get("singular_values"):
            rows.setdefault(row["layer"], {})[row["step"]] = row["singular_values"]
    found = {}
    for layer, at in rows.items():
        steps = sorted(at)
        found[layer] = Spectra(np.array(steps), np.array([at[s] for s in steps], dtype=float))
    return found


@lru_cache(maxsize=4 * RUNS_IN_MEMORY)
def _memory(folder: Path, stamp: Stamp) -> dict[str, int]:
    return Run(folder).records.memory or {}
