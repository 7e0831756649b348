"""Variants, grids and seeds of a study file → label and fields of each run."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lowrank_lab.config import InputError, nearest
from lowrank_lab.studies.select import Selection, read_selection

Fields = dict[str, Any]
OF_A_VARIANT = ("grid", "select", "seeds")  # keys of a variant that are not fields of its runs
LONGEST_LABEL = 80


def combinations(
    content: Mapping[str, Any], study: str, seeds: list[int] | None, only: Sequence[str]
) -> Iterator[tuple[str, Fields]]:
    """Label and fields of every run: variants × grids × seeds.

    Args:
        content: of the study file.
        study: its name, for messages.
        seeds: instead of those in the file.
        only: variants to take; all of them if empty.

    Raises:
        InputError: one line that names the key and what is allowed.
    """
    variants = _variants(content.get("variants", {"": {}}), only, study)
    in_file = content.get("seeds", [0])
    _check_lists({"seeds": in_file if seeds is None else seeds}, study)
    select = content.get("select")
    selection = None if select is None else read_selection(select, f"{study}: select")
    for label, changes in variants.items():
        _check_variant(study, label, changes)
        grid = content.get("grid", {}) | changes.get("grid", {})
        _check_lists(grid, f"{study}: variants: {label}" if "grid" in changes else study)
        own_seeds = changes.get("seeds", in_file) if seeds is None else seeds
        for name, fields in _points_of(
            content.get("base", {}), str(label), changes, grid, selection
        ):
            for seed in own_seeds:
                yield name, with_fields(fields, {"seed": seed})


def _points_of(
    base: Fields,
    label: str,
    changes: Fields,
    grid: dict[str, list[Any]],
    selection: Selection | None,
) -> Iterator[tuple[str, Fields]]:
    """Label and fields of a variant at each point of its grid, with what `select` chooses there."""
    own = base | {n: v for n, v in changes.items() if n not in OF_A_VARIANT}
    for point in _points(grid):
        fields = with_fields(own, point)
        chosen: dict[str, list[Any]] = {}
        if selection is not None:
            chosen = selection.choose(label, fields, changes.get("select", {}))
        chosen = {n: v for n, v in chosen.items() if n not in point and not has(changes, n)}
        for values in _points(chosen):
            several = {n: v for n, v in values.items() if len(chosen[n]) > 1}
            words = [f"{_word(n)} {v}" for n, v in (point | several).items()]
            name = label or str(fields.get("method", "full-rank"))
            yield ", ".join([name, *words]), with_fields(fields, values)


def _variants(variants: Fields, only: Sequence[str], study: str) -> Fields:
    """The variants of a study that `only` names, in the file's order."""
    if not variants:
        raise InputError(f"{study}: variants", variants, "must name at least one, or be left out")
    known = [str(label) for label in variants]
    for label in only:
        if label not in known:
            raise InputError("only", label, f"no such variant in {study}; {nearest(label, known)}")
    return {k: changes for k, changes in variants.items() if not only or str(k) in only}


def _check_variant(study: str, label: Any, changes: Any) -> None:
    if len(str(label)) > LONGEST_LABEL or not str(label).isprintable():
        allowed = f"a label is one line of at most {LONGEST_LABEL} printable characters"
        raise InputError(f"{study}: variants", label, allowed)
    place = f"{study}: variants: {label}"
    if not isinstance(changes, dict):
        raise InputError(place, changes, "must be a mapping of fields")
    for name in ("grid", "select"):
        if not isinstance(changes.get(name, {}), dict):
            raise InputError(f"{place}: {name}", changes[name], "must be a mapping of fields")
    if "seeds" in changes:
        _check_lists({"seeds": changes["seeds"]}, place)


def _points(grid: dict[str, list[Any]]) -> Iterator[Fields]:
    """Every combination of the values of a grid's fields."""
    for values in itertools.product(*grid.values()):
        yield dict(zip(map(str, grid), values, strict=True))


def _word(field: str) -> str:
    """The name of a field in labels."""
    return field.rpartition(".")[2].replace("_", " ")


def _check_lists(lists: Mapping[str, Any], place: str) -> None:
    for name, values in lists.items():
        if not isinstance(values, list) or not values:
            raise InputError(f"{place}: {name}", values, "must be a list with something in it")


def has(fields: Fields, name: str) -> bool:
    """Whether a field or `method_options.NAME` is among these fields."""
    outer, _, inner = name.partition(".")
    options = fields.get(outer)
    return inner in options if inner and isinstance(options, dict) else name in fields


def with_fields(fields: Fields, changes: Fields) -> Fields:
    """The fields of a run with some changed; `method_options.scale` changes one option."""
    changed = dict(fields)
    for name, value in changes.items():
        outer, _, inner = name.partition(".")
        options = changed.get(outer, {})
        if inner and isinstance(options, dict):
            changed[outer] = {**options, inner: value}
        else:
            changed[name] = value
    return changed
