"""`select` in a study file: each variant's best learning rate and options, from an earlier study.

In a study file:

    select: {from: tune, by: [method, init], best: [lr, method_options.scale]}

Each variant is compared with the runs of the study `tune`, or of a list of studies, that have the
same `by` fields, and gets the `best` fields with the lowest validation loss (the mean over seeds).
An option that follows from other fields, as alpha does from the rank, stays the variant's.

around: {lr: [0.5, 1, 2]}   a grid of multiples of the chosen value
fit: lr                     instead of the best value tried, the lowest point of a parabola through
                            the losses over its logarithm, at most two doublings from the best;
                            diverged runs don't count, and next to one the best value is taken
edges: allow                accept best values that are the first or last of those tried; or a
                            list of the fields whose best values may be
select: {init: kaiming}     in a variant: these values of `by` fields replace the variant's own
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowrank_lab.analysis.rates import lowest_point
from lowrank_lab.config import InputError, ResolvedConfig, RunConfig, nearest
from lowrank_lab.methods.registry import METHODS
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.paths import data_folder, kept_study
from lowrank_lab.runs.run import find_runs

KEYS = ("from", "by", "best", "fit", "around", "edges")
# Model, text and length of a run.
SETTING = ("size", "corpus", "sequence_length", "batch", "total_steps")
Values = tuple[Any, ...]


@dataclass(frozen=True)
class Selection:
    """The `select` of a study file, checked, and the runs to choose from."""

    place: str  # in the study file, for messages
    sources: tuple[str, ...]  # names of studies
    by: tuple[str, ...]
    best: tuple[str, ...]
    fit: tuple[str, ...] = ()
    around: dict[str, list[float]] = field(default_factory=dict)
    edges: tuple[str, ...] = ()  # fields whose best value may be the first or last of those tried
    tried: Sequence[tuple[ResolvedConfig, float]] = ()  # with the validation losses

    def choose(
        self, label: str, fields: dict[str, Any], like: dict[str, Any]
    ) -> dict[str, list[Any]]:
        """The best value of each `best` field of a variant, or its multiples by `around`.

        Args:
            fields: of the variant, at one point of its grid.
            like: values of `by` fields that replace the variant's own.

        Raises:
            InputError: no run has these values, or the best value lies at the edge of its grid.
        """
        place = f"{self.place}: {label}"
        for name in like:
            if name not in self.by:
                raise InputError(f"{place}: {name}", like[name], nearest(name, self.by))
        try:
            config = resolve(RunConfig(**fields))
        except InputError as error:
            raise InputError(f"{place}: {error.field}", error.value, error.allowed) from None
        own = tuple(like[name] if name in like else value_of(config, name) for name in self.by)
        means, first = self._losses(own, place)
        best = min(means, key=means.__getitem__)
        self._check_inside(place, best, means)
        found = {n: v for n, v in zip(self.best, best, strict=True) if v is not None}
        found |= {name: self._fitted(place, name, best, means) for name in self.fit}
        return {
            name: [value * factor for factor in self.around[name]]
            if name in self.around
            else [value]
            for name, value in found.items()
            if not _follows(first[best], name)
        }

    def _losses(
        self, own: Values, place: str
    ) -> tuple[dict[Values, float], dict[Values, ResolvedConfig]]:
        """Mean loss and first run for each tried combination of `best` values.

        Args:
            own: values of the `by` fields that the runs must have.
        """
        losses: dict[Values, list[float]] = defaultdict(list)
        first: dict[Values, ResolvedConfig] = {}
        for run, loss in self.tried:
            if _values(run, self.by) == own:
                values = _values(run, self.best)
                losses[values].append(loss)
                first.setdefault(values, run)
        if not losses:
            words = ", ".join(f"{n} {v}" for n, v in zip(self.by, own, strict=True))
            ignored = "".join(map(_why_ignored, self.sources))
            raise InputError(place, words, f"no such run in {', '.join(self.sources)}{ignored}")
        return {values: math.fsum(found) / len(found) for values, found in losses.items()}, first

    def _like(self, best: Values, tried: Iterable[Values], i: int) -> list[Values]:
        """The values tried that differ from the best in number i alone, in its order."""
        found = [v for v in tried if v[:i] + v[i + 1 :] == best[:i] + best[i + 1 :]]
        return sorted((v for v in found if isinstance(v[i], int | float)), key=lambda v: v[i])

    def _fitted(self, place: str, name: str, best: Values, means: dict[Values, float]) -> float:
        """The lowest point of a parabola through the losses near the best, in log(value)."""
        i = self.best.index(name)
        tried = {v[i]: means[v] for v in self._like(best, means, i)}
        try:
            return float(f"{lowest_point(tried):.3g}")
        except ValueError as error:
            allowed = f"{error} in {', '.join(self.sources)}, with all else equal"
            raise InputError(f"{place}: fit: {name}", best[i], allowed) from None

    def _check_inside(self, place: str, best: Values, tried: Iterable[Values]) -> None:
        """Refuse the smallest or largest of several numbers tried with all else equal."""
        for i, name in enumerate(self.best):
            numbers = [v[i] for v in self._like(best, tried, i)]
            if (
                name not in self.edges
                and len(numbers) >= 2
                and best[i] in (numbers[0], numbers[-1])
            ):
                allowed = f"it lies at the edge of the values in {', '.join(self.sources)}, "
                allowed += f"{numbers[0]:g} to {numbers[-1]:g}: "
                allowed += "try values beyond, or set edges: allow"
                raise InputError(f"{place}: {name}", best[i], allowed)


def value_of(config: ResolvedConfig, name: str) -> Any:
    """The value of a field or of `method_options.NAME`; None if the method has no such option."""
    outer, _, inner = name.partition(".")
    value = getattr(config, outer)
    return value.get(inner) if inner else value


def _follows(config: ResolvedConfig, name: str) -> bool:
    """Whether an option's value is the default that follows from the other fields."""
    option = name.partition(".")[2]
    if not option or METHODS[config.method].options[option].default is not None:
        return False
    given = {n: v for n, v in config.method_options.items() if n != option}
    derived = value_of(resolve(config.replace(method_options=given)), name)
    return bool(derived == value_of(config, name))


def read_selection(content: Any, place: str) -> Selection:
    """Check the `select` of a study file, and read the results of the study that it names.

    Raises:
        InputError: an error in it, or no finished study of a name in it.
    """
    given = content.get("from") if isinstance(content, dict) else None
    sources = tuple(given) if isinstance(given, list) else (given,)
    if not sources or not all(isinstance(name, str) for name in sources):
        allowed = "a mapping with from (a study's name, or a list of names), by and best"
        raise InputError(place, content, allowed)
    for name in content:
        if name not in KEYS:
            raise InputError(f"{place}: {name}", content[name], nearest(str(name), KEYS))
    by = _fields(content.get("by", "method"), f"{place}: by")
    best = _fields(content.get("best", "lr"), f"{place}: best")
    fit = _fields(content["fit"], f"{place}: fit") if "fit" in content else ()
    for name in fit:
        if name not in best:
            raise InputError(f"{place}: fit", name, f"one of best: {', '.join(best)}")
    around = content.get("around", {})
    if not isinstance(around, dict) or not all(
        name in best and isinstance(factors, list) and factors and all(map(_is_factor, factors))
        for name, factors in around.items()
    ):
        allowed = "a mapping of fields of best to lists of factors above 0"
        raise InputError(f"{place}: around", around, allowed)
    edges = content.get("edges", "refuse")
    if isinstance(edges, list) and all(name in best for name in edges):
        free = tuple(edges)
    elif edges in ("refuse", "allow"):
        free = best if edges == "allow" else ()
    else:
        allowed = f"refuse, allow, or a list of fields of best: {', '.join(best)}"
        raise InputError(f"{place}: edges", edges, allowed)
    tried = [found for name in sources for found in _results(name, f"{place}: from", by)]
    return Selection(place, sources, by, best, fit, around, free, tried)


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
    """Configurations and validation losses of a study: of the runs here, then of the kept study.

    A kept run is used if no run here has its values of the `by` fields; if there are runs here, it
    must share its model, text and length with one of them.
    """
    if Path(name).name != name:
        raise InputError(place, name, "the name of a study, without folders")
    found: list[tuple[ResolvedConfig, float]] = []
    for folder in (data_folder() / "runs" / name, kept_study(name)):
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
        allowed = f"no finished study of this name in {data_folder() / 'runs'} or among the kept "
        raise InputError(place, name, f"{allowed}studies{_why_ignored(name)}")
    return found


def _why_ignored(name: str) -> str:
    """Why the runs of a study in the data folder are ignored, if they are."""
    folder = data_folder() / "runs" / name
    runs = find_runs(folder) if folder.is_dir() else []
    left = [run.folder.name for run in runs if not run.finished]
    return f"; {folder} is ignored until {left[0]} has finished" if left else ""


def _values(config: ResolvedConfig, names: tuple[str, ...]) -> Values:
    return tuple(value_of(config, name) for name in names)
