"""What fits on a card, and what would make it fit: questions to `memory.simulate`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lowrank_lab.config import InputError, ResolvedConfig, RunConfig
from lowrank_lab.memory.formulas import by_formula
from lowrank_lab.methods.registry import METHODS
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.planning.fsdp import check_ranks, fullest, of_ranks
from lowrank_lab.planning.simulate import Account, simulate

UNITS = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
GB = 10**9
LONG = 10_000  # steps of a run in which everything happens that happens only now and then
# Fields that a method may have no use for: left out, where it refuses them.
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
    """The configuration with another method; what that has no use for is left out.

    Raises:
        InputError: what is left is refused as well.
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
class Attempt:
    """A change of the configuration, and what it leads to."""

    changes: dict[str, Any]
    account: Account | None  # None: weights and states alone are too much
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


def ways_to_fit(
    config: RunConfig, capacity: int, device: str = "cuda", ranks: int | None = None
) -> list[Attempt]:
    """What was tried to get a configuration into so many bytes, up to the first that fits.

    Nothing that changes what is learned comes first: recomputing blocks, then fewer sequences at a
    time; then updates within the backward pass, which leave out gradient clipping; then a smaller
    batch, then a lower rank. With `ranks` they are those of one of so many processes.
    """
    tried: list[Attempt] = []
    for family in _families(config, in_shards=ranks is not None):
        for changes in family:
            attempt = _attempt(config, changes, capacity, device, ranks)
            if attempt is None:
                continue
            tried.append(attempt)
            if attempt.fits:
                return tried
            if attempt.account is None or _hopeless(tried[-2:], capacity):
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
    config: RunConfig, changes: dict[str, Any], capacity: int, device: str, ranks: int | None
) -> Attempt | None:
    """The outcome of a change; None if it isn't one or is refused."""
    changes = {name: value for name, value in changes.items() if getattr(config, name) != value}
    try:
        changed = resolve(config.replace(**changes))
        if ranks is not None:
            check_ranks(changed, ranks)
    except InputError:
        return None
    if not changes:
        return None
    least = least_bytes(changed, ranks)
    if least > capacity:
        return Attempt(changes, None, least, fits=False)
    account = simulate(changed, device, ranks=ranks)
    peak = account.peak.total
    return Attempt(changes, account, peak, peak <= capacity)


def _hopeless(last: Sequence[Attempt], capacity: int) -> bool:
    """Whether halving further leads above the capacity: a peak falls by half as much each time."""
    if len(last) < 2 or last[0].changes.keys() != last[1].changes.keys():
        return False
    return last[1].peak - (last[0].peak - last[1].peak) > capacity


def least_bytes(config: ResolvedConfig, ranks: int | None = None) -> int:
    """What a step can't do without: weights, states and gradients, or the largest one of these."""
    try:
        found = by_formula(config) if ranks is None else fullest(of_ranks(config, ranks))[1]
    except InputError:  # states that no formula knows
        return 0
    return found.weights + found.optimizer_states + found.gradients


def compare(config: RunConfig, device: str = "cuda") -> Iterator[tuple[str, Account]]:
    """The accounts of all methods with otherwise the same configuration."""
    for method in METHODS:
        yield method, simulate(of_method(config, method), device)
