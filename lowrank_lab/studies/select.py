"""What a study takes over from an earlier one: each variant's best learning rate, and the like.

In a study file:

    select: {from: tune, by: [method, init], best: [lr, method_options.scale]}

Every variant then gets those values of the `best` fields with which, in the runs of the study
`tune` that have the same values of the `by` fields, the validation loss was lowest (its mean, where
there are several seeds). An option whose best value follows from others, as alpha does from the
rank, is left to the variant. More keys of it: `around: {lr: [0.5, 1, 2]}` makes a grid of multiples
of what was chosen; `edges: allow` takes a best value that is the first or last of three or more
tried. A variant's own key `select: {init: kaiming}` looks as if it had these values of the `by`
fields.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowrank_lab.config import InputError, ResolvedConfig, RunConfig, nearest
from lowrank_lab.methods.registry import METHODS
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.paths import data_folder
from lowrank_lab.runs.run import find_runs

KEYS = ("from", "by", "best", "around", "edges")
# What was trained, on which text and for how long.
SETTING = ("size", "corpus", "sequence_length", "batch", "total_steps")
Values = tuple[Any, ...]


@dataclass(frozen=True)
class Selection:
    """The `select` of a study file, checked, with the runs that it chooses from."""

    place: str  # what messages call it
    source: str
    by: tuple[str, ...]
    best: tuple[str, ...]
    around: dict[str, list[float]] = field(default_factory=dict)
    edges: bool = False  # may the best value be the first or last of those tried
    tried: Sequence[tuple[ResolvedConfig, float]] = ()  # and the validation losses of these runs

    def choose(
        self, label: str, fields: dict[str, Any], like: dict[str, Any]
    ) -> dict[str, list[Any]]:
        """The best value of each `best` field that a variant has, or its multiples by `around`.

        Args:
            fields: of the variant, at one point of its grid.
            like: values of `by` fields to look for, instead of the variant's own.

        Raises:
            InputError: nothing like it was tried, or the best value lies at the edge of its grid.
        """
        place = f"{self.place}: {label}"
        for name in like:
            if name not in self.by:
                raise InputError(f"{place}: {name}", like[name], nearest(name, self.by))
        try:
            config = resolve(RunConfig(**fields))
        except InputError as error:
            raise InputError(f"{place}: {error.field}", error.value, error.allowed) from None
        wanted = tuple(like[name] if name in like else value_of(config, name) for name in self.by)
        losses: dict[Values, list[float]] = defaultdict(list)
        first: dict[Values, ResolvedConfig] = {}
        for run, loss in self.tried:
            if _values(run, self.by) == wanted:
                values = _values(run, self.best)
                losses[values].append(loss)
                first.setdefault(values, run)
        if not losses:
            looked_for = ", ".join(f"{n} {v}" for n, v in zip(self.by, wanted, strict=True))
            nowhere = f"no such run in {self.source}{_left_out(self.source)}"
            raise InputError(place, looked_for, nowhere)
        means = {values: math.fsum(found) / len(found) for values, found in losses.items()}
        best = min(means, key=means.__getitem__)
        if not self.edges:
            self._check_inside(place, best, list(means))
        found = {n: v for n, v in zip(self.best, best, strict=True) if v is not None}
        return {
            name: [value * factor for factor in self.around[name]]
            if name in self.around
            else [value]
            for name, value in found.items()
            if not _follows(first[best], name)
        }

    def _check_inside(self, place: str, best: Values, tried: list[Values]) -> None:
        """Refuse a number that is the least or most of three or more, the others being equal."""
        for i, name in enumerate(self.best):
            others = {v[i] for v in tried if v[:i] + v[i + 1 :] == best[:i] + best[i + 1 :]}
            numbers = sorted(v for v in others if isinstance(v, int | float))
            if len(numbers) >= 3 and best[i] in (numbers[0], numbers[-1]):
                allowed = f"it lies at the edge of what {self.source} tried, {numbers[0]:g} to "
                allowed += f"{numbers[-1]:g}: try beyond, or say edges: allow"
                raise InputError(f"{place}: {name}", best[i], allowed)


def value_of(config: ResolvedConfig, name: str) -> Any:
    """A value of a configuration, or its `method_options.NAME`; None if it hasn't that."""
    outer, _, inner = name.partition(".")
    held = getattr(config, outer)
    return held.get(inner) if inner else held


def _follows(config: ResolvedConfig, name: str) -> bool:
    """Whether a resolved value is what the method makes of other fields where none is given."""
    option = name.partition(".")[2]
    if not option or METHODS[config.method].options[option].default is not None:
        return False
    given = {n: v for n, v in config.method_options.items() if n != option}
    derived = value_of(resolve(config.replace(method_options=given)), name)
    return bool(derived == value_of(config, name))


def read_selection(content: Any, place: str) -> Selection:
    """Check the `select` of a study file, and read the results of the study that it names.

    Raises:
        InputError: what is wrong with it, or that study has no finished runs here.
    """
    if not isinstance(content, dict) or not isinstance(content.get("from"), str):
        raise InputError(place, content, "a mapping with from (a study's name), by and best")
    for name in content:
        if name not in KEYS:
            raise InputError(f"{place}: {name}", content[name], nearest(str(name), KEYS))
    by = _fields(content.get("by", "method"), f"{place}: by")
    best = _fields(content.get("best", "lr"), f"{place}: best")
    around = content.get("around", {})
    if not isinstance(around, dict) or not all(
        name in best and isinstance(factors, list) and factors and all(map(_is_factor, factors))
        for name, factors in around.items()
    ):
        allowed = "a mapping of fields of best to lists of factors above 0"
        raise InputError(f"{place}: around", around, allowed)
    edges = content.get("edges", "refuse")
    if edges not in ("refuse", "allow"):
        raise InputError(f"{place}: edges", edges, "refuse or allow")
    tried = _results(content["from"], f"{place}: from", by)
    return Selection(place, content["from"], by, best, around, edges == "allow", tried)


def _is_factor(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _fields(names: Any, place: str) -> tuple[str, ...]:
    """One name or a list of names of RunConfig's fields or of `method_options.NAME`."""
    given = [names] if isinstance(names, str) else names
    if not isinstance(given, list) or not given:
        raise InputError(place, names, "a field's name, or a list of names")
    for name in given:
        outer, _, inner = str(name).partition(".")
        if outer not in RunConfig.model_fields or (inner and outer != "method_options"):
            raise InputError(
                place, name, f"no such field; {nearest(outer, RunConfig.model_fields)}"
            )
    return tuple(given)


def _results(name: str, place: str, by: tuple[str, ...]) -> list[tuple[ResolvedConfig, float]]:
    """Configurations and validation losses of a study: of this machine's runs, then of the kept.

    Kept ones count where this machine has none that agree with them in `by`, and only beside runs
    of the same model, text and length.
    """
    if Path(name).name != name:
        raise InputError(place, name, "the name of a study, without folders")
    found: list[tuple[ResolvedConfig, float]] = []
    for folder in (data_folder() / "runs" / name, data_folder() / "study" / name):
        runs = find_runs(folder) if folder.is_dir() else []
        if not all(run.finished for run in runs):
            continue
        tried = {_values(config, by) for config, _ in found}
        settings = {_values(config, SETTING) for config, _ in found}
        found += [
            (run.config, run.result["validation_loss"])
            for run in runs
            if not settings
            or (_values(run.config, SETTING) in settings and _values(run.config, by) not in tried)
        ]
    if not found:
        allowed = f"no finished study of this name in {data_folder() / 'runs'} or "
        raise InputError(place, name, f"{allowed}{data_folder() / 'study'}{_left_out(name)}")
    return found


def _left_out(name: str) -> str:
    """Why this machine's runs of a study don't count, if they don't."""
    folder = data_folder() / "runs" / name
    runs = find_runs(folder) if folder.is_dir() else []
    left = [run.folder.name for run in runs if not run.finished]
    return f"; what is in {folder} doesn't count while {left[0]} is unfinished" if left else ""


def _values(config: ResolvedConfig, names: tuple[str, ...]) -> Values:
    return tuple(value_of(config, name) for name in names)
