"""Kept studies: the records of finished runs, without weights, in two Parquet files per study.

runs.parquet    one row per run: `run` (its id), `label`, the configuration, machine and versions
                (`ran_on_*`), results (`final_*`) and bytes (`memory_*`)
steps.parquet   of each run, one row per recorded step, as in metrics.jsonl, then one row per step
                and `layer`, as in spectra.jsonl; in the former, `layer` is null

If studies in the same folder share a run, only one of them stores its steps and layers. In the
others' runs.parquet, the column `stored_in` names that study.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowrank_lab.config import InputError
from lowrank_lab.runs.files import Row
from lowrank_lab.runs.records import Records

if TYPE_CHECKING:
    import pyarrow as pa

RUNS, STEPS = FILES = ("runs.parquet", "steps.parquet")
PREFIXES = {"result": "final_", "memory": "memory_", "ran_on": "ran_on_"}
OWN = ("run", "label", "stored_in")
LAYER = "layer"  # has a value in the rows of spectra.jsonl, and in these alone


class KeptRecords:
    """The records of one run in a kept study."""

    def __init__(self, study: KeptStudy, run: str) -> None:
        self._study, self._run = study, run
        row = dict(study.runs[run])
        groups: dict[str, Row] = {group: {} for group in PREFIXES}
        for group, prefix in PREFIXES.items():
            for name in [name for name in row if name.startswith(prefix)]:
                groups[group][name.removeprefix(prefix)] = row.pop(name)
        self.facts: dict[str, Any] = {n: row[n] for n in ("label",) if n in row}
        self.facts["config"] = {n: v for n, v in row.items() if n not in OWN}
        self.facts |= {"ran_on": groups["ran_on"]} if groups["ran_on"] else {}
        self.result: Row = groups["result"]
        self.memory: dict[str, int] | None = groups["memory"] or None

    @property
    def metrics(self) -> list[Row]:
        return self._study.rows(self._run, of_layers=False)

    @property
    def spectra(self) -> list[Row]:
        return self._study.rows(self._run, of_layers=True)

    @property
    def has_metrics(self) -> bool:
        return bool(self._study.table(self._run, of_layers=False).num_rows)

    @property
    def has_spectra(self) -> bool:
        return bool(self._study.table(self._run, of_layers=True).num_rows)


class KeptStudy:
    """The two tables of a kept study. Use `open_study`, which caches unchanged files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def runs(self) -> dict[str, Row]:
        """The row of each run in runs.parquet, without null values."""
        from lowrank_lab.runs.parquet import decode, without_nulls

        return {row["run"]: without_nulls(row) for row in decode(self._read(RUNS))}

    def stores(self, run: str) -> bool:
        """Whether this study's own files have the steps and layers of a run."""
        return run in self.runs and "stored_in" not in self.runs[run]

    def rows(self, run: str, *, of_layers: bool) -> list[Row]:
        """The rows per step of a run, or with `of_layers` per step and layer, without nulls."""
        from lowrank_lab.runs.parquet import decode, without_nulls

        return list(map(without_nulls, decode(self.table(run, of_layers=of_layers))))

    def table(self, run: str, *, of_layers: bool) -> pa.Table:
        """The rows of `rows` as a table, from the study that stores them."""
        import pyarrow.compute as pc

        home = self._home(run)
        begin, end = home._places.get(run, (0, 0))
        found = home._steps.slice(begin, end - begin)
        if LAYER in found.column_names:
            has_layer = pc.is_valid(found[LAYER])
            found = found.filter(has_layer if of_layers else pc.invert(has_layer))
        elif of_layers:
            found = found.slice(0, 0)
        return found.select([name for name in found.column_names if name != "run"])

    def _home(self, run: str) -> KeptStudy:
        name = self.runs[run].get("stored_in")
        if name is None:
            return self
        home = self.folder.parent / name
        if not (is_study(home) and (found := open_study(home)).stores(run)):
            allowed = f"{run} is stored in {name}, which has to lie beside it and have that run"
            raise InputError("study", str(self.folder), allowed)
        return found

    @cached_property
    def _steps(self) -> pa.Table:
        return self._read(STEPS)

    @cached_property
    def _places(self) -> dict[str, tuple[int, int]]:
        """The half-open range of row numbers of each run in steps.parquet."""
        runs = self._steps["run"].to_pylist() if self._steps.num_rows else []
        begins = [i for i, run in enumerate(runs) if i == 0 or run != runs[i - 1]]
        return {runs[a]: (a, b) for a, b in pairwise([*begins, len(runs)])}

    def _read(self, file: str) -> pa.Table:
        from lowrank_lab.runs.parquet import read

        try:
            table = read(self.folder / file)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise InputError("study", str(self.folder), f"{file} can't be read: {reason}") from None
        return table


def is_study(folder: Path) -> bool:
    """Whether a folder is a kept study."""
    return (folder / RUNS).is_file()


def open_study(folder: Path) -> KeptStudy:
    """Open the kept study in a folder."""
    stats = [(folder / file).stat() for file in FILES if (folder / file).exists()]
    return _open(folder, tuple((stat.st_mtime_ns, stat.st_size) for stat in stats))


def kept_run(path: Path) -> KeptRecords | None:
    """The records of the kept run STUDY/RUN; None if there is no such run."""
    if not is_study(path.parent) or path.name not in (study := open_study(path.parent)).runs:
        return None
    return KeptRecords(study, path.name)


@lru_cache(maxsize=64)
def _open(folder: Path, stamp: tuple[tuple[int, int], ...]) -> KeptStudy:
    return KeptStudy(folder)


def write_study(folder: Path, records: Mapping[str, Records]) -> dict[str, str]:
    """Write the records of finished runs as the kept study `folder`; replaces its contents.

    Args:
        folder: the study's folder. Its sibling folders are the other studies.
        records: the records of each run, by run id.

    Returns:
        For each run that another study already stores: the name of that study.

    Raises:
        InputError: another study refers to a run that would be changed or removed, or a table
            cannot represent the records exactly. Nothing is written then.
    """
    from lowrank_lab.runs.parquet import encode, to_bytes

    others = [open_study(path.parent) for path in sorted(folder.parent.glob(f"*/{RUNS}"))
              if path.parent.name != folder.name]  # fmt: skip
    _check_referred(folder, records, others)
    homes = {run: _stored(run, record, others) for run, record in records.items()}
    shared = {run: home for run, home in homes.items() if home is not None}
    own = {run: record for run, record in sorted(records.items()) if run not in shared}
    contents = {
        RUNS: [_row(run, record, shared.get(run)) for run, record in sorted(records.items())],
        STEPS: [{"run": run, **row} for run, record in own.items() for row in _steps_of(record)],
    }
    try:
        files = {file: to_bytes(encode(rows)) for file, rows in contents.items()}
    except ValueError as error:
        raise InputError("keep", str(folder), f"these records fit no table: {error}") from None
    folder.mkdir(parents=True, exist_ok=True)
    for file in reversed(FILES):  # runs.parquet last: it marks a complete study
        partial = folder / f".{file}-{os.getpid()}"
        partial.write_bytes(files[file])
        partial.replace(folder / file)
    return shared


def _row(run: str, record: Records, stored_in: str | None) -> Row:
    """The row of a run in runs.parquet."""
    groups = {
        "result": record.result,
        "memory": record.memory,
        "ran_on": record.facts.get("ran_on"),
    }
    row = {"run": run, "label": record.facts.get("label"), "stored_in": stored_in}
    row |= record.facts["config"]
    for group, values in groups.items():
        row |= {f"{PREFIXES[group]}{name}": value for name, value in (values or {}).items()}
    return row


def _steps_of(record: Records) -> list[Row]:
    """A run's rows in steps.parquet."""
    return [*record.metrics, *record.spectra]


def _stored(run: str, record: Records, others: Iterable[KeptStudy]) -> str | None:
    """The name of a study that already stores the same steps and layers of a run, or None."""
    for study in others:
        if study.stores(run) and _same(record, KeptRecords(study, run)):
            return study.folder.name
    return None


def _same(one: Records, other: Records) -> bool:
    from lowrank_lab.runs.parquet import without_nulls

    a, b = (list(map(without_nulls, _steps_of(record))) for record in (one, other))
    return a == b


def _check_referred(
    folder: Path, records: Mapping[str, Records], others: Iterable[KeptStudy]
) -> None:
    """Raise if a run that another study refers to would be changed or removed."""
    for study in others:
        for run in (r for r, row in study.runs.items() if row.get("stored_in") == folder.name):
            if run not in records or not _same(records[run], KeptRecords(study, run)):
                allowed = f"{study.folder.name} refers to its {run}, which would be another"
                raise InputError("keep", str(folder), allowed)
