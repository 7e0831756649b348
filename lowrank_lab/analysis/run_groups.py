"""Runs grouped over seeds: one row per configuration, its mean loss, and the filter of a table."""

from __future__ import annotations

import math
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lowrank_lab.analysis.stats import Mean, mean_interval
from lowrank_lab.config import InputError
from lowrank_lab.memory.formulas import MIB
from lowrank_lab.runs.catalogue import Entry

# Columns of a table of runs: name → heading.
COLUMNS = {
    "label": "label", "model": "model", "rank": "rank", "lr": "rate", "other": "other",
    "seed": "seed", "loss": "loss", "half_width": "±", "memory": "MiB", "state": "state",
}  # fmt: skip
NUMBERS = ("rank", "lr", "seed", "loss", "half_width", "memory")
FIELDS = ("label", "model", "rank", "lr", "seed", "state")  # that a table is filtered by
NAMES = {"rate": "lr", "±": "half_width", "mib": "memory", "method": "label"}  # in a search
OPERATORS: Mapping[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt, "=": operator.eq,
}  # fmt: skip
CONDITION = re.compile(r"([a-z±]+)(<=|>=|<|>|=)(.+)", re.IGNORECASE)


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone, or a single run."""

    entries: tuple[Entry, ...]
    other: str = ""  # fields that tell it from groups of the same label, model, rank and rate

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its runs."""
        return tuple(entry.name for entry in self.entries)

    @property
    def label(self) -> str:
        return self.entries[0].label

    @property
    def compared(self) -> tuple[Entry, ...]:
        """The runs that means are over: the finished ones, else all that can be read."""
        finished = tuple(entry for entry in self.entries if entry.state == "finished")
        return finished or tuple(entry for entry in self.entries if entry.state != "broken")

    @cached_property
    def loss(self) -> Mean:
        """Mean validation loss with its Student-t interval; NaN before the first evaluation."""
        losses = [entry.loss for entry in self.compared if math.isfinite(entry.loss)]
        return mean_interval(losses) if losses else Mean(math.nan, math.nan, 0)

    @cached_property
    def memory(self) -> float:
        """Mean of weights and optimizer states, in MiB; NaN if not measured."""
        sizes = [e.memory / MIB for e in self.entries if math.isfinite(e.memory)]
        return sum(sizes) / len(sizes) if sizes else math.nan

    @property
    def state(self) -> str:
        """`finished`, or the number of runs in each state."""
        counts = Counter(entry.state for entry in self.entries)
        if len(counts) == 1:
            return self.entries[0].state
        return ", ".join(f"{n} {state}" for state, n in counts.most_common())

    @property
    def in_trouble(self) -> bool:
        """Whether a run of it is broken or has failed."""
        return any(entry.state in ("broken", "failed") for entry in self.entries)

    @cached_property
    def row(self) -> dict[str, Any]:
        """Its values in the columns of COLUMNS; `seed` is the number of seeds of several runs."""
        config, several = self.entries[0].config, len(self.entries) > 1
        seed = f"{len(self.entries)} seeds" if several else config.get("seed")
        return {
            "label": self.label, "model": config.get("model"), "rank": config.get("rank"),
            "lr": config.get("lr"), "other": self.other, "seed": seed, "loss": self.loss.mean,
            "half_width": self.loss.half_width, "memory": self.memory, "state": self.state,
        }  # fmt: skip

    @cached_property
    def cells(self) -> dict[str, str]:
        """`row` as text."""
        return {name: _text(name, value) for name, value in self.row.items()}


def groups_of(entries: Iterable[Entry], over_seeds: bool = True) -> list[Group]:
    """Groups of the runs, sorted by label, rank and rate.

    Args:
        over_seeds: put runs together that differ in their seed alone; else one group per run.
    """
    together: dict[str, list[Entry]] = {}
    for entry in entries:
        alone = not over_seeds or not entry.config
        together.setdefault(entry.name if alone else entry.without_seed, []).append(entry)
    groups = [tuple(sorted(runs, key=lambda e: e.seed or 0)) for runs in together.values()]
    others = _others([runs[0] for runs in groups])
    found = [Group(runs, other) for runs, other in zip(groups, others, strict=True)]
    for column in ("lr", "rank", "label"):
        found = sorted_by(found, column)
    return found


def _others(firsts: Sequence[Entry]) -> list[str]:
    """For each run: its fields that vary among runs of the same label, model, rank and rate."""
    configs = [{**e.config, **(e.config.get("method_options") or {})} for e in firsts]
    keys = [(e.label, *map(e.config.get, ("model", "rank", "lr"))) for e in firsts]
    alike: dict[Any, list[dict[str, Any]]] = {}
    for key, config in zip(keys, configs, strict=True):
        alike.setdefault(key, []).append(config)
    varying = {
        key: {n for n in set().union(*found) if any(c.get(n) != found[0].get(n) for c in found)}
        for key, found in alike.items()
    }
    return [
        ", ".join(
            f"{name} {value}"
            for name, value in config.items()
            if name in varying[key] and name not in ("seed", "method_options")
        )
        for key, config in zip(keys, configs, strict=True)
    ]


def _text(name: str, value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if name in ("loss", "half_width"):
        return f"{value:.4f}"
    return f"{value:.2f}" if name == "memory" else f"{value:g}" if name == "lr" else str(value)


def titles_of(groups: Sequence[Group]) -> list[str]:
    """A title for each group: its label, and of rank, rate, … and seed those that differ."""
    rows = [group.row for group in groups]
    parts = [row["label"] for row in rows]
    words = {"model": "{}", "rank": "rank {}", "lr": "rate {:g}", "other": "{}"}
    for name, form in words.items():
        values = [row[name] for row in rows]
        if len(set(values)) > 1:
            parts = [p + (f", {form.format(v)}" if v not in (None, "") else "")
                     for p, v in zip(parts, values, strict=True)]  # fmt: skip
    if len(set(parts)) < len(parts):
        parts = [f"{p}, seed {row['seed']}" for p, row in zip(parts, rows, strict=True)]
    if len(set(parts)) < len(parts):  # several runs of one configuration
        parts = [f"{p} ({g.names[0]})" for p, g in zip(parts, groups, strict=True)]
    return parts


def matching(
    groups: Iterable[Group], search: str = "", fields: Mapping[str, str] | None = None
) -> list[Group]:
    """The groups that a search and all fields match.

    Args:
        search: words that all occur in a row, and conditions such as `rank=8` or `rate<=0.003`.
        fields: column → the text of its cell; an empty text matches all.

    Raises:
        InputError: a condition on an unknown column, or with a value that is no number.
    """
    tests = [_test(word) for word in search.split()]
    asked = {name: text for name, text in (fields or {}).items() if text}
    return [
        group for group in groups
        if all(_field(group, name, text) for name, text in asked.items())
        and all(test(group) for test in tests)
    ]  # fmt: skip


def _field(group: Group, name: str, text: str) -> bool:
    """Whether a group, or one of its runs, has this text in a column."""
    if name in ("seed", "state"):
        return any(str(e.seed if name == "seed" else e.state) == text for e in group.entries)
    return group.cells[name] == text


def _test(word: str) -> Callable[[Group], bool]:
    found = CONDITION.fullmatch(word)
    if found is None:
        text = word.lower()
        return lambda group: text in " ".join([*group.cells.values(), *group.names]).lower()
    name, sign, value = found.groups()
    name = NAMES.get(name.lower(), name.lower())
    if name not in COLUMNS:
        raise InputError("search", word, f"a column is one of {', '.join(COLUMNS)}")
    if name not in NUMBERS:
        if sign != "=":
            raise InputError("search", word, f"{name} has no numbers: {name}=TEXT")
        return lambda group: value.lower() in group.cells[name].lower()
    compare = OPERATORS[sign]
    try:
        number = float(value)
    except ValueError:
        raise InputError("search", word, f"{name} is compared with a number") from None
    if name == "seed":
        return lambda group: any(compare(e.seed, number) for e in group.entries if e.config)
    return lambda group: group.row[name] is not None and compare(group.row[name], number)


def choices_of(groups: Iterable[Group]) -> dict[str, list[str]]:
    """The texts of each field of FIELDS in the groups, without fields that have only one.

    Numbers ascend; other texts keep the order of the groups.
    """
    groups = list(groups)
    found: dict[str, list[str]] = {}
    for name in FIELDS:
        if name in ("seed", "state"):
            values = [getattr(e, name) for g in groups for e in g.entries]
        else:
            values = [group.row[name] for group in groups]
        there = list(dict.fromkeys(v for v in values if v is not None))
        there = sorted(there) if name in NUMBERS else there
        if len(there) > 1:
            found[name] = [_text(name, value) for value in there]
    return found


def sorted_by(groups: Sequence[Group], column: str, descending: bool = False) -> list[Group]:
    """The groups sorted by a column; those without a value come last."""

    there = [group for group in groups if group.cells[column]]
    there.sort(key=lambda g: (isinstance(g.row[column], str), g.row[column]), reverse=descending)
    return there + [group for group in groups if not group.cells[column]]


def best_of_each(groups: Sequence[Group], at_most: int) -> list[Group]:
    """Of each label the group with the lowest mean loss (the first, if none has a loss)."""
    best: dict[str, Group] = {}
    for group in groups:
        if group.state == "broken":
            continue
        known = best.setdefault(group.label, group)
        if group.loss.mean < known.loss.mean or (math.isnan(known.loss.mean) and group.loss.n):
            best[group.label] = group
    return list(best.values())[:at_most]
