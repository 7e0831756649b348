"""Grid studies: the knobs that vary among runs, and tables over two of them.

A knob is a field of RunConfig that affects the result. Some knobs have no effect when another knob
is 0: `reset_strength` has none without resets. Such runs have the value `ANY` for that knob and
count for each of its values.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from lowrank_lab.analysis.stats import mean_interval
from lowrank_lab.config import InputError, RunConfig, nearest
from lowrank_lab.memory.formulas import MIB
from lowrank_lab.runs.catalogue import read_catalogue
from lowrank_lab.runs.run import Run, complete_runs

ANY = "any"
NO_KNOBS = frozenset(
    {
        "seed", "tokens", "device", "checkpoint_every", "keep_latest", "keep_after_finish",
        "eval_every", "eval_tokens", "spectra_every", "spectra_layers",
    }
)  # fmt: skip
FIRST = ("rank", "reset_every", "reset_strength", "on_refactor", "refactor_every", "lr", "method")
KNOBS = (*FIRST, *(n for n in RunConfig.model_fields if n not in NO_KNOBS and n not in FIRST))
NEEDS = {
    "reset_strength": "reset_every", "reset_how": "reset_every", "reset_moments": "reset_every",
    "reset_params": "reset_every", "on_refactor": "refactor_every",
}  # fmt: skip


def settings(folder: Path | str, strict: bool = True) -> pd.DataFrame:
    """One row per finished run: run, label, seed, every knob, and the results.

    The results are test_loss (nats per token), test_perplexity and weights_and_states_mib. Copies
    of a run share one row.

    Args:
        strict: raise on unfinished and broken runs; False skips them.

    Raises:
        InputError: the folder does not exist or has no finished run.
    """
    if strict:
        runs = complete_runs(folder)
    else:
        runs = [Run(e.folder) for e in read_catalogue(str(folder)) if e.state == "finished"]
    rows = [_row(run) for run in runs]
    if not rows:
        raise InputError("folder", str(folder), "no run in it has finished yet")
    table = pd.DataFrame(rows, dtype=object)
    return table.drop_duplicates(["seed", *KNOBS]).reset_index(drop=True)


def _row(run: Run) -> dict[str, Any]:
    config, result = run.config, run.result
    knobs = {name: getattr(config, name) for name in KNOBS} | {"steps": config.total_steps}
    for name, value in knobs.items():
        if isinstance(value, dict):  # options: compared as text
            knobs[name] = ", ".join(f"{k}={v}" for k, v in sorted(value.items()))
    if not config.reset_every and (not config.refactor_every or config.on_refactor != "reset"):
        knobs["recovery_steps"] = ANY  # nothing to recover from
    knobs |= {name: ANY for name, other in NEEDS.items() if not knobs[other]}
    size = (result["weight_bytes"] + result["optimizer_state_bytes"]) / MIB
    ends = {name: result[name] for name in ("test_loss", "test_perplexity")}
    facts = {"run": run.folder.name, "label": run.label, "seed": config.seed}
    return facts | knobs | ends | {"weights_and_states_mib": size}


def varying(table: pd.DataFrame) -> dict[str, list[Any]]:
    """Knobs with more than one value among the runs, each with its sorted values.

    A knob that follows from an earlier one is excluded, because it does not vary independently:
    for example, alpha = rank, or one learning rate per method.

    Args:
        table: returned by `settings`.
    """
    found: dict[str, list[Any]] = {}
    for name in (knob for knob in KNOBS if knob in table):
        values = set(table[name]) - {ANY}
        if len(values) > 1 and not any(_follows(table, name, other) for other in found):
            found[name] = sorted(values, key=_order)
    return found


def _follows(table: pd.DataFrame, name: str, other: str) -> bool:
    """Whether the value of `other` determines the value of `name`."""
    return bool((table.groupby(other, dropna=False)[name].nunique(dropna=False) == 1).all())


def _order(value: Any) -> tuple[int, Any]:
    """Sort key: None, then numbers, then strings."""
    if value is None:
        return (0, 0)
    return (2, value) if isinstance(value, str) else (1, value)


def where(table: pd.DataFrame, fixed: Mapping[str, Any]) -> pd.DataFrame:
    """The runs with these knob values; a knob without effect (`ANY`) matches every value.

    Raises:
        InputError: a knob does not vary, or no run has the value.
    """
    known = varying(table)
    keep = pd.Series(True, index=table.index)
    for name, value in fixed.items():
        _check_varies(name, name, known)
        if value not in known[name]:
            raise InputError(name, value, f"runs have {', '.join(map(str, known[name]))}")
        keep &= table[name].isin([value, ANY])
    return table[keep]


def cells(
    table: pd.DataFrame,
    row: str,
    column: str,
    fixed: Mapping[str, Any] | None = None,
    value: str = "test_perplexity",
) -> pd.DataFrame:
    """Mean result over seeds for every pair of values of two knobs.

    Args:
        table: returned by `settings`.
        fixed: values of other knobs; must include every knob that varies within a cell.
        value: a numeric column.

    Returns:
        Columns row, column, mean, half_width (95 % Student-t interval, NaN for one seed) and n.
        Pairs without runs have n = 0.

    Raises:
        InputError: a knob does not vary, or another knob varies within a cell.
    """
    known = varying(table)
    for side, name in (("row", row), ("column", column)):
        _check_varies(side, name, known)
    if row == column:
        raise InputError("column", column, "must be another knob than row")
    if value not in table:
        raise InputError("value", value, nearest(value, map(str, table.columns)))
    chosen = where(table, fixed or {})
    others = [name for name in known if name not in (row, column)]
    rows = []
    for a, b in itertools.product(known[row], known[column]):
        cell = chosen[chosen[row].isin([a, ANY]) & chosen[column].isin([b, ANY])]
        _check_alike(cell, others)
        values = cell[value].astype(float).tolist()
        rows.append((a, b, *(mean_interval(values) if values else (float("nan"),) * 2 + (0,))))
    return pd.DataFrame(rows, columns=[row, column, "mean", "half_width", "n"])


def _check_varies(field: str, name: str, known: Mapping[str, Any]) -> None:
    if name not in known:
        allowed = f"what varies among these runs is {', '.join(known) or 'nothing but the seed'}"
        raise InputError(field, name, allowed)


def _check_alike(cell: pd.DataFrame, others: list[str]) -> None:
    """Raise if the runs of a cell differ in more than their seed: their mean is meaningless."""
    for name in others:
        found = sorted(set(cell[name]), key=_order)
        if len(found) > 1:
            words = ", ".join(map(str, found))
            raise InputError(name, None, f"it varies within a cell of the map; fix it: {words}")


def best(table: pd.DataFrame) -> pd.Series[Any]:
    """The row of `cells` or `costs` with the lowest mean.

    Raises:
        InputError: no cell has a run.
    """
    means = table["mean"].astype(float)
    if means.isna().all():
        raise InputError("cells", len(table), "none of them has a run")
    found: pd.Series[Any] = table.iloc[int(means.argmin())]
    return found


def axes_of(table: pd.DataFrame, row: str = "", column: str = "") -> tuple[str, str]:
    """The two knobs of a map: the requested ones, else the first that vary.

    Raises:
        InputError: fewer than two knobs vary, or a requested knob does not.
    """
    known = varying(table)
    for side, name in (("row", row), ("column", column)):
        if name:
            _check_varies(side, name, known)
    if len(known) < 2:
        allowed = "a map needs two knobs that vary among the runs"
        raise InputError("runs", ", ".join(known) or "one setting", allowed)
    row = row or next(name for name in known if name != column)
    return row, column or next(name for name in known if name != row)


def maps(
    table: pd.DataFrame, row: str, column: str, value: str = "test_perplexity"
) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """Each combination of the other knobs' values, with its `cells`."""
    known = {n: values for n, values in varying(table).items() if n not in (row, column)}
    for point in itertools.product(*known.values()):
        fixed = dict(zip(known, point, strict=True))
        yield fixed, cells(table, row, column, fixed, value)


def costs(table: pd.DataFrame, value: str = "test_perplexity") -> pd.DataFrame:
    """One row per setting: its knobs, weights_and_states_mib, mean, half_width and n."""
    known = list(varying(table))
    rows = []
    for key, part in table.groupby(known, sort=False, dropna=False) if known else [((), table)]:
        size = float(part["weights_and_states_mib"].astype(float).mean())
        rows.append((*key, size, *mean_interval(part[value].astype(float).tolist())))
    return pd.DataFrame(rows, columns=[*known, "weights_and_states_mib", "mean", "half_width", "n"])


def effects(table: pd.DataFrame, value: str = "test_perplexity") -> pd.DataFrame:
    """The effect of changing one knob, paired by seed and all other knobs.

    Returns:
        One row per pair of values of a knob: knob, from, to, mean, half_width, n and pairs.
        `mean` is the difference to − from, averaged over settings within each seed, then over the
        n seeds. `half_width` is that of its 95 % interval. `pairs` counts the paired runs.
    """
    known = varying(table)
    rows = []
    for name, values in known.items():
        others = ["seed", *(other for other in known if other != name)]
        whole = _for_each(table[table[name] != ANY], {n: v for n, v in known.items() if n != name})
        for a, b in itertools.combinations(values, 2):
            old, new = (whole.loc[whole[name] == v, [*others, value]] for v in (a, b))
            pairs = old.merge(new, on=others, suffixes=("_old", "_new"))
            change = (pairs[f"{value}_new"] - pairs[f"{value}_old"]).astype(float)
            by_seed = change.groupby(pairs["seed"]).mean()
            if len(by_seed):
                rows.append((name, a, b, *mean_interval(by_seed.tolist()), len(change)))
    return pd.DataFrame(rows, columns=["knob", "from", "to", "mean", "half_width", "n", "pairs"])


def _for_each(table: pd.DataFrame, known: Mapping[str, list[Any]]) -> pd.DataFrame:
    """Repeat each run with an `ANY` knob, once per value of that knob."""
    for name, values in known.items():
        each = [values if value == ANY else [value] for value in table[name]]
        table = table.assign(**{name: pd.Series(each, table.index)}).explode(name)
    return table
