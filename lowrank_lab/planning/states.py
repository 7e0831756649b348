"""Weights and optimizer states of methods by formula alone: nothing is built or simulated."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lowrank_lab.config import InputError, RunConfig
from lowrank_lab.memory.formulas import GB, activation_bytes, by_formula
from lowrank_lab.methods.registry import METHODS
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.optim.eight_bit import EIGHT_BIT
from lowrank_lab.planning.fit import of_method

COLUMNS = ("method", "rank", "weights", "optimizer_states", "states_8bit", "activations")


def states(config: RunConfig, methods: Iterable[str] | None = None) -> list[dict[str, Any]]:
    """Bytes of each method in a configuration (COLUMNS).

    `optimizer_states` are those of the configuration's `state_precision`, `states_8bit` those in
    blocks of 8 bits; None where the method has no such choice. `activations` are None where no
    formula has them. A method that refuses the configuration, or has no formula, is a row with
    `refused`.

    Args:
        methods: names; by default all.
    """
    return [_row(config, name) for name in (METHODS if methods is None else methods)]


def _row(config: RunConfig, name: str) -> dict[str, Any]:
    try:
        resolved = resolve(of_method(config, name))
        found = by_formula(resolved)
    except InputError as error:
        return {"method": name, "refused": str(error)}
    coded = None
    if METHODS[name].eight_bit:
        coded = by_formula(resolve(of_method(config.replace(state_precision=EIGHT_BIT), name)))
    return {
        "method": name, "rank": resolved.rank, "weights": found.weights,
        "optimizer_states": found.optimizer_states,
        "states_8bit": None if coded is None else coded.optimizer_states,
        "activations": activation_bytes(resolved),
    }  # fmt: skip


def in_gigabytes(size: int | None) -> str:
    """Bytes in GB (10⁹) with two digits; a dash for None."""
    return "–" if size is None else f"{size / GB:.2f}"


def text(rows: Iterable[dict[str, Any]]) -> str:
    """One line per method, in GB."""
    head = ("GB", "rank", "weights", "states", "in 8 bits", "activations")
    lines = ["".join(f"{h:>12}" if i else f"{h:<14}" for i, h in enumerate(head))]
    for row in rows:
        if "refused" in row:
            lines.append(f"{row['method']:<14}{row['refused']}")
            continue
        cells = [str(row["rank"] or "–"), *(in_gigabytes(row[name]) for name in COLUMNS[2:])]
        lines.append(f"{row['method']:<14}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)
