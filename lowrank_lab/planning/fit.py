"""Which configuration fits on a device, and which change makes it fit, by simulation."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lowrank_lab.config import InputError, ResolvedConfig, RunConfig
from lowrank_lab.memory.formulas import by_formula
from lowrank_lab.methods.registry import METHODS
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.planning.fsdp import check_world_size, fullest, per_rank
from lowrank_lab.planning.memory_report import MemoryReport
from lowrank_lab.planning.simulate import simulate

UNITS = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
GB = 10**9
LONG = 10_000  # steps: a run of that length has every rare event
# Fields that some methods refuse; for those `of_method` takes the default.
OF_SOME_METHODS = (
    "refactor_every", "on_refactor", "refactor_basis", "refactor_above", "reset_every", "init",
    "per_layer", "state_precision", "stochastic_rounding", "optimizer", "optimizer_options",
    "method_options",
)  # fmt: skip


def bytes_of(text: str, field: str = "fits") -> int:
    """`24GB` (10⁹) or `24GiB` (2³⁰) → bytes.

    Raises:
        InputError: it isn't a number with such a unit.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", text)
    unit = match[2].upper() if match else ""
    if match is None or unit not in UNITS or float(match[1]) <= 0:
        raise InputError(field, text, "a size like 24GB (10⁹ bytes) or 24GiB (2³⁰)")
    return int(float(match[1]) * UNITS[unit])


def of_method(config: RunConfig, method: str) -> RunConfig:
    """The configuration with another method, and defaults for the fields that it refuses.

    Raises:
        InputError: it refuses the rest as well.
    """
    rank = config.rank
    if method != config.method and METHODS.get(method) and METHODS[method].rank is not None:
        rank = None  # a rank for others says nothing to a method that has one of its own
    changed = config.replace(method=method, lr=None, rank=rank)
    while True:
        try:
            resolve(changed)
        except InputError as error:
            name = error.field.split(".")[0]
            default = RunConfig.model_fields[name].default if name in OF_SOME_METHODS else None
            if name not in OF_SOME_METHODS or getattr(changed, name) == default:
                raise
            changed = changed.replace(**{name: default})
        else:
            return changed


WORDS = {
    "activation_checkpointing": "blocks recomputed", "gradient_accumulation": "in {} pieces",
    "per_layer": "per layer", "clip": "no clipping", "batch": "batch {}", "rank": "rank {}",
}  # fmt: skip


@dataclass
class FitAttempt:
    """A change of the configuration, and the peak that it leads to."""

    changes: dict[str, Any]
    report: MemoryReport | None  # None: weights and states alone are too much
    peak: int
    fits: bool

    @property
    def flags(self) -> str:
        """The change as flags of the command line."""
        return " ".join(
            f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
            for name, value in self.changes.items()
        )

    @property
    def words(self) -> str:
        """The change in a few words."""
        return ", ".join(WORDS[name].format(value) for name, value in self.changes.items())


def suggestions(
    config: RunConfig, capacity: int, device: str = "cuda", world_size: int | None = None
) -> list[FitAttempt]:
    """Changes that could make a configuration fit, in order, up to the first that does.

    First what leaves training the same: recomputed blocks, then smaller micro-batches. Then updates
    during the backward pass, without gradient clipping; then a smaller batch; then a lower rank.
    With `world_size`, for the largest of so many processes.
    """
    tried: list[FitAttempt] = []
    for family in _families(config, in_shards=world_size is not None):
        for changes in family:
            attempt = _attempt(config, changes, capacity, device, world_size)
            if attempt is None:
                continue
            tried.append(attempt)
            if attempt.fits:
                return tried
            if attempt.report is None or _hopeless(tried[-2:], capacity):
                break  # more of the same wouldn't help
    return tried


def _families(config: RunConfig, in_shards: bool) -> Iterator[Iterator[dict[str, Any]]]:
    """Changes that could help, each family in the order of how far it goes."""
    frugal: dict[str, Any] = {"activation_checkpointing": True}
    at_once: dict[str, Any] = {"per_layer": True, "clip": 0.0, "gradient_accumulation": 1}
    yield iter([frugal])
    if not config.per_layer:
        halves = _halves(config.batch // config.gradient_accumulation)
        pieces = (config.batch // part for part in halves if config.batch % part == 0)
        yield ({**frugal, "gradient_accumulation": count} for count in pieces)
    if not config.per_layer and not in_shards:
        yield iter([at_once, frugal | at_once])
    most = frugal if in_shards else frugal | at_once
    yield ({**most, "batch": batch} for batch in _halves(config.batch))
    if config.rank is not None:
        yield ({**most, "rank": rank} for rank in _halves(config.rank))


def _halves(count: int) -> Iterator[int]:
    while count > 1:
        count //= 2
        yield count


def _attempt(
    config: RunConfig, changes: dict[str, Any], capacity: int, device: str, world_size: int | None
) -> FitAttempt | None:
    """The outcome of a change; None if it changes nothing or is refused."""
    changes = {name: value for name, value in changes.items() if getattr(config, name) != value}
    try:
        changed = resolve(config.replace(**changes))
        if world_size is not None:
            check_world_size(changed, world_size)
    except InputError:
        return None
    if not changes:
        return None
    least = least_bytes(changed, world_size)
    if least > capacity:
        return FitAttempt(changes, None, least, fits=False)
    report = simulate(changed, device, world_size=world_size)
    peak = report.peak.total
    return FitAttempt(changes, report, peak, peak <= capacity)


def _hopeless(last: Sequence[FitAttempt], capacity: int) -> bool:
    """Whether halving further leads above the capacity: a peak falls by half as much each time."""
    if len(last) < 2 or last[0].changes.keys() != last[1].changes.keys():
        return False
    return last[1].peak - (last[0].peak - last[1].peak) > capacity


def least_bytes(config: ResolvedConfig, world_size: int | None = None) -> int:
    """The least memory of a step: weights, states and gradients (per layer: the largest)."""
    try:
        found = (
            by_formula(config) if world_size is None else fullest(per_rank(config, world_size))[1]
        )
    except InputError:  # states that no formula knows
        return 0
    return found.weights + found.optimizer_states + found.gradients


def compare(
    config: RunConfig, device: str = "cuda", methods: Iterable[str] | None = None
) -> Iterator[tuple[str, MemoryReport]]:
    """The report of each method (by default all) with otherwise the same configuration."""
    for method in METHODS if methods is None else methods:
        yield method, simulate(of_method(config, method), device)
