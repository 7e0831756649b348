"""The records of a run: one interface for run folders and kept studies."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from lowrank_lab.config import InputError
from lowrank_lab.data.files import once_each
from lowrank_lab.runs.files import Row, append_jsonl, read_jsonl, write_json


class Records(Protocol):
    """The records of one run."""

    @property
    def facts(self) -> dict[str, Any]:
        """`config`, `label` and `ran_on`, as in config.json."""
        ...

    @property
    def result(self) -> dict[str, Any] | None:
        """The final results; None if the run has not finished."""
        ...

    @property
    def memory(self) -> dict[str, int] | None:
        """Bytes by category; None if not measured."""
        ...

    @property
    def metrics(self) -> list[Row]:
        """One row per step."""
        ...

    @property
    def spectra(self) -> list[Row]:
        """One row per layer and recorded step or event."""
        ...

    @property
    def has_metrics(self) -> bool: ...

    @property
    def has_spectra(self) -> bool: ...


class FolderRecords:
    """The records in a run folder, read again on each access: the run may be in progress.

    Only `facts` is cached.

    Raises:
        InputError: the folder is not a run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / "config.json").exists():
            raise InputError("run", str(folder), "it is not a run folder: config.json is missing")

    @cached_property
    def facts(self) -> dict[str, Any]:
        try:
            text = (self.folder / "config.json").read_text()
            facts = json.loads(text, object_pairs_hook=once_each)
        except (ValueError, OSError) as error:  # not JSON, not even text, or not a file
            raise InputError("run", str(self.folder), f"config.json is damaged: {error}") from None
        if not isinstance(facts, dict) or not isinstance(facts.get("config"), dict):
            allowed = "it is not a run folder: its config.json is not a run's"
            raise InputError("run", str(self.folder), allowed)
        return facts

    @property
    def result(self) -> dict[str, Any] | None:
        return self._json("result.json")

    @property
    def memory(self) -> dict[str, int] | None:
        return self._json("memory.json")

    @property
    def metrics(self) -> list[Row]:
        return read_jsonl(self.folder / "metrics.jsonl")

    @property
    def spectra(self) -> list[Row]:
        return read_jsonl(self.folder / "spectra.jsonl")

    @property
    def has_metrics(self) -> bool:
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
    def has_spectra(self) -> bool:
        return (self.folder / "spectra.jsonl").exists()

    def _json(self, name: str) -> dict[str, Any] | None:
        path = self.folder / name
        if not path.exists():
            return None
        try:
            found = json.loads(path.read_text())
        except ValueError as error:
            raise InputError("run", str(self.folder), f"{name} is damaged: {error}") from None
        if not isinstance(found, dict):
            raise InputError("run", str(self.folder), f"{name} is damaged: it is no JSON object")
        return found


@dataclass(frozen=True)
class Thinned:
    """The records of a finished run, with its training steps subsampled."""

    records: Records
    rows: int  # training steps to keep; evaluations and events are always kept
    last_spectra: bool = False  # keep only the last step's spectra; events are always kept

    @property
    def facts(self) -> dict[str, Any]:
        return self.records.facts

    @property
    def result(self) -> dict[str, Any] | None:
        return self.records.result

    @property
    def memory(self) -> dict[str, int] | None:
        return self.records.memory

    @cached_property
    def metrics(self) -> list[Row]:
        steps = self.records.metrics
        every = max(1, len(steps) // self.rows) if self.rows else len(steps) + 1
        return [
            row for row in steps
            if row["step"] % every == 0 or "validation_loss" in row or row["events"]
        ]  # fmt: skip

    @cached_property
    def spectra(self) -> list[Row]:
        found = self.records.spectra
        if not self.last_spectra:
            return found
        last = max((row["step"] for row in found if "event" not in row), default=0)
        return [row for row in found if "event" in row or row["step"] == last]

    @property
    def has_metrics(self) -> bool:
        return bool(self.metrics)

    @property
    def has_spectra(self) -> bool:
        return self.records.has_spectra


def write_folder(records: Records, folder: Path) -> None:
    """Write records as files into an existing, empty run folder; result.json last."""
    write_json(folder / "config.json", records.facts)
    if records.memory is not None:
        write_json(folder / "memory.json", records.memory)
    append_jsonl(folder / "metrics.jsonl", records.metrics)
    append_jsonl(folder / "spectra.jsonl", records.spectra)
    if records.result is not None:
        write_json(folder / "result.json", records.result)
