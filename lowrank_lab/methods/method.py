"""Method: all facts about one method, in one value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from lowrank_lab.methods.optimizers import OptimizerBuilder
from lowrank_lab.methods.options import ByWidth, Option


@dataclass(frozen=True)
class Method:
    """A row of METHODS."""

    name: str
    summary: str
    source: str
    optimizer: OptimizerBuilder
    lr: ByWidth  # peak learning rate
    layers: str | None = None  # kind of factorised layer, None for dense weights
    uses_rank: bool = False
    rank: int | None = None  # default rank; None is a quarter of the hidden size
    init: str | None = None  # default initialisation of the factors
    options: Mapping[str, Option] = field(default_factory=dict)
    layer_options: tuple[str, ...] = ()  # options that are the layers' and not the optimizer's
    # Which weights its optimizer needs whole to update them, and not entry by entry.
    whole: Literal["none", "targets", "all"] = "all"
    in_parts: bool = (
        False  # processes can update parts of those whose `shard_dim` (optim.base) says so
    )
    per_layer: bool = True  # can each weight be updated by itself within the backward pass
    states: str = ""  # elements of optimizer state of an m×n target weight, in words
    spectral_lr: ByWidth | None = None  # the same for factors that start from an SVD
    halved: bool = False  # whether it is half of that from a rank of half the width on

    def learning_rate(self, width: int, init: str | None, rank: int | None) -> float:
        """The default peak learning rate for a model of this hidden size."""
        lr = (init == "spectral" and self.spectral_lr) or self.lr
        found = self.halved and (self.layers is None or lr is self.spectral_lr)
        high = found and rank is not None and 2 * rank >= width
        return lr.at(width) * (0.5 if high else 1.0)
