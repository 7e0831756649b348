"""Keeping the records of finished runs in a kept study."""

from __future__ import annotations

from pathlib import Path

from lowrank_lab.config import InputError
from lowrank_lab.runs.kept import KeptRecords, is_study, open_study, write_study
from lowrank_lab.runs.records import Records, Thinned
from lowrank_lab.runs.run import (
    complete_runs,
    find_runs,
)

KEPT_ROWS = 200  # training steps per run that `keep` copies, besides evaluations and events


def keep(
    folder: Path | str, out: Path | str, rows: int = KEPT_ROWS, *, one_seed: bool = False
) -> dict[str, str]:
    """Add the records of finished runs, without weights, to a kept study.

    Other runs in `out` stay; runs with the same name are replaced.

    Args:
        out: the folder of the kept study. Steps that a sibling study already stores are not
            stored again.
        rows: training steps to keep per run, besides evaluations and events.
        one_seed: keep the spectra of all recorded steps of one seed of each label, its first; of
            the other seeds, those of the last step.

    Returns:
        For each run name, the study that stores its steps.

    Raises:
        InputError: a run is unfinished, two runs share a name, or `out` has run folders; also the
            errors of `write_study`.
    """
    runs, out = find_runs(folder), Path(out).resolve()
    complete_runs(folder)  # raises on unfinished runs
    records: dict[str, Records] = {}
    if is_study(out):
        kept = open_study(out)
        records |= {name: KeptRecords(kept, name) for name in kept.runs}
    elif any(out.glob("*/config.json")):
        raise InputError("keep", str(out), "it has run folders; tables need a folder of their own")
    names = [run.folder.resolve().name for run in runs]
    first: dict[str, int] = {}  # seed of each label
    for run in runs:
        first[run.label] = min(run.config.seed, first.get(run.label, run.config.seed))
    for run, name in zip(runs, names, strict=True):
        if names.count(name) > 1:
            raise InputError("keep", str(folder), f"two of its runs have the name {name}")
        last_alone = one_seed and run.config.seed != first[run.label]
        records[name] = Thinned(run.records, rows, last_alone)
    shared = write_study(out, records)
    return {name: shared.get(name, out.name) for name in names}
