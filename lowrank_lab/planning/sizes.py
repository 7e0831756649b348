"""Memory and FLOPs of methods over the named sizes, from a laptop's to a cluster's."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from lowrank_lab.config import SIZES, RunConfig
from lowrank_lab.memory.breakdown import PERSISTENT
from lowrank_lab.memory.formulas import GB, by_formula, flops_per_token, weights
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.planning.fit import of_method
from lowrank_lab.planning.simulate import simulate

TOKENS_PER_PARAMETER = 20
UNITS_OF_TIME = (
    (365.25 * 86400, "years"), (86400, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds"),
)  # fmt: skip


def over_sizes(
    config: RunConfig, methods: Iterable[str], sizes: Iterable[str] = ("60m", "1b", "7b")
) -> pd.DataFrame:
    """Bytes and FLOPs by formula, one row per method and size; ranks are a quarter of the width.

    Columns: method, model, parameters (of the full-rank model), rank, weights, gradients,
    optimizer_states (bytes), tokens (20 per parameter of the full-rank model) and flops (of the
    training on them: matrix products and attention, without optimizers).

    Raises:
        InputError: an unknown method or size, or a method without a formula.
    """
    rows = []
    for method in methods:
        for model in sizes:
            of_size = resolve(of_method(config.replace(model=model, rank=None), method))
            parameters = _parameters(model)
            found, tokens = by_formula(of_size), TOKENS_PER_PARAMETER * parameters
            parts = [getattr(found, name) for name in PERSISTENT]
            flops = flops_per_token(of_size) * tokens
            rows.append((method, model, parameters, of_size.rank, *parts, tokens, flops))
    names = ["method", "model", "parameters", "rank", *PERSISTENT, "tokens", "flops"]
    return pd.DataFrame(rows, columns=names)


def _parameters(model: str) -> int:
    """Parameters of a named size at full rank."""
    return sum(w.numel() for w in weights(resolve(RunConfig(model=model))))


def per_process(config: RunConfig, world_sizes: Iterable[int]) -> pd.DataFrame:
    """GB of one process of an FSDP2 run, for numbers of processes; simulated for CUDA.

    One row per world size; 1 is training without FSDP2, more are its fullest process. Weights,
    gradients and states are those between two steps, activations (with logits) those as the
    backward pass begins; `gathered` and the peak are those of the moment with the most bytes.

    Raises:
        InputError: a world size that doesn't suit the configuration.
    """
    rows = {}
    for count in world_sizes:
        report = simulate(config, "cuda", world_size=count if count > 1 else None)
        kept = report.steps["next"].kept
        parts = {name: getattr(report.persistent, name) for name in PERSISTENT}
        parts |= {"activations": kept.activations + kept.logits}
        parts |= {"gathered": report.peak.gathered, "peak": report.peak.total}
        rows[count] = {name: round(size / GB, 2) for name, size in parts.items()}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("processes")


def duration(seconds: float) -> str:
    """Two digits in the largest unit of which there is at least one: `6.3 days`."""
    size, unit = next((s, u) for s, u in UNITS_OF_TIME if seconds >= s or s == 1)
    value = seconds / size
    return f"{value:.1f} {unit}" if value < 10 else f"{float(f'{value:.2g}'):,.0f} {unit}"


def known_sizes(smallest: str = "60m") -> list[str]:
    """The named sizes from one on."""
    names = list(SIZES)
    return names[names.index(smallest) :]
