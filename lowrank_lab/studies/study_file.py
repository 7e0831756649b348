"""Reading a study file: every run in it, checked before anything starts.

A study file is YAML:

    description: the question, for the report
    base: {model: micro, tokens: 4000000}          # fields of RunConfig, for all runs
    variants:                                      # named changes to the base; grid and seeds too
      full rank: {method: full-rank, lr: 1.0e-2}
      low rank: {method: low-rank, grid: {lr: [0.005, 0.01]}, seeds: [0]}
    grid: {rank: [8, 16]}                          # every combination, with every variant
    seeds: [0, 1, 2]
    pairs: [[low rank, full rank]]                 # the report says whether the first ends lower
    select: {from: tune, by: method, best: lr}     # best values of an earlier study: see select.py
    time_limit: 30m                                # a longer run is stopped and has failed
    notebook: 02_run                               # executed for each run
    compare: 03_compare                            # executed at the end; writes the report

Each notebook is looked for beside the file, in the folder above, and among the library's own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank_lab.config import InputError, ResolvedConfig, RunConfig, nearest
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.studies.plain_yaml import read_yaml
from lowrank_lab.studies.shipped import find_notebook, find_study
from lowrank_lab.studies.variants import combinations
from lowrank_lab.training.preflight import check

KEYS = {
    "description", "notebook", "compare", "base", "variants", "grid", "select", "seeds",
    "pairs", "time_limit",
}  # fmt: skip
KINDS = {
    "base": dict, "variants": dict, "grid": dict, "seeds": list, "description": str,
    "notebook": str, "compare": str,
}  # fmt: skip
IN_WORDS = {dict: "a mapping", list: "a list", str: "text"}


@dataclass(frozen=True)
class Study:
    """A study file, read and checked."""

    name: str
    description: str
    notebook: Path
    compare: Path
    runs: dict[str, tuple[str, ResolvedConfig]]  # run id → label, configuration
    time_limit: float | None = None  # seconds per run
    pairs: tuple[tuple[str, str], ...] = ()  # labels (A, B): does A end at a lower loss than B?


def load_study(
    study: Path | str,
    seeds: list[int] | None = None,
    only: Sequence[str] = (),
    *,
    corpora: bool = True,
) -> Study:
    """Read a study file and check every run in it.

    The file and its notebooks are checked first, so that an error in them is reported before a
    corpus is prepared.

    Args:
        study: a path, or the name of one of the library's own studies.
        seeds: instead of those in the file.
        only: variants to take; all of them if empty.
        corpora: prepare the corpora, and check that they are long enough.

    Raises:
        InputError: one line that names the file, the key or field, and what is allowed.
    """
    path = find_study(study)
    content = _read_yaml(path)
    _check_keys(content, path.name)
    limit = content.get("time_limit")
    limit = None if limit is None else seconds_of(limit, f"{path.name}: time_limit")
    notebook = find_notebook(path, "notebook", content.get("notebook", "02_run"))
    compare = find_notebook(path, "compare", content.get("compare", "03_compare"))
    runs, given = _read_runs(content, path.name, seeds, only)
    labels = {label for label, _ in runs.values()}
    pairs = _pairs(content.get("pairs", []), labels, bool(only), f"{path.name}: pairs")
    for run_id, config in given.items() if corpora else ():
        with _errors_named(f"{path.name}: {runs[run_id][0]}"):
            check(config)
    description = content.get("description", "")
    return Study(path.stem, description, notebook, compare, runs, limit, pairs)


def _read_runs(
    content: dict[str, Any], name: str, seeds: list[int] | None, only: Sequence[str]
) -> tuple[dict[str, tuple[str, ResolvedConfig]], dict[str, RunConfig]]:
    """Runs by id: their labels and resolved configurations; and the configurations as given."""
    runs: dict[str, tuple[str, ResolvedConfig]] = {}
    given: dict[str, RunConfig] = {}
    for label, fields in combinations(content, name, seeds, only):
        with _errors_named(f"{name}: {label}"):
            config = RunConfig(**fields)
            resolved = resolve(config)
        first, same = runs.setdefault(resolved.run_id, (label, resolved))
        if same.method_options != resolved.method_options:
            _refuse_counted_as_one(name, (first, same), (label, resolved))
        given.setdefault(resolved.run_id, config)
    return runs, given


def _refuse_counted_as_one(
    name: str, first: tuple[str, ResolvedConfig], second: tuple[str, ResolvedConfig]
) -> None:
    """Refuse two variants that have one run id but not the same options (`COUNTED_AS`)."""
    (label, config), (other, options) = second, (first[0], first[1].method_options)
    field = next(n for n, v in config.method_options.items() if options[n] != v)
    allowed = f"with {options[field]!r} of {other} it counts as one run; name what each does"
    raise InputError(f"{name}: {label}: {field}", config.method_options[field], allowed)


@contextmanager
def _errors_named(place: str) -> Iterator[None]:
    """Put the place in the study file before the field that an InputError names."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{place}: {error.field}", error.value, error.allowed) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    if not re.fullmatch(r"[A-Za-z0-9_-]+", path.stem):
        raise InputError("study", path.name, "its name may have letters, digits, _ and -")
    content = read_yaml(path, "study")
    if not isinstance(content, dict):
        allowed = "it must be a mapping with base, variants, grid, seeds"
        raise InputError("study", str(path), allowed)
    return content


def _check_keys(content: dict[str, Any], name: str) -> None:
    for key, value in content.items():
        if key not in KEYS:
            raise InputError(f"{name}: {key}", value, f"no such key; {nearest(key, KEYS)}")
        if key in KINDS and not isinstance(value, KINDS[key]):
            raise InputError(f"{name}: {key}", value, f"must be {IN_WORDS[KINDS[key]]}")


def _pairs(content: Any, labels: set[str], partly: bool, place: str) -> tuple[tuple[str, str], ...]:
    """The pairs of labels that a study asks about.

    Args:
        partly: leave out pairs with a label that no run has, instead of refusing them.

    Raises:
        InputError: not a list of two labels each, or a label that no run has.
    """
    if not isinstance(content, list):
        raise InputError(place, content, "must be a list of pairs of labels")
    found = []
    for pair in content:
        if not isinstance(pair, list) or len(pair) != 2 or pair[0] == pair[1]:
            raise InputError(place, pair, "must be two labels: does the first end lower?")
        if not all(isinstance(label, str) for label in pair):
            raise InputError(place, pair, "a label is text: quote it")
        missing = [label for label in pair if label not in labels]
        if missing and not partly:
            raise InputError(place, missing[0], f"no such label; {nearest(missing[0], labels)}")
        if not missing:
            found.append((str(pair[0]), str(pair[1])))
    return tuple(found)


def seconds_of(text: str | float, field: str = "time_limit") -> float:
    """`90s`, `30m`, `1h30m` or a number of seconds → seconds.

    Raises:
        InputError: it is none of these, or not above 0.
    """
    match = re.fullmatch(r"(?:([\d.]+)h)?(?:([\d.]+)m)?(?:([\d.]+)s?)?", str(text).strip())
    try:
        parts = [float(part or 0) for part in match.groups()] if match else [0.0]
    except ValueError:
        parts = [0.0]
    seconds = sum(part * unit for part, unit in zip(parts, (3600, 60, 1), strict=False))
    if not 0 < seconds < float("inf"):
        raise InputError(field, text, "a time above 0, like 90s, 30m or 1h30m")
    return seconds
